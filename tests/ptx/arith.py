"""Arithmetic, comparison and bit instructions: each lane for itself (PTX ISA, "Integer", "Floating-Point", "Logic and Shift").

A function takes the machine and an instruction and returns it bound to the register arrays. Approximate instructions are
computed exactly; .ftz is ignored; fma rounds once through double precision.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tests.ptx.errors import EmulatorError
from tests.ptx.machine import DTYPE, Array, Bound, Machine
from tests.ptx.parser import Instruction, Operand

UNSIGNED = {"b16": "u16", "b32": "u32", "b64": "u64"}
PACKED = ("f16x2", "bf16x2")
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def bf16_to_f32(bits: Array) -> Array:
    """uint16 patterns of bfloat16 -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: Array) -> Array:
    """float32 -> uint16 patterns of bfloat16, to nearest even; a NaN becomes 0x7fff."""
    return (round_bits(np.ascontiguousarray(value, np.float32)) >> np.uint32(16)).astype(np.uint16)


def operands(machine: Machine, instruction: Instruction, kind: str, count: int) -> list[Array]:
    """The `count` sources after the destination, all of one type."""
    return [machine.source(operand, kind) for operand in instruction.operands[1 : 1 + count]]


def halves(machine: Machine, instruction: Instruction, kind: str, count: int, function: Callable[..., Array]) -> Bound:
    """16-bit floats, one or two in a register, rounded once.

    float32 is wide enough for that (24 >= 2 * 11 + 2 bits) but for fma, which goes through float64.
    """
    storage = "u32" if kind in PACKED else "u16"
    destination = machine.register(instruction.operands[0], storage)
    relu, wide = "relu" in instruction.parts, np.float64 if count == 3 else np.float32

    def value(*sources: Array) -> Array:
        result = function(*[s.astype(wide, copy=False) for s in sources]).astype(np.float32, copy=False)
        return np.maximum(result, np.float32(0)) if relu else result

    if kind.startswith("bf16"):
        words = [machine.wide(o, storage) for o in instruction.operands[1 : 1 + count]]
        if kind == "bf16":
            return machine.alu(destination, lambda out: np.copyto(out, f32_to_bf16(value(*[bf16_to_f32(w) for w in words]))))
        high_bits, sixteen = np.uint32(0xFFFF0000), np.uint32(16)

        def compute(out: Array) -> None:
            low = round_bits(value(*[(w << sixteen).view(np.float32) for w in words]))
            high = round_bits(value(*[(w & high_bits).view(np.float32) for w in words]))
            np.right_shift(low, sixteen, low)
            np.bitwise_and(high, high_bits, high)
            np.bitwise_or(low, high, out)

        return machine.alu(destination, compute)
    halves_of = [machine.wide(o, "f16" if storage == "u16" else storage).view(np.float16) for o in instruction.operands[1 : 1 + count]]

    def compute_half(out: Array) -> None:
        np.copyto(out.view(np.float16), value(*halves_of), casting="same_kind")

    if count == 3:  # float64 to float16 at once

        def compute_fused(out: Array) -> None:
            result = function(*[s.astype(np.float64) for s in halves_of]).astype(np.float16)
            out.view(np.float16)[...] = np.maximum(result, np.float16(0)) if relu else result

        return machine.alu(destination, compute_fused)
    return machine.alu(destination, compute_half)


def round_bits(value: Array) -> Array:
    """float32 -> uint32 whose upper half is the nearest bfloat16; a NaN stays one."""
    bits = value.view(np.uint32)
    up = bits >> np.uint32(16)
    np.bitwise_and(up, np.uint32(1), up)
    np.add(up, np.uint32(0x7FFF), up)
    np.add(up, bits, up)
    bad = np.isnan(value)
    if bad.any():
        up[bad] = 0x7FFF0000
    return up


def is_half(kind: str) -> bool:
    return kind in ("f16", "bf16", *PACKED)


def ufunc(function: Any, count: int) -> Callable[[Machine, Instruction], Bound]:
    """A numpy function of `count` sources and `out`."""

    def bind(machine: Machine, instruction: Instruction) -> Bound:
        kind = UNSIGNED.get(instruction.kind, instruction.kind)
        if "cc" in instruction.parts:
            return carried(machine, instruction)
        if is_half(kind):
            return halves(machine, instruction, kind, count, function)
        if toward := direction(instruction):
            return rounded(machine, instruction, count, function, toward)
        sources = operands(machine, instruction, kind, count)
        destination = machine.register(instruction.operands[0], kind)
        if "sat" in instruction.parts:
            return saturated(machine, destination, kind, partial(function, *sources), sources, function)
        if all(source.ndim == 0 for source in sources):
            return machine.alu(destination, lambda out: np.copyto(out, function(*sources), casting="unsafe"))
        return machine.alu(destination, partial(function, *sources))

    return bind


