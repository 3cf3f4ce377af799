"""GET / and GET /status.json: a page that shows the server at work, and the numbers it asks for every second.

The page is one static file that loads nothing from anywhere; its script and style are allowed by their hashes and by
nothing else. It holds no data, so it needs no key; the numbers need one like every other route. They name sequences by
number, never by text, session or key. Making them costs the event loop time, so they are made in slices, at most once in
`MIN_AGE_S` and never for more than 1 % of the time, however many pages are open.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from aiohttp import web

from api.counters import Histogram
from api.errors import json_response
from api.health import verdict
from api.service import SERVICE, Served, Service
from config.version import VERSION
from engine.cache.blocks import Block, BlockState
from engine.cards import cards
from engine.errors import EngineError
from engine.host import free_bytes
from engine.loop import Engine
from formats.errors import FormatError

MAX_CELLS = 4000  # of the block map; larger pools put several blocks into a cell
MAX_SEQUENCES = 200
MIN_AGE_S = 0.5
COST_SHARE = 0.01  # of the event loop's time
SLICE_BLOCKS = 2048  # between which the event loop does other things

PAGE = Path(__file__).with_name("pages") / "status.html"
ASKS_KEY = "data-asks-key"


def _hashes(page: str, tag: str) -> str:
    """CSP sources of the page's own <script> or <style>."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)


