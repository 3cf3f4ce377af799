"""GPTQ, compressed-tensors and FP8 checkpoints: what their numbers are, how they are cut and stacked, what ids they give."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.eight_bit import Float8, Int8
from engine.models.spec import load_spec
from engine.reference import dense
from engine.w4 import W4
from engine.w8 import W8
from engine.weights import open_checkpoint
from tests.engine.judge import Reference, greedy
from tests.fixtures.quantized import FORMS, quantized_checkpoint
from tests.harness import answers, configure, running

NAMES = ("q", "k", "v", "o", "gate", "up", "down")
COMES_AS = {
    "int4": W4,
    "GPTQ v": W4,
    "GPTQ 8 bits, act": np.ndarray,
    "GPTQ 8": W8,
    "W8A8": Int8,
    "FP8": Float8,
    "int8, z": np.ndarray,
    "int8": W8,
}


def kind_of(form: str) -> type:
    return next(kind for part, kind in COMES_AS.items() if part in form)


@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_those_of_the_twin(tmp_path: Path, form: str) -> None:
    quantized, twin = quantized_checkpoint(tmp_path, form, intermediate_size=320 if "one group" in form else 384)
    checkpoint, plain = (open_checkpoint(path, load_spec(path)) for path in (quantized, twin))
    for name in (f"layers.1.{part}" for part in NAMES):
        wanted = plain.weight(name).numpy()
        weight = checkpoint.weight(name)
        kind = kind_of(form)
        assert isinstance(weight, kind) if kind is not np.ndarray else hasattr(weight, "dtype"), type(weight)
        exact = {"rtol": 2**-23, "atol": 1e-8} if kind is not np.ndarray else {"rtol": 2**-11, "atol": 1e-7}
        np.testing.assert_allclose(dense(weight), wanted, **exact)
        np.testing.assert_allclose(dense(checkpoint.weight(name, dense=True)), wanted, rtol=2**-11, atol=1e-7)
        for rows, columns in (
            (slice(8, 40), slice(None)),
            (slice(None), slice(32, 96)),
            (slice(3, 9), slice(0, 64)),
            (slice(None), slice(7, 90)),
        ):
            part = checkpoint.weight(name, rows=rows, columns=columns)
            np.testing.assert_allclose(dense(part), wanted[rows, columns], rtol=2**-11, atol=1e-7)
        chosen = np.random.default_rng(0).permutation(len(wanted))[:40]
        np.testing.assert_allclose(dense(checkpoint.weight(name, rows=chosen)), wanted[chosen], rtol=2**-11, atol=1e-7)
        order = checkpoint.order(name)
        assert (order is not None) == ("act-order" in form)
        if order is not None:
            for columns in (slice(0, 64), slice(64, 128)):
                part = checkpoint.weight(name, columns=columns, in_order=True)
                assert isinstance(part, W4 if "8 bits" not in form else object)
                np.testing.assert_allclose(dense(part), wanted[:, order[columns]], rtol=2**-11, atol=1e-7)


PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], list(range(20, 61))]


def ids(path: Path, **engine: Any) -> list[list[int]]:
    async def run() -> list[list[int]]:
        config = configure(
            model={"path": str(path), "dtype": engine.pop("dtype", "float32")},
            engine={"device": "cpu", "max_batch_size": 4, "session_len": 96} | engine,
            cache={"num_blocks": 32, "cache_block_seq_len": 16},
        )
        async with running(config) as started:
            return await answers(started, PROMPTS, greedy(8), together=True)

    return asyncio.run(run())


def check(answers: list[list[int]], twin: Path) -> None:
    judge = Reference(twin, load_spec(twin))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        judge.check(prompt, answer)


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_those_of_the_dense_twin(tmp_path: Path, form: str) -> None:
    more = {"family": "qwen2"} if "act-order" in form else {"tie_word_embeddings": "v2" in form}
    quantized, twin = quantized_checkpoint(tmp_path, form, **more)
    check(ids(quantized, device="reference"), twin)
    check(ids(quantized, dtype="bfloat16"), twin)


@pytest.mark.parametrize("form", ["GPTQ v1 act-order", "packed int4", "W8A8", "FP8 blocks"])
def test_ids_of_two_ranks_are_those_of_the_dense_twin(tmp_path: Path, form: str) -> None:
    quantized, twin = quantized_checkpoint(tmp_path, form)
    check(ids(quantized, tp=2, dtype="bfloat16"), twin)
