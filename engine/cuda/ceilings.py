"""What the card can do at most, measured the plain way: `bench/kernels.py` compares every kernel with it. No operation of a model.

    data [n] uint32, n a multiple of 4, 16-byte aligned        sums [grid * threads] uint32

Work split: thread i of all reads vectors (128 bits) i, i + all, i + 2 all .., several in flight at a time, and writes the exclusive or
of its words. Consecutive threads read consecutive addresses, nothing is read twice, and next to nothing is written. What is
left at the end, fewer than that a thread, is not read: the launcher says how many bytes were.

`nothing` does nothing: what a launch costs.

Versions tried: a read kernel like this one reached 4.37 TB/s on an H200 in a prototype.
"""

from __future__ import annotations

import torch

from engine.cuda import ptx
from engine.cuda.launch import Kernel, Library, Variant
from engine.cuda.target import cuda, pointer, types

SHAPES = ((256, 8, 4), (512, 8, 2), (512, 4, 4), (256, 4, 8), (1024, 4, 2))  # threads, vectors in flight, thread blocks a multiprocessor
i32, u32, u64 = types.int32, types.uint32, types.uint64
WORDS = pointer(u32)


def read(threads: int, in_flight: int) -> Kernel:
    """(data, sums, rounds): `rounds` times `in_flight` vectors a thread."""
    held = 4 * in_flight

    def kernel(data, sums, rounds):  # type: ignore[no-untyped-def]
        all_threads = u32(cuda.gridDim.x) * u32(threads)
        thread = u32(cuda.blockIdx.x) * u32(threads) + u32(cuda.threadIdx.x)
        words = cuda.local.array(held, u32)
        total = u32(0)
        at = ptx.address(data) + u64(thread) * u64(16)
        stride = u64(all_threads) * u64(16)
        i = i32(0)
        while i < rounds:
            for j in range(in_flight):
                words[4 * j], words[4 * j + 1], words[4 * j + 2], words[4 * j + 3] = ptx.load_stream_128(at)
                at += stride
            for j in range(held):
                total = u32(total ^ words[j])
            i = i32(i + i32(1))
        sums[thread] = total

    return Kernel(kernel, (WORDS, WORDS, i32), threads)


def nothing() -> Kernel:
    """(ignored)."""

    def kernel(ignored):  # type: ignore[no-untyped-def]
        return

    return Kernel(kernel, (WORDS,), 32)


class Read:
    """Read `data` once, in one of SHAPES. data uint32 [n]; sums uint32 [at least
    `threads`], overwritten: their exclusive or is that of what was read."""

    def __init__(self, library: Library, multiprocessors: int, threads: int, in_flight: int, blocks: int) -> None:
        self._library, self._grid, self._in_flight = library, multiprocessors * blocks, in_flight
        self.threads = self._grid * threads
        self._variant = Variant(__name__, "read", (threads, in_flight))
        self.variants = (self._variant,)

    def num_bytes(self, data: torch.Tensor) -> int:
        """Of `data`, so many are read."""
        return self._rounds(data) * self._in_flight * self.threads * 16

    def _rounds(self, data: torch.Tensor) -> int:
        return data.numel() // (4 * self.threads * self._in_flight)

    def __call__(self, data: torch.Tensor, sums: torch.Tensor) -> None:
        if data.dtype != torch.uint32 or not data.is_contiguous() or data.data_ptr() % 16 or len(sums) < self.threads:
            raise ValueError(f"data is {data.dtype} and sums have {len(sums)} words; aligned uint32 and at least {self.threads} are needed")
        if not self._rounds(data):
            raise ValueError(f"data has {data.numel()} words; at least {4 * self.threads * self._in_flight} are needed")
        self._library[self._variant](self._grid, data, sums, self._rounds(data))


class Nothing:
    """An empty launch."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._variant = Variant(__name__, "nothing")
        self.variants = (self._variant,)

    def __call__(self) -> None:
        self._library[self._variant](1, None)
