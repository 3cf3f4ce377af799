"""From `TokenEvent` to socket: `python -m bench.delivery --streams 256 --seconds 5`.

The server's real application on real sockets of 127.0.0.1; in place of the engine an object that gives one event to
every stream in a step and makes the next step as soon as all streams have taken theirs. Readers that only count run in
another process. The server is pinned to one core, the readers to the other ones.

Prints a table; with `--json` the last line of stdout is {"token_events_per_s": ..., "loop_lag_p99_ms": ..., ...}.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

from api.app import make_app
from api.protocol import Listener
from api.service import Service
from bench.load import Lag
from bench.machine import Neighbours, describe_machine
from bench.metrics import percentile
from config.schema import Config
from engine.build import mock_spec
from engine.loop import Engine, EngineSnapshot, EngineStatus, Generation
from engine.sequence import FinishReason, SamplingParams, Sequence
from engine.step import TokenEvent
from text.tokenizer import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent
WARMUP_S = 0.5
START_TIMEOUT_S = 30.0
SESSION_LEN = 1 << 24
FIRST_PRINTABLE, NUM_PRINTABLE = 32, 95


class EventSource:
    """Stands where `engine.loop.Engine` stands, and computes nothing: events appear as fast as the streams take them."""

    def __init__(self, step_s: float) -> None:
        self.spec = mock_spec()
        self.session_len = SESSION_LEN
        self.status, self.reason = EngineStatus.READY, ""
        self.observers: list[Any] = []
        self.steps = 0
        self.sent = 0
        self.began = asyncio.Event()
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
    ) -> Generation:
        now = time.monotonic()
        sequence = Sequence(next(self._ids), list(prompt_ids), len(prompt_ids), params, arrival_s=now, priority=priority, salt=salt)
        sequence.first_scheduled_s = now
        self.began.set()
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
            self.sent += len(live)
            for generation in live:
                generation._push(TokenEvent(generation.sequence_id, token))
            await asyncio.sleep(self._step_s if live else 0.01)
            # nothing tells that a list was taken, and asking once a loop iteration costs less than an event would
            while any(generation._events for generation in live if generation.sequence_id in self._live):  # noqa: ASYNC110
                await asyncio.sleep(0)


async def serve(num_streams: int, seconds: float, step_s: float, reader_cores: set[int]) -> dict[str, float]:
    """Run server and readers once; what the readers counted, plus the server's own side."""
    config = Config()
    config = dataclasses.replace(config, admission=dataclasses.replace(config.admission, max_requests=num_streams + 1))
    source, service = EventSource(step_s), Service(config, "mock")
    service.serve(cast(Engine, source), ByteTokenizer(), None)
    listener, lag = Listener(make_app(service), config.http), Lag(0.005)
    port = await listener.start("127.0.0.1", 0, None)
    tasks = [asyncio.create_task(source.run())]
    words = [sys.executable, "-m", "bench.readers", str(port), str(num_streams), str(WARMUP_S), str(seconds)]
    reader = await asyncio.create_subprocess_exec(*words, cwd=ROOT, stdout=subprocess.PIPE)
    os.sched_setaffinity(reader.pid, reader_cores)
    try:
        tasks.append(asyncio.create_task(lag.watch()))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(source.began.wait(), START_TIMEOUT_S)
        cpu, sent = time.process_time(), source.sent
        out, _ = await asyncio.wait_for(reader.communicate(), seconds + 60)
        cpu, sent = time.process_time() - cpu, source.sent - sent
    finally:
        if reader.returncode is None:
            reader.kill()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await listener.close(1.0)
        service.close()
    if reader.returncode:
        raise RuntimeError(f"the readers failed with exit code {reader.returncode}")
    return json.loads(out) | {
        "loop_lag_p50_ms": percentile(lag.late_s, 50) * 1000,
        "loop_lag_p99_ms": percentile(lag.late_s, 99) * 1000,
        "server_cpu_us_per_event": 1e6 * cpu / max(sent, 1),
    }


def measure(num_streams: int, seconds: float, step_s: float, loop: str) -> dict[str, Any]:
    """One run on the cores this process may use: the server on the first, the readers on the others."""
    cores = sorted(os.sched_getaffinity(0))
    server_core, reader_cores = {cores[0]}, set(cores[1:]) or {cores[0]}
    os.sched_setaffinity(0, server_core)
    try:
        with asyncio.Runner(loop_factory=_loop_factory(loop)) as runner:
            r = runner.run(serve(num_streams, seconds, step_s, reader_cores))
    finally:
        os.sched_setaffinity(0, cores)
    rate = r["events"] / r["seconds"]
    return {
        "token_events_per_s": rate,
        "us_per_event": 1e6 / rate if rate else 0.0,
        "streams": num_streams,
        "step_s": step_s,
        "loop": loop,
        "cores": {"server": sorted(server_core), "readers": sorted(reader_cores)},
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
    p.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    p.add_argument("--json", action="store_true")
    args = p.parse_args(argv)
    if not (1 <= args.streams <= 10_000 and 0.1 <= args.seconds <= 300 and 1 <= args.repeats <= 20 and 0 <= args.step_s <= 10):
        p.error("needs 1..10000 streams, 0.1..300 seconds, 1..20 repeats and a step of 0..10 s")
    logging.getLogger("numbatch").setLevel(logging.CRITICAL)  # the readers leave in the middle of their streams, on purpose
    neighbours = Neighbours()
    runs = [measure(args.streams, args.seconds, args.step_s, args.loop) for _ in range(args.repeats)]
    runs.sort(key=lambda r: r["token_events_per_s"])
    out = runs[len(runs) // 2] | {"runs": [r["token_events_per_s"] for r in runs]}
    out |= {"machine": describe_machine(), "others_cpu_share": neighbours.share()}
    print(f"{out['streams']} streams, {args.loop}, server on core {out['cores']['server']}, readers on {out['cores']['readers']}")
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
