"""What the products of a 4-bit weight share (`w4_few.py`, `w4_matmul.py`, `w4_hopper.py`): operands, their check, launcher, write-out.

A product is out = x @ dequantize(w).T + bias (engine.w4.dequantize, engine.reference.linear). Its kernels all take

    (x, packed, pairs, bias or null, out, parts, m, n, k, elements between rows of x, of out)

and leave their results in shared memory as float32 [row of x][block_n + 4], from where `result_writer` brings them to `out` or,
where input channels are split over thread blocks, to float32 parts [S, M, N] (`engine/cuda/parts.py`). Knows no kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from engine.cuda import ptx
from engine.cuda.launch import Library, Variant
from engine.cuda.target import cuda, pointer, types
from engine.cuda.tuning import W4Grid, row_bucket
from engine.cuda.w4_layout import FORMS, W4Device

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
i32, u32, u64, f32 = types.int32, types.uint32, types.uint64, types.float32
HALVES, WORDS, FLOATS = pointer(types.uint16), pointer(u32), pointer(f32)


# -- in a kernel ------------------------------------------------------------------------------------------------------------------


def arguments(out_dtype: str) -> tuple[Any, ...]:
    """Types of a kernel's arguments."""
    return (HALVES, WORDS, WORDS, FLOATS, FLOATS if out_dtype == "float32" else HALVES, FLOATS, u32, u32, u32, u32, u32)


