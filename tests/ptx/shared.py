"""Shared memory of a batch of thread blocks, with a shadow: which bytes were ever written, by which warp, since which barrier.

The shadow keeps for each granule (the narrowest access of the kernel, at most 4 bytes) a tag of its last writer and its
last reader: epoch * 64 + warp + 1, where the epoch counts the barriers of the thread block. A tag of the present epoch
and of another warp is a hazard: hardware orders such a pair only by luck. Within one warp nothing is reported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.parser import Instruction

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

SHARED_BASE = 1024  # sm_90 keeps the first KiB for itself; swizzled tiles want 1024-byte alignment
UNWRITTEN, WRITTEN, PENDING = 0, 1, 2  # PENDING: a cp.async that nobody has waited for
MANY, ATOMIC = 63, 62  # in a tag's place for the warp: several readers; written by atomics only
PATTERN = {1: 0x01, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}
WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class SharedMemory:
    """`stride` bytes for each thread block, one after the other."""

    def __init__(self, machine: Machine, nbytes: int) -> None:
        self.machine, self.nbytes = machine, nbytes
        self.stride = max(-(-nbytes // 128) * 128, 128)
        lanes, blocks = machine.lanes, machine.blocks
        self.data = np.zeros(blocks * self.stride, np.uint8)
        self.valid = np.zeros(blocks * self.stride, np.uint8)
        self.flat = {width: self.data.view(word) for width, word in WORD.items()}
        self.flat_valid = {width: self.valid.view(word) for width, word in WORD.items()}
        self.rows = {(w, n): view.reshape(-1, n) for w, view in self.flat.items() for n in (1, 2, 4, 8, 16) if w * n <= 16}
        self.base = np.repeat(np.arange(blocks, dtype=np.int64) * self.stride - SHARED_BASE, machine.block_lanes)
        self.granule = 4
        self.epoch = np.zeros(lanes, np.int64)  # epoch * 64
        self.warp = np.tile(np.arange(machine.block_lanes, dtype=np.int64) // 32 + 1, blocks)
        self.tag = self.epoch + self.warp
        self.check_races = self.check_poison = True

    def narrow(self, nbytes: int) -> None:
        """Told at binding time of every access: the shadow is as fine as the narrowest."""
        self.granule = min(self.granule, nbytes)

    def reset(self, races: bool, poison: bool) -> None:
        """A new batch of thread blocks."""
        self.check_races, self.check_poison = races, poison
        self.valid.fill(UNWRITTEN)
        self.data.fill(0xCB)
        size = self.data.size // self.granule
        if not hasattr(self, "writer") or self.writer.size != size:
            self.writer, self.reader = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.writer.fill(0)
        self.reader.fill(0)
        self.epoch.fill(64)
        np.add(self.epoch, self.warp, out=self.tag)

    def barrier(self, lanes: np.ndarray | None) -> None:
        """All of these thread blocks have passed a barrier: what came before is ordered."""
        if lanes is None:
            self.epoch += 64
        else:
            self.epoch[lanes] += 64
        np.add(self.epoch, self.warp, out=self.tag)

    # -- accesses: `at` are byte offsets into `data`, `lanes` the lanes that make them (None: all) --------------------------

    def locate(self, instruction: Instruction, addresses: np.ndarray, lanes: np.ndarray | None, nbytes: int, write: bool) -> np.ndarray:
        """Shared addresses -> offsets into `data`, checked for bounds and alignment."""
        low, high = int(addresses.min()), int(addresses.max())
        if low < SHARED_BASE or high + nbytes > SHARED_BASE + self.nbytes:
            wrong = int(np.argmax((addresses < SHARED_BASE) | (addresses + nbytes > SHARED_BASE + self.nbytes)))
            raise self.machine.error(
                instruction, self.lane(lanes, wrong),
                f"{'writes' if write else 'reads'} {nbytes} bytes at shared offset {int(addresses[wrong]) - SHARED_BASE}, outside the {self.nbytes} bytes of the thread block",
            )  # fmt: skip
        if nbytes > 1 and int(np.bitwise_or.reduce(addresses)) & (nbytes - 1):
            wrong = int(np.argmax(addresses & (nbytes - 1) != 0))
            raise self.machine.error(
                instruction,
                self.lane(lanes, wrong),
                f"shared offset {int(addresses[wrong]) - SHARED_BASE} is not a multiple of {nbytes} bytes",
            )
        return addresses + (self.base if lanes is None else self.base[lanes])

    @staticmethod
    def lane(lanes: np.ndarray | None, at: int) -> int:
        return at if lanes is None else int(lanes[at])

    def granules(self, at: np.ndarray, nbytes: int) -> np.ndarray:
        """Indices into the tags: (n,) or (n, granules of an access)."""
        first = at // self.granule
        count = max(nbytes // self.granule, 1)
        return first if count == 1 else first[:, None] + np.arange(count)

    def read(self, instruction: Instruction, at: np.ndarray, lanes: np.ndarray | None, nbytes: int) -> None:
        """Check and note a read of `nbytes` at each of `at`."""
        if self.check_poison:
            unit = min(nbytes, 8)
            index = at // unit
            seen = self.flat_valid[unit].take(index, mode="clip")
            good = seen == PATTERN[unit]
            if nbytes == 16:
                good &= self.flat_valid[8].take(index + 1, mode="clip") == PATTERN[8]
            if not good.all():
                wrong = int(np.argmin(good))
                pending = (self.valid[at[wrong] : at[wrong] + nbytes] == PENDING).any()
                raise self.machine.error(
                    instruction, self.lane(lanes, wrong),
                    f"reads shared offset {self.offset(at, wrong)}, "
                    + ("which a cp.async writes that its thread has not waited for" if pending else "which nothing has written"),
                )  # fmt: skip
        if not self.check_races:
            return
        index = self.granules(at, nbytes)
        tag, epoch = self.tags(lanes, index.ndim)
        self.compare(instruction, at, lanes, self.writer.take(index, mode="clip"), tag, epoch, "reads", "wrote")
        before = self.reader.take(index, mode="clip")
        many = (before > epoch) & (before != tag)
        self.reader[index] = tag
        many |= self.reader.take(index, mode="clip") != tag
        if many.any():
            self.reader[index[many]] = np.broadcast_to(epoch, many.shape)[many] + MANY

    def write(self, instruction: Instruction, at: np.ndarray, lanes: np.ndarray | None, nbytes: int, state: int = WRITTEN) -> None:
        """Check and note a write."""
        if nbytes == 16:
            index = at // 8
            self.flat_valid[8][index] = PATTERN[8] * state
            self.flat_valid[8][index + 1] = PATTERN[8] * state
        else:
            self.flat_valid[nbytes][at // nbytes] = PATTERN[nbytes] * state
        if not self.check_races:
            return
        index = self.granules(at, nbytes)
        tag, epoch = self.tags(lanes, index.ndim)
        self.compare(instruction, at, lanes, self.writer.take(index, mode="clip"), tag, epoch, "writes", "wrote")
        self.compare(instruction, at, lanes, self.reader.take(index, mode="clip"), tag, epoch, "writes", "read")
        self.writer[index] = tag
        self.compare(instruction, at, lanes, self.writer.take(index, mode="clip"), tag, epoch, "writes", "writes")

    def atomic(self, instruction: Instruction, at: np.ndarray, lanes: np.ndarray | None, nbytes: int) -> None:
        """An atomic access: a hazard with plain accesses of other warps, none with other atomics."""
        if self.check_poison and not (self.flat_valid[nbytes].take(at // nbytes) == PATTERN[nbytes]).all():
            wrong = int(np.argmin(self.flat_valid[nbytes].take(at // nbytes) == PATTERN[nbytes]))
            raise self.machine.error(
                instruction, self.lane(lanes, wrong), f"an atomic on shared offset {self.offset(at, wrong)}, which nothing has written"
            )
        if not self.check_races:
            return
        index = at // self.granule
        tag, epoch = self.tags(lanes, 1)
        before = self.writer.take(index)
        self.compare(instruction, at, lanes, np.where(before == epoch + ATOMIC, 0, before), tag, epoch, "changes", "wrote")
        self.writer[index] = epoch + ATOMIC

    def tags(self, lanes: np.ndarray | None, ndim: int) -> tuple[np.ndarray, np.ndarray]:
        tag, epoch = (self.tag, self.epoch) if lanes is None else (self.tag[lanes], self.epoch[lanes])
        return (tag, epoch) if ndim == 1 else (tag[:, None], epoch[:, None])

    def compare(
        self,
        instruction: Instruction,
        at: np.ndarray,
        lanes: np.ndarray | None,
        found: np.ndarray,
        tag: np.ndarray,
        epoch: np.ndarray,
        does: str,
        did: str,
    ) -> None:
        bad = (found > epoch) & (found != tag)
        if bad.any():
            wrong = int(np.argmax(bad if bad.ndim == 1 else bad.any(axis=1)))
            other = int(found.reshape(len(at), -1)[wrong].max()) % 64
            who = "several warps" if other == MANY else "an atomic" if other == ATOMIC else f"warp {other - 1}"
            lane = self.lane(lanes, wrong)
            raise self.machine.error(
                instruction, lane,
                f"a race: warp {int(self.warp[lane]) - 1} {does} shared offset {self.offset(at, wrong)}, which {who} {did} with no barrier between",
            )  # fmt: skip

    def offset(self, at: np.ndarray, wrong: int) -> int:
        return int(at[wrong]) % self.stride
