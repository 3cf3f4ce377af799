"""mov, cvt, prmt and changes of address space: values that change their type or place (PTX ISA, "Data Movement and Conversion")."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tests.ptx.arith import bf16_to_f32, directed, f32_to_bf16, round_bits
from tests.ptx.errors import EmulatorError
from tests.ptx.machine import DTYPE, LOCAL_WINDOW, RAW, SHARED_WINDOW, Array, Bound, Machine
from tests.ptx.parser import WIDTH, Instruction, Operand

ROUND: dict[str, Any] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def mov(machine: Machine, instruction: Instruction) -> Bound:
    """mov, also packing {a, b} into a register and unpacking it."""
    target, source = instruction.operands
    kind = instruction.kind
    if target.kind == "vector":
        return unpack(machine, target, source, kind)
    if source.kind == "vector":
        return pack(machine, target, source, kind)
    destination = machine.register(target, kind)
    if source.kind == "special" and source.name.startswith(("%clock", "%globaltimer")):

        def read_clock(out: Array) -> None:
            machine.clock += 16
            out.fill(machine.clock)

        return machine.alu(destination, read_clock)
    value = machine.source(source, kind)
    if value.dtype != destination.dtype:
        value = value.astype(destination.dtype)

    def full() -> None:
        destination[...] = value

    def masked(mask: Array) -> None:
        np.copyto(destination, value, where=mask)

    return Bound(full, masked, lambda mask: full())


def unpack(machine: Machine, target: Operand, source: Operand, kind: str) -> Bound:
    width = WIDTH[kind] // len(target.items)
    pieces = machine.wide(source, kind).view(RAW[width]).reshape(machine.lanes, -1)
    wanted = [(machine.register(item, f"b{width * 8}"), pieces[:, at]) for at, item in enumerate(target.items) if item.kind != "sink"]

    def core(lanes: Array | None) -> list[Array]:
        # copies: a target may be the source's own register
        return [piece.copy() if lanes is None else piece[lanes] for _, piece in wanted]

    return machine.gathered([], [register for register, _ in wanted], core)


def pack(machine: Machine, target: Operand, source: Operand, kind: str) -> Bound:
    width = WIDTH[kind] // len(source.items)
    parts = [machine.source(item, f"b{width * 8}") for item in source.items]
    whole = machine.scratch(RAW[WIDTH[kind]], 2)
    pieces = whole.view(RAW[width]).reshape(machine.lanes, -1)

    def compute(out: Array) -> None:
        for at, part in enumerate(parts):
            pieces[:, at] = part
        out[...] = whole

    return machine.alu(machine.register(target, f"b{WIDTH[kind] * 8}"), compute)


def loose(machine: Machine, operand: Operand, kind: str) -> Callable[[], Array]:
    """A source whose register may be wider than its type: the low bits, as that type."""
    if operand.kind == "reg":
        raw, dtype = machine.raw[operand.name], np.dtype(DTYPE[kind])
        if raw.itemsize > dtype.itemsize:
            return lambda: raw.astype(RAW[dtype.itemsize]).view(dtype)
    value = machine.source(operand, kind)
    return lambda: value


def cvt(machine: Machine, instruction: Instruction) -> Bound:
    """cvt.[rounding].[sat].dtype.stype; pairs of floats for the packed types."""
    parts, types = instruction.parts, instruction.types
    if "pack" in parts:
        return cvt_pack(machine, instruction)
    if any(part in ("e4m3x2", "e5m2x2", "tf32") for part in parts):
        return cvt_special(machine, instruction)
    to, source_kind = types[0], types[-1]
    if to in ("f16x2", "bf16x2"):
        return cvt_pair(machine, instruction, to)
    read = loose(machine, instruction.operands[1], source_kind)
    target = machine.raw[instruction.operands[0].name]
    change = conversion(to, source_kind, parts)
    if target.itemsize > WIDTH[to]:
        extend: Any = np.dtype(f"{'i' if to.startswith('s') else 'u'}{target.itemsize}")
        return machine.alu(target, lambda out: np.copyto(out, change(read()).astype(extend), casting="unsafe"))
    destination = machine.register(instruction.operands[0], to)
    if "f" not in to and "f" not in source_kind and "sat" not in parts:
        return machine.alu(destination, lambda out: np.copyto(out, read(), casting="unsafe"))
    return machine.alu(destination, lambda out: np.copyto(out, change(read()), casting="unsafe"))


def conversion(to: str, source: str, parts: list[str]) -> Callable[[Array], Array]:
    """The function of arrays from one type to the other."""
    rounding = next((part for part in parts if part in ROUND), None)
    toward = next((part for part in parts if part in ("rz", "rm", "rp")), None)
    sat = "sat" in parts
    dtype: Any = DTYPE[to]
    if source == "bf16":
        return lambda x: conversion(to, "f32", parts)(bf16_to_f32(x))
    if to == "bf16":
        relu = "relu" in parts

        def to_bf16(x: Array) -> Array:
            y = x.astype(np.float32)
            y = np.maximum(y, np.float32(0)) if relu else y
            return (y.view(np.uint32) >> np.uint32(16)).astype(np.uint16) if toward == "rz" else f32_to_bf16(y)

        return to_bf16
    from_float, to_float = source.startswith("f"), to.startswith("f")
    if from_float and to_float:

        def floats(x: Array) -> Array:
            y = (ROUND[rounding](x) if rounding else x).astype(dtype)
            if toward and not rounding:
                y = directed(x, y, toward)
            if "relu" in parts:
                y = np.maximum(y, dtype(0))
            return np.clip(np.nan_to_num(y, nan=0.0), dtype(0), dtype(1)) if sat else y

        return floats
    if from_float:
        return lambda x: float_to_int(ROUND[rounding or "rzi"](x), dtype)
    if to_float:
        return lambda x: directed(x, x.astype(dtype), toward) if toward else x.astype(dtype)
    if sat:
        limits = np.iinfo(dtype)

        def clamp(x: Array) -> Array:
            limit_low, limit_high = np.iinfo(x.dtype).min, np.iinfo(x.dtype).max
            return np.clip(x, max(limits.min, limit_low), min(limits.max, limit_high)).astype(dtype)

        return clamp
    return lambda x: x.astype(dtype)


def float_to_int(x: Array, dtype: Any) -> Array:
    """An integral float to an integer type: out of range becomes the nearest end, NaN becomes 0."""
    limits, y = np.iinfo(dtype), x.astype(np.float64)
    low, high = float(limits.min), float(limits.max)
    inside = np.where((y >= low) & (y < high), y, 0.0).astype(dtype)
    return np.where(y >= high, dtype(limits.max), np.where(y <= low, dtype(limits.min), inside))


def cvt_pair(machine: Machine, instruction: Instruction, to: str) -> Bound:
    """cvt.rn.f16x2.f32 d, a, b: a goes to the upper half. From e4m3x2 / e5m2x2: see cvt_special."""
    high, low = (machine.source(o, "f32") for o in instruction.operands[1:3])
    change = conversion(to.removesuffix("x2"), "f32", instruction.parts)
    saturate = "satfinite" in instruction.parts

    if to == "bf16x2" and "rn" in instruction.parts and "relu" not in instruction.parts and high.ndim and low.ndim:
        upper_bits, sixteen = np.uint32(0xFFFF0000), np.uint32(16)

        def nearest(out: Array) -> None:
            upper = round_bits(high)
            np.bitwise_and(upper, upper_bits, upper)
            np.bitwise_or(round_bits(low) >> sixteen, upper, out)

        return machine.alu(machine.register(instruction.operands[0], "u32"), nearest)

    def compute(out: Array) -> None:
        pair = out.view(np.uint16 if to == "bf16x2" else np.float16)
        a, b = (np.clip(high, -65504, 65504), np.clip(low, -65504, 65504)) if saturate else (high, low)
        upper, lower = change(np.atleast_1d(a)), change(np.atleast_1d(b))
        pair[1::2] = upper
        pair[0::2] = lower

    return machine.alu(machine.register(instruction.operands[0], "u32"), compute)


def cvt_pack(machine: Machine, instruction: Instruction) -> Bound:
    """cvt.pack.sat.{u16,s16}.s32 d, a, b (two halves), cvt.pack.sat.{u8,s8}.s32.b32 d, a, b, c (two bytes before c's low half)."""
    to = instruction.types[0]
    a, b = (machine.source(o, "s32") for o in instruction.operands[1:3])
    c = machine.source(instruction.operands[3], "u32") if len(instruction.operands) > 3 else None
    limits, word = np.iinfo(DTYPE[to]), RAW[WIDTH[to]]
    bits = np.uint32(8 * WIDTH[to])

    def compute(out: Array) -> None:
        upper, lower = (np.clip(x, limits.min, limits.max).astype(word).astype(np.uint32) for x in (a, b))
        pair = (upper << bits) | lower
        np.copyto(out, pair if c is None else (c << (bits + bits)) | pair)

    return machine.alu(machine.register(instruction.operands[0], "u32"), compute)


def cvt_special(machine: Machine, instruction: Instruction) -> Bound:
    """tf32 and the pairs of 8-bit floats."""
    parts = instruction.parts
    if "tf32" in parts:
        source = machine.source(instruction.operands[1], "f32")

        def tf32(out: Array) -> None:
            bits = np.atleast_1d(source).view(np.uint32)
            up = np.uint32(0x1000) if "rna" in parts else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
            np.copyto(out, (bits + up) & np.uint32(0xFFFFE000))

        return machine.alu(machine.register(instruction.operands[0], "b32"), tf32)
    eight = "e4m3" if "e4m3x2" in parts else "e5m2"
    table = eight_bit_floats(eight)
    if parts[-1] == "f32":
        high, low = (machine.source(o, "f32") for o in instruction.operands[1:3])
        relu = "relu" in parts

        def narrow(out: Array) -> None:
            pieces = [np.maximum(x, np.float32(0)) if relu else x for x in (high, low)]
            upper, lower = (to_eight_bits(np.atleast_1d(x), table) for x in pieces)
            np.copyto(out, (upper.astype(np.uint16) << np.uint16(8)) | lower)

        return machine.alu(machine.register(instruction.operands[0], "b16"), narrow)
    if "f16x2" not in parts or parts[-1] == "f16x2":
        raise EmulatorError(f"{instruction.op}: this conversion is not emulated")
    pair = machine.wide(instruction.operands[1], "b16")

    def widen(out: Array) -> None:
        out.view(np.float16)[...] = table[pair.view(np.uint8)].astype(np.float16)

    return machine.alu(machine.register(instruction.operands[0], "u32"), widen)


def eight_bit_floats(name: str) -> Array:
    """The 256 values of e4m3 (no infinities, NaN at 0x7f) or e5m2 (as IEEE)."""
    code = np.arange(256)
    mantissa_bits, bias = (3, 7) if name == "e4m3" else (2, 15)
    exponent, mantissa = (code >> mantissa_bits) & ((1 << (7 - mantissa_bits)) - 1), code & ((1 << mantissa_bits) - 1)
    fraction = mantissa / 2.0**mantissa_bits
    value = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    if name == "e4m3":
        value[(code & 0x7F) == 0x7F] = np.nan
    else:
        value[(exponent == 31) & (mantissa == 0)] = np.inf
        value[(exponent == 31) & (mantissa != 0)] = np.nan
    return np.where(code & 0x80, -value, value)


def to_eight_bits(x: Array, table: Array) -> Array:
    """Nearest, ties to even, saturating to the largest finite value; NaN becomes 0x7f."""
    positive = table[:128]
    finite = positive[np.isfinite(positive)]
    magnitude = np.minimum(np.abs(x.astype(np.float64)), finite[-1])
    above = np.clip(np.searchsorted(finite, magnitude), 1, len(finite) - 1)
    low, high = finite[above - 1], finite[above]
    upper = (magnitude - low > high - magnitude) | ((magnitude - low == high - magnitude) & (above % 2 == 0))
    code = np.where(upper, above, above - 1).astype(np.uint8)
    code = np.where(np.isnan(x), np.uint8(0x7F), code)
    return (code | np.where(np.signbit(x) & ~np.isnan(x), np.uint8(0x80), np.uint8(0))).astype(np.uint8)


def prmt(machine: Machine, instruction: Instruction) -> Bound:
    """prmt.b32 d, a, b, selector: four of the eight bytes of {b, a}; bit 3 of a nibble repeats the byte's sign."""
    a, b = (machine.source(o, "u32") for o in instruction.operands[1:3])
    selector = machine.source(instruction.operands[3], "u32")
    destination = machine.register(instruction.operands[0], "u32")
    mode = instruction.parts[2] if len(instruction.parts) > 2 else ""
    if selector.ndim == 0 and not mode and not int(selector) & 0x8888:
        return machine.alu(destination, byte_moves(a, b, int(selector)))

    def compute(out: Array) -> None:
        pair = np.empty((machine.lanes, 2), np.uint32)
        pair[:, 0], pair[:, 1] = a, b
        choice = np.broadcast_to(selector, machine.lanes).astype(np.int64)
        nibbles = prmt_mode(mode, choice) if mode else (choice[:, None] >> np.arange(0, 16, 4)) & 15
        taken = np.take_along_axis(pair.view(np.uint8), nibbles & 7, axis=1)
        taken = np.where(nibbles & 8, np.where(taken & 0x80, np.uint8(255), np.uint8(0)), taken)
        np.copyto(out, np.ascontiguousarray(taken).view(np.uint32)[:, 0])

    return machine.alu(destination, compute)


def prmt_mode(mode: str, choice: Array) -> Array:
    """The byte numbers of the named modes."""
    s, k = (choice & 3)[:, None], np.arange(4)
    if mode == "f4e":
        return s + k
    if mode == "b4e":
        return (s - k) & 7
    if mode == "rc8":
        return s + 0 * k
    if mode == "ecl":
        return np.maximum(s, k)
    if mode == "ecr":
        return np.minimum(s, k)
    return (s & 1) * 2 + (k & 1)  # rc16


def byte_moves(a: Array, b: Array, selector: int) -> Callable[[Array], None]:
    """A constant selection as shifts and masks: bytes that move equally far move together."""
    moves: dict[tuple[int, int], int] = {}
    for to in range(4):
        place = selector >> 4 * to & 7
        key = (place // 4, to - place % 4)
        moves[key] = moves.get(key, 0) | 0xFF << 8 * to
    steps = [((a, b)[which], np.uint32(8 * abs(by)), by, np.uint32(mask)) for (which, by), mask in moves.items()]

    def compute(out: Array) -> None:
        total: Any = np.uint32(0)
        for value, bits, by, mask in steps:
            total = total | ((value << bits if by > 0 else value >> bits if by < 0 else value) & mask)
        np.copyto(out, total)

    return compute


def cvta(machine: Machine, instruction: Instruction) -> Bound:
    """cvta[.to].space: between an address in a space and a generic one."""
    kind, parts = instruction.kind, instruction.parts
    source, destination = machine.source(instruction.operands[1], kind), machine.register(instruction.operands[0], kind)
    window = SHARED_WINDOW if any(p.startswith("shared") for p in parts) else LOCAL_WINDOW if "local" in parts else 0
    dtype = np.dtype(DTYPE[kind]).type
    if not window or kind.endswith("32"):
        return machine.alu(destination, lambda out: np.copyto(out, source))
    return machine.alu(destination, partial(np.subtract if "to" in parts else np.add, source, dtype(window)))


def isspacep(machine: Machine, instruction: Instruction) -> Bound:
    """isspacep.space p, a."""
    source, space = machine.source(instruction.operands[1], "u64"), instruction.parts[1].partition("::")[0]
    top = {"shared": SHARED_WINDOW >> 56, "local": LOCAL_WINDOW >> 56, "global": 0, "const": 255}[space]
    return machine.alu(
        machine.register(instruction.operands[0], "pred"), lambda out: np.copyto(out, (source >> np.uint64(56)) == np.uint64(top))
    )


def mapa(machine: Machine, instruction: Instruction) -> Bound:
    """mapa d, a, rank: a cluster here is one thread block, so the address is its own."""
    source, destination = (
        machine.source(instruction.operands[1], instruction.kind),
        machine.register(instruction.operands[0], instruction.kind),
    )
    return machine.alu(destination, lambda out: np.copyto(out, source))


OPS: dict[str, Callable[[Machine, Instruction], Bound]] = {
    "mov": mov, "cvt": cvt, "prmt": prmt, "cvta": cvta, "isspacep": isspacep, "mapa": mapa,
}  # fmt: skip
