"""Schedules and datasets: fixed beforehand, deterministic, strict about their files."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from bench import workload
from bench.workload import (
    Playback,
    arrival_times,
    corpus_prompts,
    jsonl_prompts,
    random_prompts,
    read_azure,
    read_mooncake,
    read_trace,
    trace_jobs,
)


def test_arrivals_are_fixed_by_the_seed() -> None:
    assert arrival_times(50, 3.0, 1.0, 1) == arrival_times(50, 3.0, 1.0, 1)
    assert arrival_times(50, 3.0, 1.0, 1) != arrival_times(50, 3.0, 1.0, 2)
    assert arrival_times(10, 3.0, 1.0, 1) == arrival_times(50, 3.0, 1.0, 1)[:10]


def test_poisson_gaps_have_their_mean_and_spread() -> None:
    times = arrival_times(20_000, 4.0, 1.0, 0)
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.pstdev(gaps) == pytest.approx(0.25, rel=0.05)  # of an exponential: equal to its mean
    assert min(gaps) >= 0


def test_less_burstiness_is_more_spread() -> None:
    def spread(burstiness: float) -> float:
        times = arrival_times(5000, 4.0, burstiness, 0)
        return statistics.pstdev(b - a for a, b in zip(times, times[1:], strict=False))

    assert spread(0.25) > 1.5 * spread(1.0) > 2 * spread(4.0)


def test_infinite_rate_is_all_at_once() -> None:
    assert arrival_times(3, math.inf, 1.0, 0) == [0.0, 0.0, 0.0]


def test_random_prompts() -> None:
    rows = list(random_prompts(20, 100, 10, 0.5, 1000, 7, words=False))
    assert rows == list(random_prompts(20, 100, 10, 0.5, 1000, 7, words=False))
    assert len({len(ids) for ids, _, _ in rows}) > 1
    for ids, n, m in rows:
        assert len(ids) == n and 50 <= n <= 150 and 5 <= m <= 15
        assert all(workload.MIN_ID <= i < 1000 for i in ids)
    text, n, _ = next(random_prompts(1, 12, 4, 0.0, 1000, 7, words=True))
    assert len(text.split()) == 12 and n == 0
    with pytest.raises(ValueError, match="too small"):
        next(random_prompts(1, 12, 4, 0.0, 3, 7, words=False))


def test_corpus_slices(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("some words of a small text " * 200)
    rows = list(corpus_prompts(file, 5, 20, 9, None, 1))
    assert rows == list(corpus_prompts(file, 5, 20, 9, None, 1))
    assert all(len(text) == 80 and m == 9 for text, _, m in rows)
    ids, n, _ = next(corpus_prompts(file, 1, 20, 9, lambda text: list(text.encode()), 1))
    assert len(ids) == n == 20
    with pytest.raises(ValueError, match="5400 characters"):
        next(corpus_prompts(file, 1, 2000, 9, None, 1))


def test_jsonl_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a", "output_tokens": 3}, {"prompt": [5, 6]}, {"messages": [{"role": "user", "content": "b"}]}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    rows = list(jsonl_prompts(file, 4, 8))
    assert rows == [("a", 0, 3), ([5, 6], 2, 8), ([{"role": "user", "content": "b"}], 0, 8), ("a", 0, 3)]


@pytest.mark.parametrize(
    "line", ['{"prompt": ""}', '{"prompt": 3}', "[]", "{", '{"prompt": "a", "output_tokens": -1}', '{"prompt": "a", "output_tokens": 1.5}']
)
def test_jsonl_refusals_name_the_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        list(jsonl_prompts(file, 2, 8))


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:18:04.0319600,110,27
"""


def test_azure(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_text(AZURE)
    rows = list(read_trace(file))
    assert [(r.input_len, r.output_len) for r in rows] == [(4808, 10), (3180, 8), (110, 27)]
    assert [r.at_s for r in rows] == pytest.approx([0.0, 0.052, 60.052])
    jobs = list(trace_jobs(iter(rows), 2, Playback(2.0, 0.5, 2000)))
    assert [(j.at_s, len(j.prompt), j.output_len) for j in jobs] == [(0.0, 2000, 5), (0.026, 1590, 4)]
    assert jobs[0].prompt[:20] != jobs[1].prompt[:20]


@pytest.mark.parametrize(
    ("text", "part"), [("a,b\n1,2\n", "TIMESTAMP"), (AZURE + "x,1,2\n", "line 5"), (AZURE + "2023-11-16 18:19:04.0,-1,2\n", "line 5")]
)
def test_azure_refusals(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(ValueError, match=part):
        list(read_azure(file))


def mooncake(tmp_path: Path) -> Path:
    rows = [
        {"timestamp": 3000, "input_length": 1100, "output_length": 50, "hash_ids": [0, 1, 2]},
        {"timestamp": 3500, "input_length": 1300, "output_length": 9, "hash_ids": [0, 1, 5]},
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_mooncake_shares_prefixes(tmp_path: Path) -> None:
    rows = list(read_trace(mooncake(tmp_path)))
    assert [r.at_s for r in rows] == [0.0, 0.5]
    a, b = trace_jobs(iter(rows), 10, Playback(seed=3))
    assert (len(a.prompt), len(b.prompt)) == (1100, 1300)
    assert a.prompt[:1024] == b.prompt[:1024] and a.prompt[1024:] != b.prompt[1024:1100]


def test_scaling_keeps_what_is_shared(tmp_path: Path) -> None:
    a, b = trace_jobs(read_mooncake(mooncake(tmp_path)), 10, Playback(scale=0.125, max_output=4, seed=3))
    assert (len(a.prompt), len(b.prompt), a.output_len) == (138, 162, 4)
    assert a.prompt[:128] == b.prompt[:128] and a.prompt[128:] != b.prompt[128:138]


def test_mooncake_refuses_too_few_blocks(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 0, "input_length": 513, "output_length": 5, "hash_ids": [1]}\n')
    with pytest.raises(ValueError, match="cannot cover 513"):
        list(read_mooncake(file))


def test_the_real_traces_are_read(assets: Path) -> None:
    traces = assets / "traces"
    code = list(read_trace(traces / "AzureLLMInferenceTrace_code.csv"))
    assert (code[0].input_len, code[0].output_len) == (4808, 10) and len(code) > 5000
    assert all(a.at_s <= b.at_s for a, b in zip(code, code[1:], strict=False))
    mooncake_rows = list(read_trace(traces / "mooncake_conversation_trace.jsonl"))
    assert mooncake_rows[0].blocks == tuple(range(14)) and len(mooncake_rows) > 5000


def test_the_mixed_workload_is_the_one_that_the_peers_ran() -> None:
    lengths = workload.mixed_lengths()
    assert (len(lengths), sum(n for n, _ in lengths), sum(m for _, m in lengths)) == (512, 202_806, 94_221)
    assert workload.mixed_lengths(8) == lengths[:8] and max(n for n, _ in lengths) == 2048
    requests = list(workload.mixed_prompts(5, 0.1, 32000, 0))
    assert [(n, m) for _, n, m in requests] == [(max(1, round(n / 10)), max(1, round(m / 10))) for n, m in lengths[:5]]
    assert all(len(ids) == n and max(ids) < 32000 for ids, n, _ in requests)
    text, known, _ = next(workload.mixed_prompts(1, 0.1, 32000, 0, words=True))
    assert len(text.split()) == requests[0][1] and known == 0