TEXT = PAGE.read_text(encoding="utf-8")
CSP = (
    f"default-src 'none'; script-src {_hashes(TEXT, 'script')}; style-src {_hashes(TEXT, 'style')}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def status_page(request: web.Request) -> web.Response:
    """GET /"""
    secured = bool(request.app[SERVICE].config.server.api_keys)
    text = TEXT if secured else TEXT.replace(f" {ASKS_KEY}", "", 1)
    headers = {"Content-Security-Policy": CSP, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return web.Response(text=text, content_type="text/html", charset="utf-8", headers=headers)


async def status_json(request: web.Request) -> web.Response:
    """GET /status.json: in every state of the server; what there is not (yet) is null."""
    service = request.app[SERVICE]
    kept = _kept.setdefault(service, Kept())
    if service.described is not None and kept.memory is UNKNOWN:
        kept.memory = None  # one plan a server, whoever asks meanwhile
        try:
            kept.memory = await service.in_thread(partial(memory, service.described.engine))
        except BaseException:  # also where the caller left: the next one asks again
            kept.memory = UNKNOWN
            raise
    async with kept.lock:
        if (started_s := time.monotonic()) >= kept.until_s:
            kept.answer = await status(service, kept.memory or None)
            ended_s = time.monotonic()
            kept.until_s = ended_s + max(MIN_AGE_S, (ended_s - started_s) / COST_SHARE)
    response = json_response(kept.answer)
    response.headers["Cache-Control"] = "no-store"
    return response


UNKNOWN: dict[str, Any] = {}  # the memory plan before anybody asked


@dataclass(slots=True)
class Kept:
    """Of one server, between two answers."""

    memory: dict[str, Any] | None = field(default_factory=lambda: UNKNOWN)
    answer: dict[str, Any] = field(default_factory=dict)
    until_s: float = 0.0  # monotonic: `answer` is good until then
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


_kept: WeakKeyDictionary[Service, Kept] = WeakKeyDictionary()


async def status(service: Service, plan: dict[str, Any] | None) -> dict[str, Any]:
    """Counters grow and never fall: the page makes rates of two answers. `now_s` is monotonic."""
    state, reason = verdict(service)
    served = service.described
    return {
        "version": VERSION,
        "now_s": time.monotonic(),
        "status": state,
        "reason": reason,
        "model": _model(service, served),
        "memory": plan,
        "counters": _counters(service),
        **(await _engine(served.engine) if served is not None else {"blocks": None, "queue": None, "sequences": []}),
    }


def memory(engine: Engine) -> dict[str, Any] | None:
    """Bytes of one rank: weights and workspace from the files' headers, KV as it was allocated. None where no model is loaded."""
    config = engine.config
    if config.engine.device == "mock":
        return None
    from engine.plan import plan_memory  # here: it brings numba, which a server whose model runs elsewhere starts without

    on_card = config.engine.device == "cuda"
    size = min((card.total_bytes for card in cards()[: config.engine.tp]), default=0) if on_card else free_bytes()
    try:
        plan = plan_memory(config, engine.spec, config.model.path, size)
    except (EngineError, FormatError, OSError) as error:  # the files may be gone by now; the model runs on
        return {"problem": f"The plan cannot be made: {type(error).__name__}."}
    return {
        "device": plan.device,
        "dtype": plan.dtype,
        "ranks": plan.ranks,
        "weights": plan.weights,
        "workspace": plan.workspace,
        "block_bytes": plan.block_bytes,
        "kv_bytes": (engine.manager.num_blocks + plan.spare_blocks) * plan.block_bytes,
    }


async def block_map(blocks: Sequence[Block], tables: Iterable[tuple[int, list[int]]], now: float, most: int = MAX_CELLS) -> dict[str, Any]:
    """Blocks in order, `per_cell` to a cell; `tables`: (sequence, its block table).

    A cell is 0 where all is FREE, else [ACTIVE, CACHED, of these pinned by sessions, owner, age in s]: three counts, the
    first sequence that holds one of its blocks (0: none), seconds since the oldest became what it is.
    """
    owners: dict[int, int] = {}
    seen = 0
    for sequence_id, table in tables:
        for block_id in table:
            owners.setdefault(block_id, sequence_id)
        if (seen := seen + len(table)) >= SLICE_BLOCKS:
            seen = 0
            await asyncio.sleep(0)
    per_cell = max(1, -(-len(blocks) // most))
    in_slice = max(1, SLICE_BLOCKS // per_cell) * per_cell
    cells: list[list[float] | int] = []
    for first in range(0, len(blocks), in_slice):
        last = min(first + in_slice, len(blocks))
        cells += [_cell(blocks[i : min(i + per_cell, last)], owners, now) for i in range(first, last, per_cell)]
        await asyncio.sleep(0)
    return {"per_cell": per_cell, "cells": cells}


def _cell(blocks: Sequence[Block], owners: dict[int, int], now: float) -> list[float] | int:
    used = [block for block in blocks if block.state is not BlockState.FREE]
    if not used:
        return 0
    active = sum(block.state is BlockState.ACTIVE for block in used)
    owner = next((owners[block.id] for block in used if block.id in owners), 0)
    age = now - min(block.since_s for block in used)
    return [active, len(used) - active, sum(block.pins > 0 for block in used), owner, round(max(age, 0.0), 1)]


def _model(service: Service, served: Served | None) -> dict[str, Any]:
    config = service.config
    out: dict[str, Any] = {"name": service.model_name, "quant_policy": config.cache.quant_policy, "tp": config.engine.tp}
    if served is not None:
        knobs = served.engine.config.engine
        out |= {
            "family": served.engine.spec.family,
            "device": knobs.device,
            "session_len": served.session_len,
            "vocab_size": served.vocab_size,
            "max_batch_size": knobs.max_batch_size,
        }
    return out


async def _engine(engine: Engine) -> dict[str, Any]:
    seen, manager, now = engine.snapshot(), engine.manager, time.monotonic()
    sequences = list(engine.scheduler.sequences.values())
    return {
        "blocks": {
            "total": seen.num_blocks,
            "free": seen.free,
            "active": seen.active,
            "cached": seen.cached,
            "pinned": seen.pinned,
            "block_seq_len": manager.block_seq_len,
            **await block_map(manager.blocks, ((seq.id, seq.blocks) for seq in sequences), now),
        },
        "queue": {"running": seen.num_running, "waiting": seen.num_waiting, "waiting_tokens": seen.waiting_tokens},
        "sequences": [
            {
                "id": seq.id,
                "status": seq.status.name,
                "prompt": seq.num_prompt,
                "cached": seq.num_cached,
                "generated": seq.num_generated,
                "blocks": len(seq.blocks),
                "age_s": round(now - seq.arrival_s, 1),
            }
            for seq in sequences[:MAX_SEQUENCES]
        ],
    }


def _counters(service: Service) -> dict[str, Any]:
    counted, engine = service.metrics, service.engine
    seen = engine.snapshot() if engine is not None else None
    return {
        "prompt_tokens": counted.prompt_tokens,
        "cached_tokens": counted.cached_tokens,
        "generation_tokens": counted.generation_tokens,
        "finished": sum(counted.finished.values()),
        "refused": sum(counted.refused.values()),
        "preemptions": seen.preemptions if seen else 0,
        "first_token_s": _mean(counted.first_token_s),
        "inter_token_s": _mean(counted.inter_token_s),
    }


def _mean(histogram: Histogram) -> dict[str, float]:
    """What a mean over any stretch of time is made of."""
    return {"count": sum(histogram.counts), "sum": histogram.total}