def result_writer(block_n: int, threads: int, out_dtype: str, copies: int = 1, rows: int = 0) -> Any:
    """A device function (at, thread, bias, out, parts, m, n, elements between rows of out, first_row, live, first_column, splits,
    split) for `threads` threads, thread = 0 .. threads - 1: what lies at shared address `at` as float32 [copies, rows,
    block_n + 4], the copies added up in order, goes out with the bias: `live` rows from first_row on and the channels from
    first_column on that there are. `rows`: of a copy, where there are several."""
    pitch, quads, wide_out = block_n + 4, block_n // 4, out_dtype == "float32"
    half, pack = ptx.HALF["float16" if wide_out else out_dtype], ptx.PACK["float16" if wide_out else out_dtype]
    zero = f32(0.0)

    @cuda.jit(device=True, inline="always")
    def write(value, out, parts, whole, place):  # type: ignore[no-untyped-def]
        if not whole:
            parts[place] = value
        elif wide_out:
            out[place] = value
        else:
            out[place] = half(value)

    @cuda.jit(device=True, inline="always")
    def write_results(at, thread, bias, out, parts, m, n, out_stride, first_row, live, first_column, splits, split):  # type: ignore[no-untyped-def]
        whole = splits == u32(1)
        biased = ptx.address(bias) != u64(0) and split == u32(0)
        stride = out_stride if whole else n
        out_row = u64(u64(first_row) * u64(stride))
        if not whole:
            out_row = u64(u64(u32(u32(split * m) + first_row)) * u64(n))
        fours = u32(u32(n | stride) & u32(3)) == u32(0)
        piece = thread
        while piece < u32(live * u32(quads)):
            row, r = u32(piece // u32(quads)), u32(u32(piece % u32(quads)) * u32(4))
            column = u32(first_column + r)
            v0, v1, v2, v3 = zero, zero, zero, zero
            from_ = u32(at + u32(u32(u32(row * u32(pitch)) + r) * u32(4)))
            for c in range(copies):
                v = ptx.load_shared_128(u32(from_ + u32(c * rows * pitch * 4)))
                v0, v1 = f32(v0 + ptx.float_of_bits(v[0])), f32(v1 + ptx.float_of_bits(v[1]))
                v2, v3 = f32(v2 + ptx.float_of_bits(v[2])), f32(v3 + ptx.float_of_bits(v[3]))
            if biased:
                if column < n:
                    v0 = f32(v0 + bias[column])
                if u32(column + u32(1)) < n:
                    v1 = f32(v1 + bias[u32(column + u32(1))])
                if u32(column + u32(2)) < n:
                    v2 = f32(v2 + bias[u32(column + u32(2))])
                if u32(column + u32(3)) < n:
                    v3 = f32(v3 + bias[u32(column + u32(3))])
            place = u64(out_row + u64(row) * u64(stride) + u64(column))
            if fours and column < n:
                if not whole or wide_out:
                    to = u64((ptx.address(out) if whole else ptx.address(parts)) + place * u64(4))
                    b0, b1, b2, b3 = ptx.bits_of_float(v0), ptx.bits_of_float(v1), ptx.bits_of_float(v2), ptx.bits_of_float(v3)
                    ptx.store_128(to, b0, b1, b2, b3)
                else:
                    ptx.store_64(u64(ptx.address(out) + place * u64(2)), pack(v0, v1), pack(v2, v3))
            elif column < n:
                write(v0, out, parts, whole, place)
                if u32(column + u32(1)) < n:
                    write(v1, out, parts, whole, u64(place + u64(1)))
                if u32(column + u32(2)) < n:
                    write(v2, out, parts, whole, u64(place + u64(2)))
                if u32(column + u32(3)) < n:
                    write(v3, out, parts, whole, u64(place + u64(3)))
            piece = u32(piece + u32(threads))

    return write_results


# -- launcher ---------------------------------------------------------------------------------------------------------------------


class W4Product(ABC):
    """A product of one kernel family: x [M, k] in `dtype`, out [M, n] in `out_dtype`, bias float32 [n]; 1 <= M <= max_m.

    A call returns `out`, or, where the input channels are split, float32 parts [S, M, n] in `scratch` (float32, at least
    `scratch_floats`): their sum is the output, and out is not written. How it is launched comes from the tuning table, by M;
    `launch` is used for every M instead where it is given. A family says which `buckets` of rows its table has, and answers the
    three questions below.
    """

    buckets: ClassVar[tuple[int, ...]]

    def __init__(
        self,
        library: Library,
        n: int,
        k: int,
        group: int,
        form: str,
        dtype: str,
        *,
        cc: tuple[int, int],
        multiprocessors: int,
        max_m: int,
        out_dtype: str = "",
        launch: Any = None,
    ) -> None:
        if form not in FORMS or dtype not in ("bfloat16", "float16"):
            raise ValueError(f"a 4-bit product computes in bfloat16 or float16 with pairs of the form zero or bias, not {dtype}, {form}")
        self.n, self.k, self.group, self.form, self.dtype, self.max_m = n, k, group, form, dtype, max_m
        self.out_dtype = out_dtype or dtype
        self._library, self._cc, self._multiprocessors = library, cc, multiprocessors
        served = [rows for rows in self.buckets if rows <= row_bucket(max_m, self.buckets)]
        self._launches = {rows: launch or self.of_table(rows) for rows in served}
        self.variants = tuple(dict.fromkeys(self.variant(chosen) for chosen in self._launches.values()))
        self.scratch_floats = max(self.launch(m)[1].part_floats for m in range(1, max_m + 1))
        self._ready: dict[int, tuple[Any, W4Grid]] = {}

    @abstractmethod
    def of_table(self, rows: int) -> Any:
        """How the table launches a bucket."""

    @abstractmethod
    def variant(self, launch: Any) -> Variant:
        """The kernel of a launch."""

    @abstractmethod
    def grid(self, launch: Any, m: int) -> W4Grid:
        """How a launch cuts a product of m rows."""

    def launch(self, m: int) -> tuple[Variant, W4Grid]:
        """The kernel and the grid for m rows."""
        chosen = self._launches[row_bucket(m, self.buckets)]
        return self.variant(chosen), self.grid(chosen, m)

    def __call__(
        self, x: torch.Tensor, weight: W4Device, out: torch.Tensor, scratch: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        m = x.shape[0]
        if m not in self._ready:
            self._ready[m] = self._prepare(m)
        launcher, grid = self._ready[m]
        self._check(x, weight, out, scratch, bias)
        strides = x.stride(0), out.stride(0)
        launcher(
            grid.grid, x, weight.packed, weight.pairs, bias, out, scratch, m, self.n, self.k, *strides, shared_bytes=grid.shared_bytes
        )  # fmt: skip
        return out if grid.splits == 1 else scratch[: grid.part_floats].view(grid.splits, m, self.n)

    def _prepare(self, m: int) -> tuple[Any, W4Grid]:
        if not 1 <= m <= self.max_m:
            raise ValueError(f"this product was made for 1 to {self.max_m} rows, {m} were given")
        variant, grid = self.launch(m)
        return self._library[variant], grid

    def _check(self, x: torch.Tensor, weight: W4Device, out: torch.Tensor, scratch: torch.Tensor, bias: torch.Tensor | None) -> None:
        made = (weight.n, weight.k, weight.group, weight.form, weight.dtype)
        if made != (self.n, self.k, self.group, self.form, self.dtype):
            raise ValueError(f"a weight {made} does not fit a product made for {(self.n, self.k, self.group, self.form, self.dtype)}")
        if x.shape[1] != self.k or x.dtype != DTYPES[self.dtype] or x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
            raise ValueError(f"x must be {self.dtype} [M, {self.k}], rows 16 bytes aligned; it is {x.dtype} {tuple(x.shape)} {x.stride()}")
        if out.shape != (len(x), self.n) or out.dtype != DTYPES[self.out_dtype] or out.stride(1) != 1 or out.data_ptr() % 16:
            raise ValueError(f"out must be {self.out_dtype} [{len(x)}, {self.n}], 16 bytes aligned; it is {out.dtype} {tuple(out.shape)}")
        if scratch.numel() < self.scratch_floats or scratch.dtype != torch.float32:
            raise ValueError(f"this product needs {self.scratch_floats} floats of scratch; {scratch.numel()} {scratch.dtype} were given")
        if bias is not None and (bias.shape != (self.n,) or bias.dtype != torch.float32):
            raise ValueError(f"bias must be float32 [{self.n}]; it is {bias.dtype} {tuple(bias.shape)}")
