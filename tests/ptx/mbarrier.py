"""mbarrier objects and bulk copies: arrivals, bytes in flight, phases (PTX ISA, "mbarrier", "cp.async.bulk").

The object's own 8 bytes are never looked at: its state is kept here, by shared offset, an array over the thread blocks of
the batch. A bulk copy moves its bytes at once, tagged as an asynchronous write that only those know of who have waited for
its mbarrier; so a forgotten wait is a race.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.errors import EmulatorError
from tests.ptx.loadstore import Lanes, Port, addresses, copies_of, every_lane, nothing
from tests.ptx.machine import SHARED_WINDOW, Array, Bound, Machine
from tests.ptx.parser import Instruction, Operand
from tests.ptx.shared import ASYNC, CLOCK, IDS


class Barrier:
    """One shared offset in every thread block: expected and pending arrivals, pending bytes, phase, what was left there."""

    def __init__(self, blocks: int) -> None:
        self.count, self.pending, self.bytes = (np.zeros(blocks, np.int64) for _ in range(3))
        self.phase = np.zeros(blocks, np.int64)
        self.live = np.zeros(blocks, bool)
        self.maker = np.zeros(blocks, np.int32)  # the tag of who initialised it
        self.gathering, self.left = (np.zeros((blocks, IDS), np.int32) for _ in range(2))

    def advance(self) -> None:
        """Complete the phases that nothing is missing from."""
        done = self.live & (self.pending == 0) & (self.bytes == 0)
        self.phase[done] += 1
        self.pending[done] = self.count[done]
        self.left[done] = self.gathering[done]
        self.gathering[done] = 0


class Barriers:
    """All mbarriers of a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.by_offset: dict[int, Barrier] = {}
        self.async_clock = 0

    def reset(self) -> None:
        self.by_offset.clear()
        self.async_clock = 0

    def each(self, instruction: Instruction, address: Array, lanes: Array, initial: bool = False) -> list[tuple[Barrier, Array]]:
        """(barrier, the lanes that name it) for the addresses of some lanes."""
        self.machine.shared.locate(instruction, address, lanes, 8, True)
        found = []
        for offset in np.unique(address):
            some = lanes[address == offset]
            barrier = self.by_offset.get(int(offset))
            if barrier is None:
                barrier = self.by_offset[int(offset)] = Barrier(self.machine.blocks)
            if not initial:
                self._check_made(instruction, barrier, some)
            found.append((barrier, some))
        return found

    def _check_made(self, instruction: Instruction, barrier: Barrier, lanes: Array) -> None:
        machine, maker = self.machine, barrier.maker[self.machine.block[lanes]]
        if not barrier.live[machine.block[lanes]].all():
            raise machine.error(instruction, int(lanes[0]), "uses an mbarrier that was not initialised")
        unknown = maker > machine.shared.limits.take(machine.shared.row[lanes] * IDS + maker % IDS)
        if machine.shared.check_races and unknown.any():
            lane = int(lanes[np.argmax(unknown)])
            raise machine.error(instruction, lane, "uses an mbarrier that another warp initialised with no barrier since")

    def arrive(self, instruction: Instruction, barrier: Barrier, lanes: Array, count: Array, nbytes: Array, drop: bool = False) -> Array:
        """These lanes arrive; returns the phase that each of them arrived in."""
        machine = self.machine
        block = machine.block[lanes]
        phase = barrier.phase[block].copy()
        np.add.at(barrier.bytes, block, nbytes)
        np.subtract.at(barrier.pending, block, count)
        if drop:
            np.subtract.at(barrier.count, block, count)
        if (barrier.pending < 0).any():
            wrong = int(np.argmax(barrier.pending < 0))
            raise machine.error(
                instruction, int(lanes[np.argmax(block == wrong)]),
                f"arrives once too often: the mbarrier expects {int(barrier.count[wrong])} arrivals in a phase",
            )  # fmt: skip
        rows = np.unique(lanes // 32)
        if machine.shared.check_races:
            np.maximum.at(barrier.gathering, rows // machine.shared.warps, machine.shared.arrive(rows))
        barrier.advance()
        return phase

    def complete(self, barrier: Barrier, block: int, nbytes: int, clock: int) -> None:
        """A copy has brought its bytes."""
        barrier.bytes[block] -= nbytes
        barrier.gathering[block, ASYNC] = max(int(barrier.gathering[block, ASYNC]), clock)
        barrier.advance()

    def learn(self, barrier: Barrier, lanes: Array) -> None:
        """These lanes have seen the phase complete."""
        rows = np.unique(lanes // 32)
        if self.machine.shared.check_races and len(rows):
            self.machine.shared.learn(rows, barrier.left[rows // self.machine.shared.warps])


def barriers_of(machine: Machine) -> Barriers:
    if machine.barriers is None:
        machine.barriers = Barriers(machine)
    return machine.barriers  # type: ignore[no-any-return]


def shared_address(machine: Machine, operand: Operand) -> Callable[[Lanes], Array]:
    """Addresses in shared memory, given as such or as generic ones."""
    read = addresses(machine, operand)

    def within(lanes: Lanes) -> Array:
        value = read(lanes)
        return np.where(value >= SHARED_WINDOW, value - SHARED_WINDOW, value)

    return within


def number_of(machine: Machine, operand: Operand | None, default: int) -> Callable[[Array], Array]:
    """A count of each lane."""
    if operand is None:
        return lambda lanes: np.full(len(lanes), default, np.int64)
    value = machine.source(operand, "u32")
    return lambda lanes: np.broadcast_to(value, machine.lanes)[lanes].astype(np.int64)


def mbarrier(machine: Machine, instruction: Instruction) -> Bound:
    """init, inval, expect_tx, complete_tx, arrive, arrive.expect_tx, arrive_drop, test_wait, try_wait."""
    word, operands, barriers = instruction.parts[1], instruction.operands, barriers_of(machine)
    if any("cluster" in part for part in instruction.parts if part.startswith("shared")) and operands[0].kind not in ("sink", "address"):
        raise EmulatorError("only arrivals without a result reach another thread block")
    place = next(at for at, operand in enumerate(operands) if operand.kind == "address")
    where = shared_address(machine, operands[place])
    rest = operands[place + 1 :]
    if word in ("test_wait", "try_wait"):
        return wait(machine, instruction, where, rest[0])
    if word == "pending_count":
        raise EmulatorError(f"{instruction.op} is not emulated")
    expects = "expect_tx" in instruction.parts
    argument = number_of(machine, rest[0] if rest else None, 1)
    target = operands[0] if place == 1 else None
    state = machine.raw[target.name] if target is not None and target.kind == "reg" else None

    def act(mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        address = where(lanes)
        values = argument(lanes)
        for barrier, some in barriers.each(instruction, address, lanes, word == "init"):
            given, block = values[np.isin(lanes, some)], machine.block[some]
            if word == "init":
                barrier.count[block] = barrier.pending[block] = given
                barrier.bytes[block] = barrier.phase[block] = 0
                barrier.live[block] = True
                barrier.maker[block] = machine.shared.tag[some]
            elif word == "inval":
                barrier.live[block] = False
            elif word == "expect_tx":
                np.add.at(barrier.bytes, block, given)
            elif word == "complete_tx":
                np.subtract.at(barrier.bytes, block, given)
                barrier.advance()
            else:
                one, none = np.ones(len(some), np.int64), np.zeros(len(some), np.int64)
                phase = barriers.arrive(
                    instruction, barrier, some, one if expects else given, given if expects else none, word == "arrive_drop"
                )
                if state is not None:
                    state[some] = phase

    return every_lane(machine, act)


def wait(machine: Machine, instruction: Instruction, where: Callable[[Lanes], Array], operand: Operand) -> Bound:
    """test_wait and try_wait: whether the phase of that parity (or that state) is over; who sees so knows what was left there."""
    destination, barriers = machine.register(instruction.operands[0], "pred"), barriers_of(machine)
    parity = "parity" in instruction.parts
    wanted = np.broadcast_to(machine.source(operand, "u32" if parity else "u64"), machine.lanes)

    def look(mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        for barrier, some in barriers.each(instruction, where(lanes), lanes):
            phase, value = barrier.phase[machine.block[some]], wanted[some].astype(np.int64)
            over = (phase & 1) != (value & 1) if parity else phase > value
            destination[some] = over
            barriers.learn(barrier, some[over])

    return every_lane(machine, look)


def async_arrive(machine: Machine, instruction: Instruction) -> Bound:
    """cp.async.mbarrier.arrive[.noinc]: arrive when this thread's cp.async are done; here they are done now."""
    where, barriers, copies = shared_address(machine, instruction.operands[0]), barriers_of(machine), copies_of(machine)
    counted = "noinc" in instruction.parts

    def arrive(mask: Array) -> None:
        copies.wait(mask, None)
        lanes = np.flatnonzero(mask)
        for barrier, some in barriers.each(instruction, where(lanes), lanes):
            none = np.zeros(len(some), np.int64)
            barriers.arrive(instruction, barrier, some, none + 1 if counted else none, none)

    return every_lane(machine, arrive)


def bulk(machine: Machine, instruction: Instruction) -> Bound:
    """cp.async.bulk: global to shared with an mbarrier, shared to global with bulk groups; 16-byte pieces."""
    parts, operands = instruction.parts, instruction.operands
    if "commit_group" in parts or "wait_group" in parts or "prefetch" in parts:
        return nothing(machine, instruction)
    if "tensor" in parts or any(part.startswith("multicast") for part in parts) or len(parts) < 5:
        raise EmulatorError(f"{instruction.op} is not emulated")
    size = number_of(machine, operands[2], 0)
    machine.shared.narrow(16)
    if parts[3].startswith("shared"):
        if not any(part.startswith("mbarrier") for part in parts):
            raise EmulatorError(f"{instruction.op} is not emulated")
        return bulk_load(machine, instruction, size)
    target, source = addresses(machine, operands[0]), shared_address(machine, operands[1])
    port_in, port_out = (Port(machine, instruction, space, 4, 4) for space in ("shared", "global"))

    def store(mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        for lane, to, start, nbytes in zip(lanes, target(lanes), source(lanes), size(lanes), strict=True):
            steps, owner = pieces(machine, instruction, int(lane), int(nbytes))
            fenced(machine, instruction, port_in, start + steps, owner)
            port_out.store(to + steps, owner, port_in.load(start + steps, owner))

    return every_lane(machine, store)


def fenced(machine: Machine, instruction: Instruction, port: Port, address: Array, lanes: Array) -> None:
    """What plain stores wrote is seen by the asynchronous proxy after a fence.proxy.async only."""
    at = machine.shared.locate(instruction, address, lanes, port.nbytes, False)
    machine.shared.check_fenced(instruction, at, lanes, port.nbytes)


def pieces(machine: Machine, instruction: Instruction, lane: int, nbytes: int) -> tuple[Array, Array]:
    """Offsets of the 16-byte pieces of a copy, and its lane for each."""
    if nbytes % 16 or nbytes <= 0:
        raise machine.error(instruction, lane, f"copies {nbytes} bytes, which is no multiple of 16")
    return np.arange(0, nbytes, 16), np.full(nbytes // 16, lane)


def bulk_load(machine: Machine, instruction: Instruction, size: Callable[[Array], Array]) -> Bound:
    operands, barriers, shared = instruction.operands, barriers_of(machine), machine.shared
    target, source, signal = shared_address(machine, operands[0]), addresses(machine, operands[1]), shared_address(machine, operands[3])
    port = Port(machine, instruction, "global", 4, 4)

    def copy(mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        owners: dict[int, Barrier] = {}
        for barrier, some in barriers.each(instruction, signal(lanes), lanes):
            owners |= dict.fromkeys(some.tolist(), barrier)
        for lane, to, start, nbytes in zip(lanes, target(lanes), source(lanes), size(lanes), strict=True):
            steps, owner = pieces(machine, instruction, int(lane), int(nbytes))
            rows = port.load(start + steps, owner)
            at = shared.locate(instruction, to + steps, owner, 16, True)
            barriers.async_clock += 1
            shared.flat[16][at // 16] = np.ascontiguousarray(rows).view(np.complex128)[:, 0]
            shared.write(instruction, at, owner, 16, tag=barriers.async_clock * CLOCK + ASYNC)
            barriers.complete(owners[int(lane)], int(machine.block[lane]), int(nbytes), barriers.async_clock)

    return every_lane(machine, copy)


def fence(machine: Machine, instruction: Instruction) -> Bound:
    """Only fence.proxy.async does anything here: see `fenced`."""
    if "async" not in instruction.parts:
        return nothing(machine, instruction)

    def note(mask: Array) -> None:
        machine.shared.fence(np.unique(np.flatnonzero(mask) // 32))

    return every_lane(machine, note)


def elect(machine: Machine, instruction: Instruction) -> Bound:
    """elect.sync d|p, members: true in the lowest lane of the mask."""
    number, chosen = instruction.operands[0].items
    members = machine.source(instruction.operands[1], "u32")
    flag = machine.register(chosen, "pred")
    word = machine.register(number, "b32") if number.kind == "reg" else None

    def act(mask: Array) -> None:
        wanted = np.broadcast_to(members, machine.lanes)
        leader = (wanted & -wanted.astype(np.int64)).astype(np.uint32)
        first = np.bitwise_count(leader - np.uint32(1)).astype(np.uint32)
        np.copyto(flag, machine.lane == first, where=mask)
        if word is not None:
            np.copyto(word, first, where=mask)

    return every_lane(machine, act)


OPS: dict[str, Callable[[Machine, Instruction], Bound]] = {"mbarrier": mbarrier, "fence": fence, "elect": elect}