def direction(instruction: Instruction) -> str | None:
    """rz, rm or rp where a float instruction asks for one."""
    return next((part for part in instruction.parts if part in ("rz", "rm", "rp")), None) if "f" in instruction.kind else None


def rounded(machine: Machine, instruction: Instruction, count: int, function: Any, toward: str) -> Bound:
    """A float32 result rounded towards zero, down or up, from float64."""
    if instruction.kind != "f32":
        raise EmulatorError("this rounding is emulated for f32 only")
    sources = operands(machine, instruction, "f32", count)

    def compute(out: Array) -> None:
        exact = function(*[s.astype(np.float64) for s in sources])
        np.copyto(out, directed(exact, exact.astype(np.float32), toward))

    return machine.alu(machine.register(instruction.operands[0], "f32"), compute)


def directed(x: Array, y: Array, toward: str) -> Array:
    """Correct the rounding of y = nearest(x): towards zero, down or up."""
    exact, nearest = x.astype(np.float64), y.astype(np.float64)
    if toward == "rz":
        return np.where(np.abs(nearest) > np.abs(exact), np.nextafter(y, y.dtype.type(0)), y)
    wrong = nearest > exact if toward == "rm" else nearest < exact
    return np.where(wrong, np.nextafter(y, y.dtype.type(-np.inf if toward == "rm" else np.inf)), y)


def saturated(
    machine: Machine, destination: Array, kind: str, compute: Callable[[Array], Any], sources: list[Array], function: Any
) -> Bound:
    """.sat: floats to [0, 1] with NaN to 0, s32 to its range."""
    if kind.startswith("f"):

        def clamp(out: Array) -> None:
            compute(out)
            np.clip(np.nan_to_num(out, copy=False, nan=0.0, posinf=1.0, neginf=0.0), 0, 1, out=out)

        return machine.alu(destination, clamp)
    limits = np.iinfo(DTYPE[kind])
    return machine.alu(
        destination,
        lambda out: np.copyto(out, function(*[s.astype(np.int64) for s in sources]).clip(limits.min, limits.max), casting="unsafe"),
    )


def multiply(machine: Machine, instruction: Instruction) -> Bound:
    return product(machine, instruction, add=False)


def multiply_add(machine: Machine, instruction: Instruction) -> Bound:
    return product(machine, instruction, add=True)


def product(machine: Machine, instruction: Instruction, add: bool) -> Bound:
    """mul and mad: .lo, .hi, .wide for integers, plain for floats."""
    kind, parts = UNSIGNED.get(instruction.kind, instruction.kind), instruction.parts
    if "cc" in parts:
        return carried(machine, instruction)
    if "f" in kind:
        return fma(machine, instruction) if add else ufunc(np.multiply, 2)(machine, instruction)
    a, b = operands(machine, instruction, kind, 2)
    if "wide" in parts:
        wide = WIDER[kind]
        destination, dtype = machine.register(instruction.operands[0], wide), DTYPE[wide]
        if b.ndim == 0:
            b = b.astype(dtype)
        c = machine.source(instruction.operands[3], wide) if add else None
        return machine.alu(destination, summed(machine, partial(np.multiply, a, b, dtype=dtype), c, dtype))
    destination, dtype = machine.register(instruction.operands[0], kind), DTYPE[kind]
    c = machine.source(instruction.operands[3], kind) if add else None
    if "hi" in parts:
        return machine.alu(destination, summed(machine, partial(high_product, a, b), c, dtype))
    return machine.alu(destination, summed(machine, partial(np.multiply, a, b), c, dtype))


def summed(machine: Machine, compute: Callable[..., Any], addend: Array | None, dtype: Any) -> Callable[[Array], Any]:
    """`compute(out=...)`, then plus `addend`, which may be the same array as the destination."""
    if addend is None:
        return lambda out: compute(out=out)
    scratch = machine.scratch(dtype, 1)

    def both(out: Array) -> None:
        compute(out=scratch)
        np.add(scratch, addend, out)

    return both


