"""float32 partial sums of a product whose input channels were split over thread blocks: who reads a product's output adds them up.

    parts   float32 [S, T, N], consecutive: part s of row t; the output is their sum, in the order of s, bias included

The kernels that follow a product (norm, rope, SiLU) read its output anyway: reading S parts costs them little, and nobody has to
wait for anybody or to be the last one. `SumParts` is for who needs the output itself (NCCL, a test).
Knows no product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engine.cuda import ptx
from engine.cuda.launch import Kernel, Library, Variant
from engine.cuda.target import cuda, pointer, types

TOGETHER = 4  # parts whose loads are in flight at a time, where nothing else is said
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PACK = {"bfloat16": ptx.pack_bf16, "float16": ptx.pack_f16_portable}

i32, u32, u64, f32 = types.int32, types.uint32, types.uint64, types.float32
WORDS = pointer(u32)


def part_adder(width: int, together: int = TOGETHER) -> Callable[..., None]:
    """A device function (values, first, at, parts, stride): the sum over `parts` of the `width` (a multiple of 4, or 2) floats at
    address `at`, `stride` bytes from part to part, to values[first ..]."""
    loads, each = (width // 4, 4) if width % 4 == 0 else (width // 2, 2)
    load = ptx.load_128 if each == 4 else ptx.load_64
    step, held = 4 * each, together * width

    @cuda.jit(device=True, inline="always")
    def add_parts(values: Any, first: Any, at: Any, parts: Any, stride: Any) -> None:
        words = cuda.local.array(held, u32)
        for i in range(width):
            values[first + i] = f32(0.0)
        done = u32(0)
        while done < parts:
            for p in range(together):
                part = u32(min(u32(done + u32(p)), u32(parts - u32(1))))
                source = u64(at + u64(part) * stride)
                for i in range(loads):
                    w = load(u64(source + u64(step * i)))
                    for e in range(each):
                        words[p * width + each * i + e] = w[e]
            for p in range(together):
                if u32(done + u32(p)) < parts:
                    for i in range(width):
                        values[first + i] += ptx.float_of_bits(words[p * width + i])
            done = u32(done + u32(together))

    return add_parts


def sum_parts(dtype: str, threads: int) -> Kernel:
    """(parts, how many, bytes of one, out, vectors of 8 in out)."""
    pack, add_parts = PACK[dtype], part_adder(8)

    def kernel(parts, count, stride, out, vectors):  # type: ignore[no-untyped-def]
        ptx.next_may_begin()
        ptx.after_previous()
        at = u32(cuda.blockIdx.x) * u32(threads) + u32(cuda.threadIdx.x)
        if at < u32(vectors):
            v = cuda.local.array(8, f32)
            add_parts(v, 0, ptx.address(parts) + u64(at) * u64(32), count, stride)
            to = ptx.address(out) + u64(at) * u64(16)
            ptx.store_128(to, pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]))

    return Kernel(kernel, (WORDS, u32, u64, WORDS, u32), threads, early=True)


class SumParts:
    """out [T, N] in the computing dtype = the sum of parts float32 [S, T, N]; N a multiple of 8."""

    def __init__(self, library: Library, dtype: str, threads: int = 256) -> None:
        self._library, self._dtype, self._threads = library, DTYPES[dtype], threads
        self._variant = Variant(__name__, "sum_parts", (dtype, threads))
        self.variants = (self._variant,)

    def __call__(self, parts: torch.Tensor, out: torch.Tensor) -> None:
        check_parts("parts", parts, *out.shape)
        if out.dtype != self._dtype or not out.is_contiguous() or out.shape[1] % 8:
            raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, not consecutive {self._dtype} rows of a multiple of 8")
        vectors = out.numel() // 8
        if vectors:
            self._library[self._variant](-(-vectors // self._threads), *part_arguments(parts), out, vectors)


def part_arguments(parts: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """What kernels are given: parts, how many, bytes from one to the next."""
    return parts, len(parts), 4 * parts.stride(0)


def check_parts(what: str, parts: torch.Tensor, rows: int, width: int) -> None:
    """ValueError unless parts is float32 [S, rows, width], consecutive."""
    if parts.shape[1:] != (rows, width) or parts.dtype != torch.float32 or not parts.is_contiguous():
        raise ValueError(f"{what} is {parts.dtype} {tuple(parts.shape)}, not consecutive float32 (parts, {rows}, {width})")
