"""Tuning on the emulated card: candidates in turn, each checked, every line kept, rows ready to paste."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda")

from bench import tune, tune_card
from bench.gpu_time import WallTimer
from bench.kernels_cuda import Shapes
from bench.tune_card import Tuner
from engine.cuda.tuning import W4Launch
from engine.cuda.tuning_attention import DecodeShape
from tests.ptx.device import EmulatedDevice

TINY = Shapes(
    hidden=64, inner=128, heads=4, kv_heads=2, head_dim=32, block_seq_len=16, vocab=300, products=(("a", 128, 256),), rows=(1, 16),
    decode=((2, 40),), prompts=((2, 20),), small=(), sampled=(), max_rows=4,
)  # fmt: skip


@pytest.fixture
def tuner(root: Path, tmp_path: Path) -> Tuner:
    device = EmulatedDevice(multiprocessors=2)
    return Tuner(device, root / ".cache/kernels", WallTimer(device), WallTimer(device), TINY, "bfloat16", tmp_path / "rows.jsonl")


def test_jobs_take_turns_and_begin_with_the_table(tuner: Tuner) -> None:
    jobs = tuner.jobs({"w4", "decode", "prompt"})
    cases = [job.case for job in jobs]
    assert set(cases[:6]) == {"1 128 256", "8 128 256", "16 128 256", "32 2 x 40", "32 2 x 20"}
    assert all(job.promise == -1.0 for job in jobs[:6]) and len(jobs) > 40
    assert {job.kind for job in jobs} == {"w4 few", "w4", "w4 hopper", "decode", "prompt"}
    for kind in ("w4 few", "w4", "w4 hopper"):
        one = [job for job in jobs if job.kind == kind and job.case != "8 128 256"]
        assert [job.promise for job in one] == sorted(job.promise for job in one)
        assert len({job.launch for job in one}) == len(one) > 1


def test_quantized_pools_have_jobs_of_their_own(tuner: Tuner) -> None:
    jobs = tuner.jobs({"decode_int8", "prompt_int8", "decode_int4"})  # 4 bits of 32 numbers are too few bytes for a kernel
    assert {(job.kind, job.case) for job in jobs} == {("decode_int8", "32 2 x 40"), ("prompt_int8", "32 2 x 20")}
    shapes = [job.launch for job in jobs if job.kind == "decode_int8"]
    assert {shape.tiles for shape in shapes} == {1, 2} and {shape.few for shape in shapes} == {0, 8} and len(set(shapes)) == len(shapes)
    assert all(variant.constants[9] == 8 for job in jobs for variant in job.variants if variant.factory == "paged_decode")


def test_a_run_measures_checks_and_prints_rows(tuner: Tuner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [job for job in tuner.jobs({"w4", "decode"}) if job.promise == -1.0 and job.case in ("1 128 256", "32 2 x 40")]
    tuner.run(jobs, time.monotonic() + 250, 1)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    measured = [row for row in lines if "us" in row]
    assert {row["case"] for row in measured} == {"1 128 256", "32 2 x 40"}
    assert all(row["right"] and row["error"] < 1e-2 for row in measured)
    capsys.readouterr()
    assert tune.main(["--print", str(tmp_path / "rows.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert '((9, 0), "1 128 256"): FewLaunch(1, ' in printed and "DECODE[(9, 0)][32] = DecodeShape(" in printed
    again = Tuner(tuner.device, root_of(tuner), tuner._quick, tuner._careful, TINY, "bfloat16", tmp_path / "rows.jsonl")
    before = len(lines)
    again.run(jobs, time.monotonic() + 250, 1)  # everything is there: only the finalists are measured again
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()[before:]]
    assert sum("us" in row for row in rows) == 2


def root_of(tuner: Tuner) -> Path:
    return tuner._cache_dir


def test_a_wrong_candidate_is_not_timed(tuner: Tuner, tmp_path: Path) -> None:
    (job,) = [job for job in tuner.jobs({"decode"}) if job.promise == -1.0]
    tuner._measure(tune_card.Job(job.kind, job.case, job.launch, 0.0, job.variants, lambda: (0.5, [lambda: 1 / 0])), [], tuner._quick)
    assert tune.times(tune.read(tmp_path / "rows.jsonl")) == {}
    assert tune.identity(job.row) in {tune.identity(row) for row in tune.read(tmp_path / "rows.jsonl")}


def line(kind: str, case: str, launch: list[int], us: float, right: bool = True) -> dict:
    where = {"card": "T", "cc": [9, 0], "date": "2026-01-02"}
    return {"bench": "tune", "kind": kind, "case": case, "launch": launch, "us": us, "error": 0.0, "right": right, "where": where}


def test_the_best_is_chosen() -> None:
    rows = [
        line("w4", "1 4096 4096", [1, 2, 1, 8, 3, 0], 9.0), line("w4", "1 4096 4096", [1, 4, 1, 8, 3, 0], 5.0),
        line("w4", "1 4096 4096", [1, 4, 1, 8, 3, 0], 6.0),  # measured again, carefully
        line("w4", "1 4096 4096", [1, 1, 1, 8, 3, 0], 0.0, right=False),
        line("w4 hopper", "8 4096 4096", [8, 4, 1, 3, 4, 2, 1, 4, 1, 1], 6.0), line("w4 hopper", "8 4096 4096", [8, 3, 1, 3, 4], 7.0),
        line("decode", "128 1 x 1024", [4, 3, 2], 10.0), line("decode", "128 1 x 1024", [8, 3, 1], 8.0),
        line("decode", "128 64 x 1024", [4, 3, 2], 60.0), line("decode", "128 64 x 1024", [8, 3, 1], 90.0),
        line("decode", "128 1 x 1024", [2, 2, 2], 1.0),  # not measured in every case
        line("decode_int4", "128 64 x 4096", [4, 2, 4, 32, 2, 8], 80.0),
    ]  # fmt: skip
    assert tune.pasted(rows) == [
        '    ("w4_matmul", (9, 0), "1 4096 4096"): W4Launch(1, 4, 1, 8, 3, 0),  # 2026-01-02, T: 6.00 us, of 2',
        '    "8 4096 4096": HopperLaunch(8, 4, 1, 3, 4, 2, 1, 4, 1, 1),  # 2026-01-02, T: 6.00 us, of 2',
        "    DECODE[(9, 0)][128] = DecodeShape(4, 3, 2)  # 2026-01-02, T: 216.2 % above the best of each of 2 cases, of 2",
        "    DECODE_QUANTIZED[4][(9, 0)][128] = DecodeShape(4, 2, 4, 32, 2, 8)  # 2026-01-02, T: 0.0 % above the best of each of 1 cases, of 1",
    ]
    assert W4Launch(1, 4, 1, 8, 3, 0).rows == 1 and DecodeShape(4, 3, 2).warps == 4


def test_broken_lines_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(line("w4", "a", [1], 2.0)) + '\n{"bench": "kernel row"}\n{"bench": "tu')
    assert len(tune.read(path)) == 1 and tune.read(tmp_path / "none") == []


def test_without_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune.main(["--budget-s", "60", "--out", str(tmp_path / "x.jsonl"), "--processes", "1"]) != 0
    assert "nothing was measured" in capsys.readouterr().out
