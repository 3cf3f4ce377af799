"""Bits: shifts, logic, fields, counts, any function of three (PTX ISA, "Logic and Shift", the bit instructions of "Integer")."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tests.ptx.arith import UNSIGNED, operands
from tests.ptx.errors import EmulatorError
from tests.ptx.machine import DTYPE, Array, Bound, Machine
from tests.ptx.parser import Instruction, Operand


def shift(machine: Machine, instruction: Instruction) -> Bound:
    """shl, shr: an amount past the width gives 0 or the sign, as numpy's shifts do."""
    kind = UNSIGNED.get(instruction.kind, instruction.kind)
    function = np.left_shift if instruction.parts[0] == "shl" else np.right_shift
    a = machine.source(instruction.operands[1], kind)
    destination = machine.register(instruction.operands[0], kind)
    dtype = np.dtype(DTYPE[kind])
    amount = machine.source(instruction.operands[2], "u32")
    if amount.ndim == 0:
        amount = np.array(min(int(amount), 8 * dtype.itemsize), dtype)
        return machine.alu(destination, partial(function, a, amount))
    if dtype.itemsize == 4:
        amount = amount.view(dtype)
        if dtype.kind == "u":
            return machine.alu(destination, partial(function, a, amount))
    limit = np.uint32(8 * dtype.itemsize)
    amount = amount.view(np.uint32)
    return machine.alu(destination, lambda out: function(a, np.minimum(amount, limit).astype(dtype), out))


def funnel(machine: Machine, instruction: Instruction) -> Bound:
    """shf.l / shf.r: a shift of the pair {hi, lo}, the amount wrapped or clamped."""
    low, high, amount = (machine.source(o, "u32") for o in instruction.operands[1:4])
    wrap, left = "wrap" in instruction.parts, "l" in instruction.parts

    def compute(out: Array) -> None:
        pair = (high.astype(np.uint64) << np.uint64(32)) | low
        by = (amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))).astype(np.uint64)
        np.copyto(out, (pair << by) >> np.uint64(32) if left else (pair >> by) & np.uint64(0xFFFFFFFF), casting="unsafe")

    return machine.alu(machine.register(instruction.operands[0], "u32"), compute)


def logic(function: Any) -> Callable[[Machine, Instruction], Bound]:
    """and, or, xor, not on bits or predicates."""

    def bind(machine: Machine, instruction: Instruction) -> Bound:
        kind = UNSIGNED.get(instruction.kind, instruction.kind)
        sources = [predicate(machine, o) if kind == "pred" else machine.source(o, kind) for o in instruction.operands[1:]]
        return machine.alu(machine.register(instruction.operands[0], kind), partial(function, *sources))

    return bind


def predicate(machine: Machine, operand: Operand) -> Array:
    if operand.kind == "not":
        raise EmulatorError("a negated predicate is not allowed here")
    return machine.source(operand, "pred")


def count_type(function: Callable[[Array], Array]) -> Callable[[Machine, Instruction], Bound]:
    """popc, clz, bfind, brev: a source of the type, a result of 32 bits (brev: of the type)."""

    def bind(machine: Machine, instruction: Instruction) -> Bound:
        kind = UNSIGNED.get(instruction.kind, instruction.kind)
        source = machine.source(instruction.operands[1], kind)
        destination = machine.register(instruction.operands[0], kind if instruction.parts[0] == "brev" else "u32")
        amount = "shiftamt" in instruction.parts
        last = np.uint32(8 * np.dtype(DTYPE[kind]).itemsize - 1)

        def compute(out: Array) -> None:
            value = function(source).astype(out.dtype)
            np.copyto(out, np.where(value == np.uint32(0xFFFFFFFF), value, last - value) if amount else value)

        return machine.alu(destination, compute)

    return bind


def leading_zeros(value: Array) -> Array:
    """Of unsigned integers."""
    bits = 8 * value.dtype.itemsize
    spread = value.copy()
    step = 1
    while step < bits:
        spread |= spread >> value.dtype.type(step)
        step *= 2
    return np.bitwise_count(~spread).astype(np.uint32)


def find_bit(value: Array) -> Array:
    """The place of the highest bit that is not the sign, 0xffffffff where there is none."""
    if value.dtype.kind == "i":
        value = np.where(value < 0, ~value, value).view(np.dtype(f"u{value.dtype.itemsize}"))
    return np.uint32(8 * value.dtype.itemsize - 1) - leading_zeros(value)


def reverse_bits(value: Array) -> Array:
    bits = 8 * value.dtype.itemsize
    result = np.zeros_like(value)
    for at in range(bits):
        result |= ((value >> value.dtype.type(at)) & value.dtype.type(1)) << value.dtype.type(bits - 1 - at)
    return result


