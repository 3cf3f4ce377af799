"""Which tensors a quantized linear is made of, in each form that checkpoints have: names, types and shapes, checked.

    form     tensors of a linear of N output and K input channels, G = K / group_size scales a channel, P = 32 / bits
    AWQ      qweight I32 [K, N/8]      qzeros I32 [G, N/8]     scales F16 [G, N]                      (engine/awq.py)
    GPTQ     qweight I32 [K/P, N]      qzeros I32 [G, N/P]     scales [G, N]        g_idx I32 [K]     (engine/packed_ints.py)
    PACKED   weight_packed I32 [N, K/P]    weight_scale [N, G]    weight_zero_point I32 [N/P, G]
             weight_g_idx I32 [K]          weight_shape I64 [2]                                       (engine/packed_ints.py)
    INT8     weight I8 [N, K]          weight_scale [N, 1] or [1]                                     (engine/eight_bit.py)
    FP8      weight F8_E4M3 [N, K]     weight_scale or weight_scale_inv [N, 1], [1] or [N/128, K/128] (engine/eight_bit.py)

Headers only; no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engine.awq import PACK
from engine.models.quantized import BLOCK, Scheme
from engine.stored import DENSE_TYPES, RowPick, Stored

FLOATS = DENSE_TYPES
SCALAR = ((), (1,), (1, 1))


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor of a linear: its types and shapes; `optional` ones may be absent, names after `or_name` stand in for it."""

    types: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False
    or_name: str = ""


def join_linear(linear: str, shape: tuple[int, int], scheme: Scheme, picks: Mapping[str, RowPick], found: dict[str, Stored]) -> Stored:
    """The tensors of a linear taken out of `found`, as one parameter. KeyError with the names that are missing; ModelError
    where one is there and does not fit."""
    wanted = WANTED[scheme.form](shape, scheme)
    names = {suffix: _present(linear, suffix, tensor, found) for suffix, tensor in wanted.items()}
    if missing := [f"{linear}.{s}" for s, name in names.items() if name not in found and not wanted[s].optional]:
        raise KeyError(*missing)
    first = found[names[next(iter(wanted))]]
    _check_cut(first, shape, scheme, picks)
    parts = []
    for suffix, name in names.items():
        if name in found:
            parts.append(found.pop(name))
            _check_part(parts[-1], wanted[suffix])
    stored = Stored(first.file, linear, shape, scheme.form, parts=tuple(parts), scheme=scheme)
    if (told := stored.part("weight_shape")) is not None and tuple(told.file.raw(told.name).view("<i8").tolist()) != shape:
        raise told.fail(f"says {told.file.raw(told.name).view('<i8').tolist()}, the model's configuration wants {list(shape)}")
    return stored


def is_quantized(linear: str, scheme: Scheme, found: Mapping[str, Stored]) -> bool:
    """Whether the tensor that holds the integers is there."""
    first, tensor = next(iter(WANTED[scheme.form]((PACK, PACK), scheme).items()))
    stored = found.get(f"{linear}.{first}")
    return stored is not None and not stored.parts and (first != "weight" or stored.type in tensor.types)


def _present(linear: str, suffix: str, tensor: Wanted, found: Mapping[str, Stored]) -> str:
    name = f"{linear}.{suffix}"
    return f"{linear}.{tensor.or_name}" if name not in found and f"{linear}.{tensor.or_name}" in found else name


def _check_part(part: Stored, wanted: Wanted) -> None:
    if part.type not in wanted.types or part.shape not in wanted.shapes:
        kind, size = " or ".join(wanted.types), " or ".join(str(shape) for shape in dict.fromkeys(wanted.shapes))
        raise part.fail(f"{part.type} {part.shape}, the model's configuration wants {kind} {size}")


def _check_cut(first: Stored, shape: tuple[int, int], scheme: Scheme, picks: Mapping[str, RowPick]) -> None:
    n, k = shape
    per, group = 32 // scheme.bits, scheme.group_size or k
    if scheme.form in ("AWQ", "GPTQ", "PACKED"):
        if any(pick.start % per or pick.count % per for pick in picks.values()):
            raise first.fail(f"q, k and v do not lie between whole int32s of {per} output channels")
        if (n % per and (scheme.form == "AWQ" or scheme.zeros)) or k % group or k % per:
            raise first.fail(f"{n} output and {k} input channels are no whole int32s of {per} and groups of {group}")


def drop_zero_bias(linear: str, found: dict[str, Stored]) -> None:
    """Some tools write a bias of zeros for the linears of models that have none."""
    stored = found.get(f"{linear}.bias")
    if stored is not None and stored.type in DENSE_TYPES and not np.any(stored.file.raw(stored.name)):
        del found[f"{linear}.bias"]


def _awq(shape: tuple[int, int], scheme: Scheme) -> dict[str, Wanted]:
    n, k = shape
    groups = k // scheme.group_size
    return {
        "qweight": Wanted(("I32",), ((k, n // PACK),)),
        "qzeros": Wanted(("I32",), ((groups, n // PACK),), optional=not scheme.zeros),
        "scales": Wanted(("F16",), ((groups, n),)),
    }


def _gptq(shape: tuple[int, int], scheme: Scheme) -> dict[str, Wanted]:
    n, k = shape
    per, groups = 32 // scheme.bits, _groups(k, scheme)
    return {
        "qweight": Wanted(("I32",), ((k // per, n),)),
        "qzeros": Wanted(("I32",), ((groups, n // per),)),
        "scales": Wanted(FLOATS, ((groups, n),)),
        "g_idx": Wanted(("I32",), ((k,),), optional=True),
    }


def _packed(shape: tuple[int, int], scheme: Scheme) -> dict[str, Wanted]:
    n, k = shape
    per, groups = 32 // scheme.bits, _groups(k, scheme)
    zeros = {"weight_zero_point": Wanted(("I32",), ((n // per, groups),))} if scheme.zeros else {}
    return {
        "weight_packed": Wanted(("I32",), ((n, k // per),)),
        "weight_scale": Wanted(FLOATS, ((n, groups),)),
        **zeros,
        "weight_g_idx": Wanted(("I32",), ((k,),), optional=True),
        "weight_shape": Wanted(("I64",), ((2,),), optional=True),
    }


def _int8(shape: tuple[int, int], scheme: Scheme) -> dict[str, Wanted]:
    n = shape[0]
    scales = ((n, 1), (n,)) if scheme.block_rows else SCALAR
    return {
        "weight": Wanted(("I8",), (shape,)),
        "weight_scale": Wanted(FLOATS, scales),
        "input_scale": Wanted(FLOATS, SCALAR, optional=True),
    }


def _fp8(shape: tuple[int, int], scheme: Scheme) -> dict[str, Wanted]:
    n, k = shape
    scales: tuple[tuple[int, ...], ...] = ((n, 1), (n,)) if scheme.block_rows == 1 else SCALAR
    if scheme.group_size:
        scales = ((math.ceil(n / BLOCK), math.ceil(k / BLOCK)),)
    return {
        "weight": Wanted(("F8_E4M3",), (shape,)),
        "weight_scale": Wanted(FLOATS, scales, or_name="weight_scale_inv"),
        "input_scale": Wanted(FLOATS, SCALAR, optional=True, or_name="activation_scale"),
    }


def _groups(k: int, scheme: Scheme) -> int:
    return k // (scheme.group_size or k)


WANTED = {"AWQ": _awq, "GPTQ": _gptq, "PACKED": _packed, "INT8": _int8, "FP8": _fp8}
