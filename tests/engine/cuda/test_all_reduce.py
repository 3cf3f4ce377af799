"""The one-launch sum over cards: one emulated launch plays all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.cuda.all_reduce import MAX_BYTES, THREADS, VECTOR
from engine.cuda.launch import Kernel, Library, Variant, assemble, to_ptx
from engine.cuda.target import PTX_ARCHITECTURES
from tests.ptx.device import EmulatedDevice
from tests.ptx.emulator import Emulator, Memory

BLOCKS = 2


class Cards:
    """Parts, signals and epochs of `size` cards in one memory."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.size = size
        self.stride = 3 * BLOCKS * THREADS  # vectors
        self.parts = torch.full((size, 2, self.stride * VECTOR), float("nan"), dtype=dtype)
        self.signals = torch.zeros((size, BLOCKS, size), dtype=torch.int32)
        self.epochs = torch.zeros((size, BLOCKS), dtype=torch.int32)
        name = {torch.bfloat16: "bfloat16", torch.float16: "float16"}[dtype]
        self.variant = Variant("engine.cuda.all_reduce", "all_reduce", (size, name, True))
        self.emulator = Emulator(to_ptx(self.variant, (9, 0)))

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """x [size, n] -> what every card has after one launch."""
        out = torch.full_like(x, float("nan"))
        part_addresses = torch.tensor([p.data_ptr() for p in self.parts])
        signal_addresses = torch.tensor([s.data_ptr() for s in self.signals])
        memory = Memory()
        tensors = {
            "x": x, "parts": self.parts, "signals": self.signals, "epochs": self.epochs, "out": out,
            "part addresses": part_addresses, "signal addresses": signal_addresses,
        }  # fmt: skip
        for name, tensor in tensors.items():
            memory.add(tensor, name=name)
        args = [
            x.data_ptr(), part_addresses.data_ptr(), signal_addresses.data_ptr(), self.epochs.data_ptr(), 0, x.shape[1] // VECTOR,
            self.stride, out.data_ptr(),
        ]  # fmt: skip
        grid, block = (BLOCKS, self.size, 1), (THREADS, 1, 1)
        self.emulator.launch(self.variant.name, grid=grid, block=block, args=args, memory=memory, shared_bytes=0)
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_card_gets_the_same_sum_time_after_time(size: int, dtype: torch.dtype) -> None:
    cards, generator = Cards(size, dtype), torch.Generator().manual_seed(size)
    for number, vectors in enumerate((1, THREADS - 1, BLOCKS * THREADS + 1), start=1):
        x = torch.randn((size, vectors * VECTOR), generator=generator).to(dtype)
        total = torch.zeros(vectors * VECTOR)
        for part in x.float():
            total = total + part  # in the order of the ranks, in float32
        out = cards.sum(x)
        assert all(torch.equal(card, total.to(dtype)) for card in out)
        assert (cards.epochs == number).all() and (cards.signals == number).all()


@pytest.mark.parametrize("cc", PTX_ARCHITECTURES, ids=str)
def test_it_needs_neither_stack_nor_spills(cc: tuple[int, int]) -> None:
    for size in (2, 4, 8):
        _, resources = assemble(to_ptx(Variant("engine.cuda.all_reduce", "all_reduce", (size, "bfloat16")), cc), cc)
        assert (resources.stack_bytes, resources.spill_bytes) == (0, 0) and resources.registers <= 128


def test_large_odd_or_strided_tensors_are_for_nccl(tmp_path: Path) -> None:
    from engine.cuda.all_reduce import OneShotSum

    one_shot = OneShotSum(Library(EmulatedDevice(), tmp_path), 0, 2, torch.bfloat16, BLOCKS, None)
    assert one_shot.takes(torch.empty((4, 64), dtype=torch.bfloat16))
    assert not one_shot.takes(torch.empty((4, 64), dtype=torch.float16))
    assert not one_shot.takes(torch.empty((1, 9), dtype=torch.bfloat16))
    assert not one_shot.takes(torch.empty((4, 128), dtype=torch.bfloat16)[:, :64])
    assert not one_shot.takes(torch.empty(MAX_BYTES // 2 + 8, dtype=torch.bfloat16))
    assert isinstance(one_shot.variants[0].make(), Kernel)