def high_product(a: Array, b: Array, out: Array) -> None:
    """The upper half of the product."""
    bits = out.dtype.itemsize * 8
    if bits < 64:
        wide = np.int64 if out.dtype.kind == "i" else np.uint64
        np.copyto(out, (a.astype(wide) * b.astype(wide)) >> wide(bits), casting="unsafe")
        return
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    x0, x1, y0, y1 = x & low, x >> shift, y & low, y >> shift
    middle = x1 * y0 + ((x0 * y0) >> shift)
    other = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> shift) + (other >> shift)
    if out.dtype.kind == "i":  # two's complement: take back what the sign bits added
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    np.copyto(out, high.astype(out.dtype))


def fma(machine: Machine, instruction: Instruction) -> Bound:
    """a * b + c rounded once: exact in float64 for float32 but for ties of ties."""
    kind = instruction.kind
    if is_half(kind):
        return halves(machine, instruction, kind, 3, lambda a, b, c: a * b + c)
    if toward := direction(instruction):
        return rounded(machine, instruction, 3, lambda a, b, c: a * b + c, toward)
    a, b, c = operands(machine, instruction, kind, 3)
    destination = machine.register(instruction.operands[0], kind)
    wide = np.float64 if kind == "f32" else np.longdouble
    first = machine.scratch(wide, 1)
    sat = "sat" in instruction.parts

    def compute(out: Array) -> None:
        np.multiply(a, b, out=first, dtype=wide)
        np.add(first, c, out=first)
        np.copyto(out, first, casting="same_kind")
        if sat:
            np.clip(np.nan_to_num(out, copy=False, nan=0.0, posinf=1.0, neginf=0.0), 0, 1, out=out)

    return machine.alu(destination, compute)


def divide(machine: Machine, instruction: Instruction) -> Bound:
    """Floats divide; integers truncate towards zero; by zero gives all ones, as hardware does."""
    kind = instruction.kind
    if "f" in kind:
        return ufunc(np.divide, 2)(machine, instruction)
    a, b = operands(machine, instruction, kind, 2)

    def compute(out: Array) -> None:
        quotient = (a - np.fmod(a, b)) // b if out.dtype.kind == "i" else a // b
        np.copyto(out, np.where(b == 0, out.dtype.type(-1) if out.dtype.kind == "i" else np.iinfo(out.dtype).max, quotient))

    return machine.alu(machine.register(instruction.operands[0], kind), compute)


def remainder(machine: Machine, instruction: Instruction) -> Bound:
    a, b = operands(machine, instruction, instruction.kind, 2)
    return machine.alu(
        machine.register(instruction.operands[0], instruction.kind), lambda out: np.copyto(out, np.where(b == 0, a, np.fmod(a, b)))
    )


def minimum(machine: Machine, instruction: Instruction) -> Bound:
    return extreme(machine, instruction, np.fmin, np.minimum)


def maximum(machine: Machine, instruction: Instruction) -> Bound:
    return extreme(machine, instruction, np.fmax, np.maximum)


def extreme(machine: Machine, instruction: Instruction, number: Any, nan: Any) -> Bound:
    """min and max: a NaN loses unless .NaN is given; three operands (sm_100) are two steps."""
    function = nan if "NaN" in instruction.parts or "f" not in instruction.kind else number
    return ufunc(lambda a, b, out=None: function(a, b, out=out), 2)(machine, instruction)


COMPARE: dict[str, Any] = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
                           "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}  # fmt: skip
UNORDERED = {"equ": np.not_equal, "neu": np.equal, "ltu": np.greater_equal, "leu": np.greater, "gtu": np.less_equal, "geu": np.less}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(machine: Machine, instruction: Instruction, first: int) -> Callable[[Array], Any]:
    """`compute(out)` into booleans for the operands from `first` on."""
    kind, word = UNSIGNED.get(instruction.kind, instruction.kind), instruction.parts[1]
    if kind == "bf16":
        a, b = (bf16_source(machine, o) for o in instruction.operands[first : first + 2])
        return lambda out: np.copyto(out, relation(word, True)(a(), b()))
    a, b = (machine.source(o, kind) for o in instruction.operands[first : first + 2])
    if word in COMPARE and not (word == "ne" and "f" in kind):
        return partial(COMPARE[word], a, b)
    return lambda out: np.copyto(out, relation(word, "f" in kind)(a, b))


def bf16_source(machine: Machine, operand: Operand) -> Callable[[], Array]:
    value = machine.wide(operand, "u16")
    return lambda: bf16_to_f32(value)


def relation(word: str, floating: bool) -> Callable[[Array, Array], Array]:
    """Ordered comparisons are false on NaN, those with u are true."""
    if word == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if word == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if word == "ne" and floating:
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    if word in COMPARE:
        return COMPARE[word]  # type: ignore[no-any-return]
    if word == "equ":
        return lambda a, b: (a == b) | np.isnan(a) | np.isnan(b)
    return lambda a, b: ~UNORDERED[word](a, b) if word != "neu" else a != b


