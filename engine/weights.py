"""A checkpoint's parameters as tensors: whole ones or a tensor-parallel rank's share, in the form the file has them in.

Strict both ways: `open_checkpoint` refuses a file that lacks or adds a tensor, `finish` a model that did not ask for
all of them. Only the rows and blocks asked for are read. What comes back is a copy: it does not hold the file open
and may be changed. Knows nothing of backends and ranks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from engine import w4, w8
from engine.errors import ModelError
from engine.gguf_blocks import W4_CONVERTERS, W8_CONVERTERS, to_float32, to_w4, to_w8
from engine.models.spec import ModelSpec
from engine.w4 import W4
from engine.w8 import W8
from engine.weight_files import Stored, take_stock
from formats.gguf import TYPES

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NUMPY_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<u2"),
    "BF16": np.dtype("<u2"),
    # numpy has no bfloat16: halves as bits
}
BITS = {  # signed integer of the same size, all bits but the sign, infinity
    torch.float32: (torch.int32, np.int32(0x7FFFFFFF), 0x7F800000),
    torch.float16: (torch.int16, np.int16(0x7FFF), 0x7C00),
    torch.bfloat16: (torch.int16, np.int16(0x7FFF), 0x7F80),
}
CHUNK = 1 << 18  # elements dequantized at a time
TORCH_GRAIN = 1 << 15  # up to so many elements torch converts without waking its threads, which costs more than it gains
GROUP_SIZE = 32  # of every GGUF type that becomes W4 or W8
FULL = slice(None)


def open_checkpoint(path: Path | str, spec: ModelSpec) -> Checkpoint:
    """A Hugging Face directory or a GGUF file, checked against the spec; ModelError naming file and tensor otherwise."""
    return Checkpoint(take_stock(path, spec))


class Checkpoint:
    """Parameters by canonical name (`engine/weight_files.py`), without the `.weight` or `.bias`."""

    def __init__(self, stock: dict[str, Stored]) -> None:
        self._stock = stock
        self._used: set[str] = set()

    def weight(self, name: str, *, rows: slice | None = None, columns: slice | None = None, dense: bool = False) -> torch.Tensor | W4 | W8:
        """Output channels `rows` and input channels `columns` of a weight (a norm's: [features]).

        Formats that map exactly onto W4 or W8 come so, unless `dense` or a slice that cuts a group in two; everything
        else as float32, float16 or bfloat16, quantized ones dequantized in float32 and rounded to float16, which is
        what a 16-bit checkpoint made from the file would hold.
        """
        stored = self._find(f"{name}.weight")
        rows, columns = rows or FULL, columns or FULL
        if stored.type in DTYPES:
            return _plain(stored, rows, columns)
        return _quantized(stored, rows, columns, dense)

    def bias(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """[N], as stored; ModelError where the model has none."""
        return _plain(self._find(f"{name}.bias"), rows or FULL, FULL)

    def finish(self) -> None:
        """Everything was asked for, or ModelError lists what was not."""
        if unused := sorted(self._stock.keys() - self._used):
            raise ModelError(f"{len(unused)} parameters were never loaded: {', '.join(unused[:8])}")

    def _find(self, canonical: str) -> Stored:
        if canonical not in self._stock:
            raise ModelError(f"{canonical}: this model has no such parameter")
        self._used.add(canonical)
        return self._stock[canonical]


def _plain(stored: Stored, rows: slice, columns: slice) -> torch.Tensor:
    array: np.ndarray = stored.file.raw(stored.name).view(NUMPY_DTYPES[stored.type]).reshape(stored.shape)
    array = _take_rows(array, rows, stored)
    if array.ndim == 2:
        array = array[:, columns]
    tensor = torch.from_numpy(np.array(array)).view(DTYPES[stored.type])
    return _finite(tensor, stored)


def _quantized(stored: Stored, rows: slice, columns: slice, dense: bool) -> torch.Tensor | W4 | W8:
    block = TYPES[stored.type]
    start, stop, _ = columns.indices(stored.shape[1])
    first, last = start // block.elements, -(-stop // block.elements)
    raw = stored.file.raw(stored.name).reshape(stored.shape[0], -1)
    raw = _take_rows(raw, rows, stored)[:, first * block.nbytes : last * block.nbytes]
    start, stop = start - first * block.elements, stop - first * block.elements
    aligned = start % GROUP_SIZE == 0 and stop % GROUP_SIZE == 0
    if dense or not aligned or stored.type not in W4_CONVERTERS and stored.type not in W8_CONVERTERS:
        return _finite(_dequantized(raw, stored.type, slice(start, stop)), stored)
    weight = to_w4(raw, stored.type) if stored.type in W4_CONVERTERS else to_w8(raw, stored.type)
    _check_scales(weight, stored)
    return weight if (start, stop) == (0, weight.in_features) else _contiguous(weight.columns(start, stop))


def _dequantized(raw: np.ndarray, kind: str, columns: slice) -> torch.Tensor:
    """float16 [N, columns]; some rows at a time, so that the float32 numbers stay in the processor's caches."""
    n, width = raw.shape[0], columns.stop - columns.start
    out = torch.empty((n, width), dtype=torch.float16)
    step, piece = max(1, CHUNK // width), max(1, TORCH_GRAIN // width)
    for row in range(0, n, step):
        values = torch.from_numpy(_float32(np.ascontiguousarray(raw[row : row + step]), kind)[:, columns])
        for target, source in zip(out[row : row + step].split(piece), values.split(piece), strict=True):
            target.copy_(source)
    return out


def _float32(raw: np.ndarray, kind: str) -> np.ndarray:
    if kind in W4_CONVERTERS:
        return w4.dequantize(to_w4(raw, kind))
    return w8.dequantize(to_w8(raw, kind)) if kind in W8_CONVERTERS else to_float32(raw, kind)


def _contiguous(weight: W4 | W8) -> W4 | W8:
    if isinstance(weight, W4):
        return W4(*map(np.ascontiguousarray, (weight.qweight, weight.scale, weight.bias)))
    return W8(np.ascontiguousarray(weight.q), np.ascontiguousarray(weight.scale))


def _take_rows(array: np.ndarray, rows: slice, stored: Stored) -> np.ndarray:
    """Rows in the model's order. GGUF's interleaved heads have row 2 i + j where the model has j * head_dim / 2 + i."""
    if not stored.interleaved_heads:
        return array[rows]
    half = stored.shape[0] // stored.interleaved_heads // 2
    order = np.arange(stored.shape[0]).reshape(-1, half, 2).swapaxes(1, 2).ravel()
    return array[order[rows]]


def _check_scales(weight: W4 | W8, stored: Stored) -> None:
    if not np.isfinite(weight.scale).all() or isinstance(weight, W4) and not np.isfinite(weight.bias).all():
        raise stored.fail("a scale is not a finite number")


def _finite(tensor: torch.Tensor, stored: Stored) -> torch.Tensor:
    """NaN and infinity have all bits of the exponent set; looking at bits is several times as fast as a sum."""
    integers, magnitude, limit = BITS[tensor.dtype]
    bits = tensor.view(integers).numpy()
    if bits.size and int((bits & magnitude).max()) >= limit:
        raise stored.fail("holds a number that is not finite")
    return tensor
