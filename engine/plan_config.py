"""A memory plan without weights, and the table that says what other precisions would take.

`stock_for_plan` reads the headers of the weights; where a folder holds a config.json and no weights, it counts what that file
promises. `precisions` is seed 002's table for any model: weights in 16 bits and in 4, the K/V of a few sequences in 16, 8 and
4 bits. Arithmetic on a `ModelSpec`; no torch, no card, nothing is allocated.

    K/V of a position = 2 x layers x KV heads x (head_dim x bits / 8 + 4 where quantized: scale and zero)   engine/cache/layout.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from engine.cache.layout import KVLayout
from engine.errors import ModelError
from engine.models.families import FAMILIES
from engine.models.spec import ModelSpec
from engine.weight_files import INDEX, SINGLE, Stored, expected_shapes, file_name, take_stock
from formats.workspace import is_workspace

GIB, GB = 2**30, 10**9
W4_GROUP = 128  # of the 4-bit checkpoint that is counted: what auto_awq writes
BLOCK = 64  # positions: blocks of so many have no padding
SEQUENCES, LENGTHS = 8, (2048, 8192, 32768)
PRECISIONS = (("16-bit", 16, 16), ("16-bit + KV int8", 16, 8), ("W4", 4, 16), ("W4 + KV int8", 4, 8), ("W4 + KV int4", 4, 4))
DENSE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class _Promised:
    """The file of a parameter that is not there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def raw(self, name: str) -> NoReturn:
        raise ModelError(f"{self.path.name}: {name}: there are no weights here, only a config.json")


def only_config(path: Path | str) -> bool:
    """Whether this is a folder with a description of a model and nothing of its weights."""
    path = Path(path)
    return (
        path.is_dir()
        and not is_workspace(path)
        and (path / "config.json").is_file()
        and not ((path / INDEX).exists() or (path / SINGLE).exists())
    )


def stock_for_plan(path: Path | str, spec: ModelSpec) -> dict[str, Stored]:
    """What the plan is made from: the headers of the weights, else what config.json says there would be."""
    return promised_stock(path, spec) if only_config(path) else take_stock(path, spec)


def promised_stock(path: Path | str, spec: ModelSpec) -> dict[str, Stored]:
    """Every parameter in the type that config.json says it has."""
    file, names = _Promised(Path(path)), FAMILIES[spec.family].names
    out: dict[str, Stored] = {}
    for canonical, shape in expected_shapes(spec).items():
        name = file_name(canonical, names)
        scheme = None
        if spec.quant is not None and canonical.startswith("layers.") and len(shape) == 2:  # a head is left as it was, as a rule
            name = name.removesuffix(".weight")
            scheme = spec.quant.scheme(name)
        out[canonical] = Stored(file, name, shape, scheme.form if scheme else DENSE[spec.dtype], scheme=scheme)
    return out


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes of a whole model, all ranks together. `kv`: of SEQUENCES sequences of each of LENGTHS."""

    name: str
    weights: int
    kv: tuple[int, ...]


def precisions(spec: ModelSpec) -> list[Precision]:
    """From the shapes alone, whatever the files at hand hold."""
    return [
        Precision(name, weight_bytes(spec, bits), tuple(SEQUENCES * length * kv_bytes(spec, kv_bits) for length in LENGTHS))
        for name, bits, kv_bits in PRECISIONS
    ]


def weight_bytes(spec: ModelSpec, bits: int) -> int:
    """Of a checkpoint: 16 bits all through, or the layers' matrices in AWQ's form (a nibble, and a 16-bit scale and 4-bit zero
    point a group) with embedding, output head, norms and biases left in 16 bits."""
    total = 0
    for canonical, shape in expected_shapes(spec).items():
        elements = shape[0] * (shape[1] if len(shape) == 2 else 1)
        if bits == 4 and canonical.startswith("layers.") and len(shape) == 2:
            total += elements // 2 + shape[0] * -(-shape[1] // W4_GROUP) * 5 // 2
        else:
            total += 2 * elements
    return total


def kv_bytes(spec: ModelSpec, bits: int) -> int:
    """Of one position of one sequence, all layers."""
    block = KVLayout(spec.num_layers, spec.num_kv_heads, spec.head_dim, BLOCK, "bfloat16", 0 if bits == 16 else bits)
    return block.block_bytes // BLOCK


def precision_table(spec: ModelSpec) -> str:
    """For people: GiB; of the weights GB (10^9 bytes) too, which is what a parameter count suggests."""
    heads = [f"{length // 1024}k" for length in LENGTHS]
    out = [f"{'what other precisions take, GiB':<32}{'weights':>20}" + "".join(f"{f'KV {SEQUENCES} x {h}':>12}" for h in heads)]
    for row in precisions(spec):
        weights = f"{row.weights / GIB:.2f} ({row.weights / GB:.2f} GB)"
        out.append(f"{row.name:<32}{weights:>20}" + "".join(f"{size / GIB:>12.2f}" for size in row.kv))
    return "\n".join(out)
