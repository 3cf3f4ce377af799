"""Streams opened and dropped at random moments, and what must be left of them: nothing.

    python -m tests.e2e.storm --streams 1000 --rounds 3

Server and clients share one process and one event loop, so that tasks, threads, file descriptors and child processes
can be counted. After the last drop the engine may end the steps in flight; then every block is FREE or CACHED.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from api.lifecycle import Server
from config.load import load_config
from engine.loop import STEPS_IN_FLIGHT, Engine
from tests.e2e.support import ROOT, Stream, descendants, free_port, many_files, request_bytes

SETTLE_S = 30.0
MOMENTS = ("connect", "half headers", "half body", "sent", "headers", "some events", "some events", "late", "end")
KNOBS = ("engine.max_batch_size=256", "engine.mock_step_s=0.002", "cache.num_blocks=4096", "server.log_level=ERROR")
WAYS = ("close", "reset", "half-close")


@dataclass
class Left:
    """What was counted after a round."""

    outcomes: dict[str, int] = field(default_factory=dict)
    steps_until_idle_blocks: int = 0  # results between "no sequence" and "no ACTIVE block"
    tasks: list[str] = field(default_factory=list)  # more than before the round
    complaints: list[str] = field(default_factory=list)  # of the event loop: exceptions nobody retrieved


@dataclass
class Census:
    tasks: int
    files: int
    threads: int
    children: int

    @classmethod
    def take(cls) -> Census:
        gc.collect()
        files = len(os.listdir("/proc/self/fd"))
        return cls(len(asyncio.all_tasks()), files, threading.active_count(), len(descendants(os.getpid())))


def body_of(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Chat or completion; streamed or not; several choices; stop strings that hold text back; long and short prompts."""
    body: dict[str, Any] = {
        "stream": rng.random() < 0.85,
        "seed": rng.randrange(1 << 60),
        "max_tokens": rng.choice((1, 5, 40, 200)),
        "ignore_eos": True,
    }
    if rng.random() < 0.3:
        body["n"] = rng.choice((2, 3))
    if rng.random() < 0.3:
        body["stop"] = ["a", "never in the text", "  "][: rng.randrange(1, 4)]
    text = "x" * rng.choice((1, 3, 64, 300)) + str(rng.randrange(3))
    if rng.random() < 0.5:
        return "/v1/completions", body | {"prompt": text}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}


