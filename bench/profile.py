"""A few decode steps under a profiler: `python -m bench.profile --model DIR --rows 32 --trace trace.json --json`.

N sequences decode; once all have begun, some steps are recorded in the rank (`profiled_rank.py`) and the scheduler's part here,
and both are written as one Chrome trace (chrome://tracing, Perfetto). Printed: the share of the time between the first and
the last recorded step in which the device worked (on a card: at least one kernel or copy ran; on the host: a stage of the
runner did), and which kernels took how much of it. The profiler costs some host time: shares are lower bounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import offline
from bench.machine import describe_machine
from bench.profiled_rank import VARIABLE, Tracer, Wish
from bench.profiled_rank import main as profiled_rank
from bench.workload import random_ids
from engine import worker
from engine.build import build_engine, resolve_spec
from engine.errors import EngineError
from engine.loop import Engine
from engine.sequence import SamplingParams

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
SETTLE = 2  # recorded steps at the beginning that do not count: starting the profiler let the pipeline run dry
TOP = 12
TIMEOUT_S = 600.0

Interval = tuple[float, float]


def covered(intervals: Iterable[Interval], window: Interval) -> float:
    """Length of the union of the intervals within the window."""
    total, end = 0.0, window[0]
    for low, high in sorted(intervals):
        low, high = max(low, end), min(high, window[1])
        if high > low:
            total += high - low
            end = high
    return total


def summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Busy share, step time and what took it, of the events of a trace. ValueError where too few steps are in it."""
    complete = [e for e in events if e.get("ph") == "X"]
    marks = sorted({e["ts"] for e in complete if e.get("cat") in ("mark", "user_annotation") and e["name"].startswith("step ")})
    if len(marks) < SETTLE + 3:
        raise ValueError(f"only {len(marks)} steps were recorded; at least {SETTLE + 3} are needed.")
    window = marks[SETTLE], marks[-1]
    on_card = any(e.get("cat") in DEVICE for e in complete)
    wanted = DEVICE if on_card else ("stage",)
    busy = [e for e in complete if e.get("cat") in wanted and e["ts"] < window[1] and e["ts"] + e["dur"] > window[0]]
    spent: dict[str, list[float]] = defaultdict(list)
    for e in busy:
        spent[e["name"]].append(e["dur"])
    length = window[1] - window[0]
    top = sorted(spent.items(), key=lambda item: -sum(item[1]))[:TOP]
    steps = len(marks) - SETTLE - 1
    return {
        "busy_share": covered(((e["ts"], e["ts"] + e["dur"]) for e in busy), window) / length,
        "device": "card" if on_card else "host",
        "steps": steps,
        "step_us": statistics.median(b - a for a, b in zip(marks[SETTLE:], marks[SETTLE + 1 :], strict=False)),
        "launches_per_step": len(busy) / steps,
        "top": [
            {"name": name, "us_per_step": sum(d) / steps, "calls_per_step": len(d) / steps, "share": sum(d) / length} for name, d in top
        ],
    }


def watch(engine: Engine, tracer: Tracer) -> None:
    """Time what this process does for a step."""
    scheduler: Any = engine.scheduler
    executor: Any = engine._executor
    for owner, name in ((scheduler, "plan"), (scheduler, "apply"), (executor, "send"), (engine, "_deliver")):
        setattr(owner, name, tracer.timed(getattr(owner, name), name.strip("_"), "loop"))


async def record(args: argparse.Namespace, trace: Path) -> list[dict[str, Any]]:
    """Run the engine until the rank has written its trace; its events with ours."""
    wish = Wish(args.rows, args.skip, args.steps, str(trace))
    needed = args.skip + args.steps + 64
    work = offline.Work(False, (args.rows,), (), 0, 1.0, needed, 1)
    args.set = [*args.set, "engine.executor=process"]
    config = offline.configure(args, work)
    engine = build_engine(config, resolve_spec(config))
    os.environ |= wish.export()
    original, worker.worker_main = worker.worker_main, profiled_rank
    tracer = Tracer("server")
    try:
        await engine.start()
        with contextlib.suppress(AttributeError):  # an engine whose parts cannot be replaced is not timed here
            watch(engine, tracer)
        rng = random.Random(0)
        room = engine.session_len - 64
        prompt = min(offline.DECODE_PROMPT_TOKENS, room // 2)
        params = SamplingParams(max_tokens=min(100_000, room - prompt), temperature=0.0, ignore_eos=True)
        running = [engine.submit(random_ids(rng, prompt, engine.spec.vocab_size), params) for _ in range(args.rows)]
        ended = asyncio.ensure_future(_end(running))
        deadline = time.monotonic() + TIMEOUT_S
        while not written(trace) and not ended.done() and time.monotonic() < deadline:
            await asyncio.wait([ended], timeout=0.05)
        for generation in running:
            generation.abort()
        await asyncio.gather(ended, return_exceptions=True)
    finally:
        worker.worker_main = original
        del os.environ[VARIABLE]
        await engine.stop()
    if not written(trace):
        raise RuntimeError(
            f"no {args.skip + args.steps} steps of {args.rows} rows ran before the sequences ended or {TIMEOUT_S:.0f} s passed"
        )
    return joined(trace, tracer.events)


def written(trace: Path) -> bool:
    return trace.exists()


def joined(trace: Path, ours: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rank's events, and ours of the same time."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    times = [e["ts"] for e in events if e.get("ph") == "X"]
    low, high = min(times, default=0.0), max(times, default=0.0)
    return events + [e for e in ours if e["ph"] == "M" or low <= e["ts"] <= high]


async def _end(running: list[Any]) -> None:
    """Until one sequence ends."""

    async def one(generation: Any) -> None:
        while (await generation.next())[-1].finish_reason is None:
            pass

    tasks = [asyncio.ensure_future(one(generation)) for generation in running]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.profile", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    offline.add_model_arguments(p)
    p.add_argument("--rows", type=int, default=1, help="sequences that decode together")
    p.add_argument("--skip", type=int, default=16, help="steady steps before the recorded ones")
    p.add_argument("--steps", type=int, default=48, help="steps to record")
    p.add_argument("--trace", default="", help="write the Chrome trace here; compressed where the name ends in .gz")
    p.add_argument("--json", action="store_true")
    args = p.parse_args(argv)
    if not (1 <= args.rows <= 4096 and 0 <= args.skip <= 10_000 and SETTLE + 3 <= args.steps <= 10_000):
        p.error(f"--rows must be 1..4096, --skip 0..10000 and --steps {SETTLE + 3}..10000")
    with tempfile.TemporaryDirectory() as folder:
        try:
            events = asyncio.run(record(args, Path(folder) / "rank.json"))
            out = summary(events)
        except (EngineError, ValueError, OSError, RuntimeError) as error:
            print(f"bench.profile: {error}", file=sys.stderr)
            return 2
    if args.trace:
        data = json.dumps({"traceEvents": events}).encode()
        Path(args.trace).write_bytes(gzip.compress(data, 6) if args.trace.endswith(".gz") else data)
    out |= {"bench": "profile", "rows": args.rows, "model": Path(args.model).name, "set": args.set, "machine": describe_machine()}
    print(f"{out['device']} busy {100 * out['busy_share']:.1f} %; {out['steps']} steps of {args.rows} rows, {out['step_us']:.0f} us each")
    for row in out["top"]:
        print(f"{100 * row['share']:6.1f} %  {row['us_per_step']:9.1f} us  {row['calls_per_step']:6.1f} x  {row['name'][:90]}")
    if args.json:
        print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
