"""Instructions of a warp as one: shfl, vote, match, redux, activemask, mma (PTX ISA, "Parallel Synchronization", "Warp-Level Matrix").

The scheduler lets a warp in when the lanes named by its member mask are here together; what arrives otherwise raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.errors import EmulatorError
from tests.ptx.loadstore import Lanes, whole_warps
from tests.ptx.machine import DTYPE, Array, Bound, Machine
from tests.ptx.parser import Instruction

BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)


def presence(machine: Machine, lanes: Lanes) -> Array:
    """(warps, 32) booleans: who executes."""
    here = np.zeros(machine.lanes, bool)
    here[slice(None) if lanes is None else lanes] = True
    return here.reshape(-1, 32)


def ballot_of(votes: Array) -> Array:
    """(warps, 32) booleans -> (warps,) masks."""
    return (votes * BITS).sum(axis=1, dtype=np.uint32)


def check_members(machine: Machine, instruction: Instruction, members: Array, lanes: Lanes) -> None:
    """Every lane named in a member mask must be here, and every lane here must be named."""
    if lanes is None and bool((members == np.uint32(0xFFFFFFFF)).all()):
        return
    here = presence(machine, lanes)
    masks = np.repeat(ballot_of(here), 32)
    wanted = np.broadcast_to(members, machine.lanes)
    wrong = here.reshape(-1) & ((wanted & ~masks) | (~wanted >> machine.lane & np.uint32(1)) != 0)
    if wrong.any():
        lane = int(np.argmax(wrong))
        raise machine.error(
            instruction, lane, f"is divergent: lanes {int(masks[lane]):#010x} are here, the member mask is {int(wanted[lane]):#010x}"
        )


def shfl(machine: Machine, instruction: Instruction) -> Bound:
    """shfl.sync.mode.b32 d[|p], a, b, c, members."""
    mode = next(p for p in instruction.parts if p in ("up", "down", "bfly", "idx"))
    sync = "sync" in instruction.parts
    target = instruction.operands[0]
    targets = target.items if target.kind == "pair" else (target,)
    destinations = [machine.register(t, "b32" if at == 0 else "pred") for at, t in enumerate(targets) if t.kind != "sink"]
    kinds = [at for at, t in enumerate(targets) if t.kind != "sink"]
    value = machine.wide(instruction.operands[1], "b32")
    b, c = (machine.source(o, "u32") for o in instruction.operands[2:4])
    members = machine.source(instruction.operands[4], "u32") if sync else np.array(0xFFFFFFFF, np.uint32)
    constant = shuffle_lanes(machine, mode, b, c) if b.ndim == 0 and c.ndim == 0 else None

    def core(lanes: Lanes) -> list[Array]:
        check_members(machine, instruction, members, lanes)
        origin, inside = constant or shuffle_lanes(machine, mode, b, c)
        if lanes is not None:
            here = np.zeros(machine.lanes, bool)
            here[lanes] = True
            origin, inside = origin[lanes], inside[lanes]
            absent = ~here[origin]
            if absent.any():
                lane = int(lanes[np.argmax(absent)])
                raise machine.error(instruction, lane, f"reads lane {int(origin[np.argmax(absent)]) % 32}, which is not here")
        return [value[origin] if at == 0 else inside for at in kinds]

    return machine.gathered([], destinations, core)


def shuffle_lanes(machine: Machine, mode: str, b: Array, c: Array) -> tuple[Array, Array]:
    """(the lane to read, whether it was in range) for each lane."""
    lane = machine.lane.astype(np.int64)
    by, clamp, segment = (
        (b & np.uint32(31)).astype(np.int64),
        (c & np.uint32(31)).astype(np.int64),
        (c >> np.uint32(8) & np.uint32(31)).astype(np.int64),
    )
    limit = (lane & segment) | (clamp & ~segment)
    if mode == "up":
        origin, inside = lane - by, lane - by >= limit
    elif mode == "down":
        origin, inside = lane + by, lane + by <= limit
    elif mode == "bfly":
        origin, inside = lane ^ by, (lane ^ by) <= limit
    else:
        origin = (lane & segment) | (by & ~segment)
        inside = origin <= limit
    return np.where(inside, origin, lane) + np.arange(machine.lanes) // 32 * 32, inside


def vote(machine: Machine, instruction: Instruction) -> Bound:
    """vote.sync.{all,any,uni,ballot} d, [!]p, members."""
    word, sync = next(p for p in instruction.parts if p in ("all", "any", "uni", "ballot")), "sync" in instruction.parts
    operand = instruction.operands[1]
    negated = operand.kind == "not"
    source = np.broadcast_to(machine.source(operand.items[0] if negated else operand, "pred"), machine.lanes)
    members = machine.source(instruction.operands[2], "u32") if sync else np.array(0xFFFFFFFF, np.uint32)
    destination = machine.register(instruction.operands[0], "b32" if word == "ballot" else "pred")

    def core(lanes: Lanes) -> list[Array]:
        check_members(machine, instruction, members, lanes)
        here = presence(machine, lanes)
        votes = (~source if negated else source).reshape(-1, 32) & here
        result: Array
        if word == "ballot":
            result = ballot_of(votes)
        elif word == "any":
            result = votes.any(axis=1)
        elif word == "all":
            result = (votes | ~here).all(axis=1)
        else:
            result = (votes | ~here).all(axis=1) | ~votes.any(axis=1)
        spread = np.repeat(result, 32)
        return [spread if lanes is None else spread[lanes]]

    return machine.gathered([], [destination], core)


def activemask(machine: Machine, instruction: Instruction) -> Bound:
    destination = machine.register(instruction.operands[0], "b32")

    def core(lanes: Lanes) -> list[Array]:
        spread = np.repeat(ballot_of(presence(machine, lanes)), 32)
        return [spread if lanes is None else spread[lanes]]

    return machine.gathered([], [destination], core)


def match(machine: Machine, instruction: Instruction) -> Bound:
    """match.any.sync.type d, a, members; match.all.sync.type d[|p], a, members."""
    target = instruction.operands[0]
    targets = target.items if target.kind == "pair" else (target,)
    destinations = [machine.register(t, "b32" if at == 0 else "pred") for at, t in enumerate(targets)]
    value = machine.wide(instruction.operands[1], instruction.kind)
    members = machine.source(instruction.operands[2], "u32")

    def core(lanes: Lanes) -> list[Array]:
        check_members(machine, instruction, members, lanes)
        here, rows = presence(machine, lanes), value.reshape(-1, 32)
        same = (rows[:, :, None] == rows[:, None, :]) & here[:, None, :]
        masks = (same * BITS).sum(axis=2, dtype=np.uint32).reshape(-1)
        every = masks == np.repeat(ballot_of(here), 32)
        results = [masks] if "any" in instruction.parts else [np.where(every, masks, np.uint32(0)), every]
        return [r if lanes is None else r[lanes] for r in results[: len(destinations)]]

    return machine.gathered([], destinations, core)


REDUCE: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def redux(machine: Machine, instruction: Instruction) -> Bound:
    """redux.sync.op.type d, a, members: lanes with equal member masks together."""
    kind = instruction.kind
    word = next(p for p in instruction.parts if p in REDUCE)
    value, members = machine.wide(instruction.operands[1], kind), machine.source(instruction.operands[2], "u32")
    destination = machine.register(instruction.operands[0], kind)

    def core(lanes: Lanes) -> list[Array]:
        check_members(machine, instruction, members, lanes)
        wanted = np.broadcast_to(members, machine.lanes)
        chosen = np.arange(machine.lanes) if lanes is None else lanes
        _, groups = np.unique(chosen // 32 * (1 << 32) + wanted[chosen], return_inverse=True)
        order = np.argsort(groups, kind="stable")
        starts = np.searchsorted(groups[order], np.arange(groups.max() + 1))
        return [REDUCE[word].reduceat(value[chosen][order], starts).astype(DTYPE[kind])[groups]]

    return machine.gathered([], [destination], core)


# -- mma ---------------------------------------------------------------------------------------------------------------------


def mma(machine: Machine, instruction: Instruction) -> Bound:
    """mma.sync.aligned.m16n8k{8,16,32}.row.col.f32.{bf16,f16,e4m3...}: fragments as in the ISA's figures.

    Lane l = 4 g + t holds, register for register, the pairs (row g, columns 2t and 2t + 1) of 8x8 quarters of A and of B's
    columns: a register over a warp, read in lane order, is such a quarter row by row. Accumulates in float32.
    """
    parts = instruction.parts
    shape = next(p for p in parts if p.startswith("m16n8k"))
    k = int(shape[6:])
    d_kind, a_kind, b_kind, c_kind = instruction.types if len(instruction.types) == 4 else parts[-4:]
    integer = a_kind in ("s8", "u8")
    element = 1 if integer or a_kind in ("e4m3", "e5m2") else 4 if a_kind == "tf32" else 2
    if d_kind not in ("f32", "f16", "s32") or a_kind not in ("bf16", "f16", "s8", "u8") or k * element not in (16, 32):
        raise EmulatorError(f"{instruction.op} is not emulated")
    d, a, b, c = (o.items for o in instruction.operands)
    across = 4 // element * 4  # columns of one register over four lanes
    a_registers, b_registers = ([machine.register(item, "b32") for item in items] for items in (a, b))
    half = d_kind == "f16"
    accumulator = "s32" if integer else "b32" if half else "f32"
    c_registers = [machine.wide(item, accumulator) for item in c]
    d_registers = [machine.register(item, accumulator) for item in d]
    dtype: Any = np.float64 if integer else np.float32

    left = machine.scratch_shape(dtype, (machine.warps, 16, k), 1)
    right = machine.scratch_shape(dtype, (machine.warps, k, 8), 2)  # rows of k: many times faster to multiply with
    product = machine.scratch_shape(dtype, (machine.warps, 16, 8), 3)
    line = machine.scratch_shape(dtype, (machine.warps * 8 * across,), 4)
    element_type: Any = {"f16": np.float16, "bf16": np.uint16, "s8": np.int8, "u8": np.uint8}
    crossed = any(x is not y and np.shares_memory(x, y) for i, x in enumerate(d_registers) for y in c_registers[i + 1 :])

    def fill(into: Array, blocks: list[Array], kind: str, rows: int) -> None:
        """Registers of whole warps into their 8-row blocks: rows first, then columns. `rows` 1: B, whose rows are k."""
        flat = line[: len(into) * 8 * across]  # converted first, then placed: a transposing conversion is slow
        placed = flat.reshape(-1, 8, across)
        for at, block in enumerate(blocks):
            if kind == "bf16":
                np.copyto(flat.view(np.uint32), block.view(np.uint16))
                np.left_shift(flat.view(np.uint32), np.uint32(16), out=flat.view(np.uint32))
            else:
                np.copyto(flat, block.view(element_type[kind]))
            row, column = at % rows * 8, at // rows * across
            if rows == 2:
                into[:, row : row + 8, column : column + across] = placed
            else:
                into[:, column : column + across] = placed.swapaxes(1, 2)

    def core(lanes: Lanes) -> list[Array]:
        warps = whole_warps(machine, instruction, lanes)
        a, b, c = ([r if lanes is None else r[lanes] for r in rs] for rs in (a_registers, b_registers, c_registers))
        fill(left[:warps], a, a_kind, 2)
        fill(right[:warps], b, b_kind, 1)
        result = np.matmul(left[:warps], right[:warps], out=product[:warps])
        if half:
            total = result + np.stack([r.view(np.float16).reshape(warps, 8, 8) for r in c], axis=1).reshape(warps, 16, 8)
            words = np.ascontiguousarray(total.astype(np.float16)).view(np.uint32).reshape(warps, 2, 32)
            return [words[:, at].reshape(-1) for at in range(2)]
        quads = result.reshape(warps, 2, 8, 4, 2)
        if integer:
            return [quads[:, at // 2, :, :, at % 2].reshape(-1).astype(np.int32) + r for at, r in enumerate(c)]
        return [np.add(quads[:, at // 2, :, :, at % 2], r.reshape(warps, 8, 4)).reshape(-1) for at, r in enumerate(c)]

    bound = machine.gathered([], d_registers, core)
    if half or integer or crossed:
        return bound
    quads = product.reshape(machine.warps, 2, 8, 4, 2)
    sums = [
        (quads[:, at // 2, :, :, at % 2], c_registers[at].reshape(-1, 8, 4), d_registers[at].reshape(-1, 8, 4)) for at in range(4)
    ]  # fmt: skip

    def full() -> None:
        fill(left, a_registers, a_kind, 2)
        fill(right, b_registers, b_kind, 1)
        np.matmul(left, right, out=product)
        for part, addend, destination in sums:
            np.add(part, addend, out=destination)

    return Bound(full, bound.masked)


def movmatrix(machine: Machine, instruction: Instruction) -> Bound:
    """movmatrix.sync.aligned.m8n8.trans.b16 d, a."""
    source, destination = machine.register(instruction.operands[1], "b32"), machine.register(instruction.operands[0], "b32")

    def core(lanes: Lanes) -> list[Array]:
        warps = whole_warps(machine, instruction, lanes)
        words = source if lanes is None else source[lanes]
        halves = np.ascontiguousarray(words).view(np.uint16).reshape(warps, 8, 8).swapaxes(1, 2)
        return [np.ascontiguousarray(halves).view(np.uint32).reshape(-1)]

    return machine.gathered([], [destination], core)


OPS: dict[str, Callable[[Machine, Instruction], Bound]] = {
    "shfl": shfl, "vote": vote, "activemask": activemask, "match": match, "redux": redux, "mma": mma, "movmatrix": movmatrix,
}  # fmt: skip
