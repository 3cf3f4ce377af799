"""Random traffic through the real loop, scheduler and cache onto the mock model, whose canary checks every read.

Every answer must equal the one that the naive one-at-a-time function gives, whatever was preempted, aborted, cached
or split; afterwards every block is FREE or CACHED and the books balance.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from engine.loop import Engine, Generation
from engine.mock import mock_answer
from engine.sequence import FinishReason, SamplingParams
from tests.harness import collect, configure, running

PRESSURES: dict[str, dict[str, dict[str, Any]]] = {
    "roomy": {"engine": {"max_batch_size": 32}, "cache": {"num_blocks": 1024, "cache_block_seq_len": 8}},
    "preempting": {"engine": {"max_batch_size": 16, "max_prefill_token_num": 40}, "cache": {"num_blocks": 30, "cache_block_seq_len": 4}},
    "one position a block": {"engine": {"max_batch_size": 4}, "cache": {"num_blocks": 140, "cache_block_seq_len": 1}},
    "parts of one token": {
        "engine": {"max_batch_size": 8, "max_prefill_token_num": 1},
        "cache": {"num_blocks": 64, "cache_block_seq_len": 4},
    },
    "no prefix cache": {
        "engine": {"max_batch_size": 16},
        "cache": {"num_blocks": 40, "cache_block_seq_len": 4, "enable_prefix_caching": False},
    },
    "one slot": {"engine": {"max_batch_size": 1}, "cache": {"num_blocks": 32, "cache_block_seq_len": 4}},
}


def random_prompt(rng: random.Random) -> list[int]:
    """Two symbols, so that prefixes collide often; sometimes an exact number of blocks."""
    return [rng.choice((65, 66)) if rng.random() < 0.15 else 65 for _ in range(rng.choice((1, 3, 4, 8, 16, rng.randrange(1, 60))))]


def random_params(rng: random.Random) -> SamplingParams:
    max_tokens = rng.randrange(1, 50)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=rng.choice((0, 0, rng.randrange(0, max_tokens + 1))),
        temperature=rng.choice((0.0, 1.0)),
        seed=rng.randrange(4),
        stop_token_ids=rng.choice(((), (40, 41, 42))),
        ignore_eos=rng.random() < 0.3,
    )


async def one_client(engine: Engine, rng: random.Random) -> str:
    """Submit, and either read to the end and compare, or go away at a random moment."""
    prompt, params, salt = random_prompt(rng), random_params(rng), rng.choice((b"", b"", b"other"))
    generation = engine.submit(prompt, params, priority=rng.choice((0, 0, 0, -1, 5)), salt=salt)
    if rng.random() < 0.3:
        return await drop(generation, rng)
    events = await collect(generation)
    expected = mock_answer(prompt, params)
    assert [event.token_id for event in events] == expected
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else engine.spec.eos_token_ids)}
    reason = FinishReason.STOP if expected[-1] in ends else FinishReason.LENGTH
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [reason]
    return "finished"


async def drop(generation: Generation, rng: random.Random) -> str:
    seen = 0
    for _ in range(rng.randrange(0, 12)):
        events = await generation.next()
        seen += len(events)
        if events[-1].finish_reason is not None:
            return "finished before it was dropped"
        await asyncio.sleep(0)
    generation.abort()
    generation.abort()
    return "dropped"


async def traffic(seed: int, num_clients: int, pressure: dict[str, dict[str, Any]], spread_s: float = 0.3) -> dict[str, int]:
    rng = random.Random(seed)
    sections = {name: dict(knobs) for name, knobs in pressure.items()}
    sections["engine"] |= {"device": "mock", "session_len": 120, "executor": "thread"}
    sections["admission"] = {"max_queue_tokens": 1 << 20}
    counts: dict[str, int] = {}
    async with running(configure(**sections)) as engine:

        async def later(delay_s: float, own: random.Random) -> None:
            await asyncio.sleep(delay_s)
            outcome = await one_client(engine, own)
            counts[outcome] = counts.get(outcome, 0) + 1

        async with asyncio.timeout(100):
            await asyncio.gather(*(later(rng.random() * spread_s, random.Random(rng.random())) for _ in range(num_clients)))
            await engine.idle()
            await asyncio.sleep(0.05)  # the steps that were in flight at the last drop
        engine.check_integrity()
        snapshot = engine.snapshot()
        assert (snapshot.num_running, snapshot.num_waiting, snapshot.active) == (0, 0, 0)
        assert snapshot.free + snapshot.cached == snapshot.num_blocks
        return counts | {"preemptions": snapshot.preemptions, "hits": snapshot.prefix_hits}


@pytest.mark.parametrize("pressure", PRESSURES.values(), ids=PRESSURES.keys())
@pytest.mark.parametrize("seed", range(3))
def test_every_answer_is_the_one_at_a_time_answer(pressure: dict[str, dict[str, Any]], seed: int) -> None:
    counts = asyncio.run(traffic(seed, 120, pressure))
    assert counts["finished"] > 60
    assert counts["dropped"] > 10


def test_the_pressures_do_press() -> None:
    """All at once, so that how much they press does not depend on how fast the machine is."""
    counts = {name: asyncio.run(traffic(7, 100, pressure, spread_s=0.0)) for name, pressure in PRESSURES.items()}
    assert counts["preempting"]["preemptions"] > 3
    assert counts["roomy"]["hits"] > 20
    assert counts["no prefix cache"]["hits"] == 0
