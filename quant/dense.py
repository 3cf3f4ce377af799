"""A 16-bit Hugging Face folder from any checkpoint: what a ladder's first rung is where the file at hand holds 4 bits, and what
other tools quantize.

Quantized weights are dequantized in float32 and rounded to float16, as `engine/weights.py` gives them; others stay as they
are. Names, packed tensors and config.json are the source's (`quant/source.py`). All or nothing.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.errors import ModelError
from engine.models.layers import to_dense
from engine.models.spec import load_spec
from engine.weight_files import take_stock
from engine.weights import DTYPES, Checkpoint
from formats.errors import printable
from formats.workspace import is_workspace
from quant.disk import INDEX, Planned, ShardedTensors, flush_folders, replace_folder, write_file
from quant.forward import SITES, rows_of
from quant.source import Source
from quant.tokenizer_files import tokenizer_files

FORM = {"dtype", "quant"}  # fields of a spec that say how it is stored, not what it computes
NOT_DENSE = ("quantization_config", "compression_config")  # keys of config.json that a dense model has not


def is_dense(path: Path | str) -> bool:
    """Whether every weight of a checkpoint is stored in 16 or 32 bits."""
    path = Path(path)
    return all(stored.type in DTYPES for stored in take_stock(path, load_spec(path)).values())


def write_dense(source: Path | str, dst: Path | str) -> Path:
    """Write `dst`, a folder that is replaced where it is a checkpoint. ModelError where the model cannot be said in 16 bits by
    a config.json; OSError of the disk, after which nothing is left."""
    path, dst = Path(source), Path(dst)
    if is_workspace(path):
        raise ModelError(f"{printable(path.name)}: is a TurboMind workspace; give the checkpoint it was made from")
    spec = load_spec(path)
    model = Source(path, spec, take_stock(path, spec))
    config = {key: value for key, value in model.config().items() if key not in NOT_DENSE}
    if dst.exists() and not (dst / "config.json").is_file():
        raise ModelError(f"{printable(dst.name)}: is there and is no checkpoint; name another folder")
    partial = dst.with_name(f"{dst.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_tensors(partial, model)
        for name, data in tokenizer_files(path, hub=True):
            if name != "config.json":
                write_file(partial / name, data)
        write_file(partial / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        _check(partial, model)
        flush_folders(partial)
        replace_folder(partial, dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return dst


def _write_tensors(folder: Path, model: Source) -> None:
    planned, checkpoint = dict(_planned(model)), model.checkpoint()
    tensors = ShardedTensors(folder, planned)
    try:
        for name, values in _values(model, checkpoint):
            tensors.write(name, _numpy(values, planned[name].dtype))
        checkpoint.finish()
        tensors.flush()
        index = tensors.index()
    finally:
        tensors.close()
    if index is not None:
        write_file(folder / INDEX, index)


def _planned(model: Source) -> Iterator[tuple[str, Planned]]:
    for canonical, name in model.dense_names().items():
        yield name, Planned(_type(model, canonical), model.stock[canonical].shape)
    for layer in range(model.spec.num_layers):
        for linear in model.linears(layer):
            first = f"layers.{layer}.{next(iter(rows_of(model.spec, linear.site)))}"
            yield f"{linear.name}.weight", Planned(_type(model, f"{first}.weight"), (linear.rows, model.stock[f"{first}.weight"].shape[1]))
            if linear.biased:
                yield f"{linear.name}.bias", Planned(_type(model, f"{first}.bias"), (linear.rows,))


def _values(model: Source, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for canonical, name in model.dense_names().items():
        yield name, to_dense(checkpoint.weight(canonical.removesuffix(".weight"), dense=True))
    for layer in range(model.spec.num_layers):
        linears = model.linears(layer)
        for site in SITES:
            sizes = rows_of(model.spec, site)
            parts = [f"layers.{layer}.{part}" for part in sizes]
            weight = torch.cat([to_dense(checkpoint.weight(part, dense=True)) for part in parts])
            for linear in linears:
                if linear.site == site:
                    rows = linear.indices(list(sizes.values()))
                    yield f"{linear.name}.weight", weight[rows]
                    if linear.biased:
                        yield f"{linear.name}.bias", torch.cat([checkpoint.bias(part) for part in parts])[rows]


def _type(model: Source, canonical: str) -> str:
    stored = model.stock[canonical]
    return stored.type if stored.type in DTYPES else "F16"


def _numpy(values: torch.Tensor, kind: str) -> Any:
    """Bytes as they go to the file: 16-bit floats as integers."""
    values = values.to(DTYPES[kind]).contiguous()
    return values.numpy() if values.dtype == torch.float32 else values.view(torch.int16).numpy()


def _check(folder: Path, model: Source) -> None:
    """The folder is read as the same model. Frequencies that a GGUF file gives one by one were compared when it was named."""
    read, spec = load_spec(folder), model.spec
    same = FORM | ({"rope"} if spec.rope.freq_factors else set())
    odd = [f.name for f in dataclasses.fields(spec) if f.name not in same and getattr(read, f.name) != getattr(spec, f.name)]
    if odd:
        raise ModelError(f"A config.json cannot say this model's {', '.join(odd)}; there is no 16-bit copy of it.")
