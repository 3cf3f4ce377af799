"""Shared memory of a batch of thread blocks, with a shadow: which bytes were written, and which accesses are ordered.

Every warp has a vector clock: what it knows of the other warps' accesses. It learns at barriers, and from mbarriers that
it waits for; an access of another warp that it does not know of, one of the two a write, is a hazard that hardware orders
only by luck. A granule (the narrowest access of the kernel, at most 4 bytes) keeps the tag of its last write,
clock * 128 + atomic * 64 + warp, and each warp's last read of it. Reads are only logged until a write asks for them,
because a barrier of all thread blocks makes the log pointless. Within one warp nothing is reported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.parser import Instruction

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

SHARED_BASE = 1024  # sm_90 keeps the first KiB for itself; swizzled tiles want 1024-byte alignment
UNWRITTEN, WRITTEN, PENDING = 0, 1, 2  # PENDING: a cp.async that nobody has waited for
ASYNC = 60  # in a tag's place for the warp: a bulk copy or a wgmma
IDS, ATOMIC, CLOCK = 64, 64, 128
WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
LOG_LENGTH = 64
Lanes = np.ndarray | None


def wide_view(array: np.ndarray, nbytes: int) -> np.ndarray:
    """An array of bytes or words as one of items of `nbytes`, so that an access is one item."""
    return array.view(WORD[nbytes] if nbytes in WORD else np.dtype(f"V{nbytes}"))


class SharedMemory:
    """`stride` bytes for each thread block, one after the other."""

    def __init__(self, machine: Machine, nbytes: int) -> None:
        self.machine, self.nbytes = machine, nbytes
        self.stride = max(-(-nbytes // 1024) * 1024, 1024)
        blocks, self.warps = machine.blocks, machine.block_lanes // 32
        self.data = np.zeros(blocks * self.stride, np.uint8)
        self.valid = np.zeros(blocks * self.stride, np.uint8)
        self.flat: dict[int, Any] = {width: self.data.view(word) for width, word in WORD.items()}
        self.flat_valid = {width: self.valid.view(word) for width, word in WORD.items()}
        self.states = {
            (width, state): np.full(width, state, np.uint8).view(word)[0]
            for width, word in WORD.items()
            for state in (UNWRITTEN, WRITTEN, PENDING)
        }
        self.base = np.repeat(np.arange(blocks, dtype=np.int64) * self.stride - SHARED_BASE, machine.block_lanes)
        lane = np.arange(machine.lanes)
        self.row = lane // 32  # of the vector clocks
        self.warp = self.row % self.warps
        self.granule = 4
        self.writer = self.readers = np.zeros(0, np.int32)
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
        if self.writer.size != size:
            self.writer = np.zeros(size, np.int32)
        self.writer.fill(0)
        self.readers = np.zeros(0, np.int32)
        self.log: list[tuple[np.ndarray, Lanes, int, np.ndarray]] = []
        self.dirty = False
        self.floor = 0  # tags up to this one are known to every warp
        self.clocks = np.zeros((self.machine.blocks * self.warps, IDS), np.int32)
        self.own = np.arange(len(self.clocks)), np.tile(np.arange(self.warps), self.machine.blocks)
        self.clocks[self.own] = 1
        self.proxied = np.zeros_like(self.clocks)  # of the writes known to each warp, those before its last fence.proxy.async
        self._retag()

    def _retag(self) -> None:
        """The tags of the present clocks."""
        clock = self.clocks[self.own]
        self.tag = (clock * CLOCK + self.own[1]).astype(np.int32).repeat(32)
        self.limits = (self.clocks * CLOCK + (CLOCK - 1)).astype(np.int32).reshape(-1)

    # -- what orders accesses ----------------------------------------------------------------------------------------------

    def barrier_all(self) -> None:
        """A barrier that every thread block of the batch has passed."""
        if not self.check_races:
            return
        self.log.clear()
        self.dirty = False
        self.floor = int(self.limits.max())
        by_block = self.clocks.reshape(self.machine.blocks, self.warps, IDS)
        by_block[...] = by_block.max(axis=1, keepdims=True)
        self.clocks[self.own] += 1
        self._retag()

    def barrier(self, warps: np.ndarray, given: np.ndarray | None = None) -> None:
        """A barrier of the warps (thread blocks, warps) marked; `given` (thread blocks, IDS): what others had brought to it."""
        if not self.check_races:
            return
        self._apply_log()
        by_block = self.clocks.reshape(self.machine.blocks, self.warps, IDS)
        joined = np.where(warps[:, :, None], by_block, 0).max(axis=1)
        if given is not None:
            joined = np.maximum(joined, given)
        by_block[...] = np.where(warps[:, :, None], np.maximum(by_block, joined[:, None]), by_block)
        rows = warps.reshape(-1)
        self.clocks[self.own[0][rows], self.own[1][rows]] += 1
        self._retag()

    def arrive(self, rows: np.ndarray) -> np.ndarray:
        """What these warps (rows of the clocks) know now, to be left at a barrier; what they do from here on is new."""
        self._apply_log()
        known = self.clocks[rows].copy()
        self.clocks[rows, self.own[1][rows]] += 1
        self._retag()
        return known

    def learn(self, rows: np.ndarray, known: np.ndarray) -> None:
        """These warps have waited for a barrier at which `known` (rows, IDS) was left."""
        self._apply_log()
        own = self.clocks[rows, self.own[1][rows]]
        self.clocks[rows] = np.maximum(self.clocks[rows], known)
        self.clocks[rows, self.own[1][rows]] = own
        self._retag()

    # -- accesses: `at` are byte offsets into `data`, `lanes` the lanes that make them (None: all) --------------------------

    def locate(self, instruction: Instruction, addresses: np.ndarray, lanes: Lanes, nbytes: int, write: bool) -> np.ndarray:
        """Shared addresses -> offsets into `data`, checked for bounds and alignment."""
        low, high = int(addresses.min()), int(addresses.max())
        if low < SHARED_BASE or high + nbytes > SHARED_BASE + self.nbytes:
            wrong = int(np.argmax((addresses < SHARED_BASE) | (addresses + nbytes > SHARED_BASE + self.nbytes)))
            raise self.machine.error(
                instruction, self.lane(lanes, wrong),
                f"{'writes' if write else 'reads'} {nbytes} bytes at shared offset {int(addresses[wrong]) - SHARED_BASE}, "
                f"outside the {self.nbytes} bytes of the thread block",
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
    def lane(lanes: Lanes, at: int) -> int:
        return at if lanes is None else int(lanes[at])

    def read(self, instruction: Instruction, at: np.ndarray, lanes: Lanes, nbytes: int) -> None:
        """Check and note a read of `nbytes` (a power of two) at each of `at`."""
        if self.check_poison:
            self._check_written(instruction, at, lanes, nbytes)
        if not self.check_races:
            return
        if self.dirty:
            self._check_writer(instruction, at, lanes, nbytes, "reads", False)
        self.log.append((at, lanes, nbytes, self.tag))
        if len(self.log) > LOG_LENGTH:
            self._apply_log()

    def _check_written(self, instruction: Instruction, at: np.ndarray, lanes: Lanes, nbytes: int) -> None:
        good = self.flat_valid[nbytes].take(at // nbytes, mode="clip") == self.states[nbytes, WRITTEN]
        if not good.all():
            wrong = int(np.argmin(good))
            pending = (self.valid[at[wrong] : at[wrong] + nbytes] == PENDING).any()
            raise self.machine.error(
                instruction, self.lane(lanes, wrong),
                f"reads shared offset {self.offset(at, wrong)}, "
                + ("which a cp.async writes that its thread has not waited for" if pending else "which nothing has written"),
            )  # fmt: skip

    def write(self, instruction: Instruction, at: np.ndarray, lanes: Lanes, nbytes: int, state: int = WRITTEN, tag: int = 0) -> None:
        """Check and note a write; `tag`: instead of the warp's, of a copy that the warp has begun."""
        self.flat_valid[nbytes][at // nbytes] = self.states[nbytes, state]
        if self.check_races:
            self._note_write(instruction, at, lanes, nbytes, False, tag)

    def atomic(self, instruction: Instruction, at: np.ndarray, lanes: Lanes, nbytes: int) -> None:
        """An atomic access: a hazard with plain accesses of other warps, none with other atomics."""
        if self.check_poison:
            self._check_written(instruction, at, lanes, nbytes)
        if self.check_races:
            self._note_write(instruction, at, lanes, nbytes, True)

    def _note_write(self, instruction: Instruction, at: np.ndarray, lanes: Lanes, nbytes: int, atomic: bool, tag: int = 0) -> None:
        if self.dirty:
            self._check_writer(instruction, at, lanes, nbytes, "changes" if atomic else "writes", atomic)
        self._check_readers(instruction, at, lanes, nbytes)
        count = nbytes // self.granule
        tags = self.tag if lanes is None else self.tag[lanes]
        if atomic:
            tags = tags + np.int32(ATOMIC)
        if tag:
            tags = np.full(len(at), tag, np.int32)
        mine = tags.repeat(count) if count > 1 else tags
        items, index = wide_view(self.writer, 4 * count), at // nbytes
        items[index] = wide_view(mine, 4 * count)
        self.dirty = True
        if atomic:
            return
        left = items.take(index, mode="clip").view(np.int32)
        if (left != mine).any():
            wrong = int(np.argmax((left != mine).reshape(len(at), -1).any(axis=1)))
            other = int(left.reshape(len(at), -1)[wrong].max())
            self._race(instruction, at, lanes, wrong, "writes", other, "writes in the same instruction")

    def fence(self, rows: np.ndarray) -> None:
        """fence.proxy.async of these warps: what they know of plain writes, their own too, asynchronous reads may see."""
        if self.check_races:
            self.proxied[rows] = self.clocks[rows]
            self.arrive(rows)

    def check_fenced(self, instruction: Instruction, at: np.ndarray, lanes: np.ndarray, nbytes: int) -> None:
        """An asynchronous read of plain writes: their warp, or the one that reads, must have fenced since."""
        if not self.check_races:
            return
        count = nbytes // self.granule
        found = wide_view(self.writer, 4 * count).take(at // nbytes, mode="clip").view(np.int32)
        writer, clock, row = found % IDS, found // CLOCK, self.row[lanes].repeat(count)
        of_writer = row // self.warps * self.warps + np.minimum(writer, self.warps - 1)
        bad = (writer != ASYNC) & (clock > self.proxied[of_writer, writer]) & (clock > self.proxied[row, writer])
        if bad.any():
            wrong = int(np.argmax(bad)) // count
            raise self.machine.error(
                instruction, int(lanes[wrong]),
                f"reads shared offset {self.offset(at, wrong)} with no fence.proxy.async after the plain write of warp {int(writer[wrong * count])}",
            )  # fmt: skip

    def _limits_of(self, lanes: Lanes, ids: np.ndarray, count: int) -> np.ndarray:
        row = (self.row if lanes is None else self.row[lanes]) * IDS
        return self.limits.take((row.repeat(count) if count > 1 else row) + ids, mode="clip")

    def _check_writer(self, instruction: Instruction, at: np.ndarray, lanes: Lanes, nbytes: int, does: str, atomic: bool) -> None:
        """Is the last write of these granules known to the warp?"""
        count = nbytes // self.granule
        found = wide_view(self.writer, 4 * count).take(at // nbytes, mode="clip").view(np.int32)
        if found.max() <= self.floor:
            return
        bad = found > self._limits_of(lanes, found & np.int32(IDS - 1), count)
        if atomic:
            bad &= (found & np.int32(ATOMIC)) == 0
        if bad.any():
            wrong = int(np.argmax(bad)) // count
            self._race(instruction, at, lanes, wrong, does, int(found.reshape(-1, count)[wrong].max()), "wrote")

    def _check_readers(self, instruction: Instruction, at: np.ndarray, lanes: Lanes, nbytes: int) -> None:
        """Is every warp's last read of these granules known to the warp that writes?"""
        self._apply_log()
        if not self.readers.size:
            return
        count = nbytes // self.granule
        row = self.row if lanes is None else self.row[lanes]
        for warp in range(self.warps):
            found = wide_view(self.readers[warp], 4 * count).take(at // nbytes, mode="clip").view(np.int32)
            if found.max() <= self.floor:
                continue
            limit = self.limits.take(row * IDS + warp)
            bad = found > (limit.repeat(count) if count > 1 else limit)
            if bad.any():
                wrong = int(np.argmax(bad)) // count
                self._race(instruction, at, lanes, wrong, "writes", int(found.reshape(-1, count)[wrong].max()), "read")

    def _apply_log(self) -> None:
        """Write the logged reads into the readers' tags."""
        if not self.log:
            return
        if not self.readers.size:
            self.readers = np.zeros((self.warps, self.writer.size), np.int32)
        flat = self.readers.reshape(-1)
        for at, lanes, nbytes, tags in self.log:
            count = nbytes // self.granule
            tag, warp = (tags, self.warp) if lanes is None else (tags[lanes], self.warp[lanes])
            index = at // nbytes + warp * (self.writer.size // count)
            wide_view(flat, 4 * count)[index] = wide_view(tag.repeat(count) if count > 1 else tag, 4 * count)
        self.log.clear()

    def _race(self, instruction: Instruction, at: np.ndarray, lanes: Lanes, wrong: int, does: str, tag: int, did: str) -> None:
        lane = self.lane(lanes, wrong)
        who = "a bulk copy" if tag % IDS == ASYNC else f"warp {tag % IDS}"
        raise self.machine.error(
            instruction, lane,
            f"a race: warp {int(self.warp[lane])} {does} shared offset {self.offset(at, wrong)}, which {who} {did} with no barrier between",
        )  # fmt: skip

    def offset(self, at: np.ndarray, wrong: int) -> int:
        return int(at[wrong]) % self.stride
