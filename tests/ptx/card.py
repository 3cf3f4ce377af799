"""The real card behind the emulator's interface: with KERNEL_TESTS=card in the environment the kernel tests run on it, unchanged.

Tests make tensors on the host and look at them there, so each launch carries every storage that its arguments lie in to the
card, runs the kernel there, waits, and carries all of them back: views that overlap stay overlapped, and what a kernel must
not touch comes back as it was. Slow by design; speed is for bench/kernels.py. PTX is assembled for the card that is there,
whatever architecture a test compiled it for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from engine.cuda.launch import Kernel, assemble


@lru_cache
def _real() -> Any:
    from engine.cuda.device import CudaDevice

    return CudaDevice()


def on_card(emulated: type) -> type:
    """The emulated device's class with launches that go to the card."""

    class CardDevice(emulated):  # type: ignore[misc, valid-type]
        name = "a card"

        def load(self, image: bytes, entry: str, kernel: Kernel) -> Callable[..., None]:
            real = _real()
            torch.cuda.set_device(real.torch_device)  # the driver's context, in the thread that calls
            cubin, _ = assemble(image.decode(), real.cc, kernel.suffix)
            launch = real.load(cubin, entry, kernel)
            return mirrored(launch, entry, kernel, real, self.launches)

    return CardDevice


def mirrored(launch: Callable[..., None], entry: str, kernel: Kernel, real: Any, launches: list[str]) -> Callable[..., None]:
    """A launcher that takes host tensors; `real` says where the copies are made and how to wait."""

    def call(grid: int | tuple[int, int, int], *arguments: Any, shared_bytes: int = kernel.shared_bytes) -> None:
        if len(arguments) != len(kernel.arguments):
            raise TypeError(f"{entry} takes {len(kernel.arguments)} arguments, {len(arguments)} were given")
        if shared_bytes > kernel.shared_bytes:
            raise ValueError(f"{entry} was made for {kernel.shared_bytes} bytes of shared memory, {shared_bytes} are asked for")
        there: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        values = []
        for argument in arguments:
            if not isinstance(argument, torch.Tensor):
                values.append(0 if argument is None else argument)
                continue
            storage = argument.untyped_storage()
            if storage.data_ptr() not in there:
                here = torch.empty(0, dtype=torch.uint8).set_(storage)
                there[storage.data_ptr()] = here, here.to(real.torch_device, copy=True)
            copy = there[storage.data_ptr()][1]
            values.append(copy.data_ptr() + argument.data_ptr() - storage.data_ptr())
        launches.append(entry)
        launch(grid, *values, shared_bytes=shared_bytes)
        real.synchronize()
        for here, copy in there.values():
            here.copy_(copy)

    return call
