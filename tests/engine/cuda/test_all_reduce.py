"""The sum over cards that ends in a norm: one emulated launch plays all of them. Slots and outputs begin as NaN."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import reference
from engine.build import resolve_spec
from engine.cuda import backend
from engine.cuda.all_reduce import EMPTY, Peers, SummedNorm, most_rows, sum_threads
from engine.cuda.elementwise import AddRmsNorm
from engine.cuda.launch import Library, Variant, assemble, to_ptx
from engine.loop import Engine
from engine.plan_cuda import SUM_TURNS
from tests.engine.cuda.test_engine import config_of, engine_of
from tests.engine.judge import Reference, greedy
from tests.fixtures.toy import toy_checkpoint
from tests.harness import answers
from tests.ptx.device import KERNELS, EmulatedDevice
from tests.ptx.emulator import Emulator, Memory

EPS = 1e-5
ADDRESSES = pytest.mark.skipif(os.environ.get("KERNEL_TESTS") == "card", reason="the slots' addresses are those of this process's memory")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11}  # half an ulp, relative


class Cards:
    """Slots and turns of `size` cards in one memory, room for `room` rows."""

    def __init__(self, size: int, hidden: int, dtype: str, room: int, threads: int = 0) -> None:
        self.size, self.hidden, self.dtype, self.room = size, hidden, dtype, room
        self.threads = threads or sum_threads(hidden)
        self.slots = torch.full((size, SUM_TURNS, size, room, hidden), -1, dtype=torch.int32)
        self.turns = torch.zeros((size, room), dtype=torch.int32)
        self.emulators: dict[Variant, Emulator] = {}

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, blocks: int) -> torch.Tensor:
        """x [size, S, T, hidden] float32 or [size, T, hidden] 16-bit, residual [size, T, hidden] -> out, and residual changed."""
        parted, rows = x.ndim == 4, x.shape[-2]
        kind = "parts" if parted else "rows"
        variant = Variant("engine.cuda.all_reduce", "summed_norm", (self.hidden, self.dtype, self.size, kind, blocks, self.threads, True))
        if variant not in self.emulators:
            self.emulators[variant] = Emulator(to_ptx(variant, (9, 0)))
        out = torch.full((self.size, rows, self.hidden), float("nan"), dtype=DTYPES[self.dtype])
        addresses = torch.tensor([card.data_ptr() for card in self.slots])
        memory = Memory()
        for number, tensor in enumerate((x, residual, weight, out, self.slots, addresses, self.turns)):
            memory.add(tensor, name=f"argument {number}")
        args = [
            x.data_ptr(), x.shape[1] if parted else 1, 4 * rows * self.hidden if parted else 0, residual.data_ptr(), weight.data_ptr(),
            out.data_ptr(), EPS, addresses.data_ptr(), self.turns.data_ptr(), 0, self.room,
        ]  # fmt: skip
        self.emulators[variant].launch(
            variant.name, grid=(rows, blocks, self.size), block=(self.threads, 1, 1), args=args, memory=memory, shared_bytes=0, cooperative=True
        )
        return out

    def clean(self) -> bool:
        """Whether the slots of the next turn of every row, and of the one after it, are empty."""
        rows = range(self.room)
        return all(
            bool((self.slots[:, (int(self.turns[0, row]) + ahead) % SUM_TURNS, :, row] == -1).all()) for row in rows for ahead in range(SUM_TURNS - 1)
        )


def check(cards: Cards, rows: int, parts: int, blocks: int, seed: int) -> None:
    """parts 0: x in the computing dtype."""
    generator = torch.Generator().manual_seed(seed)
    size, hidden, dtype = cards.size, cards.hidden, DTYPES[cards.dtype]
    if parts:
        x = torch.randn((size, parts, rows, hidden), generator=generator)
        sums = torch.zeros((size, rows, hidden))
        for part in range(parts):
            sums += x[:, part]
    else:
        x = torch.randn((size, rows, hidden), generator=generator).to(dtype)
        sums = x.float()
    first = torch.randn((rows, hidden), generator=generator)
    weight = torch.randn(hidden, generator=generator)
    stream = first.clone()
    for rank in range(size):
        stream += sums[rank]
    residual = first.repeat(size, 1, 1)
    out = cards.add_norm(x, residual, weight, blocks)
    assert all(torch.equal(card, stream) for card in residual)
    assert all(torch.equal(card, out[0]) for card in out)
    wanted = reference.rms_norm(stream.numpy(), weight.numpy(), EPS)
    np.testing.assert_allclose(out[0].float().numpy(), wanted, rtol=1.05 * ROUNDING[cards.dtype], atol=1e-6)


# (size, hidden, dtype, room, threads, the launches: rows, parts, blocks)
CASES = [
    (2, 576, "bfloat16", 70, 0, [(1, 3, 8), (70, 1, 1), (3, 12, 1), (2, 8, 8), (1, 5, 1), (4, 0, 8), (69, 2, 1)]),
    (2, 1032, "float16", 3, 64, [(3, 4, 1), (1, 9, 1), (3, 1, 1), (2, 7, 4)]),  # 5 units a thread: not all of them in registers
    (3, 104, "float16", 4, 0, [(1, 2, 1), (4, 6, 4), (2, 3, 4), (4, 0, 1)]),
    (8, 256, "bfloat16", 2, 0, [(1, 2, 1), (2, 5, 1), (2, 4, 1)]),
]


@pytest.mark.parametrize("size, hidden, dtype, room, threads, launches", CASES)
def test_every_card_adds_the_same_sum_and_norms_it_time_after_time(size, hidden, dtype, room, threads, launches):
    cards = Cards(size, hidden, dtype, room, threads)
    sums = torch.zeros(room, dtype=torch.int32)
    for seed, (rows, parts, blocks) in enumerate(launches):
        check(cards, rows, parts, blocks, seed)
        sums[:rows] += 1
        assert (cards.turns == sums % SUM_TURNS).all() and cards.clean()


def test_any_bits_arrive():
    """What means "not there yet" too: it is sent as another NaN."""
    cards = Cards(2, 64, "bfloat16", 1)
    x = torch.zeros((2, 1, 1, 64))
    x.view(torch.int32)[0, 0, 0, :4] = torch.tensor([EMPTY - (1 << 32), 0x7FC00000, -(1 << 31), 0x7F800000], dtype=torch.int64).to(torch.int32)
    residual = torch.zeros((2, 1, 64))
    for blocks in (1, 4, 4, 1):
        cards.add_norm(x, residual, torch.ones(64), blocks)
    assert residual[:, 0, :2].isnan().all() and (residual[:, 0, 3] == float("inf")).all() and (residual[:, 0, 4:] == 0).all()


@pytest.mark.parametrize("cc, size, blocks", [((8, 0), 8, 1), ((8, 9), 4, 8), ((9, 0), 2, 1), ((9, 0), 2, 8)], ids=str)
def test_it_needs_neither_stack_nor_spills(cc: tuple[int, int], size: int, blocks: int) -> None:
    variant = Variant("engine.cuda.all_reduce", "summed_norm", (8192, "bfloat16", size, "parts", blocks, sum_threads(8192)))
    _, resources = assemble(to_ptx(variant, cc), cc)
    assert (resources.stack_bytes, resources.spill_bytes) == (0, 0) and resources.registers <= 64


def card_alone(library: Library, hidden: int, room: int, dtype: str = "bfloat16") -> SummedNorm:
    """Of one card, which sends to itself."""
    # slots in one piece with their address: what the emulator lets the kernel reach
    words = torch.full((2 + SUM_TURNS * room * hidden // 2,), -1, dtype=torch.int64)
    own = words[2:].view(torch.int32).view(SUM_TURNS, 1, room, hidden)
    words[0] = own.data_ptr()
    return SummedNorm(library, hidden, dtype, 0, 1, Peers(own, words), 16)


@pytest.fixture
def alone() -> SummedNorm:
    return card_alone(Library(EmulatedDevice(), KERNELS), 64, 5)


async def ids_of(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    await engine.start()
    try:
        return await answers(engine, prompts, greedy(3), together=True)
    finally:
        await engine.stop()


@ADDRESSES
def test_of_one_card_it_is_the_norm_of_the_sum(alone: SummedNorm) -> None:
    generator, norm = torch.Generator().manual_seed(0), AddRmsNorm(Library(EmulatedDevice(), KERNELS), 64, "bfloat16")
    weight = torch.randn(64, generator=generator)
    for rows in (5, 1, 4):
        x, residual = torch.randn((2, rows, 64), generator=generator), torch.randn((rows, 64), generator=generator)
        for given in (x, x[0].to(torch.bfloat16)):
            assert alone.takes(given)
            streams, outs = [residual.clone(), residual.clone()], [torch.full((rows, 64), float("nan"), dtype=torch.bfloat16) for _ in "ab"]
            alone(given, streams[0], weight, outs[0], EPS)
            norm(given, streams[1], weight, outs[1], EPS)
            assert torch.equal(*streams) and torch.equal(*outs)


def test_many_rows_and_other_widths_are_for_nccl(alone: SummedNorm) -> None:
    assert not alone.takes(torch.empty((6, 64), dtype=torch.bfloat16)) and not alone.takes_rows(6) and not alone.takes_rows(0)
    assert not alone.takes(torch.empty((4, 64), dtype=torch.float16))
    assert not alone.takes(torch.empty((4, 72), dtype=torch.bfloat16))
    assert not alone.takes(torch.empty((4, 128), dtype=torch.bfloat16)[:, :64])
    with pytest.raises(ValueError, match="6 rows"):
        alone(torch.zeros((6, 64), dtype=torch.bfloat16), torch.zeros((6, 64)), torch.ones(64), torch.zeros((6, 64), dtype=torch.bfloat16), EPS)
    assert most_rows(8192, 2, 132) == 128 and most_rows(8192, 8, 132) == 18 and most_rows(4096, 2, 132) == 132


@ADDRESSES
def test_an_engine_leaves_sums_of_few_rows_to_it(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that sums over itself: prompt parts of 17 rows go the other way."""
    model = toy_checkpoint(tmp_path / "model", "llama")
    config = config_of(model, root, engine={"max_batch_size": 1})
    monkeypatch.setattr(backend, "summed_norm_of", lambda library, device, ranks, hidden, dtype: card_alone(library, hidden, 5, dtype))
    engine, made = engine_of(config)
    prompt = list(range(3, 20))
    (ids,) = asyncio.run(ids_of(engine, [prompt]))
    Reference(model, resolve_spec(config)).check(prompt, ids)
    launches = [name.split("_")[0] + ("_rows" if "_rows_" in name else "") for name in made[0]._device.launches]
    assert launches.count("summed_rows") and launches.count("rms_rows")
