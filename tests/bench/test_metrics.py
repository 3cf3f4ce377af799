"""Percentiles, goodput, the result block and its JSON keys."""

from __future__ import annotations

import numpy as np
import pytest

from bench.metrics import Answer, block, compare, meets, parse_goodput, percentile, result, summary

VLLM_KEYS = (
    "duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput output_throughput "
    "total_token_throughput mean_ttft_ms median_ttft_ms p99_ttft_ms mean_tpot_ms median_tpot_ms p99_tpot_ms mean_itl_ms "
    "median_itl_ms p99_itl_ms mean_e2el_ms median_e2el_ms p99_e2el_ms input_lens output_lens ttfts itls latencies "
    "generated_texts errors"
).split()  # fmt: skip


def answer(intended: float, first: float, gaps: list[float], error: str = "") -> Answer:
    chunks = list(np.cumsum([first, *gaps]))
    return Answer(intended, intended, first, chunks[-1], chunks, 7, len(chunks), "x" * len(chunks), error)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("p", [0, 1, 50, 90, 95, 99, 100])
def test_percentile_is_numpys(count: int, p: int) -> None:
    values = list(np.random.default_rng(count).normal(size=count))
    assert percentile(values, p) == pytest.approx(np.percentile(values, p), abs=1e-12)


def test_percentile_of_nothing_is_zero() -> None:
    assert percentile([], 99) == 0.0
    assert set(summary("itl", []).values()) == {0.0}


def test_times_count_from_the_intended_send() -> None:
    a = answer(intended=1.0, first=3.0, gaps=[0.5, 0.25])
    a.sent_s = 2.5  # the client was late; the user still waited from 1.0
    assert (a.ttft_s, a.e2el_s) == (2.0, 2.75)
    assert a.tpot_s == pytest.approx(0.375)
    assert a.itl_s == [0.5, 0.25]


def test_one_token_has_no_time_between_tokens() -> None:
    a = answer(0.0, 1.0, [])
    assert a.tpot_s is None and a.itl_s == []
    assert meets(a, {"tpot": 0.001})


def test_result_has_vllms_keys_and_the_right_sums() -> None:
    answers = [answer(0.0, 1.0, [0.1] * 9), answer(0.5, 1.0, [0.2] * 4), answer(0.0, 0.0, [], error="HTTP 503: full")]
    r = result(answers, 4.0, {"ttft": 0.6}, detailed=True)
    assert not [key for key in VLLM_KEYS if key not in r]
    assert (r["completed"], r["failed"], r["total_input_tokens"], r["total_output_tokens"]) == (2, 1, 14, 15)
    assert r["output_throughput"] == 15 / 4 and r["request_goodput"] == 1 / 4
    assert r["mean_ttft_ms"] == pytest.approx(750) and r["mean_tpot_ms"] == pytest.approx(150)
    assert r["error_counts"] == {"HTTP 503: full": 1}
    assert r["max_concurrent_requests"] == 2
    assert r["max_output_tokens_per_s"] == 15  # all chunks lie in the second from 1 to 2


def test_without_objectives_there_is_no_goodput() -> None:
    r = result([answer(0.0, 1.0, [0.1])], 2.0, {}, detailed=False)
    assert r["request_goodput"] is None and "itls" not in r
    assert "goodput" not in block(r)


def test_block_in_the_words_parsers_look_for() -> None:
    text = block(result([answer(0.0, 1.0, [0.1])], 2.0, {"ttft": 2.0}, detailed=False))
    lines = text.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[1] == "Successful requests:                     1         "
    assert "Request goodput (req/s):                 0.50      " in lines
    assert "---------------Time to First Token----------------" in lines
    assert "-----Time per Output Token (excl. 1st token)------" in lines
    assert "---------------Inter-token Latency----------------" in lines
    assert "Mean TTFT (ms):                          1000.00   " in lines
    assert "=" * 50 in lines


def test_goodput_words() -> None:
    assert parse_goodput(["ttft:200", "tpot:50.5"]) == {"ttft": 0.2, "tpot": 0.0505}
    for word, part in (("ttfx:1", "ttfx"), ("ttft:soon", "soon"), ("ttft", "number")):
        with pytest.raises(ValueError, match=part):
            parse_goodput([word])


def test_compare_brackets_a_known_change() -> None:
    rng = np.random.default_rng(0)
    a = {"ttfts": list(rng.gamma(4, 0.1, 300)), "latencies": list(rng.gamma(4, 1, 300)), "errors": [""] * 300}
    b = {key: [v * 1.5 for v in value] if key != "errors" else value for key, value in a.items()}
    rows = compare(a, b, rounds=200)
    assert [r["metric"] for r in rows] == ["p50_ttft_ms", "p99_ttft_ms", "p50_e2el_ms", "p99_e2el_ms"]
    for row in rows:
        assert row["ratio"] == pytest.approx(1.5)
        assert row["low"] < 1.5 < row["high"]
    assert rows[0]["low"] > 1.2  # 300 answers see a change of one half in the median
