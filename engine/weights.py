"""A checkpoint's parameters as tensors: whole ones or a tensor-parallel rank's share, in the form the file has them in.

Strict both ways: `open_checkpoint` refuses a file that lacks or adds a tensor, `finish` a model that did not ask for
all of them. Only the rows and blocks asked for are read. What comes back is a copy that does not hold the file open and
may be changed; of AWQ weights, and of 16-bit and 32-bit ones where `views` was asked for, it is the mapped file itself,
not to be written to. Quantized linears of other forms are read in `engine/quantized_weights.py`. Knows nothing of backends
and ranks.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from engine import awq, w4, w8
from engine.awq import AWQ
from engine.eight_bit import Float8, Int8
from engine.errors import ModelError
from engine.gguf_blocks import W4_CONVERTERS, W8_CONVERTERS, to_float32, to_w4, to_w8
from engine.models.spec import ModelSpec
from engine.packed_ints import Rows
from engine.pieces import BITS, all_finite, in_pieces
from engine.quantized_weights import READERS, order_of_stored
from engine.stored import Stored
from engine.w4 import W4
from engine.w8 import W8
from engine.weight_files import take_stock
from formats.gguf import TYPES

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NUMPY_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<u2"),
    "BF16": np.dtype("<u2"),
    # numpy has no bfloat16: halves as bits
}
CHUNK = 1 << 18  # elements dequantized at a time, so that the float32 numbers stay in a core's cache
GROUPED_CHUNK = 1 << 20  # elements brought into W4 or W8 at a time: smaller pieces wait for the interpreter's lock
TORCH_GRAIN = 1 << 15  # up to so many elements torch converts without waking its threads, which costs more than it gains
GROUP_SIZE = 32  # of every GGUF type that becomes W4 or W8
FULL = slice(None)


def open_checkpoint(path: Path | str, spec: ModelSpec, *, views: bool = False) -> Checkpoint:
    """A Hugging Face directory or a GGUF file, checked against the spec; ModelError naming file and tensor otherwise.

    `views`: 16-bit and 32-bit weights come as they lie in the mapped file, neither copied nor searched for numbers that
    are not finite, for who uploads them and looks there. They hold the file open as long as they live.
    """
    return Checkpoint(take_stock(path, spec), views=views)


class Checkpoint:
    """Parameters by canonical name (`engine/weight_files.py`), without the `.weight` or `.bias`."""

    def __init__(self, stock: dict[str, Stored], *, views: bool = False) -> None:
        self._stock = stock
        self._views = views
        self._used: set[str] = set()

    def weight(
        self, name: str, *, rows: Rows | None = None, columns: slice | None = None, dense: bool = False, in_order: bool = False
    ) -> torch.Tensor | W4 | W8 | AWQ | Int8 | Float8:
        """Output channels `rows` and input channels `columns` of a weight (a norm's: [features]).

        Formats that map exactly onto W4, W8, Int8 or Float8, and AWQ's own, come so, unless `dense` or a slice that cuts a
        group (of AWQ: 8 rows) in two; everything else as float32, float16 or bfloat16, quantized ones dequantized in float32
        and rounded to float16, which is what a 16-bit checkpoint made from the file would hold. `in_order`: the input
        channels are those of `order`, sorted so, and `columns` counts in it.
        """
        stored = self._find(f"{name}.weight")
        rows, columns = FULL if rows is None else rows, columns or FULL
        if stored.type in DTYPES:
            return _plain(stored, rows, columns, self._views)
        if stored.type in READERS:
            return READERS[stored.type](stored, rows, columns, dense, in_order)
        if not isinstance(rows, slice):
            raise ValueError(f"{name}: rows of {stored.type} come as a slice")
        if stored.type == "AWQ":
            return _awq(stored, rows, columns, dense)
        return _quantized(stored, rows, columns, dense)

    def order(self, name: str) -> np.ndarray | None:
        """int32 [K]: the input channels of a weight as they were quantized (act-order), groups one after the other; None
        where that is the model's own order."""
        return order_of_stored(self._stock[f"{name}.weight"])

    def bias(self, name: str, rows: Rows | None = None) -> torch.Tensor:
        """[N], as stored; ModelError where the model has none."""
        return _plain(self._find(f"{name}.bias"), FULL if rows is None else rows, FULL, self._views)

    def finish(self) -> None:
        """Everything was asked for, or ModelError lists what was not."""
        if unused := sorted(self._stock.keys() - self._used):
            raise ModelError(f"{len(unused)} parameters were never loaded: {', '.join(unused[:8])}")

    def _find(self, canonical: str) -> Stored:
        if canonical not in self._stock:
            raise ModelError(f"{canonical}: this model has no such parameter")
        self._used.add(canonical)
        return self._stock[canonical]


def _plain(stored: Stored, rows: Rows, columns: slice, views: bool) -> torch.Tensor:
    array: np.ndarray = _picked(stored.file.raw(stored.name).view(NUMPY_DTYPES[stored.type]), stored)
    array = _take_rows(array, rows, stored)
    if array.ndim == 2:
        array = array[:, columns]
    if stored.unit_rows:
        return _unit_rows(_finite(torch.from_numpy(np.array(array)).view(DTYPES[stored.type]), stored))
    if not views:
        return _finite(torch.from_numpy(np.array(array)).view(DTYPES[stored.type]), stored)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes to it
        tensor = torch.from_numpy(array)
    return tensor.view(DTYPES[stored.type])


def _picked(flat: np.ndarray, stored: Stored) -> np.ndarray:
    """The parameter in its shape: a view of its tensor unless its rows lie in several places."""
    if stored.pick is None:
        return flat.reshape(stored.shape)
    pick = stored.pick
    return flat.reshape(-1, pick.stride, *stored.shape[1:])[:, pick.start : pick.start + pick.count].reshape(stored.shape)


def _unit_rows(weight: torch.Tensor) -> torch.Tensor:
    """Each row divided by its length, computed in float32."""
    return torch.nn.functional.normalize(weight.to(torch.float32)).to(weight.dtype)


def _awq(stored: Stored, rows: slice, columns: slice, dense: bool) -> torch.Tensor | AWQ:
    n, k = stored.shape
    (top, bottom, _), (left, right, _) = rows.indices(n), columns.indices(k)
    whole = AWQ(*_awq_arrays(stored))
    g = whole.group_size
    # what holds the slice and cuts nothing in two
    weight = whole.rows(_down(top, awq.PACK), _up(bottom, awq.PACK)).columns(_down(left, g), _up(right, g))
    if not all_finite(weight.scales.view(np.int16), torch.float16):
        raise stored.parts[-1].fail("a scale is not a finite number")
    if not dense and weight.out_features == bottom - top and weight.in_features == right - left:
        return weight
    out = torch.empty((weight.out_features, right - left), dtype=torch.float16)
    left -= _down(left, g)

    def convert(part: slice) -> None:
        values = w4.dequantize(awq.to_w4(weight.rows(part.start, part.stop)))
        out[part] = torch.from_numpy(values[:, left : left + out.shape[1]])

    in_pieces(convert, weight.out_features, _up(CHUNK // weight.in_features, awq.PACK))
    return out[top % awq.PACK :][: bottom - top]


def _awq_arrays(stored: Stored) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """qweight, qzeros, scales: views of the mapped file; zeros of 8 where the file has none."""
    arrays = [part.file.raw(part.name).view("<f2" if part.type == "F16" else "<i4").reshape(part.shape) for part in stored.parts]
    zeros = arrays[1] if len(arrays) == 3 else awq.symmetric_zeros(arrays[1].shape[0], arrays[1].shape[1])
    return _picked_columns(arrays[0], stored, awq.PACK), _picked_columns(zeros, stored, awq.PACK), _picked_columns(arrays[-1], stored, 1)


def _picked_columns(array: np.ndarray, stored: Stored, unit: int) -> np.ndarray:
    """`_picked` of an array whose columns are output channels, `unit` of them each."""
    if stored.pick is None:
        return array
    start, count, stride = (n // unit for n in (stored.pick.start, stored.pick.count, stored.pick.stride))
    return array.reshape(len(array), -1, stride)[:, :, start : start + count].reshape(len(array), -1)


def _down(value: int, unit: int) -> int:
    return value // unit * unit


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


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
    weight = _grouped(raw, stored.type, start, stop)
    _check_scales(weight, stored)
    return weight


def _grouped(raw: np.ndarray, kind: str, start: int, stop: int) -> W4 | W8:
    """Input channels start .. stop-1 of whole blocks; some rows at a time, on several threads."""
    n, width, groups = raw.shape[0], stop - start, (stop - start) // GROUP_SIZE
    out: W4 | W8
    if kind in W4_CONVERTERS:
        out = W4(np.empty((n, width // 2), np.uint8), np.empty((n, groups), np.float32), np.empty((n, groups), np.float32))
    else:
        out = W8(np.empty((n, width), np.int8), np.empty((n, groups), np.float32))

    def convert(part: slice) -> None:
        source = (to_w4 if kind in W4_CONVERTERS else to_w8)(raw[part], kind).columns(start, stop)
        for name in ("qweight", "scale", "bias") if isinstance(out, W4) else ("q", "scale"):
            getattr(out, name)[part] = getattr(source, name)

    in_pieces(convert, n, max(1, GROUPED_CHUNK // width))
    return out


def _dequantized(raw: np.ndarray, kind: str, columns: slice) -> torch.Tensor:
    """float16 [N, columns]; some rows at a time, on several threads."""
    n, width = raw.shape[0], columns.stop - columns.start
    out = torch.empty((n, width), dtype=torch.float16)
    piece = max(1, TORCH_GRAIN // width)

    def convert(part: slice) -> None:
        values = torch.from_numpy(_float32(np.ascontiguousarray(raw[part]), kind)[:, columns])
        for target, source in zip(out[part].split(piece), values.split(piece), strict=True):
            target.copy_(source)

    in_pieces(convert, n, max(1, CHUNK // width))
    return out


def _float32(raw: np.ndarray, kind: str) -> np.ndarray:
    if kind in W4_CONVERTERS:
        return w4.dequantize(to_w4(raw, kind))
    return w8.dequantize(to_w8(raw, kind)) if kind in W8_CONVERTERS else to_float32(raw, kind)


def _take_rows(array: np.ndarray, rows: Rows, stored: Stored) -> np.ndarray:
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
    if not all_finite(tensor.view(BITS[tensor.dtype][0]).numpy(), tensor.dtype):
        raise stored.fail("holds a number that is not finite")
    return tensor
