"""residual += the sum of x over the cards, out = rms_norm(residual): in one launch a card, for steps of few rows.

Every card can write to the others' memory. Each adds up its parts of a product in float32, stores the sum into a slot of its own on
every other card, waits until all slots of its own memory are full, and adds them in the order of the ranks: the same bits on every
card. Then it does what `elementwise.AddRmsNorm` does.

    slots of a card    uint32 [3 turns, size, room, hidden]    slots[t][r][row]: the sum of rank r, float32; EMPTY until it is there
    turns              uint32 [room]                           a card's own: which of the three turns the next sum of a row takes

A number says by itself that it has arrived (EMPTY is a NaN that no sender writes): no flag follows the data, so nothing has to be
ordered, and a sum costs one way over the link. Turns: a card that is in sum e has seen every other card enter it, so all have left
sum e - 1, whose slots it empties; they are used again in sum e + 2, and nobody gets there before this card has left e. Turns lie in
memory, and not in an argument, so that a captured graph can be replayed; each row has its own, so that sums may differ in rows.

    grid      (rows, blocks): the thread blocks of a row share the adding of its parts; the first receives and normalises
    thread    4 numbers ("unit") at a time, threads apart

All thread blocks of a grid fit on the card at once, for they wait for the other card's. There is no limit to the wait: who ends it
when a rank is gone is the process that started the ranks. A ring (NCCL) takes several steps of latency; it stays for larger sums.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from engine.cuda import ptx
from engine.cuda.elementwise import MAX_HIDDEN, block_adder, check_rows
from engine.cuda.launch import Kernel, Library, Variant
from engine.cuda.parts import DTYPES, PACK, check_parts, part_adder, part_arguments
from engine.cuda.target import cuda, pointer, types
from engine.parallel import Ranks
from engine.plan_cuda import SUM_TURNS, summed_rows

log = logging.getLogger("numbatch.engine")
UNIT = 4  # numbers of 16 bytes
MOST_HELD = 4  # units of all ranks that a thread holds while it waits
EMPTY = 0xFFFFFFFF  # no number yet
NO_NUMBER = 0x7FFFFFFF  # what is sent in its place: the NaN that sums give anyway
FEW_ROWS, FEW_ROWS_BLOCKS = 16, 8  # thread blocks of a row while there are few rows
i32, u32, u64, f32 = types.int32, types.uint32, types.uint64, types.float32
WORDS, FLOATS, ADDRESSES = pointer(u32), pointer(f32), pointer(u64)


def summed_norm(hidden: int, dtype: str, size: int, add: str, blocks: int, threads: int, grid_ranks: bool = False) -> Kernel:
    """(x, parts, bytes of one, residual, weight, out, eps, slots, turns, rank, room); add "parts": x float32 [parts, T, hidden], "rows":
    of the computing dtype, one part. `grid_ranks`: the rank is blockIdx.z, and behind rank 0's x, residual, out and turns lie those of
    the others, so that one launch can play all cards (in tests)."""
    pack, low, high = PACK[dtype], ptx.LOW[dtype], ptx.HIGH[dtype]
    send, receive, bits = ptx.store_relaxed_system_128, ptx.load_relaxed_system_128, ptx.bits_of_float
    units = hidden // UNIT
    share = -(-units // blocks)  # units that a thread block adds up
    rounds, share_rounds = -(-units // threads), -(-share // threads)  # units of a thread
    together = min(2, rounds, max(1, MOST_HELD // size))  # units that a thread waits for at a time
    batches = -(-rounds // together)
    held_all = batches == 1  # the row stays in registers; else it goes through the residual stream
    keeps_own = blocks == 1 and held_all  # its own sum too; else it sends it to itself
    numbers, own_numbers, held = UNIT * together, UNIT * share_rounds if keeps_own else UNIT, UNIT * together * size
    row_bytes, parted, zero, inverse = 4 * hidden, add == "parts", f32(0.0), f32(1.0 / hidden)
    add_parts, add_up = part_adder(UNIT, 8 if size <= 4 else 4), block_adder(threads)

    @cuda.jit(device=True, inline="always")
    def sendable(value: Any) -> Any:
        word = bits(value)
        return u32(NO_NUMBER) if word == u32(EMPTY) else word

    @cuda.jit(device=True, inline="always")
    def own_sum(x: Any, at: Any, count: Any, stride: Any, values: Any, first: Any) -> None:
        """Of unit `at` of the row at address x."""
        if parted:
            add_parts(values, first, x + u64(u32(at) * u32(16)), count, stride)
        else:
            a, b = ptx.load_64(x + u64(u32(at) * u32(8)))
            values[first], values[first + 1], values[first + 2], values[first + 3] = low(a), high(a), low(b), high(b)

    @cuda.jit(device=True, inline="always")
    def slot(turn: Any, rank: Any, row: Any, room: Any) -> Any:
        """Bytes before it."""
        return u64(u32(u32(turn * u32(size) + u32(rank)) * u32(room)) + u32(row)) * u64(row_bytes)

    @cuda.jit(device=True, inline="always")
    def load_batch(row: Any, begin: Any, values: Any) -> None:
        """float32 numbers of the thread's units from the `begin`-th on, 0 beyond the row."""
        for i in range(together):
            at = i32(cuda.threadIdx.x) + i32((begin + i) * threads)
            if at < i32(units):
                w = ptx.load_128(row + u64(u32(at) * u32(16)))
                for e in range(UNIT):
                    values[UNIT * i + e] = ptx.float_of_bits(w[e])
            else:
                for e in range(UNIT):
                    values[UNIT * i + e] = zero

    @cuda.jit(device=True, inline="always")
    def add_slots(values: Any, begin: Any, own: Any, mine: Any, turn: Any, rank: Any, row: Any, room: Any) -> None:
        """values += what all ranks sent, once it is there; `own` in the place of what this one would have sent to itself."""
        words = cuda.local.array(held, u32)
        missing = u32(1)
        while missing != u32(0):
            missing = u32(0)
            for i in range(together):
                at = i32(cuda.threadIdx.x) + i32((begin + i) * threads)
                for r in range(size):
                    n = UNIT * (size * i + r)
                    if at >= i32(units):
                        for e in range(UNIT):
                            words[n + e] = u32(0)
                    elif keeps_own and i32(r) == rank:
                        for e in range(UNIT):
                            words[n + e] = bits(own[UNIT * i + e])
                    else:
                        w = receive(mine + slot(turn, r, row, room) + u64(u32(at) * u32(16)))
                        for e in range(UNIT):
                            words[n + e] = w[e]
                            missing |= u32(1) if w[e] == u32(EMPTY) else u32(0)
        for i in range(together):
            for r in range(size):
                for e in range(UNIT):
                    values[UNIT * i + e] += ptx.float_of_bits(words[UNIT * (size * i + r) + e])

    @cuda.jit(device=True, inline="always")
    def store_batch(row: Any, begin: Any, values: Any) -> None:
        for i in range(together):
            at, n = i32(cuda.threadIdx.x) + i32((begin + i) * threads), UNIT * i
            if at < i32(units):
                to = row + u64(u32(at) * u32(16))
                ptx.store_128(to, bits(values[n]), bits(values[n + 1]), bits(values[n + 2]), bits(values[n + 3]))

    @cuda.jit(device=True, inline="always")
    def store_normed(out: Any, begin: Any, values: Any, weights: Any, scale: Any) -> None:
        for i in range(together):
            at, n = i32(cuda.threadIdx.x) + i32((begin + i) * threads), UNIT * i
            if at < i32(units):
                a = pack(values[n] * scale * weights[n], values[n + 1] * scale * weights[n + 1])
                b = pack(values[n + 2] * scale * weights[n + 2], values[n + 3] * scale * weights[n + 3])
                ptx.store_64(out + u64(u32(at) * u32(8)), a, b)

    def kernel(x, count, stride, residual, weight, out, eps, slots, turns, rank, room):  # type: ignore[no-untyped-def]
        ptx.next_may_begin()
        values, weights = cuda.local.array(numbers, f32), cuda.local.array(numbers, f32)
        own, cards = cuda.local.array(own_numbers, f32), cuda.local.array(size, u64)
        partial = cuda.shared.array(32, f32)
        thread, row, block, rows = i32(cuda.threadIdx.x), i32(cuda.blockIdx.x), i32(cuda.blockIdx.y), i32(cuda.gridDim.x)
        if grid_ranks:
            rank = i32(cuda.blockIdx.z)
        ahead = u64(rank) * u64(rows) if grid_ranks else u64(0)  # rows of other ranks before this one's
        stream = ptx.address(residual) + (ahead + u64(row)) * u64(row_bytes)
        target = ptx.address(out) + (ahead + u64(row)) * u64(row_bytes // 2)
        place = ptx.address(turns) + u64(u32(rank * room if grid_ranks else 0) + u32(row)) * u64(4)
        if parted:
            source = ptx.address(x) + ahead * u64(count) * u64(row_bytes) + u64(row) * u64(row_bytes)
        else:
            source = ptx.address(x) + (ahead + u64(row)) * u64(row_bytes // 2)
        for r in range(size):
            cards[r] = slots[r]
        mine = slots[rank]
        # since it was last used, a layer's weights went through the cache: bring it back while the kernel before this one ends
        ptx.prefetch(place)
        if held_all and block == 0:
            load_batch(ptx.address(weight), 0, weights)
            for i in range(rounds):
                at = thread + i32(i * threads)
                if at < i32(units):
                    ptx.prefetch(stream + u64(u32(at) * u32(16)))
        ptx.after_previous()
        turn = u32(ptx.load_32(place))
        stale = turn + u32(2) if turn == u32(0) else turn - u32(1)
        if held_all and block == 0:
            load_batch(stream, 0, values)

        for i in range(share_rounds):
            inner = thread + i32(i * threads)
            at = block * i32(share) + inner
            if inner < i32(share) and at < i32(units):
                n = UNIT * i if keeps_own else 0
                own_sum(source, at, count, stride, own, n)
                to = slot(turn, rank, row, room) + u64(u32(at) * u32(16))
                for r in range(size):
                    if not keeps_own or i32(r) != rank:
                        send(cards[r] + to, sendable(own[n]), sendable(own[n + 1]), sendable(own[n + 2]), sendable(own[n + 3]))
        for i in range(share_rounds):
            inner = thread + i32(i * threads)
            at = block * i32(share) + inner
            if inner < i32(share) and at < i32(units):
                for r in range(size):
                    to = mine + slot(stale, r, row, room) + u64(u32(at) * u32(16))
                    ptx.store_128(to, u32(EMPTY), u32(EMPTY), u32(EMPTY), u32(EMPTY))
        if block == 0:
            total = zero
            for b in range(batches):
                if not held_all:
                    load_batch(stream, b * together, values)
                add_slots(values, b * together, own, mine, turn, rank, row, room)
                store_batch(stream, b * together, values)
                for i in range(numbers):
                    total += values[i] * values[i]
            cuda.syncthreads()  # everything of the row was received, so all of its thread blocks have read its turn
            if thread == i32(0):
                ptx.store_32(place, u32(0) if turn == u32(SUM_TURNS - 1) else turn + u32(1))
            scale = ptx.rsqrt(add_up(total, partial) * inverse + eps)
            for b in range(batches):
                if not held_all:
                    load_batch(stream, b * together, values)
                    load_batch(ptx.address(weight), b * together, weights)
                store_normed(target, b * together, values, weights, scale)

    arguments = (WORDS, u32, u64, WORDS, FLOATS, WORDS, f32, ADDRESSES, WORDS, i32, i32)
    return Kernel(kernel, arguments, threads, early=True)


def sum_threads(hidden: int) -> int:
    """Of a row's thread block: a unit each, at most 1024."""
    return min(1024, -(-hidden // UNIT // 32) * 32)


def most_rows(hidden: int, size: int, multiprocessors: int) -> int:
    """Of one sum: all its thread blocks run at the same time."""
    return min(summed_rows(hidden, size), multiprocessors)


def summed_norm_of(library: Library, device: Any, ranks: Ranks, hidden: int, dtype: str) -> SummedNorm | None:
    """None where there is one rank, or the cards cannot reach each other's memory: then every sum is NCCL's."""
    room = most_rows(hidden, ranks.size, device.multiprocessors)
    if device.torch_device.type != "cuda" or room < 1 or hidden > MAX_HIDDEN:
        return None
    try:
        peers = Peers.meet(device.torch_device, ranks, room, hidden)
    except RuntimeError as error:
        log.warning("The cards cannot reach each other's memory, sums of small steps go through NCCL: %s", error)
        return None
    return SummedNorm(library, hidden, dtype, ranks.rank, ranks.size, peers, device.multiprocessors)


class SummedNorm:
    """residual += x summed over the ranks, out = rms_norm(residual) * weight: the same bits on every rank. [T, hidden]; residual
    float32, out in the computing dtype, weight float32 [hidden]; x the parts of a product, float32 [S, T, hidden], or the product in
    the computing dtype. Every rank calls it with as many rows, in the same order."""

    def __init__(self, library: Library, hidden: int, dtype: str, rank: int, size: int, peers: Peers, multiprocessors: int) -> None:
        self._library, self._hidden, self._dtype = library, hidden, DTYPES[dtype]
        self._rank, self._peers = rank, peers
        self._few = min(FEW_ROWS, multiprocessors // FEW_ROWS_BLOCKS)
        threads = sum_threads(hidden)
        self._by_blocks = {
            blocks: tuple(Variant(__name__, "summed_norm", (hidden, dtype, size, add, blocks, threads)) for add in ("rows", "parts"))
            for blocks in (1, FEW_ROWS_BLOCKS)
        }
        self.variants = tuple(variant for pair in self._by_blocks.values() for variant in pair)

    def takes_rows(self, rows: int) -> bool:
        """Whether sums of so many rows are for it."""
        return 0 < rows <= self._peers.room

    def takes(self, x: torch.Tensor) -> bool:
        """Whether this sum is: of few rows, of the right kind, consecutive."""
        if x.ndim == 3:
            right = x.dtype == torch.float32
        else:
            right = x.dtype == self._dtype
        return right and x.shape[-1] == self._hidden and x.is_contiguous() and self.takes_rows(x.shape[-2])

    def __call__(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float) -> None:
        rows, peers, parted = len(out), self._peers, x.ndim == 3
        check_rows("residual", residual, rows, self._hidden, torch.float32)
        check_rows("out", out, rows, self._hidden, self._dtype)
        if parted:
            check_parts("x", x, rows, self._hidden)
        else:
            check_rows("x", x, rows, self._hidden, self._dtype)
        if not self.takes_rows(rows):
            raise ValueError(f"a sum of {rows} rows over ranks, and there is room for 1 to {peers.room}")
        blocks = FEW_ROWS_BLOCKS if rows <= self._few else 1
        given = part_arguments(x) if parted else (x, 1, 0)
        self._library[self._by_blocks[blocks][parted]](
            (rows, blocks, 1), *given, residual, weight, out, eps, peers.slots, peers.turns, self._rank, peers.room
        )


class Peers:
    """The slots of all ranks, as this one sees them: `slots` int64 [size], the address of each rank's; `turns` int32 [room]."""

    def __init__(self, own: torch.Tensor, slots: torch.Tensor) -> None:
        """`own` int32 [3, size, room, hidden], all EMPTY."""
        self._own, self.slots, self.room = own, slots, own.shape[2]
        self.turns = torch.zeros(self.room, dtype=torch.int32, device=own.device)

    @classmethod
    def meet(cls, device: torch.device, ranks: Ranks, room: int, hidden: int) -> Peers:
        """Through torch's symmetric memory (NVLink or PCIe peer access). RuntimeError where there is none."""
        from torch.distributed import _symmetric_memory as symmetric

        own = symmetric.empty(SUM_TURNS * ranks.size * room * hidden, dtype=torch.int32, device=device)
        own.fill_(-1)
        torch.cuda.synchronize(device)
        handle = symmetric.rendezvous(own, ranks.group)
        slots = torch.tensor([int(address) for address in handle.buffer_ptrs], dtype=torch.int64, device=device)
        handle.barrier()  # nobody sends anything before all slots are empty
        return cls(own.view(SUM_TURNS, ranks.size, room, hidden), slots)
