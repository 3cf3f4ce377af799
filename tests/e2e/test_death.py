"""How a server ends: a rank killed, a rank frozen, SIGTERM while streams run. Nothing hangs and nothing is orphaned."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import Event, Server, Stream, descendants, is_alive, ranks

MOCK = ("engine.executor=process", "engine.mock_step_s=0.02")
LONG = {"prompt": "tell me", "max_tokens": 400, "ignore_eos": True, "stream": True, "temperature": 0}


def knobs_of(model: str, tp: int, toy: Path) -> tuple[str, ...]:
    if model == "mock":
        return (*MOCK, f"engine.tp={tp}")
    return (
        "engine.device=cpu", "engine.executor=process", f"engine.tp={tp}", f"model.path={toy}", "model.dtype=float32",
        "engine.session_len=512", "engine.max_batch_size=8", "cache.num_blocks=128", "engine.num_threads=1",
    )  # fmt: skip


async def streams_until(server: Server, strike: Callable[[], None], count: int = 4, **body: Any) -> tuple[list[list[Event]], float]:
    """Open streams, wait for the first event of each, strike, read to the end; all events, and the seconds it took."""
    streams = await asyncio.gather(*(Stream.open(server.port, LONG | body | {"prompt": f"tell me {i}"}) for i in range(count)))
    assert [stream.status for stream in streams] == [200] * count
    for stream in streams:
        await stream.reader.readuntil(b"\n\n")
    strike()
    struck = time.monotonic()
    events = await asyncio.gather(*(stream.events() for stream in streams))
    took_s = time.monotonic() - struck
    for stream in streams:
        stream.close()
    return events, took_s


def assert_ended_with_an_error(events: list[list[Event]]) -> None:
    for seen in events:
        assert "error" in seen[-1].json(), seen[-1]
        assert all("error" not in event.json() for event in seen[:-1])


def assert_no_orphans(pids: list[int]) -> None:
    deadline = time.monotonic() + 5
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [pid for pid in pids if is_alive(pid)] == []


@pytest.mark.parametrize("model, tp, victim", [("mock", 1, 0), ("mock", 2, 1), ("toy", 2, 0)])
def test_kill_of_a_rank(model: str, tp: int, victim: int, toy: Path) -> None:
    with Server(*knobs_of(model, tp, toy)) as server:
        server.ready()
        processes = descendants(server.process.pid)
        found = ranks(server.process.pid)
        assert len(found) == tp
        seen_live: list[int] = []

        def strike() -> None:
            os.kill(found[victim], signal.SIGKILL)

        async def run() -> tuple[list[list[Event]], float]:
            watch = asyncio.create_task(asyncio.to_thread(watch_live, server, seen_live))
            result = await streams_until(server, strike)
            await watch
            return result

        events, took_s = asyncio.run(run())
        assert took_s < 5
        assert_ended_with_an_error(events)
        assert server.wait(10) == 5
        assert 503 in seen_live
        assert_no_orphans(processes)


def watch_live(server: Server, seen: list[int]) -> None:
    """Ask /health/live until nobody answers."""
    while server.process.poll() is None:
        seen.append(server.get("/health/live")[0])
        time.sleep(0.01)


def test_a_frozen_rank_is_noticed_by_the_watchdog(toy: Path) -> None:
    tp = 2
    with Server(*knobs_of("mock", tp, toy), "engine.step_timeout_s=1.0") as server:
        server.ready()
        processes = descendants(server.process.pid)
        frozen = ranks(server.process.pid)[0]
        events, took_s = asyncio.run(streams_until(server, lambda: os.kill(frozen, signal.SIGSTOP)))
        assert 0.5 < took_s < 6
        assert_ended_with_an_error(events)
        assert server.wait(15) == 6
        assert_no_orphans(processes)


@pytest.mark.parametrize("model, tp", [("mock thread", 1), ("toy", 2)])
def test_sigterm_lets_streams_finish(model: str, tp: int, toy: Path) -> None:
    knobs = ("engine.mock_step_s=0.02",) if model == "mock thread" else knobs_of(model, tp, toy)
    with Server(*knobs) as server:
        server.ready()
        processes = descendants(server.process.pid)
        events, took_s = asyncio.run(streams_until(server, lambda: server.signal(signal.SIGTERM), max_tokens=60))
        for seen in events:
            assert seen[-1].data == "[DONE]"
            assert [c["finish_reason"] for e in seen[:-1] for c in e.json()["choices"]][-1] == "length"
        assert took_s < 15
        assert server.wait(10) == 0
        assert_no_orphans(processes)


def test_ranks_do_not_outlive_a_killed_server(toy: Path) -> None:
    tp = 2
    with Server(*knobs_of("mock", tp, toy)) as server:
        server.ready()
        processes = descendants(server.process.pid)
        assert len(ranks(server.process.pid)) == tp
        server.signal(signal.SIGKILL)
        server.wait(5)
        assert_no_orphans(processes)


def test_sigterm_while_loading_is_quick(toy: Path) -> None:
    with Server(*knobs_of("toy", 2, toy)) as server:
        deadline = time.monotonic() + 20
        while not ranks(server.process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        processes = descendants(server.process.pid)
        assert server.get("/health")[0] == 503
        server.signal(signal.SIGTERM)
        assert server.wait(6) == 0
        assert_no_orphans(processes)
