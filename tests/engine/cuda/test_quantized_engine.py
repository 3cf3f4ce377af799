"""GPTQ, compressed-tensors and FP8 checkpoints through the whole CUDA engine on an emulated card, against the dense twin."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.build import resolve_spec
from engine.cuda import tuning
from engine.cuda.launch import Library
from engine.cuda.runner import CudaRunner
from engine.cuda.take_columns import TakeColumns
from engine.models.spec import load_spec
from engine.parallel import Ranks
from engine.plan import plan_memory
from tests.engine.cuda.test_engine import PROMPTS, bytes_of, config_of, every_way
from tests.engine.judge import MARGIN, SESSION_LEN, Reference
from tests.fixtures.quantized import quantized_checkpoint
from tests.ptx.device import KERNELS, EmulatedDevice

# 8-bit activations round what the twin does not: int8 to 1/254 of a token's largest, e4m3 each number to 1/16
FORMS = {"GPTQ v1 act-order": MARGIN, "W8A8": 2 * MARGIN, "FP8 blocks": 6 * MARGIN}


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_those_of_the_dense_twin(form: str, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tuning.DENSE_FROM, ((9, 0), "zero"), (8, 16))
    hidden = 256 if form == "FP8 blocks" else 128
    model, twin = quantized_checkpoint(tmp_path, form, "qwen2", hidden=hidden, heads=4, kv_heads=2)
    config = config_of(model, root, engine={"w4_dense_copy": "false"})
    prompts = [PROMPTS[1], PROMPTS[3]]
    ids, _ = asyncio.run(every_way(config, prompts, 4))
    reference = Reference(twin, load_spec(twin))
    for prompt, answer in zip(prompts, ids, strict=True):
        reference.check(prompt, answer, FORMS[form])


def test_columns_are_taken_in_an_order() -> None:
    rng = np.random.default_rng(0)
    take = TakeColumns(Library(EmulatedDevice((9, 0)), KERNELS))
    for rows, k in ((1, 64), (3, 576), (2, 4104)):
        x = torch.from_numpy(rng.standard_normal((rows, k)).astype(np.float32)).bfloat16()
        order = torch.from_numpy(rng.permutation(k).astype(np.int32))
        out = torch.full_like(x, float("nan"))
        take(x, order, out)
        assert torch.equal(out, x[:, order.long()])
    with pytest.raises(ValueError, match="in an order of"):
        take(x, order[:-1], out)


@pytest.mark.parametrize("form", ["GPTQ v1 act-order", "W8A8"])
def test_the_memory_plan_is_what_the_runner_holds(form: str, tmp_path: Path, root: Path) -> None:
    model, _ = quantized_checkpoint(tmp_path, form, hidden=256)
    config = config_of(model, root, engine={"w4_dense_copy": "false", "device_memory_gib": 2, "max_prefill_token_num": 64})
    spec = resolve_spec(config)
    plan = plan_memory(config, spec, model, 2 << 30)
    runner = CudaRunner(config, spec, SESSION_LEN, Ranks(), EmulatedDevice())
    backend = runner._backend
    split = (*(decode._scratch for decode in backend._decode.values()), backend._linears._scratch)
    held = bytes_of(runner, without=(*split, runner._staged, runner._sampler._host_ids))
    elsewhere = ("CUDA context", "CUDA graphs", "split products", "split attention")
    planned = plan.weight_bytes + plan.kv_bytes + plan.block_bytes + sum(v for k, v in plan.workspace.items() if k not in elsewhere)
    assert abs(held - planned) < 0.03 * planned, (held, planned, plan.weights, plan.workspace)
    assert backend._linears._scratch.nbytes <= max(4, plan.workspace["split products"])