def setp(machine: Machine, instruction: Instruction) -> Bound:
    """setp.CMP[.BOOL].type p[|q], a, b[, c]."""
    target = instruction.operands[0]
    compute = comparison(machine, instruction, 1)
    combine = next((COMBINE[part] for part in instruction.parts[2:] if part in COMBINE), None)
    if target.kind == "reg" and combine is None:
        return machine.alu(machine.register(target, "pred"), compute)
    third = instruction.operands[3] if combine is not None else None
    other = machine.source(third.items[0] if third.kind == "not" else third, "pred") if third else None
    negated = third is not None and third.kind == "not"
    targets = target.items if target.kind == "pair" else (target,)
    wanted = [(machine.register(t, "pred"), at == 1) for at, t in enumerate(targets) if t.kind != "sink"]

    def core(lanes: Array | None, *_: Array) -> list[Array]:
        result = np.empty(machine.lanes, np.bool_)
        compute(result)
        values = []
        for _, inverted in wanted:
            value = ~result if inverted else result
            if combine is not None:
                value = combine(value, ~other if negated else other)  # type: ignore[operator]
            values.append(value if lanes is None else value[lanes])
        return values

    return machine.gathered([], [register for register, _ in wanted], core)


def set_value(machine: Machine, instruction: Instruction) -> Bound:
    """set.CMP.dtype.stype d, a, b: all ones or 1.0 where true."""
    result = instruction.types[0]
    compute = comparison(machine, instruction, 1)
    true = machine.scratch(np.bool_, 1)

    def fill(out: Array) -> None:
        compute(true)
        np.copyto(out, np.where(true, out.dtype.type(1) if out.dtype.kind == "f" else ~out.dtype.type(0), out.dtype.type(0)))

    return machine.alu(machine.register(instruction.operands[0], result), fill)


def select(machine: Machine, instruction: Instruction) -> Bound:
    """selp d, a, b, p."""
    kind = UNSIGNED.get(instruction.kind, instruction.kind)
    a, b = operands(machine, instruction, kind, 2)
    chooser = machine.source(instruction.operands[3], "pred")
    return machine.alu(machine.register(instruction.operands[0], kind), lambda out: np.copyto(out, np.where(chooser, a, b)))


def select_sign(machine: Machine, instruction: Instruction) -> Bound:
    """slct.dtype.ctype d, a, b, c: a where c >= 0."""
    kind, sign = instruction.types[0], instruction.types[1]
    a, b = operands(machine, instruction, kind, 2)
    c = machine.source(instruction.operands[3], sign)
    return machine.alu(machine.register(instruction.operands[0], kind), lambda out: np.copyto(out, np.where(c >= 0, a, b)))


def unary(functions: dict[str, Any]) -> Callable[[Machine, Instruction], Bound]:
    """A function by type, `default` otherwise, of one source."""

    def bind(machine: Machine, instruction: Instruction) -> Bound:
        kind = UNSIGNED.get(instruction.kind, instruction.kind)
        function = functions.get(kind, functions["default"])
        if is_half(kind):
            return halves(machine, instruction, kind, 1, function)
        source = machine.source(instruction.operands[1], kind)
        destination = machine.register(instruction.operands[0], kind)
        if isinstance(function, np.ufunc) and source.ndim:
            return machine.alu(destination, partial(function, source))
        return machine.alu(destination, lambda out: np.copyto(out, function(source), casting="unsafe"))

    return bind


def carried(machine: Machine, instruction: Instruction) -> Bound:
    """add, sub, mad with .cc (writes the carry flag), addc, subc, madc (read it)."""
    parts, kind = instruction.parts, instruction.kind.replace("s", "u")
    word, reads, writes = parts[0].removesuffix("c")[:3], parts[0].endswith("c"), "cc" in parts
    destination, flag = machine.register(instruction.operands[0], kind), machine.carry
    count = 3 if word == "mad" else 2
    sources = [machine.wide(o, kind) for o in instruction.operands[1 : 1 + count]]
    signed = instruction.kind.startswith("s")

    def core(lanes: Array | None, *values: Array) -> list[Array]:
        old = (flag if lanes is None else flag[lanes]).astype(destination.dtype)
        if word == "mad":
            high = np.empty_like(values[0])
            if "hi" in parts:
                view = f"i{high.itemsize}" if signed else f"u{high.itemsize}"
                high_product(values[0].view(view), values[1].view(view), high.view(view))
            left, right = high if "hi" in parts else values[0] * values[1], values[2]
        else:
            left, right = values
        if word == "sub":
            middle = left - right
            result = middle - old if reads else middle
            out = (left < right) | ((middle < old) if reads else False)
        else:
            middle = left + right
            result = middle + old if reads else middle
            out = (middle < left) | ((result < middle) if reads else False)
        if writes:
            flag[slice(None) if lanes is None else lanes] = out
        return [result]

    return machine.gathered(sources, [destination], core)


