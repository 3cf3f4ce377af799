"""`ModelSpec` from real and hostile descriptions of models: supported ones give a spec, others one clean sentence."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from config.schema import Engine
from engine.errors import ConfigError, ModelError
from engine.models.spec import FAMILIES, ModelSpec, RopeSpec, apply_overrides, load_spec, spec_from_config
from formats.gguf import GGUFFile, read_gguf
from formats.json_file import read_json
from tests.fixtures.toy import toy_checkpoint, toy_config, toy_gguf

SUPPORTED = {
    "Qwen--Qwen2.5-1.5B": ("qwen2", 28, 12, 2, 128, True),
    "Qwen--Qwen2.5-32B": ("qwen2", 64, 40, 8, 128, False),
    "Qwen--Qwen2.5-72B": ("qwen2", 80, 64, 8, 128, False),
    "Qwen--Qwen2.5-7B": ("qwen2", 28, 28, 4, 128, False),
    "Qwen--Qwen3-0.6B": ("qwen3", 28, 16, 8, 128, True),
    "Qwen--Qwen3-1.7B": ("qwen3", 28, 16, 8, 128, True),
    "Qwen--Qwen3-32B": ("qwen3", 64, 64, 8, 128, False),
    "Qwen--Qwen3-32B-FP8": ("qwen3", 64, 64, 8, 128, False),
    "Qwen--Qwen3-8B": ("qwen3", 36, 32, 8, 128, False),
    "meta-llama--Llama-2-13b-hf": ("llama", 40, 40, 40, 128, False),
    "meta-llama--Llama-2-70b-hf": ("llama", 80, 64, 8, 128, False),
    "meta-llama--Llama-2-7b-hf": ("llama", 32, 32, 32, 128, False),
    "meta-llama--Meta-Llama-3.1-405B": ("llama", 126, 128, 8, 128, False),
    "meta-llama--Meta-Llama-3.1-70B": ("llama", 80, 64, 8, 128, False),
    "meta-llama--Meta-Llama-3.1-8B": ("llama", 32, 32, 8, 128, False),
    # its quantization is told in hf_quant_config.json only: refused as a directory, below
    "nvidia--Llama-3.1-70B-Instruct-FP8": ("llama", 80, 64, 8, 128, False),
}


LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}


def spec_of(**config: Any) -> ModelSpec:
    family = config.pop("family", "llama")
    return spec_from_config(toy_config(family, **config), {})


def refusal(**config: Any) -> str:
    with pytest.raises(ModelError) as caught:
        spec_of(**config)
    return str(caught.value)


def test_every_real_config_gives_a_spec_or_a_sentence(assets: Path) -> None:
    files = sorted((assets / "configs").glob("*_config.json"))
    assert len(files) == 49
    for file in files:
        name = file.name.removesuffix("_config.json")
        if name in SUPPORTED:
            spec = spec_from_config(read_json(file), {})
            found = (spec.family, spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.tie_word_embeddings)
            assert found == SUPPORTED[name]
            continue
        with pytest.raises(ModelError, match=r"^config\.json:(architectures|quantization_config): .*(support|required)"):
            spec_from_config(read_json(file), {})


def test_llama_3_1(assets: Path) -> None:
    spec = spec_from_config(
        read_json(assets / "configs" / "meta-llama--Meta-Llama-3.1-8B_config.json"), {"eos_token_id": [128001, 128008, 128009]}
    )
    assert spec == ModelSpec(
        family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
        head_dim=128, rms_norm_eps=1e-5, max_position=131072, bos_token_id=128000, eos_token_ids=(128001, 128008, 128009),
        rope=RopeSpec(500000.0, 128, "llama3", 8.0, 8192, 1.0, 4.0), dtype="bfloat16",
    )  # fmt: skip


def test_families_differ_as_their_papers_say() -> None:
    llama, qwen2, qwen3 = spec_of(), spec_of(family="qwen2"), spec_of(family="qwen3")
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.qk_norm) == (False, False, False, False)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias, qwen2.qk_norm) == (True, False, False, False)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.mlp_bias, qwen3.qk_norm) == (False, False, False, True)
    biased = spec_of(attention_bias=True, mlp_bias=True)
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)


def test_sliding_windows() -> None:
    assert spec_of(family="mistral", sliding_window=128).window(0) == 128
    assert spec_of(family="mistral", sliding_window=None).window(0) == 0
    config = toy_config("mistral")
    del config["sliding_window"]
    assert spec_from_config(config, {}).sliding_window == 4096  # transformers' default where the key is absent
    qwen: dict[str, Any] = {"family": "qwen2", "layers": 4, "sliding_window": 64}
    assert spec_of(**qwen, use_sliding_window=False, max_window_layers=2).sliding_window == 0
    some = spec_of(**qwen, use_sliding_window=True, max_window_layers=2)
    assert [some.window(i) for i in range(4)] == [0, 0, 64, 64]
    assert spec_of(**qwen, use_sliding_window=True, max_window_layers=4).sliding_window == 0
    every = spec_of(**qwen, use_sliding_window=True, max_window_layers=0)
    assert every.window_layers == () and every.window(3) == 64
    kinds = ["sliding_attention", "full_attention"] * 2
    assert spec_of(**qwen, use_sliding_window=True, layer_types=kinds).window_layers == (0, 2)
    assert "layer_types" in refusal(**qwen, use_sliding_window=True, layer_types=kinds[:3])
    assert "layer_types" in refusal(**qwen, use_sliding_window=True, layer_types=["other"] * 4)


def test_rope_in_its_three_spellings() -> None:
    llama3 = {key: value for key, value in LLAMA3.items() if key != "type"}
    old = spec_of(rope_theta=5e5, rope_scaling=LLAMA3)
    new = spec_of(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **llama3})
    newest = spec_of(rope_theta=None, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3})
    assert old == new == newest
    assert old.rope.kind == "llama3" and old.rope.theta == 5e5
    assert spec_of(rope_parameters={"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}).rope == RopeSpec(7.0, 8)


def test_yarn_attention_factor_comes_from_the_mscale_keys() -> None:
    yarn = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
    assert spec_of(rope_scaling=yarn).rope.attention_factor == 0
    assert spec_of(rope_scaling=yarn).max_position == 40 * 4096
    # DeepSeek-V2-Lite's keys; transformers 5.23 _compute_yarn_parameters gives 0.9210423553163399
    both = spec_of(rope_scaling=yarn | {"mscale": 0.707, "mscale_all_dim": 1.0}).rope
    assert both.attention_factor == pytest.approx(0.9210423553163399, rel=1e-12)
    assert spec_of(rope_scaling=yarn | {"mscale": 0.707}).rope.attention_factor == 0
    assert spec_of(rope_scaling=yarn | {"attention_factor": 1.5, "truncate": False}).rope.attention_factor == 1.5


@pytest.mark.parametrize(
    "key, value, reason",
    [
        ("num_hidden_layers", 10**9, "outside 1 .. 1024"),
        ("num_hidden_layers", 0, "outside"),
        ("num_hidden_layers", "2", "not an integer"),
        ("num_hidden_layers", 2.0, "not an integer"),
        ("num_hidden_layers", True, "not an integer"),
        ("num_hidden_layers", [2], "not an integer"),
        ("num_attention_heads", 0, "outside"),
        ("num_attention_heads", -4, "outside"),
        ("num_key_value_heads", 3, "evenly"),
        ("num_key_value_heads", 8, "outside"),
        ("head_dim", 15, "pairs"),
        ("hidden_size", 10**400, "more than 128 bits"),
        ("rms_norm_eps", float("nan"), "outside"),
        ("rms_norm_eps", float("inf"), "outside"),
        ("rms_norm_eps", "1e-5", "not a number"),
        ("rms_norm_eps", 0, "outside"),
        ("rope_theta", float("nan"), "outside"),
        ("rope_theta", 0, "outside"),
        ("rope_theta", True, "not a number"),
        ("max_position_embeddings", 1 << 40, "outside"),
        ("vocab_size", 0, "outside"),
        ("eos_token_id", 260, "outside the vocabulary of 260"),
        ("eos_token_id", "257", "not an id"),
        ("eos_token_id", list(range(300)) * 2, "at most 256"),
        ("bos_token_id", -1, "outside"),
        ("hidden_act", "gelu", "only 'silu'"),
        ("tie_word_embeddings", 1, "not true or false"),
        ("torch_dtype", "int8", "not supported"),
        ("torch_dtype", 16, "not a string"),
        ("architectures", [], "supported: LlamaForCausalLM"),
        ("architectures", ["GPT2LMHeadModel"], "supported: LlamaForCausalLM"),
        ("architectures", ["LlamaForCausalLM", "X"], "supported"),
        ("architectures", "LlamaForCausalLM", "not a list of strings"),
        ("architectures", None, "missing"),
        ("model_type", "qwen2", "not supported"),
        ("auto_map", {"AutoModel": "modeling_evil.Model"}, "its own code, which is never run"),
        ("model_file", "evil.py", "its own code, which is never run"),
        ("quantization_config", {"quant_method": "bitsandbytes"}, "quantized"),
        ("num_local_experts", 8, "not supported"),
        ("rope_scaling", "linear", "not an object"),
        ("rope_scaling", {"type": "longrope", "factor": 2.0}, "supported: default, linear, dynamic, llama3, yarn"),
        ("rope_scaling", {"type": "linear"}, "missing"),
        ("rope_scaling", {"type": "linear", "factor": float("nan")}, "outside"),
        ("rope_scaling", {"type": "linear", "factor": 0.5}, "outside"),
        ("rope_scaling", {"type": "linear", "factor": 2, "alpha": 3}, "not a key of linear rope"),
        ("rope_scaling", LLAMA3 | {"low_freq_factor": 4.0}, "above"),
        ("rope_scaling", {"type": "yarn", "factor": 4, "truncate": "no"}, "not true or false"),
        ("partial_rotary_factor", 1.5, "outside"),
        ("partial_rotary_factor", 0.2, "rotated dimensions"),
        ("use_sliding_window", True, "not supported"),
    ],
)  # fmt: skip
def test_hostile_config(key: str, value: Any, reason: str) -> None:
    message = refusal(**{key: value})
    assert message.startswith("config.json:") and reason in message and len(message) < 400
    assert key in message or key == "num_key_value_heads"


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps", "max_position_embeddings", "architectures"]
)
def test_missing_keys(key: str) -> None:
    config = toy_config()
    del config[key]
    with pytest.raises(ModelError, match=f"config.json:{key}: missing"):
        spec_from_config(config, {})


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"", "Expecting value"),
        (b"[]", "not an object"),
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b"\xff\xfe{}", "utf-8"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"num_hidden_layers": ' + b"9" * 5000 + b"}", "4300"),
        (b'{"a": "' + b"x" * (9 << 20) + b'"}', "larger than"),
    ],
)
def test_hostile_json(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    started = time.process_time()
    with pytest.raises(ModelError, match="^config.json: ") as caught:
        load_spec(tmp_path)
    assert reason in str(caught.value) and time.process_time() - started < 2


def test_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="config.json: No such file"):
        load_spec(tmp_path)
    with pytest.raises(ModelError, match="no such file or directory"):
        load_spec(tmp_path / "absent")
    toy = toy_checkpoint(tmp_path / "toy")
    (toy / "generation_config.json").write_text('{"eos_token_id": [5, 257]}')
    assert load_spec(toy).eos_token_ids == (5, 257)
    (toy / "generation_config.json").write_text('{"eos_token_id": [999]}')
    with pytest.raises(ModelError, match="generation_config.json:eos_token_id: id 999 is outside"):
        load_spec(toy)
    (toy / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ModelError, match="hf_quant_config.json: .*quantized"):
        load_spec(toy)


# ---- GGUF


@pytest.mark.parametrize("family", [name for name, f in FAMILIES.items() if f.gguf])
def test_gguf_says_the_same_as_config_json(tmp_path: Path, family: str) -> None:
    import dataclasses

    ours = load_spec(toy_gguf(tmp_path / "x.gguf", family))
    theirs = load_spec(toy_checkpoint(tmp_path / "hf", family))
    assert ours.rms_norm_eps == pytest.approx(theirs.rms_norm_eps, rel=1e-6)  # float32 in the file
    assert dataclasses.replace(ours, rms_norm_eps=theirs.rms_norm_eps) == theirs


def with_metadata(file: GGUFFile, **changes: object) -> GGUFFile:
    metadata = {key: value for key, value in (file.metadata | changes).items() if value is not None}
    return GGUFFile(file.path, file.version, metadata, file.tensors, file._map)


@pytest.mark.parametrize(
    "key, value, reason",
    [
        ("general.architecture", "gpt2", "supported: llama, qwen2, qwen3"),
        ("general.architecture", None, "missing"),
        ("llama.block_count", None, "missing"),
        ("llama.block_count", 10**9, "outside"),
        ("llama.block_count", "2", "not an integer"),
        ("llama.attention.head_count", 0, "outside"),
        ("llama.attention.head_count", 3, "evenly"),
        ("llama.attention.key_length", 17, "pairs"),
        ("llama.attention.head_count_kv", [1, 2], "not an integer"),
        ("llama.attention.value_length", 32, "only 16"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "outside"),
        ("llama.rope.freq_base", float("inf"), "outside"),
        ("llama.rope.dimension_count", 17, "rotated dimensions"),
        ("llama.rope.scaling.type", "longrope", "supported: none, linear, yarn"),
        ("llama.vocab_size", 261, "260 rows"),
        ("llama.expert_count", 8, "not supported"),
        ("tokenizer.ggml.tokens", ["x"] * 261, "260 rows"),
        ("tokenizer.ggml.eos_token_id", 260, "outside the vocabulary"),
    ],
)
def test_hostile_gguf_metadata(tmp_path: Path, key: str, value: object, reason: str) -> None:
    from engine.models.spec import spec_from_gguf

    file = read_gguf(toy_gguf(tmp_path / "x.gguf"))
    with pytest.raises(ModelError) as caught:
        spec_from_gguf(with_metadata(file, **{key: value}))
    assert str(caught.value).startswith("x.gguf:") and reason in str(caught.value)


def test_gguf_scaling(tmp_path: Path) -> None:
    from engine.models.spec import spec_from_gguf

    file = read_gguf(toy_gguf(tmp_path / "x.gguf"))
    linear = spec_from_gguf(with_metadata(file, **{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}))
    assert (linear.rope.kind, linear.rope.factor) == ("linear", 4.0)
    old = spec_from_gguf(with_metadata(file, **{"llama.rope.scale_linear": 2.0}))
    assert (old.rope.kind, old.rope.factor) == ("linear", 2.0)
    keys = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.original_context_length": 128}
    yarn = spec_from_gguf(with_metadata(file, **keys)).rope
    assert spec_from_gguf(with_metadata(file, **keys)).max_position == 512  # 4 x 128 is what the file says too
    assert (yarn.kind, yarn.factor, yarn.original_max_position) == ("yarn", 4.0, 128)
    assert yarn.attention_factor == pytest.approx(1.1386294361119891)  # 0.1 ln 4 + 1
    assert (
        spec_from_gguf(with_metadata(file, **{"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0})).rope.kind == "default"
    )


def test_a_vocabulary_is_not_a_model(assets: Path) -> None:
    with pytest.raises(ModelError, match="supported|no weights|missing"):
        load_spec(assets / "tokenizers" / "vectors" / "ggml-vocab-qwen2.gguf")


def test_real_gguf(smollm2: Path) -> None:
    spec = load_spec(smollm2)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (30, 9, 3, 64)
    assert spec.tie_word_embeddings and spec.rope == RopeSpec(100000.0, 64) and spec.eos_token_ids == (2,)


# ---- overrides


def test_overrides() -> None:
    spec = spec_of()
    assert apply_overrides(spec, Engine()) is spec
    assert apply_overrides(spec, Engine(use_logn_attn=True)).use_logn_attn
    scaled = apply_overrides(spec, Engine(rope_scaling_factor=2.0))
    assert (scaled.rope.kind, scaled.rope.factor, scaled.rope.original_max_position) == ("dynamic", 2.0, 512)
    assert scaled.max_position == 512  # the trained length: log_n and NTK both count from it
    for factor in (0.5, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="rope_scaling_factor"):
            apply_overrides(spec, Engine(rope_scaling_factor=factor))
    linear = spec_of(rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(ConfigError, match="linear scaling"):
        apply_overrides(linear, Engine(rope_scaling_factor=2.0))


def test_the_spec_is_read_without_torch() -> None:
    import subprocess
    import sys

    from tests.conftest import ROOT

    code = "import sys, engine.models.spec, engine.models.rope, engine.weight_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_toy_config_is_json(tmp_path: Path) -> None:
    """What `toy_checkpoint` writes is what the reader sees."""
    assert json.loads((toy_checkpoint(tmp_path / "x") / "config.json").read_text()) == toy_config()
