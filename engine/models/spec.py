"""`ModelSpec`: everything the decoder needs to know about a model, as data. What families leave unsaid is in `families.py`.

`load_spec` reads it from a Hugging Face directory (config.json, generation_config.json) or from the metadata of a
GGUF file. Reads are strict: what is missing, of the wrong type, absurd or not supported is a ModelError
`file:key: reason`, before anything is allocated. No torch, no code from the checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config.schema import Engine
from engine.errors import ConfigError, ModelError
from engine.models.families import FAMILIES, Family
from engine.models.keys import REQUIRED, Keys
from engine.models.quantized import SUPPORTED, AwqSpec, QuantSpec, quantization_of_config
from formats.errors import FormatError, printable
from formats.gguf import GGUFFile, read_gguf
from formats.json_file import read_json
from formats.workspace import is_workspace, read_workspace


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021). Half-split ("HF") layout: dimension i pairs with i + rotary_dim/2."""

    theta: float = 10000.0
    rotary_dim: int = 0  # rotated dimensions of each head; 0: all of head_dim
    kind: str = "default"  # default | linear | dynamic | yarn | llama3
    factor: float = 1.0
    original_max_position: int = 0  # trained length (dynamic, yarn, llama3)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 0.0  # yarn: multiplies cos and sin; 0: 0.1 ln(factor) + 1
    truncate: bool = True  # yarn: round the ends of the ramp to whole dimensions
    freq_factors: tuple[float, ...] = ()  # GGUF rope_freqs.weight: divides each inverse frequency


@dataclass(frozen=True, slots=True)
class ModelSpec:
    family: str  # key of FAMILIES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int  # longest sequence the model was made for
    rope: RopeSpec
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k before rope (Qwen3)
    sliding_window: int = 0  # a position sees itself and sliding_window - 1 before it; 0: all
    window_layers: tuple[int, ...] = ()  # layers that have the window; () with sliding_window > 0: all
    use_logn_attn: bool = False
    bos_token_id: int = -1
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"  # of the checkpoint's 16/32-bit tensors
    quant: AwqSpec | QuantSpec | None = None  # how its linears are quantized (Hugging Face checkpoints)

    @property
    def awq(self) -> AwqSpec | None:
        return self.quant if isinstance(self.quant, AwqSpec) else None

    def window(self, layer: int) -> int:
        """Sliding window of this layer, 0 for none."""
        return self.sliding_window if not self.window_layers or layer in self.window_layers else 0

    @property
    def longest(self) -> int:
        """Most positions of a sequence that may be asked for. Dynamic NTK with factor 1 stretches theta to whatever length
        it is given (TurboMind's rope_scaling_factor = 1.0), with a larger one only so many times the trained length."""
        if self.rope.kind != "dynamic":
            return self.max_position
        return int(self.max_position * self.rope.factor) if self.rope.factor > 1 else MAX_POSITION


# Keys that would change what the model computes in a way the decoder does not know, with the values that change nothing.
NEUTRAL_HF: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1,),  # more was a numerically different way of doing the same products
    "compression_config": (),
    "auto_map": (),
    "model_file": (),
    "text_config": (),
    "vision_config": (),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "clip_qkv": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_mrope": (False,),
}
WHY = {
    "compression_config": f"this way of being quantized is not supported; supported: {SUPPORTED}",
    "auto_map": "the checkpoint brings its own code, which is never run",
    "model_file": "the checkpoint brings its own code, which is never run",
}
NEUTRAL_GGUF: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.causal": (True,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "use_parallel_residual": (False, True),  # read by other architectures only
    "rope.scaling.finetuned": (False, True),
}
FILES_BESIDE = {"hf_quant_config.json": "a ModelOpt-quantized checkpoint is not supported; take the unquantized one"}

ROPE_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}
ROPE_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 18  # hidden, intermediate
MAX_HEADS = 2048
MAX_HEAD_DIM = 1024
MAX_VOCAB = 1 << 22
MAX_POSITION = 1 << 24
MAX_THETA = 1e15
DTYPES = ("float32", "float16", "bfloat16")


def load_spec(path: Path | str) -> ModelSpec:
    """From a Hugging Face directory, a GGUF file or a LMDeploy workspace; ModelError where it is broken or not supported."""
    path = Path(path)
    try:
        if is_workspace(path):
            from engine.workspace import spec_of_workspace  # which is written with this file

            return spec_of_workspace(read_workspace(path))
        if path.is_dir():
            return _from_directory(path)
        if not path.exists():
            raise ModelError(f"{printable(path.name)}: no such file or directory")
        return spec_from_gguf(read_gguf(path))
    except FormatError as e:
        raise ModelError(str(e)) from e


