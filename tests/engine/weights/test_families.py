"""The old families' configurations as their checkpoints have them, packed tensors cut for ranks and in AWQ's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from config.schema import Engine
from engine import awq, w4
from engine.build import session_len
from engine.errors import ConfigError, ModelError
from engine.models.rope import inverse_frequencies
from engine.models.spec import ModelSpec, RopeSpec, apply_overrides, load_spec, spec_from_config
from engine.plan import memory_parts
from engine.weights import open_checkpoint
from quant.workspace import convert
from tests.fixtures.awq import quantize
from tests.fixtures.families import with_all_heads
from tests.fixtures.toy import old_checkpoint, toy_checkpoint, toy_config, toy_weights
from tests.harness import configure

OWN_CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
INTERNLM_CHAT_7B: dict[str, Any] = {
    "architectures": ["InternLMForCausalLM"], "auto_map": OWN_CODE, "bias": True, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 2048,
    "model_type": "internlm", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 2, "rms_norm_eps": 1e-06,
    "rotary": {"base": 10000, "type": "dynamic"}, "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 103168,
}  # fmt: skip
INTERNLM2_CHAT_7B: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"], "attn_implementation": "eager", "auto_map": OWN_CODE, "bias": False, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "internlm2", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pad_token_id": 2,
    "rms_norm_eps": 1e-05, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1000000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 92544,
}  # fmt: skip
QWEN_7B_CHAT: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"], "attn_dropout_prob": 0.0, "auto_map": OWN_CODE, "bf16": False, "emb_dropout_prob": 0.0,
    "fp16": False, "fp32": False, "hidden_size": 4096, "intermediate_size": 22016, "kv_channels": 128, "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 32768, "model_type": "qwen", "no_bias": True, "num_attention_heads": 32, "num_hidden_layers": 32,
    "onnx_safe": None, "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 8192,
    "tie_word_embeddings": False, "tokenizer_class": "QWenTokenizer", "use_cache": True, "use_dynamic_ntk": True,
    "use_flash_attn": "auto", "use_logn_attn": True, "vocab_size": 151936,
}  # fmt: skip
BAICHUAN2_7B_CHAT: dict[str, Any] = {
    "architectures": ["BaichuanForCausalLM"], "auto_map": OWN_CODE, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "model_max_length": 4096, "model_type": "baichuan",
    "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 125696,
}  # fmt: skip
BAICHUAN2_13B_CHAT = {k: v for k, v in BAICHUAN2_7B_CHAT.items() if k != "max_position_embeddings"} | {
    "hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers": 40, "intermediate_size": 13696
}  # fmt: skip


def test_internlm() -> None:
    assert spec_from_config(INTERNLM_CHAT_7B, {}) == ModelSpec(
        "internlm", 103168, 4096, 11008, 32, 32, 32, 128, 1e-6, 2048, RopeSpec(10000.0, 128, "dynamic", 1.0, 2048),
        qkv_bias=True, o_bias=True, bos_token_id=1, eos_token_ids=(2,), dtype="float16",
    )  # fmt: skip
    older = {k: v for k, v in INTERNLM_CHAT_7B.items() if k != "rotary"}
    assert spec_from_config(older, {}).rope == RopeSpec(10000.0, 128)
    assert spec_from_config(INTERNLM_CHAT_7B | {"rotary": {"type": "origin", "base": 5000}}, {}).rope == RopeSpec(5000.0, 128)


def test_internlm2() -> None:
    assert spec_from_config(INTERNLM2_CHAT_7B, {}) == ModelSpec(
        "internlm2", 92544, 4096, 14336, 32, 32, 8, 128, 1e-5, 32768, RopeSpec(1e6, 128, "dynamic", 2.0, 32768),
        bos_token_id=1, eos_token_ids=(2,), dtype="bfloat16",
    )  # fmt: skip


def test_qwen() -> None:
    spec = spec_from_config(QWEN_7B_CHAT, {"chat_format": "chatml", "eos_token_id": 151643})
    assert spec == ModelSpec(
        "qwen", 151936, 4096, 11008, 32, 32, 32, 128, 1e-6, 8192, RopeSpec(10000.0, 128, "dynamic", 1.0, 8192),
        qkv_bias=True, use_logn_attn=True, eos_token_ids=(151643,), dtype="bfloat16",
    )  # fmt: skip
    assert spec_from_config(QWEN_7B_CHAT | {"use_dynamic_ntk": False, "fp16": True}, {}).rope == RopeSpec(10000.0, 128)
    assert spec_from_config(QWEN_7B_CHAT | {"fp16": True}, {}).dtype == "float16"


def test_baichuan2() -> None:
    assert spec_from_config(BAICHUAN2_7B_CHAT, {}) == ModelSpec(
        "baichuan", 125696, 4096, 11008, 32, 32, 32, 128, 1e-6, 4096, RopeSpec(10000.0, 128), bos_token_id=1, eos_token_ids=(2,),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (BAICHUAN2_13B_CHAT, "max_position_embeddings: missing: the 13B form of this family has ALiBi"),
        (BAICHUAN2_13B_CHAT | {"max_position_embeddings": 4096}, "hidden_size: the 13B form of this family has ALiBi"),
        (QWEN_7B_CHAT | {"no_bias": False}, "no_bias: False is not supported"),
        (QWEN_7B_CHAT | {"use_cache_quantization": True}, "use_cache_quantization"),
        (QWEN_7B_CHAT | {"intermediate_size": 22017}, "intermediate_size: 22017 counts gate and up together and is odd"),
        (QWEN_7B_CHAT | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        (QWEN_7B_CHAT | {"kv_channels": 127}, "kv_channels: a head of 127"),
        ({k: v for k, v in QWEN_7B_CHAT.items() if k != "seq_length"}, "seq_length: missing"),
        ({k: v for k, v in QWEN_7B_CHAT.items() if k != "layer_norm_epsilon"}, "layer_norm_epsilon: missing"),
        ({k: v for k, v in INTERNLM2_CHAT_7B.items() if k != "bias"}, "bias: missing"),
        (INTERNLM_CHAT_7B | {"rotary": {"type": "xpos"}}, "rotary.type: xpos is not supported"),
        (INTERNLM_CHAT_7B | {"rotary": {"type": "dynamic", "alpha": 2}}, "rotary.alpha: not a key of rotary"),
        (INTERNLM_CHAT_7B | {"rotary": {"type": "dynamic", "scaling_factor": 0.5}}, "rotary.scaling_factor: 0.5 is outside"),
        (INTERNLM_CHAT_7B | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "auto_map: .*which is never run"),
        (INTERNLM_CHAT_7B | {"model_type": "llama"}, "model_type"),
    ],
)
def test_refused_with_a_sentence(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        spec_from_config(config, {})


# ---- rope_scaling_factor


def turbomind_theta(base: float, dim: int, factor: float, length: int, trained: int) -> float:
    """What TurboMind chose when a sequence of `length` began (0.1 to 0.7): as it is up to the trained length."""
    if factor < 1 or length <= trained:
        return base
    return base * (factor * length / trained - (factor - 1)) ** (dim / (dim - 2))


@pytest.mark.parametrize("factor", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("length", [100, 8192, 8193, 12288, 32768])
def test_frequencies_are_turbominds(factor: float, length: int) -> None:
    plain = spec_from_config(QWEN_7B_CHAT | {"use_dynamic_ntk": False}, {})
    spec = apply_overrides(plain, Engine(rope_scaling_factor=factor))
    theta = turbomind_theta(10000.0, 128, factor, length, 8192)
    np.testing.assert_allclose(inverse_frequencies(spec, length), [theta ** -(2 * i / 128) for i in range(64)], rtol=1e-12)


def test_how_long_a_sequence_may_be() -> None:
    """Factor 1 (rope_scaling_factor = 1.0, Qwen-1's use_dynamic_ntk) stretches to any length that is asked for."""
    qwen = spec_from_config(QWEN_7B_CHAT, {})
    assert session_len(configure(), qwen) == 8192
    assert session_len(configure(engine={"session_len": 32768}), qwen) == 32768
    plain = spec_from_config(QWEN_7B_CHAT | {"use_dynamic_ntk": False}, {})
    with pytest.raises(ConfigError, match="made for 8192 tokens; lower it or set engine.rope_scaling_factor"):
        session_len(configure(engine={"session_len": 8193}), plain)
    for factor, longest in ((1.0, 100_000), (2.0, 16384)):
        assert (
            session_len(configure(engine={"session_len": longest}), apply_overrides(plain, Engine(rope_scaling_factor=factor))) == longest
        )
    with pytest.raises(ConfigError, match="made for 16384 tokens"):
        session_len(configure(engine={"session_len": 16385}), apply_overrides(plain, Engine(rope_scaling_factor=2.0)))


# ---- packed tensors


@pytest.mark.parametrize("family", ["internlm2", "qwen", "baichuan"])
@pytest.mark.parametrize("views", [False, True])
def test_a_ranks_rows_of_packed_tensors(family: str, views: bool, tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path / "x", family, dtype="float16", heads=8, kv_heads=4, hidden=128)
    spec = load_spec(path)
    expected = toy_weights(spec)
    checkpoint = open_checkpoint(path, spec, views=views)
    for name in "qkv":
        whole = torch.from_numpy(expected[f"layers.1.{name}.weight"]).half()
        for rows in (slice(0, 16), slice(32, 64), slice(16, None)):
            torch.testing.assert_close(checkpoint.weight(f"layers.1.{name}", rows=rows), whole[rows], rtol=0, atol=0)
        if spec.qkv_bias:
            bias = torch.from_numpy(expected[f"layers.1.{name}.bias"]).half()
            torch.testing.assert_close(checkpoint.bias(f"layers.1.{name}", rows=slice(16, 48)), bias[16:48], rtol=0, atol=0)


def test_messages_name_the_files_own_tensors(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path / "x", "internlm2", dtype="float16")
    good = load_file(path / "model.safetensors")
    name = "model.layers.1.attention.wqkv.weight"

    def refusal(tensors: dict[str, np.ndarray]) -> str:
        save_file(tensors, path / "model.safetensors")
        with pytest.raises(ModelError) as caught:
            open_checkpoint(path, load_spec(path))
        return str(caught.value)

    assert refusal({k: v for k, v in good.items() if k != name}) == f"model.safetensors: missing: {name}"
    assert (
        refusal(good | {name: good[name][:-1]}) == f"model.safetensors: {name}: shape (127, 64), the model's configuration wants (128, 64)"
    )
    assert "no use for: model.layers.0.self_attn.q_proj.weight" in refusal(good | {"model.layers.0.self_attn.q_proj.weight": good[name]})
    save_file(good | {"model.layers.0.attention.rotary_emb.inv_freq": np.zeros(8, np.float32)}, path / "model.safetensors")
    open_checkpoint(path, load_spec(path))


@pytest.mark.parametrize("family", ["internlm2", "qwen", "baichuan"])
def test_packed_awq(family: str, tmp_path: Path) -> None:
    """Seed 001 serves an InternLM2 quantized by auto_awq: wqkv is one 4-bit linear."""
    plain = toy_config("qwen2" if family == "qwen" else "llama", heads=8, kv_heads=2 if family == "internlm2" else 8, hidden=128)
    weights = toy_weights(spec_from_config(plain, {}))
    if family != "internlm2":
        weights = with_all_heads(weights, 8, 8)
    path = old_checkpoint(tmp_path / "x", family, plain, weights, dtype="float32")
    tensors, twin = {}, {}
    for name, array in load_file(path / "model.safetensors").items():
        if array.ndim == 2 and not name.startswith(("model.tok", "model.embed", "transformer.wte", "lm_head", "output")):
            parts, dense = quantize(array, 32)
            tensors |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in parts.items()}
            twin[name] = dense
        else:
            tensors[name] = array.astype(np.float16)
            twin[name] = array.astype(np.float16).astype(np.float32)
    save_file(twin, path / "model.safetensors")
    given = open_checkpoint(path, load_spec(path))
    wanted = {n: given.weight(f"layers.1.{n}").float().numpy() for n in ("q", "k", "v", "o", "gate", "up", "down")}  # type: ignore[union-attr]
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    checkpoint = open_checkpoint(path, load_spec(path))
    for name, dense in wanted.items():
        weight = checkpoint.weight(f"layers.1.{name}")
        assert isinstance(weight, awq.AWQ)
        np.testing.assert_allclose(w4.dequantize(awq.to_w4(weight)), dense, atol=1e-6)
        part = checkpoint.weight(f"layers.1.{name}", rows=slice(16, 32))
        assert isinstance(part, awq.AWQ)
        np.testing.assert_allclose(w4.dequantize(awq.to_w4(part)), dense[16:32], atol=1e-6)
    del tensors[next(n for n in tensors if n.endswith("qzeros") and ("wqkv" in n or "c_attn" in n or "W_pack" in n))]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"missing: [\w.]+\.qzeros$"):  # said once, not for q, k and v
        open_checkpoint(path, load_spec(path))


def test_the_memory_plan_knows_them(tmp_path: Path) -> None:
    """Packed or not, in a workspace or not: the same bytes."""
    plain = memory_parts(path := toy_checkpoint(tmp_path / "plain", dtype="float16"), load_spec(path), dtype="bfloat16", tp=2)
    packed = memory_parts(
        path := toy_checkpoint(tmp_path / "packed", "internlm2", dtype="float16"), load_spec(path), dtype="bfloat16", tp=2
    )
    (path / "tokenizer_config.json").write_text("{}")
    convert(path, tmp_path / "w", model_name="base", tp=2)
    workspace = memory_parts(tmp_path / "w", load_spec(tmp_path / "w"), dtype="bfloat16", tp=2)
    assert plain == packed == workspace
