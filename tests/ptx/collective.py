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

    def decode(words: list[Array], kind: str, warps: int) -> list[Array]:
        """Registers -> (warps, 8, across) blocks."""
        stacked = np.stack(words).reshape(len(words), warps, 32)
        if integer:
            return list(stacked.view(np.int8 if kind == "s8" else np.uint8).reshape(len(words), warps, 8, across).astype(dtype))
        pieces = stacked.view(np.uint16).reshape(len(words), warps, 8, across)
        if kind == "bf16":
            return list((pieces.astype(np.uint32) << np.uint32(16)).view(np.float32))
        return list(pieces.view(np.float16).astype(np.float32))

    def core(lanes: Lanes) -> list[Array]:
        warps = whole_warps(machine, instruction, lanes)
        pick = (lambda x: x) if lanes is None else (lambda x: x[lanes])
        blocks = decode([pick(r) for r in a_registers], a_kind, warps)
        columns = decode([pick(r) for r in b_registers], b_kind, warps)
        left = np.empty((warps, 16, k), dtype)
        for at, block in enumerate(blocks):  # rows g, g + 8; then the same with the next columns
            left[:, at % 2 * 8 : at % 2 * 8 + 8, at // 2 * across : (at // 2 + 1) * across] = block
        right = np.empty((warps, 8, k), dtype)
        for at, block in enumerate(columns):
            right[:, :, at * across : (at + 1) * across] = block
        result = left @ right.swapaxes(1, 2)
        if half:
            total = result + np.stack([pick(r).view(np.float16).reshape(warps, 8, 8) for r in c_registers], axis=1).reshape(warps, 16, 8)
            words = np.ascontiguousarray(total.astype(np.float16)).view(np.uint32).reshape(warps, 2, 32)
            return [words[:, at].reshape(-1) for at in range(2)]
        quads = result.reshape(warps, 2, 8, 4, 2)
        return [
            quads[:, at // 2, :, :, at % 2].reshape(-1).astype(pick(r).dtype, copy=False) + pick(r) for at, r in enumerate(c_registers)
        ]  # fmt: skip

    return machine.gathered([], d_registers, core)


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
