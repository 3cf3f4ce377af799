"""The whole CUDA engine on an emulated card: loop, runner, graphs, kernels, sampler; its ids against the float32 reference.

A 16-bit engine need not give the reference's ids where two logits are close: every id must be one whose reference logit,
after the same ids, is within MARGIN standard deviations of the best one.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config.schema import Config
from engine.build import resolve_spec
from engine.cuda import tuning
from engine.cuda.runner import CudaRunner
from engine.errors import ConfigError
from engine.executor import ThreadExecutor
from engine.load_backend import computing_dtype, resolved
from engine.loop import Engine
from engine.parallel import Ranks
from engine.plan import plan_memory
from engine.sequence import SamplingParams
from engine.step import Logprobs
from tests.engine.judge import SESSION_LEN, Reference, greedy
from tests.fixtures.awq import awq_checkpoint
from tests.fixtures.toy import toy_checkpoint, toy_gguf
from tests.harness import answers, collect, configure
from tests.ptx.device import EmulatedDevice

PROMPTS = [list(range(3, 3 + n)) for n in (1, 7, 16, 37)]


def config_of(path: Path, root: Path, dtype: str = "bfloat16", **sections: dict[str, Any]) -> Config:
    engine = {
        "device": "cuda", "max_batch_size": 4, "session_len": SESSION_LEN, "max_prefill_token_num": 24,
        "kernel_cache_dir": str(root / ".cache" / "kernels"),
    }  # fmt: skip
    cache = {"num_blocks": 24, "cache_block_seq_len": 16}
    return resolved(
        configure(
            model={"path": str(path), "dtype": dtype},
            engine=engine | sections.get("engine", {}),
            cache=cache | sections.get("cache", {}),
        )
    )


def engine_of(config: Config, cc: tuple[int, int] = (9, 0)) -> tuple[Engine, list[CudaRunner]]:
    """An engine whose runner is a thread with an emulated card."""
    spec, made = resolve_spec(config), []

    def make() -> CudaRunner:
        made.append(CudaRunner(config, spec, SESSION_LEN, Ranks(), EmulatedDevice(cc)))
        return made[0]

    return Engine(config, spec, SESSION_LEN, ThreadExecutor(make)), made


async def every_way(
    config: Config, prompts: list[list[int]], max_tokens: int = 6, cc: tuple[int, int] = (9, 0)
) -> tuple[list[list[int]], int]:
    """Ids of all prompts together, alone with their prefixes cached, and the number of preemptions."""
    engine, _ = engine_of(config, cc)
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


CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama, bfloat16": ("llama", {}, "bfloat16"),
    "qwen3 (norms of q and k), 3 heads a KV head, float16": ("qwen3", {"hidden": 96, "heads": 6, "kv_heads": 2}, "float16"),
    "mistral, window of 20": ("mistral", {"sliding_window": 20}, "bfloat16"),
}


@pytest.mark.parametrize("case", CASES)
def test_ids_are_the_references_alone_batched_cached_and_in_parts(case: str, tmp_path: Path, root: Path) -> None:
    family, more, dtype = CASES[case]
    model = toy_checkpoint(tmp_path / "model", family, **more)
    config = config_of(model, root, dtype)
    ids, _ = asyncio.run(every_way(config, PROMPTS))
    reference = Reference(model, resolve_spec(config))
    for prompt, answer in zip(PROMPTS, ids, strict=True):
        reference.check(prompt, answer)


def test_preemption_changes_no_id(tmp_path: Path, root: Path) -> None:
    model = toy_checkpoint(tmp_path / "model", "llama")
    prompts = [list(range(3, 3 + n)) for n in (12, 13, 14, 15)]
    roomy, none = asyncio.run(every_way(config_of(model, root), prompts, 30))
    tight, some = asyncio.run(every_way(config_of(model, root, cache={"num_blocks": 7}), prompts, 30))
    assert tight == roomy and none == 0 and some > 0


@pytest.fixture
def dense_from_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt parts of 8 rows (16 without a dense copy) already take the dense product."""
    monkeypatch.setitem(tuning.DENSE_FROM, ((9, 0), "zero"), (8, 16))


MIXED = {  # q, k and v become dense; the output head stays 4-bit
    "q": "Q4_1", "k": "Q4_1", "v": "Q8_0", "o": "Q4_0", "gate": "Q4_1", "up": "Q4_1", "down": "Q5_0", "embed": "Q8_0", "lm_head": "Q4_1",
}  # fmt: skip
FOUR_BITS = ("AWQ with biases, dense copy", "AWQ with biases, unpacked for the moment", "GGUF of many types")


