"""The whole engine over a KV pool of 8 and 4 bits, on the CPU and on an emulated card: prefixes, preemption, parts, graphs, ranks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from config.schema import Config
from engine.build import build_engine, resolve_spec
from engine.load_backend import resolved
from engine.loop import Engine
from engine.plan import plan_memory
from tests.engine.cuda.test_engine import config_of, engine_of
from tests.engine.judge import SESSION_LEN, Reference, greedy
from tests.fixtures.toy import biased_checkpoint, toy_checkpoint
from tests.harness import answers, configure

PROMPTS = [list(range(3, 3 + n)) for n in (1, 17, 37)]
MARGIN = 0.12  # standard deviations: a number between two codes may get the other one


def config_on(device: str, path: Path, root: Path, bits: int, engine: dict[str, Any] | None = None, blocks: int = 24) -> Config:
    cache = {"num_blocks": blocks, "cache_block_seq_len": 16, "quant_policy": bits}
    if device == "cuda":
        return config_of(path, root, "bfloat16", engine=engine or {}, cache=cache)
    knobs = {"device": device, "max_batch_size": 4, "session_len": SESSION_LEN, "max_prefill_token_num": 24, "num_threads": 1}
    if device == "cpu":
        knobs["kernel_cache_dir"] = str(root / ".cache" / "kernels")
    return resolved(configure(model={"path": str(path), "dtype": "float32"}, engine=knobs | (engine or {}), cache=cache))


async def every_way(engine: Engine, max_tokens: int, prompts: list[list[int]] = PROMPTS) -> tuple[list[list[int]], int]:
    """Ids of all prompts together, then alone with their prefixes cached: the same; and the number of preemptions."""
    await engine.start()
    try:
        together = await answers(engine, prompts, greedy(max_tokens), together=True)
        preemptions = engine.snapshot().preemptions
        alone = await answers(engine, prompts, greedy(max_tokens), together=False)
        engine.check_integrity()
        assert together == alone
        return together, preemptions
    finally:
        await engine.stop()


def engine_on(config: Config) -> Engine:
    return engine_of(config)[0] if config.engine.device == "cuda" else build_engine(config, resolve_spec(config))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ids_are_the_references_over_the_same_pool(device: str, bits: int, tmp_path: Path, root: Path) -> None:
    make = biased_checkpoint if bits == 8 else toy_checkpoint  # keys in a frame, and without
    model = make(tmp_path / "model", hidden=128, heads=2, kv_heads=1)
    config = config_on(device, model, root, bits)
    ids, _ = asyncio.run(every_way(engine_on(config), 5))
    reference = Reference(model, resolve_spec(config), bits)
    for prompt, answer in zip(PROMPTS, ids, strict=True):
        reference.check(prompt, answer, MARGIN)


def test_preemption_changes_no_id(tmp_path: Path, root: Path) -> None:
    bits = 4
    model = toy_checkpoint(tmp_path / "model", "llama", hidden=128, heads=2, kv_heads=1)
    prompts = [list(range(3, 3 + n)) for n in (12, 13, 14, 15)]
    roomy, none = asyncio.run(every_way(engine_on(config_on("cpu", model, root, bits)), 30, prompts))
    tight, some = asyncio.run(every_way(engine_on(config_on("cpu", model, root, bits, blocks=7)), 30, prompts))
    assert tight == roomy and none == 0 and some > 0


def test_two_ranks_give_the_ids_of_one(tmp_path: Path, root: Path) -> None:
    bits = 8
    model = biased_checkpoint(tmp_path / "model", hidden=128, heads=4, kv_heads=2)  # a rank has the frames of its own KV heads
    one, _ = asyncio.run(every_way(engine_on(config_on("cpu", model, root, bits)), 4))
    two, _ = asyncio.run(every_way(engine_on(config_on("cpu", model, root, bits, {"tp": 2})), 4))
    assert one == two


def test_a_card_holds_the_bytes_that_were_planned(tmp_path: Path, root: Path) -> None:
    bits = 4
    model = toy_checkpoint(tmp_path / "model", "llama", hidden=128, heads=2, kv_heads=1)
    config = config_on("cuda", model, root, bits)
    plan = plan_memory(config, resolve_spec(config), model, 1 << 34)
    engine, runners = engine_of(config)

    async def held() -> int:
        await engine.start()
        try:
            return sum(layer.nbytes for layer in runners[0]._kv)
        finally:
            await engine.stop()

    assert asyncio.run(held()) == plan.kv_bytes
