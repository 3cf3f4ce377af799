"""Activations in the order of a weight whose input channels were quantized in another one (GPTQ's act-order).

`x[:, order]` of numpy. x [T, K] 16-bit, order int32 [K], out [T, K]; K a multiple of 8.

work split: a thread for 8 outputs; a row's numbers are read one by one, from the cache that the row just came into.
"""

from __future__ import annotations

import torch

from engine.cuda import ptx
from engine.cuda.launch import Kernel, Library, Variant
from engine.cuda.target import cuda, pointer, types

VECTOR, THREADS = 8, 128
i32, u16, u32, u64 = types.int32, types.uint16, types.uint32, types.uint64
WORDS, INTS, HALVES = pointer(u32), pointer(i32), pointer(u16)


def take_columns() -> Kernel:
    """(x, order, out, K, vectors)."""

    def kernel(x, order, out, k, count):  # type: ignore[no-untyped-def]
        at = u32(cuda.blockIdx.x) * u32(THREADS) + u32(cuda.threadIdx.x)
        if at < u32(count):
            per_row = u32(k) >> u32(3)
            row = at // per_row
            first = (at - row * per_row) * u32(VECTOR)
            source = u64(row) * u64(k)
            words = cuda.local.array(4, u32)
            for i in range(4):
                low = x[source + u64(order[first + u32(2 * i)])]
                high = x[source + u64(order[first + u32(2 * i + 1)])]
                words[i] = u32(u32(low) | u32(u32(high) << u32(16)))
            ptx.store_128(ptx.address(out) + u64(at) * u64(16), words[0], words[1], words[2], words[3])

    return Kernel(kernel, (HALVES, INTS, WORDS, i32, u32), THREADS)


class TakeColumns:
    """out = x[:, order]."""

    def __init__(self, library: Library) -> None:
        self._library, self._variant = library, Variant(__name__, "take_columns")
        self.variants = (self._variant,)

    def __call__(self, x: torch.Tensor, order: torch.Tensor, out: torch.Tensor) -> None:
        k = x.shape[1]
        if k % VECTOR or out.shape != x.shape or order.shape != (k,) or order.dtype != torch.int32 or not x.is_contiguous():
            raise ValueError(f"{tuple(x.shape)} in an order of {tuple(order.shape)} into {tuple(out.shape)}")
        vectors = x.numel() // VECTOR
        if vectors:
            self._library[self._variant](-(-vectors // THREADS), x, order, out, k, vectors)
