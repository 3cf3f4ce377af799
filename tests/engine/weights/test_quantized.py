"""GPTQ, compressed-tensors and FP8 checkpoints: what their numbers are, how they are cut and stacked, what ids they give."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.eight_bit import Float8, Int8
from engine.errors import ModelError
from engine.models.layers import stack
from engine.models.spec import load_spec, spec_from_config
from engine.packed_ints import PackedInts
from engine.reference import dense
from engine.w4 import W4
from engine.w8 import W8
from engine.weights import open_checkpoint
from tests.engine.judge import Reference, greedy
from tests.fixtures.quantized import FORMS, fields, quantized_checkpoint
from tests.fixtures.toy import save_tensors, toy_config
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


IN_AN_ENGINE = ("GPTQ v1 act-order", "GPTQ 8 bits", "packed int4, zeros", "W8A8", "FP8 blocks")


@pytest.mark.parametrize("form", IN_AN_ENGINE)
def test_ids_are_those_of_the_dense_twin(tmp_path: Path, form: str) -> None:
    more = {"family": "qwen2"} if "act-order" in form else {"tie_word_embeddings": "v2" in form}
    quantized, twin = quantized_checkpoint(tmp_path, form, **more)
    check(ids(quantized, device="reference"), twin)
    check(ids(quantized, dtype="bfloat16"), twin)


@pytest.mark.parametrize("form", ["GPTQ v1 act-order", "W8A8"])
def test_ids_of_two_ranks_are_those_of_the_dense_twin(tmp_path: Path, form: str) -> None:
    quantized, twin = quantized_checkpoint(tmp_path, form)
    check(ids(quantized, tp=2, dtype="bfloat16"), twin)


# ---- refusals


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        checkpoint = open_checkpoint(path, load_spec(path))
        for part in NAMES:
            checkpoint.weight(f"layers.0.{part}")
    return str(caught.value)


Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
BROKEN: list[tuple[str, dict[str, Any], str]] = [  # form, tensors that are changed (None: gone), the sentence
    ("GPTQ v1", {f"{Q}.scales": "nan"}, f"{Q}.scales: a scale is not a finite number"),
    ("GPTQ v1", {f"{Q}.qzeros": None}, f"missing: {Q}.qzeros"),
    ("GPTQ v1", {f"{Q}.scales": torch.zeros(2, 128).half()}, f"{Q}.scales: F16 (2, 128), the model's configuration wants F32 or F16 or BF16 (4, 128)"),
    ("GPTQ v2", {f"{Q}.qzeros": torch.zeros(2, 16, dtype=torch.int32)}, f"{Q}.qzeros: I32 (2, 16), the model's configuration wants I32 (4, 16)"),
    ("GPTQ v2", {f"{Q}.qweight": torch.zeros(16, 127, dtype=torch.int32)}, f"{Q}.qweight: I32 (16, 127), the model's configuration wants I32 (16, 128)"),
    ("GPTQ v1", {f"{Q}.g_idx": torch.zeros(128, dtype=torch.int32)}, f"{Q}.g_idx: does not give each of 4 groups 32 input channels"),
    ("GPTQ v1", {f"{Q}.g_idx": torch.full((128,), 9, dtype=torch.int32)}, f"{Q}.g_idx: does not give each of 4 groups 32 input channels"),
    ("GPTQ v1", {f"{Q}.bias": torch.ones(128)}, f"tensors that the model's configuration has no use for: {Q}.bias"),
    ("packed int4", {f"{Q}.weight_scale": "nan"}, f"{Q}.weight_scale: a scale is not a finite number"),
    ("packed int4, zeros", {f"{Q}.weight_zero_point": None}, f"missing: {Q}.weight_zero_point"),
    ("packed int4", {f"{Q}.weight_shape": torch.tensor([128, 64])}, f"{Q}.weight_shape: says [128, 64], the model's configuration wants [128, 128]"),
    ("packed int4", {f"{Q}.weight_packed": None, f"{Q}.weight": torch.zeros(128, 128)}, f"{Q}.weight: is a dense weight; quantization_config says that this linear is quantized"),
    ("W8A8", {f"{Q}.weight_scale": "nan"}, f"{Q}.weight_scale: a scale is not a finite number"),
    ("W8A8", {f"{Q}.weight_scale": None}, f"missing: {Q}.weight_scale"),
    ("W8A8", {f"{Q}.weight_scale": torch.ones(64, 1)}, f"{Q}.weight_scale: F32 (64, 1), the model's configuration wants F32 or F16 or BF16 (128, 1) or (128,)"),
    ("FP8 blocks", {f"{DOWN}.weight_scale_inv": "nan"}, f"{DOWN}.weight_scale_inv: a scale is not a finite number"),
    ("FP8 blocks", {f"{DOWN}.weight_scale_inv": torch.ones(2, 2)}, f"{DOWN}.weight_scale_inv: F32 (2, 2), the model's configuration wants F32 or F16 or BF16 (1, 2)"),
    ("FP8 a tensor, static", {f"{Q}.input_scale": "nan"}, f"{Q}.input_scale: a scale is not a finite number"),
    ("FP8 a channel", {f"{Q}.weight": "nan"}, f"{Q}: holds a number that is not finite"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "change", "sentence"), BROKEN, ids=[f"{form}, {next(iter(c)).rpartition('.')[2]}-{i}" for i, (form, c, _) in enumerate(BROKEN)]
)
def test_a_broken_checkpoint_is_refused_in_one_line(tmp_path: Path, form: str, change: dict[str, Any], sentence: str) -> None:
    path, _ = quantized_checkpoint(tmp_path, form)
    tensors = load_file(path / "model.safetensors")
    for name, value in change.items():
        if value is None:
            del tensors[name]
        elif isinstance(value, str):
            whole = tensors[name].to(torch.float32)
            whole.view(-1)[-1] = float("nan")
            tensors[name] = whole.to(tensors[name].dtype)
        else:
            tensors[name] = value
    save_tensors(path, tensors)
    assert refusal(path) == f"model.safetensors: {sentence}"


GROUP = "quantization_config.config_groups.group_0"
CONFIGS: list[tuple[str, dict[str, Any], str]] = [  # form, keys that are changed, the sentence
    ("GPTQ v1", {"bits": 3}, "quantization_config.bits: 3 is not supported; supported: 4, 8"),
    ("GPTQ v1", {"group_size": 48}, "quantization_config.group_size: 48 is not supported; supported: -1 (one scale for all of an output channel) and multiples of 32"),
    ("GPTQ v1", {"checkpoint_format": "marlin"}, "quantization_config.checkpoint_format: marlin is not supported; supported: gptq, gptq_v2"),
    ("GPTQ v1", {"dynamic": {"-:lm_head": {}}}, "quantization_config.dynamic: an object of 1 is not supported (only False or an object of 0 or a list of 0)"),
    ("GPTQ v1", {"pack_dtype": "int16"}, "quantization_config.pack_dtype: 'int16' is not supported (only 'int32')"),
    ("packed int4", {"format": "marlin-24"}, "quantization_config.format: marlin-24 is not supported; supported: pack-quantized, int-quantized, float-quantized, naive-quantized, mixed-precision"),
    ("packed int4", {"kv_cache_scheme": {"num_bits": 8}}, "quantization_config.kv_cache_scheme: calibrated K/V scales are not read; the cache's precision is cache.quant_policy. Remove this key"),
    ("packed int4", {"sparsity_config": {"format": "sparse-24"}}, "quantization_config.sparsity_config: sparse and transformed weights are not supported; take a checkpoint that is only quantized"),
    ("packed int4", {"config_groups": {}}, "quantization_config.config_groups: missing or empty; it says how the weights are quantized"),
    ("packed int4", {"ignore": ["re:(a+)+$"]}, "quantization_config.ignore: re:(a+)+$ is not a pattern that is read (letters, dots, .*, digits, up to 3 wildcards)"),
    ("packed int4", {"weights": {"num_bits": 2}}, f"{GROUP}.weights.num_bits: 2 is not supported; supported: 4, 8"),
    ("packed int4", {"weights": {"group_size": 40}}, f"{GROUP}.weights.group_size: 40 is not supported; supported: -1 (one scale for all of an output channel) and multiples of 32"),
    ("packed int4", {"weights": {"type": "float"}}, f"{GROUP}.weights.type: float of 4 bits is not supported; supported: int of 4 and 8, float of 8"),
    ("packed int4", {"weights": {"strategy": "tensor_group"}}, f"{GROUP}.weights.strategy: tensor_group is not supported with PACKED weights; supported: group, channel"),
    ("packed int4", {"input_activations": {"num_bits": 8, "type": "int"}}, f"{GROUP}.input_activations: 8-bit activations of pack-quantized weights are not supported; supported: null"),
    ("W8A8", {"weights": {"symmetric": False}}, f"{GROUP}.weights.symmetric: false is not supported with INT8 weights; supported: true"),
    ("W8A8", {"input_activations": {"num_bits": 8, "type": "int", "symmetric": False}}, f"{GROUP}.input_activations: only symmetric ones of 8 bits and of the weights' type (int) are supported"),
    ("W8A8", {"output_activations": {"num_bits": 8}}, f"{GROUP}.output_activations: quantized outputs are not supported"),
    ("FP8 blocks", {"weight_block_size": [64, 64]}, "quantization_config.weight_block_size: [64, 64] is not supported; supported: [128, 128]"),
    ("FP8 blocks", {"fmt": "e5m2"}, "quantization_config.fmt: e5m2 is not supported; supported: e4m3"),
    ("FP8 blocks", {"activation_scheme": "none"}, "quantization_config.activation_scheme: none is not supported; supported: dynamic, static"),
    ("FP8 blocks", {"quant_method": "fbgemm_fp8"}, "quantization_config: quantized by fbgemm_fp8, which is not supported; supported: AWQ (version gemm), GPTQ, compressed-tensors, FP8, 16-bit checkpoints and GGUF files"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "change", "sentence"), CONFIGS, ids=[f"{form}, {next(iter(c))}-{i}" for i, (form, c, _) in enumerate(CONFIGS)]
)
def test_what_a_configuration_may_not_say(form: str, change: dict[str, Any], sentence: str) -> None:
    quantization = json.loads(json.dumps(FORMS[form][0]))
    for key, value in change.items():
        if key == "weights":
            quantization["config_groups"]["group_0"]["weights"] |= value
        elif key.endswith("activations"):
            quantization["config_groups"]["group_0"][key] = value
        else:
            quantization[key] = value
    with pytest.raises(ModelError) as caught:
        spec_from_config(toy_config("llama", hidden=128) | {"quantization_config": quantization}, {})
    assert str(caught.value) == f"config.json:{sentence}"


def test_which_linears_are_quantized() -> None:
    """Names and patterns of `ignore`, targets of several groups, dotted parts of modules_to_not_convert."""
    config = json.loads(json.dumps(FORMS["packed int4"][0]))
    config["ignore"] = ["lm_head", "model.layers.0.self_attn.q_proj", r"re:.*\.mlp\.(gate|up)_proj$"]
    config["config_groups"]["group_1"] = json.loads(json.dumps(FORMS["W8A8"][0]))["config_groups"]["group_0"] | {"format": "int-quantized"}
    config["config_groups"]["group_0"]["targets"] = [r"re:.*self_attn.*"]
    quant = spec_from_config(toy_config("llama", hidden=128) | {"quantization_config": config}, {}).quant
    assert quant is not None
    for linear, form in (
        ("lm_head", None), ("model.layers.0.self_attn.q_proj", None), ("model.layers.1.self_attn.q_proj", "PACKED"),
        ("model.layers.1.mlp.up_proj", None), ("model.layers.1.mlp.down_proj", "INT8"),
    ):  # fmt: skip
        scheme = quant.scheme(linear)
        assert (scheme and scheme.form) == form, linear
    fp8 = FORMS["FP8 blocks"][0] | {"modules_to_not_convert": ["lm_head", "model.layers.1", "mlp.down_proj"]}
    quant = spec_from_config(toy_config("llama", hidden=128) | {"quantization_config": fp8}, {}).quant
    assert quant is not None
    names = ("model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "model.layers.3.mlp.down_proj")
    assert [quant.scheme(name) is None for name in names] == [True, False, True]


def test_a_bias_of_zeros_that_no_model_asked_for_is_left_out(tmp_path: Path) -> None:
    path, twin = quantized_checkpoint(tmp_path, "GPTQ v1")
    tensors = load_file(path / "model.safetensors")
    save_tensors(path, tensors | {f"{Q}.bias": torch.zeros(128, dtype=torch.float16)})
    weight = open_checkpoint(path, load_spec(path)).weight("layers.0.q")
    wanted = open_checkpoint(twin, load_spec(twin)).weight("layers.0.q").numpy()
    np.testing.assert_allclose(dense(weight), wanted, rtol=2**-22, atol=1e-8)


def test_zeros_of_gptq_v1_are_one_less_as_a_whole_int32() -> None:
    """A zero of 0 is written as the int32 less 0x11111111: its borrow goes through the next field, and comes back."""
    zeros = np.array([[0, 8, 15, 0, 1, 0, 0, 3]], np.uint8)
    words = fields(zeros, 4).view(np.uint32) - np.uint32(0x11111111)
    ints = PackedInts(True, 4, np.zeros((1, 8), np.int32), words.view(np.int32), np.ones((1, 8), np.float16), zero_offset=1)
    np.testing.assert_array_equal(ints.zero(slice(0, 8))[:, 0], zeros[0])


def test_columns_that_are_cut_with_an_order_are_dense(tmp_path: Path) -> None:
    """o's share of two ranks: its groups lie apart, so it is dequantized; down's share follows the order and stays 4-bit."""
    path, _ = quantized_checkpoint(tmp_path, "GPTQ v1 act-order")
    checkpoint = open_checkpoint(path, load_spec(path))
    assert isinstance(checkpoint.weight("layers.0.o", columns=slice(0, 64)), torch.Tensor)
    assert isinstance(checkpoint.weight("layers.0.down", columns=slice(0, 128), in_order=True), W4)
    together = stack([checkpoint.weight(f"layers.0.{name}") for name in "qkv"])
    assert isinstance(together, W4) and together.order is not None
    mixed = stack([checkpoint.weight("layers.0.q"), checkpoint.weight("layers.0.o")])
    assert isinstance(mixed, torch.Tensor)  # two orders
    wanted = np.concatenate([dense(checkpoint.weight(f"layers.0.{name}")) for name in "qo"])
    np.testing.assert_allclose(mixed.float().numpy(), wanted, rtol=2**-11, atol=1e-7)
