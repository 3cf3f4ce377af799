"""A rank that watches itself: what `bench.profile` starts in the place of `engine.worker.worker_main`.

The runner is wrapped: after some steady decode steps (one token for each of the wanted rows) it records the next ones and
writes a Chrome trace. On a card by torch's profiler, which sees every kernel, also those of a captured graph; elsewhere by a
plain tracer of the runner's stages. What to record comes in the environment, as JSON. Knows no HTTP and no text.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.step import StepPlan, StepResult

VARIABLE = "BENCH_PROFILE"
STAGES = (("_slots", "batch"), ("_decoder", "forward"), ("_sampler", "sample"))  # of a runner on the host
ANCHOR = "bench anchor"


@dataclass(frozen=True, slots=True)
class Wish:
    """`rows` decode together; the first `skip` such steps are left out, `steps` recorded, and written to `trace`."""

    rows: int
    skip: int
    steps: int
    trace: str

    def export(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


class Tracer:
    """Chrome trace events of this process, times of the monotonic clock in microseconds."""

    def __init__(self, process: str) -> None:
        self.events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": os.getpid(), "args": {"name": process}}]

    def add(self, name: str, category: str, start_ns: int, end_ns: int) -> None:
        place = {"pid": os.getpid(), "tid": threading.get_native_id()}
        self.events.append({"ph": "X", "name": name, "cat": category, "ts": start_ns / 1e3, "dur": (end_ns - start_ns) / 1e3, **place})

    def timed(self, call: Callable[..., Any], name: str, category: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.monotonic_ns()
            try:
                return call(*args, **kwargs)
            finally:
                self.add(name, category, start, time.monotonic_ns())

        return run


class _Timed:
    """An object one of whose methods is timed."""

    def __init__(self, inner: Any, method: str, tracer: Tracer, name: str) -> None:
        self._inner = inner
        setattr(self, method, tracer.timed(getattr(inner, method), name, "stage"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class StageProfiler:
    """Host runners: the runner's own stages. Two clocks are one here."""

    def __init__(self, runner: Any) -> None:
        self.tracer = Tracer("rank 0")
        for part, method in STAGES:
            if hasattr(getattr(runner, part, None), method):
                setattr(runner, part, _Timed(getattr(runner, part), method, self.tracer, f"{part.strip('_')}.{method}"))

    def start(self) -> None:
        del self.tracer.events[1:]

    def annotate(self, number: int, launch: Callable[[], Any]) -> Any:
        return self.tracer.timed(launch, f"step {number}", "mark")()

    def stop(self, trace: Path) -> None:
        write_whole(trace, {"traceEvents": self.tracer.events, "clock": "monotonic"})


class CardProfiler:
    """torch's profiler (CUPTI). Started once for nothing, because its first start takes seconds."""

    def __init__(self, runner: Any) -> None:
        self._device = runner._device
        self._anchor_ns = 0
        with self._make():
            self._device.synchronize()
        self._profiler = self._make()

    @staticmethod
    def _make() -> Any:
        from torch.profiler import ProfilerActivity, profile

        return profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=False)

    def start(self) -> None:
        from torch.profiler import record_function

        self._profiler.__enter__()
        with record_function(ANCHOR):
            self._anchor_ns = time.monotonic_ns()

    def annotate(self, number: int, launch: Callable[[], Any]) -> Any:
        from torch.profiler import record_function

        with record_function(f"step {number}"):
            return launch()

    def stop(self, trace: Path) -> None:
        self._device.synchronize()
        self._profiler.__exit__(None, None, None)
        raw = trace.with_suffix(".raw")
        self._profiler.export_chrome_trace(str(raw))
        found = json.loads(raw.read_text(encoding="utf-8"))
        raw.unlink()
        anchor = next(event["ts"] for event in found["traceEvents"] if event.get("name") == ANCHOR and event.get("ph") == "X")
        found["clock"] = "monotonic"
        for event in found["traceEvents"]:
            if "ts" in event:
                event["ts"] = float(event["ts"]) - anchor + self._anchor_ns / 1e3
        write_whole(trace, found)


def write_whole(path: Path, value: dict[str, Any]) -> None:
    """Who sees the file sees all of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value), encoding="utf-8")
    os.replace(partial, path)


class ProfiledRunner:
    """A runner, and a profiler of some of its steps. `launch` and `step` are called by one thread."""

    def __init__(self, runner: Any, wish: Wish, profiler: Any) -> None:
        self._runner, self._wish, self._profiler = runner, wish, profiler
        self._steady = self._recorded = 0
        self._on = self._done = False

    @property
    def num_blocks(self) -> int:
        return self._runner.num_blocks

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        wish = self._wish
        if not self._done and len(plan.slots) == wish.rows and all(count == 1 for count in plan.counts):
            self._steady += 1
            if self._steady > wish.skip and not self._on:
                self._profiler.start()
                self._on = True
        if not self._on:
            return self._runner.launch(plan)
        if self._recorded == wish.steps:
            self._profiler.stop(Path(wish.trace))
            self._on, self._done = False, True
            return self._runner.launch(plan)
        self._recorded += 1
        return self._profiler.annotate(self._recorded, lambda: self._runner.launch(plan))

    def close(self) -> None:
        self._runner.close()


def profiled(runner: Any, wish: Wish) -> ProfiledRunner:
    on_card = getattr(getattr(runner, "_device", None), "image", "") == "cubin"
    return ProfiledRunner(runner, wish, (CardProfiler if on_card else StageProfiler)(runner))


def main(rank: int, size: int, *rest: Any) -> None:
    """`worker_main` with the runner of rank 0 wrapped."""
    from engine import worker

    build, wish = worker._build, Wish(**json.loads(os.environ[VARIABLE]))
    if rank == 0:
        worker._build = lambda *words: profiled(build(*words), wish)
    worker.worker_main(rank, size, *rest)