def bit_extract(machine: Machine, instruction: Instruction) -> Bound:
    """bfe d, a, position, length; the sign of the field is extended for s32 and s64."""
    kind = instruction.kind
    unsigned = kind.replace("s", "u")
    a, signed = machine.source(instruction.operands[1], unsigned), kind.startswith("s")
    position, length = (machine.source(o, "u32") for o in instruction.operands[2:4])
    bits = 8 * np.dtype(DTYPE[kind]).itemsize
    word = np.dtype(DTYPE[unsigned]).type

    def compute(out: Array) -> None:
        start, count = (position & np.uint32(255)).astype(word), np.minimum(length & np.uint32(255), np.uint32(bits)).astype(word)
        field = (a >> start) & ((word(1) << count) - word(1))
        if signed:
            last = np.minimum(start + count - word(1), word(bits - 1))
            negative = ((a >> last) & word(1) == 1) & (count > 0)
            width = np.minimum(count, np.maximum(word(bits) - np.minimum(start, word(bits)), word(0)))
            field = np.where(negative, field | ~((word(1) << width) - word(1)), field)
        np.copyto(out, field)

    return machine.alu(machine.register(instruction.operands[0], unsigned), compute)


def bit_insert(machine: Machine, instruction: Instruction) -> Bound:
    """bfi f, a, b, position, length: the low bits of a into b."""
    kind = UNSIGNED[instruction.kind]
    a, b = operands(machine, instruction, kind, 2)
    position, length = (machine.source(o, "u32") for o in instruction.operands[3:5])
    word = np.dtype(DTYPE[kind]).type

    def compute(out: Array) -> None:
        start, count = (position & np.uint32(255)).astype(word), (length & np.uint32(255)).astype(word)
        mask = ((word(1) << count) - word(1)) << start
        np.copyto(out, (b & ~mask) | ((a << start) & mask))

    return machine.alu(machine.register(instruction.operands[0], kind), compute)


def bit_mask(machine: Machine, instruction: Instruction) -> Bound:
    """bmsk.clamp d, position, length."""
    position, length = (machine.source(o, "u32") for o in instruction.operands[1:3])
    return machine.alu(
        machine.register(instruction.operands[0], "u32"), lambda out: np.copyto(out, ((np.uint32(1) << length) - np.uint32(1)) << position)
    )


LOP3: dict[int, Callable[[Array, Array, Array], Array]] = {
    0x96: lambda a, b, c: a ^ b ^ c, 0x80: lambda a, b, c: a & b & c, 0xFE: lambda a, b, c: a | b | c, 0xEA: lambda a, b, c: (a & b) | c,
    0xF8: lambda a, b, c: a | (b & c), 0xCA: lambda a, b, c: (a & b) | (~a & c), 0xE8: lambda a, b, c: (a & b) | (c & (a | b)),
    0x78: lambda a, b, c: a ^ (b & c), 0x6A: lambda a, b, c: (a & b) ^ c, 0xC0: lambda a, b, c: a & b, 0xFC: lambda a, b, c: a | b,
    0x3C: lambda a, b, c: a ^ b, 0xA8: lambda a, b, c: (a | b) & c, 0xE0: lambda a, b, c: a & (b | c),
}  # fmt: skip


def lop3(machine: Machine, instruction: Instruction) -> Bound:
    """Any function of three bits by its table: bit 4a + 2b + c of the constant."""
    a, b, c = operands(machine, instruction, "u32", 3)
    table = instruction.operands[4].value
    function = LOP3.get(table)
    if function is None:

        def function(x: Array, y: Array, z: Array) -> Array:
            result = np.uint32(0)
            for at in range(8):
                if table >> at & 1:
                    result = result | ((x if at & 4 else ~x) & (y if at & 2 else ~y) & (z if at & 1 else ~z))
            return result  # type: ignore[return-value]

    return machine.alu(machine.register(instruction.operands[0], "u32"), lambda out: np.copyto(out, function(a, b, c)))


OPS: dict[str, Callable[[Machine, Instruction], Bound]] = {
    "shl": shift,
    "shr": shift,
    "shf": funnel,
    "and": logic(np.bitwise_and),
    "or": logic(np.bitwise_or),
    "xor": logic(np.bitwise_xor),
    "not": logic(np.invert),
    "popc": count_type(np.bitwise_count),
    "clz": count_type(leading_zeros),
    "bfind": count_type(find_bit),
    "brev": count_type(reverse_bits),
    "bfe": bit_extract,
    "bfi": bit_insert,
    "bmsk": bit_mask,
    "lop3": lop3,
}