@pytest.mark.parametrize("case", FOUR_BITS)
def test_4_bit_weights_give_the_references_ids(case: str, tmp_path: Path, root: Path, dense_from_few_rows: None) -> None:
    if case.startswith("AWQ"):
        model, _ = awq_checkpoint(tmp_path, "qwen2", hidden=128)
        config = config_of(model, root, "float16", engine={"w4_dense_copy": "true" if "copy" in case else "false"})
    else:
        model = toy_gguf(tmp_path / "toy.gguf", types=MIXED)
        config = config_of(model, root, engine={"w4_dense_copy": "false"})
    ids, _ = asyncio.run(every_way(config, PROMPTS))
    reference = Reference(model, resolve_spec(config))
    for prompt, answer in zip(PROMPTS, ids, strict=True):
        reference.check(prompt, answer)


async def scores(config: Config, prompt: list[int]) -> tuple[list[Logprobs], Logprobs]:
    """Of the prompt's ids, and of the answer's one id."""
    engine, _ = engine_of(config)
    await engine.start()
    try:
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=2, prompt_logprobs=2)
        generation = engine.submit(prompt, params)
        events = await collect(generation)
        return generation.sequence.prompt_logprobs, events[0].logprobs
    finally:
        await engine.stop()


def test_logprobs_of_prompt_and_answer_are_the_references(tmp_path: Path, root: Path) -> None:
    model, prompt = toy_checkpoint(tmp_path / "model", "llama"), list(range(3, 40))
    config = config_of(model, root)
    of_prompt, of_answer = asyncio.run(scores(config, prompt))
    reference = Reference(model, resolve_spec(config))
    assert len(of_prompt) == len(prompt) - 1
    for position in (1, 2, 23, 24, 25, 36, 37):  # parts are of 24 tokens
        logits = reference.logits(prompt[:position]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        found = of_prompt[position - 1] if position < 37 else of_answer
        token = prompt[position] if position < 37 else int(logits.argmax())
        assert abs(found.logprob - logprobs[token]) < 0.1 and abs(found.rank - int((logits > logits[token]).sum())) <= 8
        assert np.abs(np.array(found.top_logprobs) - np.sort(logprobs)[::-1][:2]).max() < 0.1


def test_a_card_without_tensor_cores_takes_the_portable_kernels(tmp_path: Path, root: Path, dense_from_few_rows: None) -> None:
    model, _ = awq_checkpoint(tmp_path, "qwen2", hidden=128)
    config = config_of(model, root, "auto", engine={"w4_dense_copy": "false"})
    prompts = [PROMPTS[1], PROMPTS[3]]
    ids, _ = asyncio.run(every_way(config, prompts, 4, (7, 5)))
    reference = Reference(model, resolve_spec(config))
    for prompt, answer in zip(prompts, ids, strict=True):
        reference.check(prompt, answer)
    with pytest.raises(ConfigError, match="bfloat16' needs compute capability 8.0, this card has 7.5"):
        computing_dtype(config_of(model, root, "bfloat16"), "cuda", "float16", (7, 5))


def bytes_of(*roots: Any, without: tuple[Any, ...] = ()) -> int:
    """Of all distinct tensors that can be reached from these objects; what only `without` holds does not count."""
    storages: dict[int, int] = {}
    seen, left = {id(o) for o in without}, list(roots)
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item
        elif type(item).__module__.startswith("engine."):
            left += [
                getattr(item, name)
                for name in {*getattr(item, "__dict__", {}), *getattr(type(item), "__slots__", ())}
                if hasattr(item, name)
            ]
    return sum(storages.values())


def test_the_memory_plan_is_what_the_runner_holds(tmp_path: Path, root: Path) -> None:
    model, _ = awq_checkpoint(tmp_path, "qwen2", hidden=128)
    config = config_of(model, root, "float16", engine={"w4_dense_copy": "true", "device_memory_gib": 2, "max_prefill_token_num": 64})
    spec = resolve_spec(config)
    plan = plan_memory(config, spec, model, 2 << 30)
    runner = CudaRunner(config, spec, SESSION_LEN, Ranks(), EmulatedDevice())
    assert plan.num_blocks == runner.num_blocks == 24
    backend = runner._backend
    # these two depend on the card's multiprocessors; their formulas have tests of their own
    split = (*(decode._scratch for decode in backend._decode.values()), backend._linears._scratch)
    pinned = (runner._staged, runner._sampler._host_ids)
    held = bytes_of(runner, without=(*split, *pinned))
    elsewhere = ("CUDA context", "CUDA graphs", "split products", "split attention")
    planned = plan.weight_bytes + plan.kv_bytes + plan.block_bytes + sum(v for k, v in plan.workspace.items() if k not in elsewhere)
    assert abs(held - planned) < 0.03 * planned, (held, planned, plan.weights, plan.workspace)
    assert backend._linears._scratch.nbytes <= max(4, plan.workspace["split products"])
