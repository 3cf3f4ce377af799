"""A kernel bound to a machine: straight-line blocks, and the scheduler that runs them.

Groups of lanes stand at the start of blocks; the group at the lowest block runs first, which brings together what
structured control flow had split. A group that comes to a warp-wide instruction without its whole warp is parked until
the rest arrives; lanes at a barrier wait for their thread block. When nothing can run, the kernel is stuck and says why.
A block that polls (an atomic, a volatile or acquiring load, a try_wait, then a jump back) lets every other group go first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx import arith, bits, collective, convert, loadstore, mbarrier, wgmma
from tests.ptx.collective import ballot_of, presence
from tests.ptx.errors import EmulatorError
from tests.ptx.machine import Array, Bound, Machine
from tests.ptx.parser import Instruction, Kernel

OPS: dict[str, Callable[[Machine, Instruction], Bound]] = {
    **arith.OPS,
    **bits.OPS,
    **convert.OPS,
    **loadstore.OPS,
    **collective.OPS,
    **mbarrier.OPS,
    **wgmma.OPS,
}


def copy(machine: Machine, instruction: Instruction) -> Bound:
    """cp.async in its three kinds."""
    kinds = {"bulk": mbarrier.bulk, "mbarrier": mbarrier.async_arrive}
    return kinds.get(instruction.parts[2], loadstore.cp_async)(machine, instruction)


OPS["cp"] = copy
ALIGNED = {"mma", "ldmatrix", "stmatrix", "movmatrix", "wgmma"}
MEMBERS = {"shfl": 4, "vote": 2, "match": 2, "redux": 2, "elect": 1}  # where the member mask stands
ENDS = {"bra", "brx", "ret", "exit", "trap", "brkpt"}
BARRIERS = {"bar", "barrier"}
POLLS = {"atom", "nanosleep"}
WORK = {"st", "red", "cp", "mma", "wgmma", "stmatrix"}  # what no loop that only waits does
EXITED = -1
IDLE_LIMIT = 10_000  # rounds in which everybody polls


def is_barrier(instruction: Instruction) -> bool:
    return instruction.parts[0] in BARRIERS and "warp" not in instruction.parts and "cluster" not in instruction.parts


def is_collective(instruction: Instruction) -> bool:
    word = instruction.parts[0]
    return word in ALIGNED or word in MEMBERS or (word in BARRIERS and not is_barrier(instruction))


def polls(instruction: Instruction) -> bool:
    parts = instruction.parts
    return (
        parts[0] in POLLS
        or (parts[0] == "ld" and bool({"volatile", "acquire", "relaxed"} & set(parts)))
        or parts[1:2] in (["try_wait"], ["test_wait"])
    )


class Block:
    """Instructions [start, end) that always run together, and how it ends."""

    def __init__(self, start: int, end: int, code: list[Instruction]) -> None:
        self.start, self.end = start, end
        last = code[end - 1]
        self.last = last if last.parts[0] in ENDS or is_barrier(last) else None
        self.body = code[start : end - (self.last is not None)]
        self.gate = next((i for i in self.body[:1] if is_collective(i) and i.guard is None), None)
        self.polls = any(polls(i) for i in self.body)
        self.works = any(i.parts[0] in WORK for i in self.body)
        self.full: list[Callable[[], Any]] = []
        self.live: list[Callable[[Array], None]] = []
        self.masked: list[Callable[[Array], None]] = []
        self.target = self.next = EXITED
        self.targets: list[int] = []


def split(kernel: Kernel) -> tuple[list[Block], dict[str, int]]:
    """The blocks of a kernel and the block of each label."""
    code = kernel.code
    cuts = {0, len(code), *kernel.labels.values()}
    seen = False
    for at, instruction in enumerate(code):
        if at in cuts:
            seen = False
        if instruction.parts[0] in ENDS or is_barrier(instruction):
            cuts.add(at + 1)
            seen = False
        elif is_collective(instruction) and not seen:
            cuts.add(at)  # straight-line code keeps a warp together, so one gate is enough
            seen = True
    edges = sorted(cuts)
    blocks = [Block(a, b, code) for a, b in zip(edges, edges[1:], strict=False)]
    by_start = {block.start: number for number, block in enumerate(blocks)}
    for number, block in enumerate(blocks):
        block.next = number + 1 if number + 1 < len(blocks) else EXITED
        if block.last is not None and block.last.parts[0] == "bra":
            block.target = by_start.get(kernel.labels[block.last.operands[0].name], EXITED)
        elif block.last is not None and block.last.parts[0] == "brx":
            labels = kernel.tables[block.last.operands[1].name]
            block.targets = [by_start.get(kernel.labels[label], EXITED) for label in labels]
    return blocks, {label: by_start.get(at, EXITED) for label, at in kernel.labels.items()}


class Program:
    """The blocks of a kernel on the arrays of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.blocks, _ = split(machine.kernel)
        for block in self.blocks:
            for instruction in block.body:
                bound = self.bind(instruction)
                block.full.append(bound.full)
                block.live.append(bound.live)
                block.masked.append(bound.masked)
        self.every = np.ones(machine.lanes, bool)
        self.arrived = np.full(machine.lanes, -1, np.int64)  # the barrier a lane waits at
        self.needed = np.zeros(machine.lanes, np.int64)
        self.resume = np.zeros(machine.lanes, np.int64)
        self.arrivals: dict[int, Array] = {}
        self.brought: dict[int, Array] = {}
        self.asked: dict[int, Array] = {}

    def bind(self, instruction: Instruction) -> Bound:
        machine, word = self.machine, instruction.parts[0]
        try:
            if word in BARRIERS:  # of a warp or a cluster of one: the gate has brought the lanes together
                bound = loadstore.nothing(machine, instruction)
            elif word in OPS:
                bound = OPS[word](machine, instruction)
            else:
                raise EmulatorError("this instruction is not known to the emulator")
        except (EmulatorError, KeyError, ValueError, IndexError, StopIteration) as error:
            raise EmulatorError(f"{machine.kernel.name[:120]}, PTX line {instruction.line}: {instruction.text}: {error}") from error
        if instruction.guard is None:
            return bound
        name, negated = instruction.guard
        guard = machine.raw[name]

        def masked(mask: Array) -> None:
            some = mask & (~guard if negated else guard)
            if some.any():
                bound.masked(some)

        every = np.ones(machine.lanes, bool)
        return Bound(lambda: masked(every), masked)

    # -- running -----------------------------------------------------------------------------------------------------------

    def run(self, exists: Array, step_limit: int) -> None:
        """Run the lanes that exist to their end."""
        self.alive = exists.copy()
        self.alive_count = int(exists.sum())
        self.groups: dict[int, Array] = {0: self.every if exists.all() else exists.copy()}
        self.parked: dict[int, Array] = {}
        self.later: dict[int, Array] = {}  # groups that have polled in vain
        self.arrived.fill(-1)
        self.arrivals.clear()
        steps = self.idle = 0
        with np.errstate(all="ignore"):
            while self.groups or self.later:
                if not self.groups:
                    self.groups, self.later = self.later, {}
                    self.idle += 1
                at = min(self.groups)
                self.step(at, self.groups.pop(at))
                steps += 1
                if steps > step_limit or self.idle > IDLE_LIMIT:
                    raise self.endless(at, steps)
        if self.parked or (self.arrived >= 0).any():
            raise self.stuck()

    def endless(self, at: int, steps: int) -> EmulatorError:
        """The kernel does not end."""
        why = (
            f"{steps} blocks were run and it has not ended"
            if self.idle <= IDLE_LIMIT
            else "all threads that are left wait in loops, in vain"
        )
        return EmulatorError(
            f"{self.machine.kernel.name[:120]}: {why}; it is near PTX line {self.machine.kernel.code[self.blocks[at].start].line}. A wait for "
            "a thread block that is not in this batch never ends: launch with cooperative=True"
        )

    def step(self, at: int, mask: Array) -> None:
        """Run one block for one group."""
        block, machine = self.blocks[at], self.machine
        if at in self.parked:
            mask = mask | self.parked.pop(at)
        if block.gate is not None and mask is not self.every:
            ready = self.gate(block.gate, mask)
            if not ready.all():
                rest = mask & ~ready
                if rest.any():
                    self.parked[at] = rest
                mask = mask & ready
        count = machine.lanes if mask is self.every else int(np.count_nonzero(mask))
        if count == 0:
            return
        if block.works:
            self.idle = 0
        if count == machine.lanes:
            mask = self.every
            for run in block.full:
                run()
            machine.stats["warp_instructions"] += len(block.body) * machine.warps
        else:
            for some in block.live if count == self.alive_count else block.masked:
                some(mask)
            machine.stats["warp_instructions"] += len(block.body) * int(mask.reshape(-1, 32).any(axis=1).sum())
        machine.stats["thread_instructions"] += len(block.body) * count
        self.leave(block, at, mask, count)

    def gate(self, instruction: Instruction, mask: Array) -> Array:
        """The lanes whose whole warp, or all named in their member mask, are here."""
        machine, word = self.machine, instruction.parts[0]
        here = presence(machine, np.flatnonzero(mask))
        if word == "wgmma" and machine.block_lanes % 128 == 0:
            return np.repeat(here.reshape(-1, 128).all(axis=1), 128)
        if word in ALIGNED:
            return np.repeat(here.all(axis=1), 32)
        if "cluster" in instruction.parts:
            return mask
        position = MEMBERS.get(word, 0)
        if word in MEMBERS and "sync" not in instruction.parts:
            return mask
        members = np.broadcast_to(machine.source(instruction.operands[position], "u32"), machine.lanes)
        return mask & (members & ~np.repeat(ballot_of(here), 32) == 0)

    def leave(self, block: Block, at: int, mask: Array, count: int) -> None:
        """Send the group on after the last instruction of its block."""
        last = block.last
        if last is None:
            self.send(block.next, mask)
            return
        word = last.parts[0]
        taken, taken_count = mask, count
        if last.guard is not None:
            name, negated = last.guard
            guard = self.machine.raw[name]
            taken = ~guard if negated else guard
            if mask is not self.every:
                taken = taken & mask
            taken_count = int(np.count_nonzero(taken))
            if taken_count == count:
                taken = mask
            elif taken_count == 0:
                self.send(block.next, mask)
                return
            else:
                self.send(block.next, mask & ~taken)
                taken = taken.copy() if taken is guard else taken
        if word == "bra":
            polled = block.target <= at and self.loop_polls(block.target, at)
            if taken_count != count or not polled and block.polls:
                self.idle = 0  # somebody has left a loop
            self.send(block.target, taken, polled)
        elif word == "brx":
            index = self.machine.source(last.operands[0], "u32")
            for number, target in enumerate(block.targets):
                self.send(target, taken & (index == number))
        elif word in ("ret", "exit"):
            self.send(EXITED, taken)
        elif word in BARRIERS:
            self.barrier(block, last, taken, taken_count)
        else:
            raise self.machine.error(last, int(np.argmax(taken)), "was reached")

    def loop_polls(self, first: int, last: int) -> bool:
        return any(block.polls for block in self.blocks[first : last + 1])

    def send(self, to: int, mask: Array, polled: bool = False) -> None:
        """These lanes stand at block `to` now."""
        if to == EXITED:
            self.alive &= ~mask
            self.alive_count = int(np.count_nonzero(self.alive))
            if (self.arrived >= 0).any():
                self.release()
            return
        if polled and to not in self.groups:
            self.later[to] = self.later[to] | mask if to in self.later else mask
            return
        if to in self.later:
            mask = mask | self.later.pop(to)
        self.groups[to] = self.groups[to] | mask if to in self.groups else mask

    # -- barriers ----------------------------------------------------------------------------------------------------------

    def barrier(self, block: Block, instruction: Instruction, mask: Array, count: int) -> None:
        """bar.sync id[, threads]; bar.arrive id, threads; bar.red.op d, id[, threads], p."""
        machine, parts = self.machine, instruction.parts
        machine.stats["barriers"] += 1
        reduces = "red" in parts
        operands = instruction.operands[1:] if reduces else instruction.operands
        number = machine.source(operands[0], "u32") if operands else np.array(0, np.uint32)
        threads = operands[1] if len(operands) > 1 + reduces else None
        if (
            threads is None
            and number.ndim == 0
            and not reduces
            and "arrive" not in parts
            and count == self.alive_count
            and not (self.arrived >= 0).any()
        ):
            machine.shared.barrier_all()
            self.send(block.next, mask)
            return
        if threads is not None:
            needed = np.broadcast_to(machine.source(threads, "u32"), machine.lanes)
            if (needed[mask] % 32).any():
                raise machine.error(instruction, int(np.argmax(mask)), "waits for a number of threads that is no multiple of 32")
        else:
            needed = np.zeros(machine.lanes, np.int64)
        numbers = np.broadcast_to(number, machine.lanes)
        if "arrive" in parts:
            for each in np.unique(numbers[mask]):
                self.arrive(int(each), mask & (numbers == each), int(needed[mask][0]))
            self.send(block.next, mask)
        else:
            self.arrived[mask] = numbers[mask]
            self.needed[mask] = needed[mask]
            self.resume[mask] = block.next
            if reduces:
                self.reducing = instruction
        self.release()

    def arrive(self, number: int, mask: Array, threads: int) -> None:
        """bar.arrive: counted, and what these warps did until now is known to who waits."""
        machine = self.machine
        if number not in self.arrivals:
            self.arrivals[number] = np.zeros(machine.blocks, np.int64)
            self.brought[number] = np.zeros((machine.blocks, 64), np.int32)
            self.asked[number] = np.zeros(machine.blocks, np.int64)
        self.asked[number][mask.reshape(machine.blocks, -1).any(axis=1)] = threads
        self.arrivals[number] += mask.reshape(machine.blocks, -1).sum(axis=1)
        rows = np.flatnonzero(mask.reshape(-1, 32).any(axis=1))
        known = machine.shared.arrive(rows)
        np.maximum.at(self.brought[number], rows // machine.shared.warps, known)

    def release(self) -> None:
        """Let go the thread blocks whose barrier is complete."""
        machine = self.machine
        shape = (machine.blocks, machine.block_lanes)
        alive = self.alive.reshape(shape).sum(axis=1)
        waiting = self.arrived.reshape(shape)
        for number in np.unique(self.arrived[self.arrived >= 0]):
            here = waiting == number
            counts = here.sum(axis=1) + self.arrivals.get(int(number), 0)
            needed = np.where(here, self.needed.reshape(shape), 0).max(axis=1)
            self.check_threads(int(number), here, needed, counts)
            done = here.any(axis=1) & (counts >= np.where(needed > 0, needed, alive))
            if not done.any():
                continue
            lanes = (here & done[:, None]).reshape(-1)
            given = None
            if int(number) in self.arrivals:
                self.arrivals[int(number)][done] = 0
                given = np.where(done[:, None], self.brought[int(number)], 0)
                self.brought[int(number)][done] = 0
            self.arrived[lanes] = -1
            machine.shared.barrier(lanes.reshape(-1, 32).any(axis=1).reshape(machine.blocks, -1), given)
            for to in np.unique(self.resume[lanes]):
                group = lanes & (self.resume == to)
                before = self.blocks[int(to) - 1].last
                if before is not None and "red" in before.parts:
                    self.reduce(before, group)
                self.send(int(to), self.every if group.all() else group)

    def check_threads(self, number: int, here: Array, needed: Array, counts: Array) -> None:
        """All who use a barrier must give the same number of threads, and no more may come."""
        least = np.where(here, self.needed.reshape(here.shape), 1 << 30).min(axis=1)
        asked = self.asked[number] if number in self.asked else needed
        has_come = self.arrivals[number] > 0 if number in self.arrivals else np.zeros(len(needed), bool)
        wrong = here.any(axis=1) & ((least != needed) | (has_come & (asked != needed)) | ((needed > 0) & (counts > needed)))
        if wrong.any():
            block = int(np.argmax(wrong))
            lane = block * self.machine.block_lanes + int(np.argmax(here[block]))
            raise EmulatorError(
                f"{self.machine.kernel.name[:120]}: barrier {number} is used with {int(least[block])}, {int(needed[block])} and "
                f"{int(asked[block])} threads at once, {int(counts[block])} have come: {self.machine.where(lane)}"
            )

    def reduce(self, instruction: Instruction, group: Array) -> None:
        """The result of bar.red for the lanes of a group."""
        machine = self.machine
        operand = instruction.operands[-1]
        negated = operand.kind == "not"
        votes = machine.source(operand.items[0] if negated else operand, "pred")
        votes = ((~votes if negated else votes) & group).reshape(machine.blocks, -1)
        members = group.reshape(machine.blocks, -1)
        if "popc" in instruction.parts:
            result, kind = votes.sum(axis=1).astype(np.uint32), "u32"
        else:
            result, kind = (votes | ~members).all(axis=1) if "and" in instruction.parts else votes.any(axis=1), "pred"
        np.copyto(machine.register(instruction.operands[0], kind), np.repeat(result, machine.block_lanes), where=group)

    def stuck(self) -> EmulatorError:
        """Nothing can run: who waits where."""
        machine, code = self.machine, self.machine.kernel.code
        lines = []
        for at, mask in self.parked.items():
            lane = int(np.argmax(mask))
            instruction = code[self.blocks[at].start]
            here = int(ballot_of(mask.reshape(-1, 32))[lane // 32])
            lines.append(
                f"PTX line {instruction.line}: {instruction.text}: divergent: lanes {here:#010x} of {machine.where(lane)} wait for the rest of their warp"
            )
        waiting = np.flatnonzero(self.arrived >= 0)
        for to in np.unique(self.resume[waiting]):
            lanes = waiting[self.resume[waiting] == to]
            instruction = code[self.blocks[int(to) - 1].end - 1] if to > 0 else code[-1]
            lines.append(
                f"PTX line {instruction.line}: {instruction.text}: {len(lanes)} threads wait, the first is {machine.where(int(lanes[0]))}"
            )
        return EmulatorError(f"{machine.kernel.name[:120]} is stuck: " + "; ".join(lines))
