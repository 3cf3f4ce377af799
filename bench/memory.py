"""Planned memory against what is really taken, and a pool that is too small: `python -m bench.memory --model DIR --json`.

First, on a card: its free memory before the engine starts and after it has served, against the plan's total (a host gives
memory only when it is touched, so that nothing can be said there). Then: many long sequences with room for half of them,
greedy, against the same sequences with room for all: every one must end, and its ids are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from bench import offline
from bench.machine import describe_machine
from bench.workload import random_ids
from config.schema import Config
from engine.build import build_engine, resolve_spec
from engine.cards import cards
from engine.errors import EngineError
from engine.load_backend import resolve_device, resolved
from engine.loop import Engine
from engine.plan import free_memory, plan_memory
from engine.sequence import SamplingParams

MIB = 2**20


def used_bytes(device: str) -> int:
    """Of the first card, by all processes; 0 on a host."""
    if device != "cuda":
        return 0
    card = cards()[0]
    return card.total_bytes - card.free_bytes


async def answers(engine: Engine, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy ids of all prompts, sent at once."""

    async def one(prompt: list[int]) -> list[int]:
        generation = engine.submit(prompt, SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True))
        ids: list[int] = []
        while len(ids) < num_tokens:
            events = await generation.next()
            ids += [event.token_id for event in events if event.token_id >= 0]
            if events[-1].finish_reason is not None and len(ids) < num_tokens:
                raise RuntimeError(f"a sequence ended after {len(ids)} of {num_tokens} tokens: {events[-1].finish_reason.name}")
        return ids

    return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


async def run(config: Config, prompts: list[list[int]], num_tokens: int) -> tuple[list[list[int]], dict[str, Any]]:
    """Start, answer, look at memory, stop."""
    device = resolve_device(config)
    before = used_bytes(device)
    engine = build_engine(config, resolve_spec(config))
    await engine.start()
    try:
        began = time.perf_counter()
        found = await answers(engine, prompts, num_tokens)
        seconds = time.perf_counter() - began
        snapshot = engine.snapshot()
        facts = {"used_bytes": used_bytes(device) - before, "seconds": seconds}
        facts |= {"preemptions": snapshot.preemptions, "num_blocks": snapshot.num_blocks}
    finally:
        await engine.stop()
    return found, facts


def agreement(left: list[list[int]], right: list[list[int]]) -> dict[str, float]:
    """Share of sequences whose ids are all equal, and of positions before the first that differs."""
    same = sum(a == b for a, b in zip(left, right, strict=True))
    prefix = sum(next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a)) for a, b in zip(left, right, strict=True))
    return {"equal_sequences": same / len(left), "equal_prefix": prefix / sum(map(len, left))}


def with_blocks(config: Config, num_blocks: int) -> Config:
    return dataclasses.replace(config, cache=dataclasses.replace(config.cache, num_blocks=num_blocks))


def measure(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    spec = resolve_spec(config)
    plan = plan_memory(config, spec, config.model.path, free_memory(config))
    if plan.shortfall:
        raise ValueError(plan.shortfall)
    planned = plan.weight_bytes + plan.workspace_bytes + plan.kv_bytes
    rng = random.Random(0)
    length = args.length - args.tokens
    prompts = [random_ids(rng, length, spec.vocab_size) for _ in range(args.sequences)]
    blocks = -(-args.length // config.cache.cache_block_seq_len)
    whole, roomy = asyncio.run(run(with_blocks(config, min(plan.num_blocks, args.sequences * (blocks + 1))), prompts, args.tokens))
    pressed, tight = asyncio.run(run(with_blocks(config, args.sequences * blocks // 2), prompts, args.tokens))
    pressure = {"roomy": roomy, "tight": tight, **agreement(whole, pressed)}
    if plan.device != "cuda":
        return {"pressure": pressure}
    _, own = asyncio.run(run(config, prompts[:2], 2))
    real = {"used_bytes": own["used_bytes"], "num_blocks": own["num_blocks"]}
    planned_too = {"planned_bytes": planned, "planned_blocks": plan.num_blocks, "plan_error": planned / max(1, own["used_bytes"]) - 1}
    return {"pressure": pressure, **real, **planned_too}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.memory", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    offline.add_model_arguments(p)
    p.add_argument("--sequences", type=int, default=200)
    p.add_argument("--length", type=int, default=4096, help="positions of each, prompt and answer")
    p.add_argument("--tokens", type=int, default=512, help="of them the answer")
    p.add_argument("--json", action="store_true")
    args = p.parse_args(argv)
    if not (2 <= args.sequences <= 4096 and 1 <= args.tokens < args.length):
        p.error("--sequences must be 2..4096, --tokens at least 1 and below --length")
    try:
        config = resolved(offline.configure(args, offline.Work(False, (args.sequences,), (), 0, 1.0, args.tokens, 1)))
        out = measure(config, args)
    except (EngineError, ValueError, OSError, RuntimeError) as error:
        print(f"bench.memory: {error}", file=sys.stderr)
        return 2
    out |= {"bench": "memory", "model": Path(args.model).name, "machine": describe_machine(), "set": args.set}
    if "plan_error" in out:
        print(f"planned {out['planned_bytes'] / MIB:,.0f} MiB, taken {out['used_bytes'] / MIB:,.0f} MiB: {100 * out['plan_error']:+.1f} %")
    tight = out["pressure"]["tight"]
    print(
        f"{args.sequences} x {args.length} with {tight['num_blocks']} blocks: all ended in {tight['seconds']:.1f} s, "
        f"{tight['preemptions']} preemptions; {100 * out['pressure']['equal_sequences']:.1f} % of answers equal, "
        f"{100 * out['pressure']['equal_prefix']:.1f} % of ids before the first that differs"
    )
    if args.json:
        print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
