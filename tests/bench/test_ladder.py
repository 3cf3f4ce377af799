"""The ladder: every rung has its row, the advice follows from the numbers, and what is printed says them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench.ladder import RUNGS, Advice, Row, Rung, Source, Task, advise, climb, gain
from bench.ladder_report import HEAD, page, record, scatter, table
from bench.quality import Distance, Text
from tests.e2e.conftest import byte_tokenizer
from tests.fixtures.toy import toy_checkpoint

ABOUT = {
    "model": "m <b>",
    "data": "d.txt",
    "tokens": 4096,
    "window": 64,
    "stride": 32,
    "machine": {"processor": "P", "cores": 2, "gpus": []},
}


def row(name: str, change: float, spread: float = 0.002, *, one: float = 100.0, many: float = 400.0, tokens: int = 1000) -> Row:
    apart = Distance(change, change - spread, change + spread, abs(change) / 3, abs(change), 1 - abs(change), 0.9) if change else None
    rung = next((r for r in RUNGS if r.name == name), Rung(name, "W4"))
    return Row(
        rung, path=f"p/{rung.weights}", perplexity=20 * (1 + change), apart=apart, decode={1: one, 32: many}, kv_tokens=tokens, ttft_s=0.1
    )


BASE = row("16-bit", 0)
FULL = [
    BASE,
    row("16-bit + KV8", 0.001, tokens=1900),
    row("W4", 0.02, one=250, many=600, tokens=1500),
    row("W4 + KV8", 0.022, one=240, many=600, tokens=2900),
    row("W4 + KV4", 0.06, one=240, many=600, tokens=5000),
    Row(RUNGS[5], "no 8-bit checkpoint is here"),
]


def test_the_gain_is_the_geometric_mean_of_what_the_goal_names() -> None:
    assert gain(FULL[3], BASE, "latency") == pytest.approx(2.4)
    assert gain(FULL[3], BASE, "memory") == pytest.approx(2.9)
    assert gain(FULL[3], BASE, "balanced") == pytest.approx((2.4 * 1.5 * 2.9) ** (1 / 3))
    assert gain(BASE, BASE, "balanced") == 1


@pytest.mark.parametrize(
    ("max_loss", "goal", "name"),
    [
        (0.03, "balanced", "W4 + KV8"),
        (0.03, "latency", "W4"),
        (0.03, "throughput", "W4"),  # as fast as W4 + KV8, and nearer to 16-bit
        (0.10, "memory", "W4 + KV4"),
        (0.005, "memory", "16-bit + KV8"),
        (0.005, "latency", "16-bit"),
        (0.0, "balanced", "16-bit"),
    ],
)
def test_the_rung_that_is_recommended(max_loss: float, goal: str, name: str) -> None:
    advice = advise(FULL, max_loss, goal)
    assert advice.row is not None and advice.row.rung.name == name
    assert advice.sentences[0].startswith(f"{name}: ") and goal in advice.sentences[0]
    others = {r.rung.name for r in FULL if r.ran} - {name, "16-bit"}
    assert {re.match(r"(.*?) (?:keeps|may keep|loses)", s)[1] for s in advice.sentences[1:]} == others  # type: ignore[index]


def test_a_rung_within_the_loss_but_not_surely_is_not_taken() -> None:
    rows = [BASE, row("W4", 0.02, 0.05, one=300)]
    advice = advise(rows, 0.03, "latency")
    assert advice.row is BASE and "W4 may keep it" in advice.sentences[1] and "score more --tokens" in advice.sentences[1]
    assert "loses too much: perplexity +6.00 % (95 %: +5.80 .. +6.20)" in " ".join(advise(FULL, 0.03, "memory").sentences)


def test_nothing_ran() -> None:
    assert advise([Row(RUNGS[0], "no memory")], 0.03, "balanced").row is None


def test_the_table_has_every_rung_and_reasons_where_there_are_no_numbers() -> None:
    lines = table(FULL).splitlines()
    assert len(lines) == 7 and all(name in lines[0] for name in HEAD)
    assert lines[6].split("  ", 1)[1].strip() == "not run: no 8-bit checkpoint is here"
    assert "+2.20" in lines[4] and "2,900" in lines[4] and "600" in lines[4] and "97.8" in lines[4]


def test_the_record_is_plain_json_with_finite_numbers() -> None:
    wide = dataclasses.replace(FULL[2], apart=dataclasses.replace(FULL[2].apart, change_high=math.inf))  # type: ignore[type-var]
    out = json.loads(json.dumps(record([BASE, wide, FULL[5]], advise(FULL, 0.03, "balanced"), ABOUT), allow_nan=False))
    assert out["recommended"] == "W4 + KV8" and out["rungs"][2] == {"rung": "W8A8", "path": "", "not_run": "no 8-bit checkpoint is here"}
    assert out["rungs"][1]["decode"] == {"1": 250, "32": 600} and out["rungs"][1]["apart"]["perplexity_change"] == 0.02


def test_the_page_is_self_contained_and_draws_what_ran() -> None:
    advice = advise(FULL, 0.03, "balanced")
    text = page(FULL, advice, ABOUT, 0.03)
    assert "m &lt;b&gt;" in text and "<b>" not in text.replace("<body>", "")
    assert not re.search(r"<script|https?://(?!www\.w3\.org)|<link|<img", text)
    drawings = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    assert len(drawings) == 5  # scatter, decode 1 and 32, KV tokens, first token; weights are 0 here
    assert len([e for e in drawings[0].iter() if e.tag == "circle"]) == 5
    assert "not run: no 8-bit checkpoint is here" in text
    plain = scatter([BASE], Advice(BASE, ()), 0.03)
    assert ET.fromstring(plain).tag == "svg"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = toy_checkpoint(tmp_path_factory.mktemp("ladder") / "toy", max_position_embeddings=512)
    byte_tokenizer(path)
    return path


def test_a_climb_measures_rungs_and_keeps_the_reasons_of_others(toy: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("Once upon a time there was a little toy that could not be read by anybody. " * 3)
    task = Task(Text(file, 64, 32, 128), ("engine.device=cpu", "engine.max_batch_size=32"), 1 << 28, decode_tokens=64, repeats=1)
    said: list[str] = []
    rungs = (Rung("16-bit", "16-bit"), Rung("again", "16-bit"), Rung("odd", "16-bit", 3), Rung("W4", "W4"), Rung("lost", "gone"))
    sources = {"16-bit": Source(str(toy)), "W4": Source(reason="too large"), "gone": Source(str(tmp_path / "nowhere"))}
    rows = climb(rungs, sources, task, said.append)
    assert [r.ran for r in rows] == [True, True, False, False, False]
    first, again, odd, missing, lost = rows
    assert first.apart is None and again.apart is not None and again.apart.kl_mean == 0 and again.apart.same_top1 == 1
    assert first.tokens == 128 and first.weight_bytes > 0 and first.kv_tokens == again.kv_tokens > 1000
    assert set(first.decode) == {1, 32} and min(first.decode.values()) > 0 and first.ttft_s > 0
    assert "quant_policy" in odd.reason and missing.reason == "too large" and "nowhere" in lost.reason
    assert any("128 of 128 tokens scored" in sentence for sentence in said)
