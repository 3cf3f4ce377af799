"""The profile mode: the share of time that was busy, the steps that are recorded, and a whole run on the mock engine."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import profile, profiled_rank
from bench.profiled_rank import CardProfiler, ProfiledRunner, StageProfiler, Tracer, Wish
from engine.step import StepPlan, StepResult


def test_union_of_intervals() -> None:
    assert profile.covered([], (0, 10)) == 0
    assert profile.covered([(1, 3), (2, 4), (8, 20), (-5, 0.5)], (0, 10)) == 0.5 + 3 + 2
    assert profile.covered([(0, 10), (2, 3)], (0, 10)) == 10


def event(name: str, category: str, ts: float, dur: float) -> dict:
    return {"ph": "X", "name": name, "cat": category, "ts": ts, "dur": dur}


def test_busy_share_counts_kernels_between_steps() -> None:
    marks = [event(f"step {i}", "user_annotation", 100.0 * i, 5) for i in range(8)]
    kernels = [event("w4", "kernel", 100.0 * i + 10, 60) for i in range(8)] + [
        event("copy", "gpu_memcpy", 100.0 * i + 65, 15) for i in range(8)
    ]
    found = profile.summary(marks + kernels + [event("plan", "loop", 210, 50), {"ph": "M", "name": "process_name"}])
    assert found["device"] == "card" and found["steps"] == 5 and found["step_us"] == 100
    assert found["busy_share"] == pytest.approx(0.7) and found["launches_per_step"] == 2
    assert found["top"][0] == {"name": "w4", "us_per_step": 60, "calls_per_step": 1, "share": pytest.approx(0.6)}
    with pytest.raises(ValueError, match="only 4 steps"):
        profile.summary(marks[:4] + kernels)


class Runner:
    num_blocks = 7

    def __init__(self) -> None:
        self._decoder = SimpleNamespace(forward=lambda: time.sleep(0.001))
        self.closed = False

    def launch(self, plan: StepPlan) -> object:
        self._decoder.forward()
        return lambda: StepResult(plan.step)

    def close(self) -> None:
        self.closed = True


def plans(rows: int, count: int, number: int) -> list[StepPlan]:
    return [StepPlan(i, slots=tuple(range(rows)), starts=(5,) * rows, counts=(count,) * rows, samples=(1,) * rows) for i in range(number)]


def test_only_steady_steps_of_so_many_rows_are_recorded(tmp_path: Path) -> None:
    runner, trace = Runner(), tmp_path / "t.json"
    watched = ProfiledRunner(runner, Wish(2, 3, 6, str(trace)), StageProfiler(runner))
    for plan in plans(2, 4, 5) + plans(3, 1, 5) + plans(2, 1, 9):
        assert watched.launch(plan)().step == plan.step
        assert not trace.exists()
    watched.launch(plans(2, 1, 1)[0])
    events = json.loads(trace.read_text())["traceEvents"]
    assert [e["name"] for e in events if e.get("cat") == "mark"] == [f"step {n}" for n in range(1, 7)]
    assert sum(e["name"] == "decoder.forward" for e in events) == 6
    assert profile.summary(events)["busy_share"] > 0.5
    watched.close()
    assert runner.closed and watched.num_blocks == 7


def test_the_trace_of_torch_is_put_on_our_clock(tmp_path: Path) -> None:
    profiler = CardProfiler(SimpleNamespace(_device=SimpleNamespace(synchronize=lambda: None)))
    begin = time.monotonic_ns() / 1e3
    profiler.start()
    profiler.annotate(1, lambda: time.sleep(0.01))
    profiler.stop(tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    step = next(e for e in events if e.get("name") == "step 1" and e.get("ph") == "X")
    assert begin <= step["ts"] <= time.monotonic_ns() / 1e3 and step["dur"] >= 9_000


def test_a_tracer_times_calls_that_fail_too() -> None:
    tracer = Tracer("x")

    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        tracer.timed(fail, "f", "loop")()
    assert tracer.events[-1]["name"] == "f" and tracer.events[-1]["dur"] >= 0


def test_a_whole_run(tmp_path: Path, smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model",
        str(smollm2),
        "--device",
        "cpu",
        "--rows",
        "2",
        "--skip",
        "2",
        "--steps",
        "8",
        "--trace",
        str(tmp_path / "trace.json"),
        "--json",
    ]
    assert profile.main(words) == 0
    out = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert 0.3 < out["busy_share"] <= 1 and out["steps"] == 5 and out["top"][0]["name"] == "decoder.forward"
    names = {e["name"] for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"plan", "apply", "deliver", "send", "step 8"} <= names
    assert profiled_rank.VARIABLE not in os.environ


def test_a_run_that_cannot_be_recorded_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "", "--device", "mock", "--set", "engine.session_len=100", "--rows", "1", "--skip", "200", "--steps", "8"]
    assert profile.main(words) == 2
    assert "no 208 steps of 1 rows" in capsys.readouterr().err