def dot_bytes(machine: Machine, instruction: Instruction) -> Bound:
    """dp4a.atype.btype d, a, b, c."""
    left, right = instruction.types
    a, b = (machine.wide(o, "u32") for o in instruction.operands[1:3])
    c = machine.source(instruction.operands[3], left if left == right else "s32")
    kinds = [np.int8 if kind.startswith("s") else np.uint8 for kind in (left, right)]

    def compute(out: Array) -> None:
        product = a.view(kinds[0]).reshape(-1, 4).astype(np.int64) * b.view(kinds[1]).reshape(-1, 4)
        np.copyto(out, (product.sum(axis=1) + c).astype(np.uint32), casting="unsafe")

    return machine.alu(machine.register(instruction.operands[0], "u32"), compute)


def multiply_24(machine: Machine, instruction: Instruction) -> Bound:
    """mul24.lo, mad24.lo: 24-bit operands."""
    kind = instruction.kind
    a, b = operands(machine, instruction, kind, 2)
    c = machine.source(instruction.operands[3], kind) if instruction.parts[0] == "mad24" else np.zeros((), DTYPE[kind])
    eight = DTYPE[kind](8)
    return machine.alu(
        machine.register(instruction.operands[0], kind), lambda out: np.copyto(out, ((a << eight) >> eight) * ((b << eight) >> eight) + c)
    )


def absolute_difference(machine: Machine, instruction: Instruction) -> Bound:
    """sad d, a, b, c = c + |a - b|."""
    a, b, c = operands(machine, instruction, instruction.kind, 3)
    return machine.alu(
        machine.register(instruction.operands[0], instruction.kind), lambda out: np.copyto(out, c + np.where(a < b, b - a, a - b))
    )


def test_property(machine: Machine, instruction: Instruction) -> Bound:
    """testp.property.type p, a."""
    a, word = machine.source(instruction.operands[1], instruction.kind), instruction.parts[1]
    tiny = np.finfo(DTYPE[instruction.kind]).tiny
    tests: dict[str, Callable[[], Array]] = {
        "finite": lambda: np.isfinite(a), "infinite": lambda: np.isinf(a), "number": lambda: ~np.isnan(a), "notanumber": lambda: np.isnan(a),
        "normal": lambda: np.isfinite(a) & (np.abs(a) >= tiny), "subnormal": lambda: (np.abs(a) < tiny) & (a != 0),
    }  # fmt: skip
    return machine.alu(machine.register(instruction.operands[0], "pred"), lambda out: np.copyto(out, tests[word]()))


def copy_sign(machine: Machine, instruction: Instruction) -> Bound:
    """copysign d, a, b: the sign of a, the magnitude of b."""
    a, b = operands(machine, instruction, instruction.kind, 2)
    return machine.alu(machine.register(instruction.operands[0], instruction.kind), partial(np.copysign, b, a))


OPS: dict[str, Callable[[Machine, Instruction], Bound]] = {
    "addc": carried,
    "subc": carried,
    "madc": carried,
    "add": ufunc(np.add, 2),
    "sub": ufunc(np.subtract, 2),
    "mul": multiply,
    "mad": multiply_add,
    "fma": fma,
    "div": divide,
    "rem": remainder,
    "min": minimum,
    "max": maximum,
    "setp": setp,
    "set": set_value,
    "selp": select,
    "slct": select_sign,
    "abs": unary({"default": np.abs}),
    "neg": unary({"default": np.negative}),
    "sqrt": unary({"default": np.sqrt}),
    "rcp": unary({"default": lambda x: 1 / x}),
    "rsqrt": unary({"default": lambda x: 1 / np.sqrt(x)}),
    "ex2": unary({"default": np.exp2}),
    "lg2": unary({"default": np.log2}),
    "sin": unary({"default": np.sin}),
    "cos": unary({"default": np.cos}),
    "tanh": unary({"default": np.tanh}),
    "cnot": unary({"default": lambda x: x == 0}),
    "dp4a": dot_bytes,
    "mul24": multiply_24,
    "mad24": multiply_24,
    "sad": absolute_difference,
    "testp": test_property,
    "copysign": copy_sign,
}
