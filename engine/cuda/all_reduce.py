"""The sum of a small tensor over the cards of a machine, in one launch a card: `Ranks.all_reduce` for steps of few rows.

Every card can read the others' memory. Each copies its part into a buffer that the others see, tells them, waits until all
have told, reads all parts and adds them up in float32 in the order of the ranks: the same bits on every card.

    slot of a rank    [2 phases, elements] 16-bit          its part of this sum and of the one before
    signals           uint32 [thread blocks, size]         signals[b][r]: the last epoch for which rank r's thread block b is ready
    epochs            uint32 [thread blocks]               the rank's own: how many sums its thread block b has done

Thread block b of every card works on the same elements and waits only for its namesakes. Two phases are enough: a card that
is one sum ahead has seen all others enter the last one, so they have left the one before it. The epoch lies in memory, and
not in an argument, so that a captured graph can be replayed.

A ring (NCCL) moves 2 (size - 1) / size of the bytes in 2 (size - 1) steps of latency; this moves size - 1 of them in one, which
wins while the message is small. Versions tried: none measured yet.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from engine.cuda import ptx
from engine.cuda.launch import Kernel, Library, Variant
from engine.cuda.target import cuda, pointer, types
from engine.parallel import Ranks

log = logging.getLogger("numbatch.engine")
THREADS = 256
BLOCKS = 32  # enough to fill the links with MAX_BYTES (an estimate until it is measured)
VECTOR = 8  # elements in 16 bytes
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
MAX_BYTES = 512 * 1024  # of one part; larger sums go to NCCL (an estimate until it is measured)
u32, u64, i32, f32 = types.uint32, types.uint64, types.int32, types.float32


def all_reduce(size: int, dtype: str, grid_ranks: bool = False) -> Kernel:
    """(x, parts, signals, epochs, rank, vectors, stride, out). `grid_ranks`: the rank is blockIdx.y, and behind rank 0's x,
    epochs and out lie those of the others, so that one launch can play all cards (in tests)."""
    low, high, pack = ptx.LOW[dtype], ptx.HIGH[dtype], ptx.PACK[dtype]
    load, load_peer, store, address = ptx.load_128, ptx.load_128, ptx.store_128, ptx.address
    release, acquire, load_32, store_32 = ptx.store_release_system, ptx.load_acquire_system, ptx.load_32, ptx.store_32

    def kernel(x, parts, signals, epochs, rank, vectors, stride, out):  # type: ignore[no-untyped-def]
        total = cuda.local.array(VECTOR, f32)
        thread, block, blocks = i32(cuda.threadIdx.x), i32(cuda.blockIdx.x), i32(cuda.gridDim.x)
        if grid_ranks:
            rank = i32(cuda.blockIdx.y)
        ahead = u64(rank) if grid_ranks else u64(0)
        source = address(x) + ahead * u64(vectors) * u64(16)
        target = address(out) + ahead * u64(vectors) * u64(16)
        counter = address(epochs) + (ahead * u64(blocks) + u64(block)) * u64(4)
        epoch = u32(load_32(counter) + u32(1))
        phase = u64(epoch & u32(1)) * u64(stride) * u64(16)
        own = parts[rank] + phase
        first, step = i32(block * i32(THREADS) + thread), i32(blocks * i32(THREADS))

        at = first
        while at < vectors:
            v = load(source + u64(at) * u64(16))
            store(own + u64(at) * u64(16), v[0], v[1], v[2], v[3])
            at = i32(at + step)
        cuda.syncthreads()
        if thread < i32(size):
            release(signals[thread] + u64(i32(block * i32(size) + rank)) * u64(4), epoch)
            mine = signals[rank] + u64(i32(block * i32(size) + thread)) * u64(4)
            while acquire(mine) < epoch:
                pass
        cuda.syncthreads()
        if thread == 0:
            store_32(counter, epoch)

        at = first
        while at < vectors:
            for i in range(VECTOR):
                total[i] = f32(0.0)
            for r in range(size):
                v = load_peer(parts[r] + phase + u64(at) * u64(16))
                for i in range(4):
                    total[2 * i] = f32(total[2 * i] + low(v[i]))
                    total[2 * i + 1] = f32(total[2 * i + 1] + high(v[i]))
            store(
                target + u64(at) * u64(16),
                pack(total[0], total[1]),
                pack(total[2], total[3]),
                pack(total[4], total[5]),
                pack(total[6], total[7]),
            )
            at = i32(at + step)

    words, addresses = pointer(u32), pointer(u64)
    return Kernel(kernel, (words, addresses, addresses, words, i32, i32, i32, words), THREADS)


def one_shot_sum(library: Library, device: torch.device, ranks: Ranks, dtype: torch.dtype) -> OneShotSum | None:
    """None where there is one rank, or the cards cannot read each other's memory: then every sum is NCCL's."""
    if ranks.size == 1 or device.type != "cuda":
        return None
    try:
        peers = Peers(device, ranks.size, BLOCKS, ranks.group)
    except RuntimeError as error:
        log.warning("The cards cannot read each other's memory, sums of small steps go through NCCL: %s", error)
        return None
    return OneShotSum(library, ranks.rank, ranks.size, dtype, BLOCKS, peers)


class OneShotSum:
    """x [rows, width] of 16 bits -> the ranks' sum, in place. `peers`: where each rank's parts and signals lie, as this card sees them."""

    def __init__(self, library: Library, rank: int, size: int, dtype: torch.dtype, blocks: int, peers: Peers) -> None:
        self._library, self._rank, self._blocks, self._peers = library, rank, blocks, peers
        self._dtype = dtype
        self._variant = Variant(__name__, "all_reduce", (size, DTYPES[dtype]))
        self.variants = (self._variant,)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether this sum is for x: small, of the right kind, in whole vectors."""
        return x.dtype == self._dtype and x.is_contiguous() and x.numel() % VECTOR == 0 and 0 < 2 * x.numel() <= MAX_BYTES

    def __call__(self, x: torch.Tensor) -> None:
        peers, vectors = self._peers, x.numel() // VECTOR
        self._library[self._variant](self._blocks, x, peers.parts, peers.signals, peers.epochs, self._rank, vectors, MAX_BYTES // 16, x)


class Peers:
    """Memory of every card that all of them see, through torch's symmetric memory (NVLink or PCIe peer access).

    parts, signals: uint64 [size], the addresses of each rank's; epochs uint32 [blocks].
    """

    def __init__(self, device: torch.device, size: int, blocks: int, group: Any) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        words = 2 * MAX_BYTES // 4 + blocks * size
        self._held = symmetric.empty(words, dtype=torch.int32, device=device)
        self._held.zero_()
        torch.cuda.synchronize(device)
        handle = symmetric.rendezvous(self._held, group)
        parts = [int(pointer) for pointer in handle.buffer_ptrs]
        self.parts = torch.tensor(parts, dtype=torch.int64, device=device)
        self.signals = self.parts + 2 * MAX_BYTES
        self.epochs = torch.zeros(blocks, dtype=torch.int32, device=device)
        handle.barrier()  # nobody tells anybody anything before all are zero
