"""The page of results: it draws what was measured, keeps our figures and the peers' apart, and stays well-formed."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench import peers, report, svg
from bench.svg import Bar, Range, Series

MACHINE = {"processor": "test CPU", "cores": 4, "gpus": [{"name": "test card <1>", "driver_version": "1"}]}


def write(folder: Path, *records: dict, name: str = "2026-01-01-x.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


class Balanced(HTMLParser):
    VOID = {"meta", "line", "circle", "rect", "path"}

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag


def page(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert report.main([str(folder), "--out", str(folder / "page.html")]) == 0
    text = (folder / "page.html").read_text()
    parser = Balanced()
    parser.feed(text)
    assert parser.stack == []
    assert "http" not in text.replace("HTTP", "") and "<script" not in text  # nothing is fetched, nothing runs
    return text


def test_a_whole_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tails = {f"p{p}_{n}_ms": 10.0 * p for p in (50, 90, 99) for n in ("ttft", "tpot", "itl", "e2el")}
    kernels = {
        "bench": "kernels", "machine": MACHINE, "ceilings": {"read_gb_s": 4000.0, "dense_gflop_s": 700e3}, "w4_layer_us": {"1": 40.5, "64": 120.0},
        "rows": [{"op": "decode attention", "case": "64 x 1,024", "us": 61.7, "gb_s": 4300.0, "gflop_s": 2000.0, "percent": 91.0, "of": "read",
                  "error": 1e-3}],
    }  # fmt: skip
    shape = {"model": "llama-3.1-8b-awq", "machine": MACHINE}
    folder = write(
        tmp_path / "r",
        shape | {"bench": "offline", "decode_tok_s": {"1": 401.0, "8": 2222.0}, "prefill_tok_s": {"8x1024": 47111.0}},
        shape | {"bench": "offline", "decode_tok_s": {"1": 433.0}, "mixed": tails | {"output_throughput": 9876.0}},
        shape | {"bench": "served", "ready_s": 11.25, "cold": False, "mixed_http": tails | {"output_throughput": 9003.0}},
        shape | {"bench": "profile", "device": "card", "rows": 32, "busy_share": 0.973, "top": [{"name": "a<b>", "us_per_step": 5.0, "calls_per_step": 2.0, "share": 0.5}]},
        kernels,
    )  # fmt: skip
    text = page(folder, capsys)
    for words in (
        "433",
        "2,222",
        "47,111",
        "9,876",
        "91 % of it",
        "11.2",
        "97.3 %",
        "40.5",
        "1.30 x as fast",
        "4.00 TB/s",
        "a&lt;b&gt;",
        "test card &lt;1&gt;",
    ):
        assert words in text, words
    assert "401" not in text  # measured again later
    assert text.count("missed") == 2  # 8 sequences, and the layer at 64 rows
    assert "9,500" in text and "Marlin" in text


def test_what_was_not_measured_is_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host = {"processor": "p", "cores": 2, "gpus": []}
    folder = write(tmp_path / "r", {"bench": "offline", "model": "llama-3.1-8b", "machine": host, "decode_tok_s": {"1": 987654.0}})
    text = page(folder, capsys)
    assert "987,654" not in text  # a CPU's figure is no card's
    assert "numbatch itself has not been measured" in text and "Latency" not in text and "8,398" in text


def test_the_results_of_this_repository(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = report.read(root / "bench/results")
    assert records and "Beside llama.cpp" in report.page(records)


def test_broken_results_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text("{")
    assert report.main([str(tmp_path), "--out", str(tmp_path / "o.html")]) == 2
    assert "a.jsonl is not JSON" in capsys.readouterr().err
    assert report.main([str(tmp_path / "none")]) == 2


def test_the_floor_of_a_decode_step() -> None:
    one = report.decode_floor_s(1, 4.37e12, 808e12)
    assert 1.0e-3 < one < 1.15e-3  # the weights once
    assert 5.5e-3 < report.decode_floor_s(256, 4.37e12, 808e12) < 6.7e-3


def test_numbers_are_short() -> None:
    given = (0, 0.95, 12.34, 42.0, 123.4, 1974.6, 28000)
    assert [svg.number(x) for x in given] == ["0", "0.95", "12.3", "42", "123", "1,975", "28,000"]


def test_ticks_are_round_and_inside() -> None:
    assert svg.ticks(100, 3000, True) == [100, 200, 500, 1000, 2000]
    assert svg.ticks(1, 1e5, True) == [1, 10, 100, 1000, 10000, 100000]
    assert svg.ticks(0, 47, False) == [0, 10, 20, 30, 40]


def test_labels_do_not_overlap() -> None:
    places = svg.apart([10.0, 11.0, 12.0, 100.0], 15)
    assert all(b - a >= 15 - 1e-9 for a, b in zip(sorted(places), sorted(places)[1:], strict=False)) and places[3] == 100.0
    assert sum(places[:3]) / 3 == pytest.approx(11.0)


def test_charts_are_xml_with_every_number() -> None:
    chart = svg.lines([Series("a & b", [(1, 10), (2, 20)], 0, "ours"), Series("c", [(1, 5), (2, 9)], 6, "bound")], "x", "y")
    marks = ET.fromstring(chart)
    assert [t.text for t in marks.iter("title")] == ["a & b, x 1: 10", "a & b, x 2: 20"]
    rects = ET.fromstring(svg.bars([Bar("a", 3.0, 0, "3"), Bar("b", 6.0, 1, "6", mark=9.0)], "l", "u")).findall("rect")
    assert float(rects[1].get("width", "")) == pytest.approx(2 * float(rects[0].get("width", "")), abs=0.2)
    dots = ET.fromstring(svg.ranges([Range("r", [("p50", 1.0), ("p99", 100.0)], 0)], "l", "ms")).findall("circle")
    assert float(dots[0].get("cx", "")) < float(dots[1].get("cx", ""))


def test_the_peers_figures_add_up() -> None:
    for m, us in peers.MARLIN.items():
        assert sum(us.values()) == pytest.approx(peers.W4_LAYER["Marlin"][m], rel=0.005)
    assert set(peers.DECODE_BARS) == set(peers.DECODE["vLLM AWQ"])


def test_the_crossing_of_4_and_16_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(model: str, rates: dict, *setting: str) -> dict:
        return {"bench": "offline", "model": model, "machine": MACHINE, "decode_tok_s": rates, "set": list(setting)}

    four, bare = run("llama-3.1-8b-awq", {"1": 500.0, "256": 3000.0}), run("llama-3.1-8b-awq", {"1": 500.0, "256": 2000.0}, report.NO_COPY)
    text = page(write(tmp_path / "r", four, bare, run("llama-3.1-8b-dense", {"1": 200.0, "256": 2500.0})), capsys)
    assert "What 4 bits are worth" in text and "500 (2.50 x)" in text and "3,000 (1.20 x)" in text and "2,000 (0.80 x)" in text
    assert "What 4 bits are worth" not in page(write(tmp_path / "q", four), capsys)
    assert report.latest(report.of_8b([four, bare]), "decode_tok_s")["256"] == 3000.0  # what is served is not mixed with what was tried