def apply_overrides(spec: ModelSpec, engine: Engine) -> ModelSpec:
    """The spec as [engine] rope_scaling_factor and use_logn_attn want it; `max_position` stays the trained length."""
    if engine.use_logn_attn:
        spec = dataclasses.replace(spec, use_logn_attn=True)
    factor = engine.rope_scaling_factor
    if factor == 0:
        return spec
    if not (math.isfinite(factor) and factor >= 1):
        raise ConfigError(f"engine.rope_scaling_factor = {factor:g}: set 0 (as the checkpoint says) or at least 1")
    kind = "llama3" if spec.rope.freq_factors else spec.rope.kind
    if kind not in ("default", "dynamic"):
        raise ConfigError(f"engine.rope_scaling_factor = {factor:g} contradicts the checkpoint's own {kind} scaling; set it to 0")
    trained = spec.rope.original_max_position or spec.max_position
    return dataclasses.replace(spec, rope=dataclasses.replace(spec.rope, kind="dynamic", factor=factor, original_max_position=trained))


# ---- Hugging Face


def _from_directory(path: Path) -> ModelSpec:
    for name, reason in FILES_BESIDE.items():
        if (path / name).exists():
            raise ModelError(f"{name}: {reason}")
    generation: Mapping[str, object] = {}
    if (path / "generation_config.json").exists():
        generation = read_json(path / "generation_config.json")
    return spec_from_config(read_json(path / "config.json"), generation)


def spec_from_config(config: Mapping[str, object], generation: Mapping[str, object]) -> ModelSpec:
    """From the two JSON objects of a Hugging Face checkpoint."""
    keys = Keys("config.json", config)
    name, family = _family_of_config(keys)
    keys = Keys("config.json", config, names=family.keys)
    _check_assumptions(keys, family)
    hidden = keys.integer("hidden_size", 1, MAX_WIDTH)
    heads = keys.integer("num_attention_heads", 1, MAX_HEADS)
    vocab = keys.integer("vocab_size", 1, MAX_VOCAB)
    layers = keys.integer("num_hidden_layers", 1, MAX_LAYERS)
    head_dim = _head_dim(keys, "head_dim", hidden, heads, family.default_head_dim)
    max_position = keys.integer("max_position_embeddings", 1, MAX_POSITION)
    bias = keys.flag("attention_bias", False) if family.bias_keys else bool(family.bias_key) and keys.flag(family.bias_key)
    window, window_layers = _window(keys, family, layers)
    return _checked(
        keys,
        ModelSpec(
            family=name,
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=_intermediate(keys, family),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=keys.integer("num_key_value_heads", 1, heads, family.default_kv_heads or heads),
            head_dim=head_dim,
            rms_norm_eps=keys.number("rms_norm_eps", 1e-12, 1.0),
            max_position=max_position,
            rope=ROPES[family.rope](keys, head_dim, max_position),
            tie_word_embeddings=keys.flag("tie_word_embeddings", False),
            qkv_bias=family.qkv_bias or bias,
            o_bias=bias,
            mlp_bias=keys.flag("mlp_bias", False) if family.bias_keys else False,
            qk_norm=family.qk_norm,
            sliding_window=window,
            window_layers=window_layers,
            use_logn_attn=bool(family.logn_key) and keys.flag(family.logn_key, False),
            bos_token_id=next(iter(keys.ids("bos_token_id", vocab)), -1),
            eos_token_ids=tuple(
                dict.fromkeys(Keys("generation_config.json", generation).ids("eos_token_id", vocab) + keys.ids("eos_token_id", vocab))
            ),
            dtype=_dtype_of_config(keys),
            quant=quantization_of_config(keys),
        ),
        heads_key="num_attention_heads",
    )


def _family_of_config(keys: Keys) -> tuple[str, Family]:
    names = keys.strings("architectures")
    for name, family in FAMILIES.items():
        if names == [family.architecture]:
            keys.expect("model_type", name)
            return name, family
    shown = ", ".join(map(printable, names[:4])) or "an empty list"
    keys.fail("architectures", f"{shown} is not supported; supported: {', '.join(f.architecture for f in FAMILIES.values())}")


def _check_assumptions(keys: Keys, family: Family) -> None:
    for key, allowed in (NEUTRAL_HF | dict(family.neutral)).items():
        if not (key == "auto_map" and family.own_code):
            keys.expect(key, *allowed, why=WHY.get(key, ""))
    for key, reason in family.required.items():
        if not keys.has(key):
            keys.fail(key, reason)
    for (key, value), reason in family.refused.items():
        if keys.values.get(key) == value:
            keys.fail(key, reason)


