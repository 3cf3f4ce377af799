"""Drive an engine in process: ids in, ids out. Shared by the tests that compare answers across configurations."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from config.schema import Config
from engine.build import build_engine, resolve_spec
from engine.loop import Engine, Generation
from engine.sequence import FinishReason, SamplingParams
from engine.step import TokenEvent


def configure(**sections: dict[str, Any]) -> Config:
    """A `Config` from keyword sections: configure(engine={"tp": 2}, cache={...})."""
    config = Config()
    return dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **knobs) for name, knobs in sections.items()})


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[Engine]:
    engine = build_engine(config, resolve_spec(config))
    try:
        await engine.start()
        yield engine
    finally:
        await engine.stop()


async def collect(generation: Generation) -> list[TokenEvent]:
    """All events of a sequence, its terminal one last."""
    events: list[TokenEvent] = []
    while not events or events[-1].finish_reason is None:
        events += await generation.next()
    return events


async def answer(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> list[int]:
    events = await collect(engine.submit(list(prompt), params))
    assert events[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    return [event.token_id for event in events]


async def answers(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, *, together: bool) -> list[list[int]]:
    """One answer a prompt: all at once, or one after the other."""
    if together:
        return list(await asyncio.gather(*(answer(engine, prompt, params) for prompt in prompts)))
    return [await answer(engine, prompt, params) for prompt in prompts]
