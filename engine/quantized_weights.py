"""Quantized linears of Hugging Face checkpoints other than AWQ: from their tensors to the forms that backends take.

    form of the file                          comes as
    GPTQ, PACKED of 4 bits                    W4 in groups of 32, 64 or 128 that share the file's scales
    GPTQ, PACKED of 8 bits, symmetric         W8
    INT8, FP8 with 8-bit activations          Int8, Float8
    any other, `dense`, or a cut in a group   float16

Scales that are not finite, zero points that are missing and groups that are none are refused, naming file and tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from engine import eight_bit, packed_ints
from engine.eight_bit import BLOCK, E4M3_NAN, Float8, Int8
from engine.packed_ints import PackedInts, Rows
from engine.pieces import in_pieces
from engine.stored import Stored
from engine.w4 import W4
from engine.w8 import GROUP_SIZE as W8_GROUP
from engine.w8 import W8

PIECE = 1 << 20  # elements converted at a time
Quantized = torch.Tensor | W4 | W8 | Int8 | Float8
NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "I8": "i1", "F8_E4M3": "u1"}


def order_of_stored(stored: Stored) -> np.ndarray | None:
    """Of act-order: `Checkpoint.order`."""
    g_idx = stored.part("g_idx") or stored.part("weight_g_idx")
    if g_idx is None or stored.scheme is None:
        return None
    try:
        return packed_ints.order_of(_array(g_idx), stored.shape[1] // (stored.scheme.group_size or stored.shape[1]))
    except ValueError as error:
        raise g_idx.fail(str(error)) from None


def _array(part: Stored) -> np.ndarray:
    """A tensor in its shape: a view of the mapped file; bfloat16 as float32."""
    raw = part.file.raw(part.name)
    if part.type == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(part.shape)
    return raw.view(NUMPY_TYPES[part.type]).reshape(part.shape)


def _scales(part: Stored) -> np.ndarray:
    scales = _array(part)
    if not np.isfinite(scales).all():
        raise part.fail("a scale is not a finite number")
    return scales


def _rows(stored: Stored, rows: Rows) -> Rows:
    """Rows of the parameter as rows of the tensor."""
    if stored.pick is None:
        return rows
    pick = stored.pick
    every = np.arange(stored.shape[0] // pick.count * pick.stride).reshape(-1, pick.stride)
    return every[:, pick.start : pick.start + pick.count].ravel()[rows]


def _count(stored: Stored, rows: Rows) -> int:
    return len(np.arange(stored.shape[0])[rows])


def _part_of(rows: Rows, piece: slice) -> Rows:
    """Rows `piece.start` .. of those chosen."""
    if isinstance(rows, slice):
        start = rows.start or 0
        return slice(start + piece.start, start + piece.stop)
    return rows[piece]


# -- packed integers ----------------------------------------------------------------------------------------------------


def _packed(stored: Stored, rows: Rows, columns: slice, dense: bool, in_order: bool) -> Quantized:
    weight, order = _packed_ints(stored), order_of_stored(stored)
    k = stored.shape[1]
    start, stop, _ = columns.indices(k)
    rows, n = _rows(stored, rows), _count(stored, rows)
    whole = start == 0 and stop == k
    if not dense and weight.bits == 4 and (order is None or in_order or whole):
        if group := packed_ints.w4_group(weight.group_size, start, stop):
            return _w4(weight, rows, n, order, slice(start, stop), group, keep_order=not in_order)
    symmetric = not dense and weight.bits == 8 and order is None and not (start % W8_GROUP or stop % W8_GROUP)
    if symmetric and bool(np.all(weight.zero(rows) == 128)):
        return _w8(weight, rows, n, slice(start, stop))
    return _dense(weight, rows, n, order[columns] if order is not None and in_order else slice(start, stop), stop - start)


def _packed_ints(stored: Stored) -> PackedInts:
    scheme, gptq = stored.scheme, stored.type == "GPTQ"
    words, zeros, scales, g_idx = (
        stored.part(name)
        for name in (
            ("qweight", "qzeros", "scales", "g_idx") if gptq else ("weight_packed", "weight_zero_point", "weight_scale", "weight_g_idx")
        )
    )
    if scheme is None or words is None or scales is None:
        raise stored.fail("is not a quantized linear")
    return PackedInts(
        gptq, scheme.bits, _array(words), None if zeros is None else _array(zeros), _scales(scales), scheme.zero_offset,
        None if order_of_stored(stored) is None or g_idx is None else _array(g_idx),
    )  # fmt: skip


def _w4(weight: PackedInts, rows: Rows, n: int, order: np.ndarray | None, columns: slice, group: int, *, keep_order: bool) -> W4:
    width = columns.stop - columns.start
    out = W4(
        np.empty((n, width // 2), np.uint8), np.empty((n, width // group), np.float32), np.empty((n, width // group), np.float32),
        integer_zeros=True, order=order if keep_order else None,
    )  # fmt: skip

    def convert(piece: slice) -> None:
        made = packed_ints.to_w4(weight, _part_of(rows, piece), order, columns)
        out.qweight[piece], out.scale[piece], out.bias[piece] = made.qweight, made.scale, made.bias

    in_pieces(convert, n, max(1, PIECE // width))
    return out


def _w8(weight: PackedInts, rows: Rows, n: int, columns: slice) -> W8:
    width = columns.stop - columns.start
    out = W8(np.empty((n, width), np.int8), np.empty((n, width // W8_GROUP), np.float32))

    def convert(piece: slice) -> None:
        made = packed_ints.to_w8(weight, _part_of(rows, piece), columns)
        out.q[piece], out.scale[piece] = made.q, made.scale

    in_pieces(convert, n, max(1, PIECE // width))
    return out


def _dense(weight: PackedInts, rows: Rows, n: int, columns: slice | np.ndarray, width: int) -> torch.Tensor:
    out = torch.empty((n, width), dtype=torch.float16)

    def convert(piece: slice) -> None:
        out[piece] = torch.from_numpy(packed_ints.dequantize(weight, _part_of(rows, piece), columns))

    in_pieces(convert, n, max(1, PIECE // width))
    return out


# -- 8-bit weights ------------------------------------------------------------------------------------------------------


def _int8(stored: Stored, rows: Rows, columns: slice, dense: bool, in_order: bool) -> Quantized:
    rows, (values, scales) = _rows(stored, rows), _eight_bits(stored)
    every = np.ascontiguousarray(np.broadcast_to(scales.reshape(-1).astype(np.float32), (values.shape[0],)))
    weight = Int8(values[rows][:, columns], every[rows])
    if not dense and _has_activations(stored):
        return weight
    if not dense and weight.in_features % W8_GROUP == 0:  # the weight alone is quantized
        return W8(np.ascontiguousarray(weight.q), np.repeat(weight.scale[:, None], weight.in_features // W8_GROUP, axis=1))
    return _dequantized(weight)


def _fp8(stored: Stored, rows: Rows, columns: slice, dense: bool, in_order: bool) -> Quantized:
    rows, (values, scales) = _rows(stored, rows), _eight_bits(stored)
    start, stop, _ = columns.indices(stored.shape[1])
    every = np.arange(values.shape[0])[rows]
    blocked = stored.scheme is not None and stored.scheme.group_size > 0
    if not blocked:
        scale = np.broadcast_to(scales.reshape(-1, 1).astype(np.float32), (values.shape[0], 1))[every]
        weight = Float8(values[rows][:, start:stop], np.ascontiguousarray(scale))
        cut = False
    else:
        first, last = start // BLOCK, -(-stop // BLOCK)
        cut = start % BLOCK > 0
        own = scales[every // BLOCK, first:last].astype(np.float32)
        weight = Float8(values[rows][:, first * BLOCK : stop], own, isinstance(rows, slice) and every[0] % BLOCK == 0)
    _check_e4m3(weight, stored)
    if not dense and not cut and _has_activations(stored):
        return weight
    return _dequantized(weight, start % BLOCK if cut else 0)


def _has_activations(stored: Stored) -> bool:
    return stored.scheme is not None and stored.scheme.activations


def _eight_bits(stored: Stored) -> tuple[np.ndarray, np.ndarray]:
    """The weight's numbers [N, K] and its scales."""
    values, scales = stored.part("weight"), stored.part("weight_scale") or stored.part("weight_scale_inv")
    if values is None or scales is None:
        raise stored.fail("is not a quantized linear")
    for part in (stored.part("input_scale"), stored.part("activation_scale")):
        if part is not None:
            _scales(part)  # not used: each token's own is at least as fine; but a broken file is
    return _array(values), _scales(scales)


def _check_e4m3(weight: Float8, stored: Stored) -> None:
    def look(piece: slice) -> None:
        if np.any((weight.q[piece] & 127) == E4M3_NAN):
            raise stored.fail("holds a number that is not finite")

    in_pieces(look, weight.out_features, max(1, PIECE // max(weight.in_features, 1)))


def _dequantized(weight: Int8 | Float8, first: int = 0) -> torch.Tensor:
    """float16, input channels from `first`."""
    n, k = weight.out_features, weight.in_features
    out = torch.empty((n, k - first), dtype=torch.float16)

    def convert(piece: slice) -> None:
        rows = Int8(weight.q[piece], weight.scale[piece]) if isinstance(weight, Int8) else Float8(weight.q[piece], weight.scale[piece])
        out[piece] = torch.from_numpy(eight_bit.dequantize(rows)[:, first:])

    in_pieces(convert, n, max(1, PIECE // k))
    return out


READERS: dict[str, Callable[[Stored, Rows, slice, bool, bool], Quantized]] = {
    "GPTQ": _packed, "PACKED": _packed, "INT8": _int8, "FP8": _fp8,
}  # fmt: skip