def _intermediate(keys: Keys, family: Family) -> int:
    size = keys.integer("intermediate_size", 1, MAX_WIDTH)
    if not family.halved_intermediate:
        return size
    if size % 2:
        keys.fail("intermediate_size", f"{size} counts gate and up together and is odd")
    return size // 2


def _head_dim(keys: Keys, key: str, hidden: int, heads: int, default: int = 0) -> int:
    if not default and not keys.has(key) and hidden % heads:
        keys.fail(key, f"missing, and {heads} heads do not divide a width of {hidden}")
    head_dim = keys.integer(key, 1, MAX_HEAD_DIM, default or hidden // heads)
    if head_dim % 2:
        keys.fail(key, f"a head of {head_dim} dimensions cannot be rotated in pairs")
    return head_dim


def _checked(keys: Keys, spec: ModelSpec, heads_key: str) -> ModelSpec:
    """What holds between keys. Yarn stretches what the model was trained for to `factor` times as many positions, whether or
    not the file's own maximum says so already."""
    if spec.rope.kind == "yarn":
        stretched = int(spec.rope.original_max_position * spec.rope.factor)
        spec = dataclasses.replace(spec, max_position=min(max(spec.max_position, stretched), MAX_POSITION))
    if spec.num_heads % spec.num_kv_heads:
        keys.fail(heads_key, f"{spec.num_heads} heads cannot share {spec.num_kv_heads} K/V heads evenly")
    return spec


def _window(keys: Keys, family: Family, layers: int) -> tuple[int, tuple[int, ...]]:
    """(sliding_window, window_layers) as ModelSpec has them."""
    if not family.window:
        keys.expect("use_sliding_window", False)
        return 0, ()
    if family.window == "all":
        if "sliding_window" in keys.values and not keys.has("sliding_window"):
            return 0, ()
        return keys.integer("sliding_window", 1, MAX_POSITION, family.default_window), ()
    if not keys.flag("use_sliding_window", False):
        return 0, ()
    window = keys.integer("sliding_window", 1, MAX_POSITION)
    if keys.has("layer_types"):
        types = keys.strings("layer_types")
        if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
            keys.fail("layer_types", f"wants {layers} entries, each full_attention or sliding_attention")
        chosen = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    else:
        chosen = tuple(range(keys.integer("max_window_layers", 0, MAX_LAYERS), layers))
    return (window, chosen if len(chosen) < layers else ()) if chosen else (0, ())


def _dtype_of_config(keys: Keys) -> str:
    key = "dtype" if keys.has("dtype") else "torch_dtype"
    name = keys.text(key, "float16" if keys.values.get("fp16") is True else "bfloat16").removeprefix("torch.")
    if name not in DTYPES:
        keys.fail(key, f"{printable(name)} is not supported; supported: {', '.join(DTYPES)}")
    return name


def _rope_of_config(keys: Keys, head_dim: int, max_position: int) -> RopeSpec:
    """`rope_parameters` (transformers 5) or `rope_scaling` with `rope_theta` beside it."""
    where = "rope_parameters" if keys.has("rope_parameters") else "rope_scaling"
    given = keys.table(where) or {}
    rope = Keys(keys.file, {f"{where}.{k}": v for k, v in given.items()}, f"{where}.")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_KEYS:
        rope.fail("rope_type", f"{printable(kind)} is not supported; supported: {', '.join(ROPE_KEYS)}")
    for key in given:
        if key not in ROPE_KEYS[kind] | ROPE_COMMON_KEYS:
            rope.fail(key, f"not a key of {kind} rope")
    partial = rope.number("partial_rotary_factor", 1e-3, 1, keys.number("partial_rotary_factor", 1e-3, 1, 1.0))
    theta = rope.number("rope_theta", 1.000001, MAX_THETA, keys.number("rope_theta", 1.000001, MAX_THETA, 10000.0))
    spec = RopeSpec(theta=theta, rotary_dim=_rotary_dim(rope, "partial_rotary_factor", int(head_dim * partial), head_dim), kind=kind)
    return _scaled(rope, spec, max_position)


def _rope_of_internlm(keys: Keys, head_dim: int, max_position: int) -> RopeSpec:
    """InternLM's `rotary`: base, type (origin or dynamic) and scaling_factor; older files have none."""
    given = keys.table("rotary")
    if given is None:
        return _rope_of_config(keys, head_dim, max_position)
    rope = Keys(keys.file, {f"rotary.{k}": v for k, v in given.items()}, "rotary.")
    for key in given.keys() - {"base", "type", "scaling_factor"}:
        rope.fail(key, "not a key of rotary")
    spec = RopeSpec(theta=rope.number("base", 1.000001, MAX_THETA, 10000.0), rotary_dim=head_dim)
    kind = rope.text("type", "origin")
    if kind == "origin":
        return spec
    if kind != "dynamic":
        rope.fail("type", f"{printable(kind)} is not supported; supported: origin, dynamic")
    factor = rope.number("scaling_factor", 1, 1e6, 1.0)
    return dataclasses.replace(spec, kind="dynamic", factor=factor, original_max_position=max_position)


def _rope_of_qwen(keys: Keys, head_dim: int, max_position: int) -> RopeSpec:
    """Qwen-1: use_dynamic_ntk is TurboMind's rope_scaling_factor = 1, of use beyond seq_length only."""
    spec = _rope_of_config(keys, head_dim, max_position)
    if not keys.flag("use_dynamic_ntk", False):
        return spec
    return dataclasses.replace(spec, kind="dynamic", factor=1.0, original_max_position=max_position)


ROPES = {"": _rope_of_config, "internlm": _rope_of_internlm, "qwen": _rope_of_qwen}


def _rotary_dim(keys: Keys, key: str, dim: int, head_dim: int) -> int:
    if dim < 4 or dim % 2 or dim > head_dim:
        keys.fail(key, f"{dim} rotated dimensions of {head_dim}; an even number from 4 is wanted")
    return dim


def _scaled(rope: Keys, spec: RopeSpec, max_position: int) -> RopeSpec:
    """With the keys of its kind of scaling."""
    if spec.kind == "default":
        return spec
    spec = dataclasses.replace(spec, factor=rope.number("factor", 1, 1e6))
    if spec.kind == "linear":
        return spec
    trained = rope.integer("original_max_position_embeddings", 1, MAX_POSITION, REQUIRED if spec.kind == "llama3" else max_position)
    spec = dataclasses.replace(spec, original_max_position=trained)
    if spec.kind == "llama3":
        low, high = rope.number("low_freq_factor", 1e-6, 1e6), rope.number("high_freq_factor", 1e-6, 1e6)
        if low >= high:
            rope.fail("high_freq_factor", f"{high:g} is not above low_freq_factor {low:g}")
        return dataclasses.replace(spec, low_freq_factor=low, high_freq_factor=high)
    return _yarn(rope, spec) if spec.kind == "yarn" else spec


def _yarn(rope: Keys, spec: RopeSpec) -> RopeSpec:
    """The attention factor is resolved here: given, or the ratio of both mscale keys, or 0 (0.1 ln(factor) + 1)."""
    scale, scale_all = rope.number("mscale", 0, 1e3, 0.0), rope.number("mscale_all_dim", 0, 1e3, 0.0)
    log = math.log(spec.factor)
    derived = (0.1 * scale * log + 1) / (0.1 * scale_all * log + 1) if scale and scale_all else 0.0
    return dataclasses.replace(
        spec,
        attention_factor=rope.number("attention_factor", 1e-6, 1e6, derived),
        beta_fast=rope.number("beta_fast", 1e-6, 1e6, 32.0),
        beta_slow=rope.number("beta_slow", 1e-6, 1e6, 1.0),
        truncate=rope.flag("truncate", True),
    )


# ---- GGUF


def spec_from_gguf(file: GGUFFile) -> ModelSpec:
    """From a GGUF file's metadata and the presence of optional tensors (output, biases, rope_freqs)."""
    top = Keys(file.path.name, file.metadata)
    name, family = _family_of_gguf(top)
    keys = Keys(file.path.name, file.metadata, f"{family.gguf}.")
    for key, allowed in NEUTRAL_GGUF.items():
        keys.expect(key, *allowed)
    if not file.tensors:
        raise ModelError(f"{printable(file.path.name)}: holds a vocabulary and no weights")
    hidden = keys.integer("embedding_length", 1, MAX_WIDTH)
    heads = keys.integer("attention.head_count", 1, MAX_HEADS)
    head_dim = _head_dim(keys, "attention.key_length", hidden, heads)
    keys.expect("attention.value_length", head_dim)
    max_position = keys.integer("context_length", 1, MAX_POSITION)
    vocab = _gguf_vocab(top, keys, file)
    window = keys.integer("attention.sliding_window", 0, MAX_POSITION, 0)
    if window and name != "llama":
        keys.fail("attention.sliding_window", "which layers have the window is not in the file; not supported")
    return _checked(
        keys,
        ModelSpec(
            family=name,
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=keys.integer("feed_forward_length", 1, MAX_WIDTH),
            num_layers=keys.integer("block_count", 1, MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=keys.integer("attention.head_count_kv", 1, heads, heads),
            head_dim=head_dim,
            rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon", 1e-12, 1.0),
            max_position=max_position,
            rope=_rope_of_gguf(keys, file, head_dim, max_position),
            tie_word_embeddings="output.weight" not in file.tensors,
            qkv_bias=family.qkv_bias or "blk.0.attn_q.bias" in file.tensors,
            o_bias="blk.0.attn_output.bias" in file.tensors,
            mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
            qk_norm=family.qk_norm,
            sliding_window=window,
            bos_token_id=next(iter(top.ids("tokenizer.ggml.bos_token_id", vocab)), -1),
            eos_token_ids=tuple(
                dict.fromkeys(i for kind in ("eos", "eot", "eom") for i in top.ids(f"tokenizer.ggml.{kind}_token_id", vocab))
            ),
            dtype=_gguf_dtype(file),
        ),
        heads_key="attention.head_count",
    )


def _family_of_gguf(keys: Keys) -> tuple[str, Family]:
    architecture = keys.text("general.architecture")
    known = {family.gguf: (name, family) for name, family in FAMILIES.items() if family.gguf}
    if architecture not in known:
        keys.fail("general.architecture", f"{printable(architecture)} is not supported; supported: {', '.join(known)}")
    return known[architecture]


def _gguf_vocab(top: Keys, keys: Keys, file: GGUFFile) -> int:
    """Rows of the embedding; the other places that state it must agree."""
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{printable(file.path.name)}: token_embd.weight: missing")
    rows = file.tensors["token_embd.weight"].shape[0]
    if rows > MAX_VOCAB:
        keys.fail("vocab_size", f"{rows} rows of token_embd.weight; at most {MAX_VOCAB} are supported")
    if keys.integer("vocab_size", 1, MAX_VOCAB, rows) != rows:
        keys.fail("vocab_size", f"contradicts the {rows} rows of token_embd.weight")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > rows:
        top.fail("tokenizer.ggml.tokens", f"{len(tokens)} tokens, token_embd.weight has {rows} rows")
    return rows


def _rope_of_gguf(keys: Keys, file: GGUFFile, head_dim: int, max_position: int) -> RopeSpec:
    dim = _rotary_dim(keys, "rope.dimension_count", keys.integer("rope.dimension_count", 1, MAX_HEAD_DIM, head_dim), head_dim)
    spec = RopeSpec(
        theta=keys.number("rope.freq_base", 1.000001, MAX_THETA, 10000.0), rotary_dim=dim, freq_factors=_freq_factors(file, dim // 2)
    )
    kind = keys.text("rope.scaling.type", "none")
    old = keys.number("rope.scale_linear", 1, 1e6, 1.0)
    factor = keys.number("rope.scaling.factor", 0, 1e6, old)
    if kind not in ("none", "linear", "yarn"):
        keys.fail("rope.scaling.type", f"{printable(kind)} is not supported; supported: none, linear, yarn")
    if kind == "none" and not keys.has("rope.scale_linear") or factor in (0, 1):
        return spec
    if kind != "yarn":
        return dataclasses.replace(spec, kind="linear", factor=factor)
    # llama.cpp scales cos and sin by attn_factor and, on top of it, by 0.1 ln(factor) + 1
    attention = keys.number("rope.scaling.attn_factor", 1e-6, 1e6, 1.0) * (0.1 * math.log(factor) + 1)
    original = keys.integer("rope.scaling.original_context_length", 1, MAX_POSITION, max_position)
    fast, slow = (keys.number(f"rope.scaling.yarn_beta_{k}", 1e-6, 1e6, d) for k, d in (("fast", 32.0), ("slow", 1.0)))
    return dataclasses.replace(
        spec, kind="yarn", factor=factor, original_max_position=original, attention_factor=attention, beta_fast=fast, beta_slow=slow
    )


def _freq_factors(file: GGUFFile, count: int) -> tuple[float, ...]:
    if "rope_freqs.weight" not in file.tensors:
        return ()
    t = file.tensors["rope_freqs.weight"]
    if t.type != "F32" or t.shape != (count,):
        raise ModelError(f"{printable(file.path.name)}: rope_freqs.weight: {t.type} {t.shape}, wanted F32 ({count},)")
    values = file.raw(t.name).view("<f4")
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ModelError(f"{printable(file.path.name)}: rope_freqs.weight: a factor is not a positive number")
    return tuple(values.tolist())


def _gguf_dtype(file: GGUFFile) -> str:
    types = {t.type for t in file.tensors.values()}
    return "bfloat16" if "BF16" in types else "float32" if types == {"F32"} else "float16"
