"""A card that is not there: kernels run in the emulator over CPU tensors, in the order of their launches.

Stands where `engine.cuda.device.CudaDevice` stands; what a stream would queue happens at once, and a captured graph is
replayed by doing the work again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.cuda.launch import Kernel
from tests.ptx.emulator import Emulator, Memory

KERNELS = Path(__file__).resolve().parents[2] / ".cache" / "kernels"  # compiled once for all tests, kept between runs


class EmulatedDevice:
    """A card of compute capability `cc` with few multiprocessors, so that small shapes fill it."""

    image = "ptx"
    name = "an emulated card"

    def __init__(self, cc: tuple[int, int] = (9, 0), multiprocessors: int = 4, memory_bytes: int = 1 << 30) -> None:
        self.cc = cc
        self.multiprocessors = multiprocessors
        self.torch_device = torch.device("cpu")
        self._memory_bytes = memory_bytes
        self.launches: list[str] = []

    def load(self, image: bytes, entry: str, kernel: Kernel) -> Callable[..., None]:
        emulator = Emulator(image.decode())

        def call(grid: int | tuple[int, int, int], *arguments: Any, shared_bytes: int = kernel.shared_bytes) -> None:
            whole = (grid, 1, 1) if isinstance(grid, int) else grid
            run(whole, arguments, shared_bytes)

        def run(grid: tuple[int, int, int], arguments: tuple[Any, ...], shared_bytes: int) -> None:
            if len(arguments) != len(kernel.arguments):
                raise TypeError(f"{entry} takes {len(kernel.arguments)} arguments, {len(arguments)} were given")
            if shared_bytes > kernel.shared_bytes:
                raise ValueError(f"{entry} was made for {kernel.shared_bytes} bytes of shared memory, {shared_bytes} are asked for")
            memory, values = Memory(), []
            for place, argument in enumerate(arguments):
                if isinstance(argument, torch.Tensor):
                    if argument.numel():  # rows that lie apart: all of the memory they are in
                        whole = argument if argument.is_contiguous() else torch.empty(0, dtype=torch.uint8).set_(argument.untyped_storage())
                        memory.add(whole, name=f"argument {place}")
                    values.append(argument.data_ptr())
                else:
                    values.append(0 if argument is None else argument)
            self.launches.append(entry)
            emulator.launch(entry, grid=grid, block=(kernel.threads, 1, 1), args=values, memory=memory, shared_bytes=shared_bytes)

        return call

    def matmul_f32(self, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(x.float(), w.float().T, out=out)

    def give_back(self) -> None:
        """Nothing is kept."""

    def memory(self) -> tuple[int, int]:
        return self._memory_bytes, self._memory_bytes

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def event(self) -> _Event:
        return _Event()

    block_scaling = True

    def int_mm(self, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
        assert len(x) > 16
        out.copy_(x.to(torch.int32) @ w.T.to(torch.int32))

    def scaled_mm(
        self, x: torch.Tensor, w: torch.Tensor, scale_x: torch.Tensor, scale_w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        (rows, k), n = x.shape, len(w)
        left, right = x.to(torch.float64), w.to(torch.float64)
        if not scale_x.dim():
            left, right = left * scale_x, right * scale_w
        elif scale_x.shape == (rows, 1):  # what cuBLAS asks for
            assert scale_x.is_contiguous() and scale_w.is_contiguous() and scale_w.shape == (1, n)
            left, right = left * scale_x, right * scale_w.T
        else:
            assert scale_x.shape == (rows, k // 128) and scale_x.stride(0) == 1 and rows % 4 == 0 and k % 512 == 0
            assert scale_w.shape == (k // 128, n // 128) and scale_w.stride(0) == 1
            left = left * scale_x.repeat_interleave(128, 1)
            right = right * scale_w.T.repeat_interleave(128, 0).repeat_interleave(128, 1)
        out.copy_(left @ right.T + (0 if bias is None else bias.to(torch.float64)))

    def synchronize(self) -> None:
        """Nothing is queued."""

    def capture(self, work: Callable[[], torch.Tensor], pool: None) -> tuple[torch.Tensor, Callable[[], None]]:
        result = work().clone()

        def replay() -> None:
            result.copy_(work())

        return result, replay

    def graph_pool(self) -> None:
        return None


class _Event:
    def synchronize(self) -> None:
        """Recorded when everything before it was done."""


if os.environ.get("KERNEL_TESTS") == "card":  # the same tests on the card that is here
    from tests.ptx.card import on_card

    EmulatedDevice = on_card(EmulatedDevice)  # type: ignore[misc]
