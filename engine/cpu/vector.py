"""A small language for vector code inside njit functions: 16 float32 lanes, written once, lowered by LLVM to any CPU.

`@kernel(n)` turns a function that emits LLVM IR into something an njit function can call with n int64 arguments
(addresses, counts) and no result. Inside, `Emit` offers loads, stores, loops and arithmetic on <16 x float>.
Addresses are plain int64: what they point at is drawn in the kernel files. Knows no layout and no model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from engine.cpu.target import FEATURES

LANES = 16
I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32, F16, PTR = ir.FloatType(), ir.HalfType(), ir.PointerType()
V_F32, V_I32 = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
V_I16, V_F16, V_I8 = ir.VectorType(I16, LANES), ir.VectorType(F16, LANES), ir.VectorType(I8, LANES)
V_I16X2, V_I8X4 = ir.VectorType(I16, 2 * LANES), ir.VectorType(I8, 4 * LANES)


class _BFloat(ir.types._BaseFloatType):
    """LLVM's bfloat, which llvmlite does not name."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()
V_BF16 = ir.VectorType(_BFloat(), LANES)
V_BF16X2 = ir.VectorType(_BFloat(), 2 * LANES)

Value = Any  # an LLVM value


class Emit:
    """One IR builder with the words the kernels are written in."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    # -- memory ---------------------------------------------------------------------------------------------------

    def at(self, address: Value, offset: int | Value = 0) -> Value:
        base = self.b.inttoptr(address, PTR)
        if isinstance(offset, int):
            if offset == 0:
                return base
            offset = I64(offset)
        return self.b.gep(base, [offset], source_etype=I8)

    def load(self, kind: ir.Type, address: Value, offset: int | Value = 0, align: int = 1) -> Value:
        return self.b.load(self.at(address, offset), typ=kind, align=align)

    def store(self, value: Value, address: Value, offset: int | Value = 0) -> None:
        self.b.store(value, self.at(address, offset), align=1)

    def prefetch(self, address: Value, offset: int | Value) -> None:
        """Into all cache levels, for reading."""
        fn = self.function("llvm.prefetch.p0", ir.VoidType(), [PTR, I32, I32, I32])
        self.b.call(fn, [self.at(address, offset), I32(0), I32(3), I32(1)])

    # -- calls ----------------------------------------------------------------------------------------------------

    def function(self, name: str, result: ir.Type, args: list[ir.Type]) -> ir.Function:
        known = self.b.module.globals.get(name)
        return known if known is not None else ir.Function(self.b.module, ir.FunctionType(result, args), name)

    def unary(self, name: str, x: Value) -> Value:
        return self.b.call(self.function(f"llvm.{name}.v16f32", V_F32, [V_F32]), [x])

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        return self.b.call(self.function("llvm.fma.v16f32", V_F32, [V_F32] * 3), [a, b, c])

    def minimum(self, a: Value, b: Value) -> Value:
        return self.b.select(self.b.fcmp_ordered("<", a, b), a, b)

    def maximum(self, a: Value, b: Value) -> Value:
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    # -- constants and lanes --------------------------------------------------------------------------------------

    def const(self, value: float) -> Value:
        return ir.Constant(V_F32, [value] * LANES)

    def ints(self, value: int) -> Value:
        return ir.Constant(V_I32, [value] * LANES)

    def broadcast(self, scalar: Value) -> Value:
        kind = ir.VectorType(scalar.type, LANES)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(V_I32, [0] * LANES))

    def sum(self, x: Value) -> Value:
        """Of the 16 lanes, always in the same tree order."""
        width = LANES
        while width > 1:
            width //= 2
            rest = ir.Constant(V_I32, [(lane + width) % LANES for lane in range(LANES)])
            x = self.b.fadd(x, self.b.shuffle_vector(x, x, rest))
        return self.b.extract_element(x, I32(0))

    # -- bfloat16 -------------------------------------------------------------------------------------------------

    def widen(self, halves: Value) -> Value:
        """<16 x i16> of bfloat16 -> <16 x float>, exact."""
        return self.b.bitcast(self.b.shl(self.b.zext(halves, V_I32), self.ints(16)), V_F32)

    def narrow(self, x: Value) -> Value:
        """<16 x float> -> <16 x i16> of bfloat16, to nearest even; a NaN stays one."""
        if FEATURES.bf16_dot:
            fn = self.function("llvm.x86.avx512bf16.cvtneps2bf16.512", V_BF16, [V_F32])
            return self.b.bitcast(self.b.call(fn, [x]), V_I16)
        bits = self.b.bitcast(x, V_I32)
        odd = self.b.and_(self.b.lshr(bits, self.ints(16)), self.ints(1))
        rounded = self.b.lshr(self.b.add(bits, self.b.add(odd, self.ints(0x7FFF))), self.ints(16))
        is_nan = self.b.fcmp_unordered("uno", x, x)
        return self.b.trunc(self.b.select(is_nan, self.ints(0x7FC0), rounded), V_I16)

    def dot_pairs(self, acc: Value, pairs: Value, x_pair: Value) -> Value:
        """acc[lane] += sum of two products of bfloat16; `pairs` <16 x i32> holds two values a lane, so does `x_pair`."""
        if FEATURES.bf16_dot:
            fn = self.function("llvm.x86.avx512bf16.dpbf16ps.512", V_F32, [V_F32, V_BF16X2, V_BF16X2])
            return self.b.call(fn, [acc, self.b.bitcast(pairs, V_BF16X2), self.b.bitcast(x_pair, V_BF16X2)])
        for part in (self.low_half, self.high_half):
            acc = self.fma(part(pairs), part(x_pair), acc)
        return acc

    def dot_bytes(self, acc: Value, unsigned: Value, signed: Value) -> Value:
        """acc[lane] += sum of four products of a byte 0 .. 255 and one -128 .. 127, <16 x i32> all three; needs FEATURES.int8_dot."""
        fn = self.function("llvm.x86.avx512.vpdpbusd.512", V_I32, [V_I32, V_I8X4, V_I8X4])
        return self.b.call(fn, [acc, self.b.bitcast(unsigned, V_I8X4), self.b.bitcast(signed, V_I8X4)])

    def low_half(self, pairs: Value) -> Value:
        return self.b.bitcast(self.b.shl(pairs, self.ints(16)), V_F32)

    def high_half(self, pairs: Value) -> Value:
        return self.b.bitcast(self.b.and_(pairs, self.ints(0xFFFF0000)), V_F32)

    # -- functions ------------------------------------------------------------------------------------------------

    def exp(self, x: Value) -> Value:
        """e**x to 2 units in the last place: 2**n * p(r), r = x - n ln 2 in two parts (Cody and Waite 1980); the
        polynomial is the Taylor series to r**6. Below -87 the result is 0; above 88 it is held at e**88."""
        b = self.b
        is_tiny = b.fcmp_ordered("<", x, self.const(-87.0))
        clamped = self.maximum(self.minimum(x, self.const(88.0)), self.const(-87.0))
        n = self.unary("rint", b.fmul(clamped, self.const(1.4426950408889634)))
        r = self.fma(n, self.const(-0.693359375), clamped)
        r = self.fma(n, self.const(2.12194440054690583e-4), r)
        p = self.const(1 / 720)
        for coefficient in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            p = self.fma(p, r, self.const(coefficient))
        power = b.shl(b.add(b.fptosi(n, V_I32), self.ints(127)), self.ints(23))
        result = b.fmul(p, b.bitcast(power, V_F32))
        result = b.select(is_tiny, self.const(0.0), result)
        return b.select(b.fcmp_unordered("uno", x, x), x, result)

    # -- control --------------------------------------------------------------------------------------------------

    @contextmanager
    def loop(self, count: Value, carried: list[Value]) -> Iterator[tuple[Value, list[Value], list[Value]]]:
        """`with e.loop(n, [a, b]) as (i, now, after): after[:] = new values`; then `e.results` has the last ones."""
        b = self.b
        before = b.block
        head, body, end = (b.append_basic_block(name) for name in ("head", "body", "end"))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        phis = [b.phi(v.type) for v in carried]
        index.add_incoming(I64(0), before)
        for phi, value in zip(phis, carried, strict=True):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_signed("<", index, count), body, end)
        b.position_at_end(body)
        after = list(phis)
        yield index, phis, after
        index.add_incoming(b.add(index, I64(1)), b.block)
        for phi, value in zip(phis, after, strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(end)
        self.results = phis


_TYPES = {"i": types.int64, "f": types.float32, "v": types.void}


def kernel(arguments: str, result: str = "v") -> Callable[[Callable[..., Value | None]], Any]:
    """An njit-callable function from one that emits its body from (Emit, *values).

    `arguments` and `result` spell the types: i int64 (an address, a count), f float32, v none.
    """

    def wrap(emit: Callable[..., Value | None]) -> Any:
        signature = _TYPES[result](*(_TYPES[code] for code in arguments))

        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            value = emit(Emit(builder), *args)
            return context.get_dummy_value() if result == "v" else value

        def typed(typingctx: Any, *args: Any) -> Any:
            return signature, codegen

        typed.__name__ = emit.__name__
        typed.__doc__ = emit.__doc__
        # numba folds arguments by the signature and would read *args as one tuple: name each
        names = ["typingctx", *(f"a{i}" for i in range(len(arguments)))]
        setattr(typed, "__signature__", inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]))  # noqa: B010
        return intrinsic(typed)

    return wrap


def caller(num_args: int) -> Any:
    """An njit-callable `call(function, *int64)` of a compiled function by its address (see `compiled`)."""

    def call_at(e: Emit, function: Value, *args: Value) -> None:
        kind = ir.FunctionType(ir.VoidType(), [I64] * num_args)
        pointer = e.b.inttoptr(function, kind.as_pointer())
        e.b.call(pointer, args)

    return kernel("i" * (num_args + 1))(call_at)


def compiled(function: Callable[..., None]) -> int:
    """Address of a module-level function of int64 arguments, compiled (or read from the disk cache) on its own.

    Kernels that are called by address are compiled once each, when a model needs them, and not again as a part of every caller.
    """
    known = _COMPILED.get(function)
    if known is None:
        signature = types.void(*[types.int64] * function.__code__.co_argcount)
        known = _COMPILED[function] = cfunc(signature, cache=True)(function)
    address: Any = known.address
    return int(address)


@kernel("f", "i")
def bfloat_bits(e: Emit, x: Value) -> Value:
    """The bfloat16 nearest to x (ties to even) as 16 bits."""
    return e.b.zext(e.b.extract_element(e.narrow(e.broadcast(x)), I32(0)), I64)


_COMPILED: dict[Callable[..., None], Any] = {}


def _pointer_view(kind: Any) -> Any:
    @intrinsic
    def view(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

        return types.CPointer(kind)(types.int64), codegen

    return view


# an address as something an njit function can index
f64_at = _pointer_view(types.float64)
f32_at = _pointer_view(types.float32)
i32_at = _pointer_view(types.int32)
i64_at = _pointer_view(types.int64)
u16_at = _pointer_view(types.uint16)
