"""A 16-bit Hugging Face folder from any checkpoint whose tensors are apart: what a ladder's first rung is where the file at
hand holds 4 bits, and what other tools quantize.

Quantized weights are dequantized in float32 and rounded to float16, as `engine/weights.py` gives them; others stay as they
are. The config.json is written from the `ModelSpec` and read again: what it cannot say is refused. All or nothing.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from engine.errors import ModelError
from engine.models.families import FAMILIES, HF_NAMES
from engine.models.layers import to_dense
from engine.models.spec import ModelSpec, RopeSpec, load_spec
from engine.weight_files import Stored, expected_shapes, file_name, take_stock
from engine.weights import DTYPES, Checkpoint
from quant.disk import INDEX, Planned, ShardedTensors, flush_folders, replace_folder, write_file
from quant.tokenizer_files import tokenizer_files

FORM = {"dtype", "awq", "quant"}  # fields of a spec that say how it is stored, not what it computes
MODEL_TYPES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
SAFETENSORS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def is_dense(path: Path | str) -> bool:
    """Whether every weight of a checkpoint is stored in 16 or 32 bits."""
    path = Path(path)
    return all(stored.type in DTYPES for stored in take_stock(path, load_spec(path)).values())


def write_dense(source: Path | str, dst: Path | str) -> Path:
    """Write `dst`, a folder that is replaced where it is one of ours. ModelError where the model cannot be said in 16 bits by
    a config.json; OSError of the disk, after which nothing is left."""
    source, dst = Path(source), Path(dst)
    spec = load_spec(source)
    if FAMILIES[spec.family].names is not HF_NAMES:
        raise ModelError(f"{source.name}: {spec.family} packs its tensors; a 16-bit copy is made of {', '.join(MODEL_TYPES)} only.")
    stock = take_stock(source, spec)
    planned = {file_name(name, HF_NAMES): Planned(_type(stored), stored.shape) for name, stored in stock.items()}
    if dst.exists() and not (dst / "config.json").is_file():
        raise ModelError(f"{dst.name}: is there and is no checkpoint; name another folder.")
    partial = dst.with_name(f"{dst.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(partial, source, spec, stock, planned)
        _check(partial, spec)
        flush_folders(partial)
        replace_folder(partial, dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return dst


def _write(folder: Path, source: Path, spec: ModelSpec, stock: dict[str, Stored], planned: dict[str, Planned]) -> None:
    tensors = ShardedTensors(folder, planned)
    try:
        checkpoint = Checkpoint(stock)
        for canonical in expected_shapes(spec):
            name, _, suffix = canonical.rpartition(".")
            values = checkpoint.bias(name) if suffix == "bias" else to_dense(checkpoint.weight(name, dense=True))
            tensors.write(file_name(canonical, HF_NAMES), _numpy(values, stock[canonical]))
        checkpoint.finish()
        tensors.flush()
        index = tensors.index()
    finally:
        tensors.close()
    if index is not None:
        write_file(folder / INDEX, index)
    for name, data in tokenizer_files(source):
        if name not in ("config.json", "generation_config.json"):
            write_file(folder / name, data)
    write_file(folder / "config.json", json.dumps(config_of(spec), indent=2).encode())


def _type(stored: Stored) -> str:
    return stored.type if stored.type in DTYPES else "F16"


def _numpy(values: torch.Tensor, stored: Stored) -> Any:
    """Bytes as they go to the file: 16-bit floats as integers."""
    values = values.to(DTYPES[_type(stored)]).contiguous()
    return values.numpy() if values.dtype == torch.float32 else values.view(torch.int16).numpy()


def _check(folder: Path, spec: ModelSpec) -> None:
    """The folder is read as the same model."""
    read = load_spec(folder)
    names = [f.name for f in dataclasses.fields(spec) if f.name not in FORM]
    odd = [name for name in names if getattr(read, name) != getattr(spec, name)]
    if odd:
        raise ModelError(f"A config.json cannot say this model's {', '.join(odd)}; there is no 16-bit copy of it.")


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """config.json of a 16-bit checkpoint."""
    family = FAMILIES[spec.family]
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": MODEL_TYPES[spec.family],
        "torch_dtype": spec.dtype,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": spec.rms_norm_eps,
        "max_position_embeddings": spec.max_position,
        "tie_word_embeddings": spec.tie_word_embeddings,
        **_rope(spec.rope),
    }
    if family.bias_keys:
        values |= {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}
    if family.window:
        values |= {"sliding_window": spec.sliding_window or None}
    if spec.bos_token_id >= 0:
        values["bos_token_id"] = spec.bos_token_id
    if spec.eos_token_ids:
        values["eos_token_id"] = list(spec.eos_token_ids)
    return values


def _rope(rope: RopeSpec) -> dict[str, Any]:
    """Keys of config.json; a kind of its own goes under rope_scaling."""
    out: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.kind != "default":
        out["rope_scaling"] = {"rope_type": rope.kind, "factor": rope.factor}
        if rope.original_max_position:
            out["rope_scaling"]["original_max_position_embeddings"] = rope.original_max_position
        if rope.kind == "llama3":
            out["rope_scaling"] |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        if rope.kind == "yarn":
            out["rope_scaling"] |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    return out