async def client(port: int, rng: random.Random, delay_s: float) -> str:
    """One connection that ends at a random moment in a random way; what became of it."""
    await asyncio.sleep(delay_s)
    path, body = body_of(rng)
    moment, way = rng.choice(MOMENTS), rng.choice(WAYS)
    data = request_bytes(port, body, path)
    cut = {"connect": 0, "half headers": data.index(b"\r\n\r\n") // 2, "half body": data.index(b"\r\n\r\n") + 9}.get(moment, len(data))
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return "not connected"
    try:
        writer.write(data[:cut])
        await _read_until(reader, moment, rng)
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        await _leave(writer, way, reader)
    return moment


async def _read_until(reader: asyncio.StreamReader, moment: str, rng: random.Random) -> None:
    if moment in ("connect", "half headers", "half body", "sent"):
        await asyncio.sleep(rng.random() * 0.05)
    elif moment == "headers":
        await reader.readuntil(b"\r\n\r\n")
    elif moment in ("some events", "late"):
        for _ in range(rng.randrange(1, 12 if moment == "some events" else 120)):
            await reader.readuntil(b"\n\n")
    else:
        await reader.read()


async def _leave(writer: asyncio.StreamWriter, way: str, reader: asyncio.StreamReader) -> None:
    if way == "reset":
        writer.transport.abort()
    elif way == "half-close":
        with contextlib.suppress(OSError):
            writer.write_eof()
            async with asyncio.timeout(10):
                await reader.read()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def wall(port: int, streams: int) -> None:
    """Streams in mid-answer, all dropped in the same instant."""
    body = {"prompt": "wall", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    for stream in await asyncio.gather(*(Stream.open(port, body) for _ in range(streams))):
        stream.reset()


async def settle(server: Server, engine: Engine) -> int:
    """Wait until no sequence is left, then until no block is ACTIVE; -> the steps that took."""
    deadline = time.monotonic() + SETTLE_S
    while (seen := engine.snapshot()).num_running or seen.num_waiting or server.service.live:
        if time.monotonic() > deadline:
            raise AssertionError(f"after {SETTLE_S} s: {seen}, {len(server.service.live)} live answers")
        await asyncio.sleep(0.001)
    first = seen.steps
    while (seen := engine.snapshot()).active:
        if time.monotonic() > deadline:
            raise AssertionError(f"blocks are still ACTIVE: {seen}")
        await asyncio.sleep(0)
    return seen.steps - first


async def one_round(server: Server, engine: Engine, port: int, streams: int, seed: int) -> Left:
    rng, left, before = random.Random(seed), Left(), asyncio.all_tasks()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: left.complaints.append(f"{context.get('message')}: {context.get('exception')!r}"))
    spread_s = streams / 500
    outcomes = await asyncio.gather(*(client(port, random.Random(rng.random()), rng.random() * spread_s) for _ in range(streams)))
    left.outcomes = {name: outcomes.count(name) for name in sorted(set(outcomes))}
    await wall(port, min(streams // 4, 250))
    left.steps_until_idle_blocks = await settle(server, engine)
    engine.check_integrity()
    seen = engine.snapshot()
    if seen.free + seen.cached != seen.num_blocks:
        raise AssertionError(f"blocks are missing: {seen}")
    await asyncio.sleep(0.1)  # handlers of requests that were never whole notice the end of their connections
    gc.collect()
    await asyncio.sleep(0)
    left.tasks = [repr(task) for task in asyncio.all_tasks() - before]
    return left


async def life(streams: int, rounds: int, seed: int, sets: tuple[str, ...]) -> list[Left]:
    """A server from start to end, with a small round to make what is made lazily and then `rounds` that count."""
    port = free_port()
    server = Server(load_config(ROOT / "config" / "mock.toml", sets=[f"server.server_port={port}", *KNOBS, *sets], environ={}).config)
    run = asyncio.create_task(server.run())
    while server.service.described is None:
        if run.done():
            raise AssertionError(f"the server ended with {run.result()}")
        await asyncio.sleep(0.01)
    engine = server.service.described.engine
    await asyncio.sleep(0.1)  # it waits for signals now
    await one_round(server, engine, port, 20, seed)
    idle = Census.take()
    results = [await one_round(server, engine, port, streams, seed + 1 + i) for i in range(rounds)]
    again = Census.take()
    server._signals.arrive()
    code = await asyncio.wait_for(run, 30)
    asyncio.get_running_loop().set_exception_handler(None)
    await asyncio.sleep(0.1)
    check(results, idle, again, code)
    return results


async def storm(streams: int, rounds: int, seed: int = 0, sets: tuple[str, ...] = ()) -> list[Left]:
    """Raises AssertionError where something is left behind."""
    many_files()
    await life(0, 0, seed, sets)
    bare = Census.take()
    results = await life(streams, rounds, seed, sets)
    after = Census.take()
    if after != bare:
        raise AssertionError(f"before the server {bare}, after it {after}: {open_files()} {threading.enumerate()}")
    return results


def check(results: list[Left], idle: Census, again: Census, code: int) -> None:
    if code != 0:
        raise AssertionError(f"the server ended with {code}")
    if (again.tasks, again.files, again.children) != (idle.tasks, idle.files, idle.children):
        raise AssertionError(f"idle before the storm {idle}, after it {again}: {open_files()}")
    for left in results:
        if left.tasks or left.complaints:
            raise AssertionError(f"left behind: {left.tasks[:5]} {left.complaints[:5]}")
        if left.steps_until_idle_blocks > STEPS_IN_FLIGHT:
            raise AssertionError(f"blocks came back {left.steps_until_idle_blocks} steps after the last sequence was gone")


def open_files() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(f"{name} -> {Path('/proc/self/fd', name).readlink()}")
    return found


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("--streams", type=int, default=1000)
    cli.add_argument("--rounds", type=int, default=3)
    cli.add_argument("--seed", type=int, default=0)
    args = cli.parse_args()
    import uvloop

    started = time.monotonic()
    results = uvloop.run(storm(args.streams, args.rounds, args.seed))
    outcomes: dict[str, int] = {}
    for left in results:
        for name, count in left.outcomes.items():
            outcomes[name] = outcomes.get(name, 0) + count
    steps = max(left.steps_until_idle_blocks for left in results)
    print(json.dumps({"outcomes": outcomes, "most_steps_until_idle_blocks": steps, "elapsed_s": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main()
