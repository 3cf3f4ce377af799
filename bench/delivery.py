"""From `TokenEvent` to socket: `python -m bench.delivery --streams 256 --seconds 5`.

The server's real application on real sockets of 127.0.0.1; in place of the engine an object that gives one event to
every stream in a step and makes the next step as soon as all streams have taken theirs. Readers that only count run in
another process. The server is pinned to one core, the readers to the other ones. With `--model` the real engine makes
the events instead, on all cores: that run is for the event-loop lag beside a computing thread.

Prints a table; with `--json` the last line of stdout is {"token_events_per_s": ..., "loop_lag_p99_ms": ..., ...}.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, cast

from api.app import make_app
from api.protocol import Listener
from api.service import Service
from bench.load import Lag
from bench.machine import Neighbours, describe_machine
from bench.metrics import percentile
from config.load import load_config
from config.schema import Config
from engine.build import build_engine, mock_spec, resolve_spec
from engine.loop import Engine, EngineSnapshot, EngineStatus, Generation
from engine.sequence import FinishReason, SamplingParams, Sequence
from engine.step import TokenEvent
from text.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WARMUP_S = 0.5
READER_TIMEOUT_S = 60.0
SESSION_LEN = 1 << 24
FIRST_PRINTABLE, NUM_PRINTABLE = 32, 95


Engines = AbstractAsyncContextManager[tuple[Engine, Tokenizer, int]]


class EventSource:
    """Stands where `engine.loop.Engine` stands, and computes nothing: events appear as fast as the streams take them."""

    def __init__(self, step_s: float) -> None:
        self.spec = mock_spec()
        self.session_len = SESSION_LEN
        self.status, self.reason = EngineStatus.READY, ""
        self.observers: list[Any] = []
        self.steps = 0
        self._step_s = step_s
        self._live: dict[int, Generation] = {}
        self._ids = itertools.count(1)

    def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: bytes = b"",
        key: str = "",
        deadline_s: float = math.inf,
        session: str = "",
        user_id: str = "",
    ) -> Generation:
        now = time.monotonic()
        sequence = Sequence(next(self._ids), list(prompt_ids), len(prompt_ids), params, arrival_s=now, priority=priority, salt=salt)
        sequence.first_scheduled_s = now
        generation = self._live[sequence.id] = Generation(cast(Engine, self), sequence)
        return generation

    def abort(self, sequence_id: int, reason: FinishReason = FinishReason.ABORT) -> None:
        self._live.pop(sequence_id, None)

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(len(self._live), 0, 0, 0, 0, 0, 0, 0, 0, 0, self.steps, time.monotonic())

    async def run(self) -> None:
        """A step: one event to each stream; the next when all have been taken."""
        while True:
            token = FIRST_PRINTABLE + self.steps % NUM_PRINTABLE
            self.steps += 1
            live = list(self._live.values())
            for generation in live:
                generation._push(TokenEvent(generation.sequence_id, token))
            await asyncio.sleep(self._step_s if live else 0.01)
            # nothing tells that a list was taken, and asking once a loop iteration costs less than an event would
            while any(generation._events for generation in live if generation.sequence_id in self._live):  # noqa: ASYNC110
                await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def event_source(config: Config, step_s: float) -> AsyncIterator[tuple[Engine, Tokenizer, int]]:
    """The mock that only makes events, its tokenizer, and how many tokens a stream may ask for."""
    source = EventSource(step_s)
    task = asyncio.create_task(source.run())
    try:
        yield cast(Engine, source), ByteTokenizer(), SESSION_LEN // 2
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def real_engine(config: Config) -> AsyncIterator[tuple[Engine, Tokenizer, int]]:
    """The engine that the configuration describes, computing in its thread beside this event loop."""
    engine = build_engine(config, resolve_spec(config))
    await engine.start()
    try:
        yield engine, load_tokenizer(Path(config.model.path)), engine.session_len - 8
    finally:
        await engine.stop()


async def serve(num_streams: int, seconds: float, config: Config, engines: Engines, reader_cores: set[int]) -> dict[str, float]:
    """Run server and readers once; what the readers counted, plus the server's own side."""
    service, listener, lag = Service(config, "bench"), None, Lag(0.005)
    async with contextlib.AsyncExitStack() as stack:
        engine, tokenizer, max_tokens = await stack.enter_async_context(engines)
        stack.callback(service.close)
        service.serve(engine, tokenizer, None)
        listener = Listener(make_app(service), config.http)
        port = await listener.start("127.0.0.1", 0, None)
        stack.push_async_callback(listener.close, 1.0)
        words = [port, num_streams, max_tokens, WARMUP_S, seconds]
        reader = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.readers", *map(str, words), cwd=ROOT, stdout=subprocess.PIPE
        )
        os.sched_setaffinity(reader.pid, reader_cores)
        watcher = asyncio.create_task(lag.watch())
        try:
            out, _ = await asyncio.wait_for(reader.communicate(), seconds + READER_TIMEOUT_S)
        finally:
            if reader.returncode is None:
                reader.kill()
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
    if reader.returncode:
        raise RuntimeError(f"the readers failed with exit code {reader.returncode}")
    return json.loads(out) | {
        "loop_lag_p50_ms": percentile(lag.late_s, 50) * 1000,
        "loop_lag_p99_ms": percentile(lag.late_s, 99) * 1000,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One run. With the mock, the server is on the first core and the readers are on the others; a model gets all cores."""
    cores = sorted(os.sched_getaffinity(0))
    server_cores = set(cores) if args.model else {cores[0]}
    reader_cores = set(cores[1:]) or {cores[0]}
    sets = [f"admission.{name}={args.streams + 64}" for name in ("max_requests", "max_requests_per_key")]
    sets += [f"model.path={args.model}", f"engine.max_batch_size={max(64, args.streams)}"] if args.model else ["engine.device=mock"]
    config = load_config(None, sets=sets).config
    engines = real_engine(config) if args.model else event_source(config, args.step_s)
    os.sched_setaffinity(0, server_cores)
    cpu = time.process_time()
    try:
        with asyncio.Runner(loop_factory=_loop_factory(args.loop)) as runner:
            r = runner.run(serve(args.streams, args.seconds, config, engines, reader_cores))
    finally:
        os.sched_setaffinity(0, cores)
    cpu = time.process_time() - cpu
    rate = r["events"] / r["seconds"]
    return {
        "token_events_per_s": rate,
        "us_per_event": 1e6 / rate if rate else 0.0,
        "streams": args.streams,
        "engine": Path(args.model).name if args.model else "mock",
        "step_s": args.step_s,
        "loop": args.loop,
        "cores": {"server": sorted(server_cores), "readers": sorted(reader_cores)},
        "server_cpu_us_per_event": 1e6 * cpu / max(r["events_in_all"], 1),
        "reader_cpu_share": r["cpu_s"] / r["seconds"],
        **r,
    }


def _loop_factory(name: str) -> Any:
    if name == "uvloop":
        import uvloop

        return uvloop.new_event_loop
    return None


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.delivery", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--streams", type=int, default=256)
    p.add_argument("--seconds", type=float, default=5.0)
    p.add_argument("--repeats", type=int, default=3, help="runs; the median one is reported")
    p.add_argument("--step-s", type=float, default=0.0, help="pause of a step; 0: as fast as the streams take events")
    p.add_argument("--model", default="", help="a checkpoint: the real engine in place of the mock (for the event-loop lag)")
    p.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    p.add_argument("--json", action="store_true")
    args = p.parse_args(argv)
    if not (1 <= args.streams <= 10_000 and 0.1 <= args.seconds <= 300 and 1 <= args.repeats <= 20 and 0 <= args.step_s <= 10):
        p.error("needs 1..10000 streams, 0.1..300 seconds, 1..20 repeats and a step of 0..10 s")
    logging.getLogger("numbatch").setLevel(logging.CRITICAL)  # the readers leave in the middle of their streams, on purpose
    neighbours = Neighbours()
    runs = [measure(args) for _ in range(args.repeats)]
    runs.sort(key=lambda r: r["token_events_per_s"])
    out = runs[len(runs) // 2] | {"runs": [r["token_events_per_s"] for r in runs]}
    out |= {"machine": describe_machine(), "others_cpu_share": neighbours.share()}
    cores = out["cores"]
    print(f"{out['streams']} streams, {out['engine']} engine, {args.loop}, server on {cores['server']}, readers on {cores['readers']}")
    print(f"token events      {out['token_events_per_s']:>10,.0f} /s   ({out['us_per_event']:.1f} us each; runs {_range(out['runs'])})")
    print(f"event-loop lag    {out['loop_lag_p50_ms']:>10.2f} ms p50, {out['loop_lag_p99_ms']:.2f} ms p99")
    print(f"processor time    {out['server_cpu_us_per_event']:>10.1f} us an event, server; readers {out['reader_cpu_share']:.0%} of a core")
    print(f"events a stream   {out['stream_min']:>10} fewest, {out['stream_max']} most")
    if args.json:
        print(json.dumps(out))
    return 0


def _range(values: list[float]) -> str:
    return f"{min(values):,.0f} .. {max(values):,.0f}"


if __name__ == "__main__":
    sys.exit(main())
