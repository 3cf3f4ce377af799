"""A small vocabulary of PTX instructions as Numba intrinsics: what CUDA C would write as inline assembly.

Each is one instruction of the PTX ISA (its section is named), typed: 16-bit pairs travel in a uint32, low half first;
global addresses are uint64, shared ones uint32 (`shared_address`). Knows no kernel.

`_asm(text, results, arguments)` makes one: `$0 ..` are the results, then the arguments. `pure` instructions may be moved,
merged or dropped by the compiler; the others happen as often as written and in that order.
"""

from __future__ import annotations

import inspect
from typing import Any

from llvmlite import ir

from engine.cuda.target import AFTER_PREVIOUS, NEXT_MAY_BEGIN, ConfigStack, intrinsic, types

u16, u32, u64, i32, f32, f64 = types.uint16, types.uint32, types.uint64, types.int32, types.float32, types.float64

_LLVM = {u16: ir.IntType(16), u32: ir.IntType(32), i32: ir.IntType(32), u64: ir.IntType(64), f32: ir.FloatType(), f64: ir.DoubleType()}
_CONSTRAINT = {u16: "h", u32: "r", i32: "r", u64: "l", f32: "f", f64: "d"}


def _asm(text: str, results: list[Any], arguments: list[Any], *, pure: bool = False, memory: bool = False, tied: int = 0) -> Any:
    """An intrinsic that emits `text`.

    `memory`: it reads or writes memory that other code may touch. `tied`: the first `tied` arguments are also the first
    results, in the same registers (accumulators that an instruction updates in place).
    """
    returns = types.void if not results else results[0] if len(results) == 1 else _tuple(results)
    constraints = ",".join(
        [f"={_CONSTRAINT[r]}" for r in results]
        + [str(i) if i < tied else _CONSTRAINT[a] for i, a in enumerate(arguments)]
        + (["~{memory}"] if memory else [])
    )
    llvm_returns = (
        ir.VoidType() if not results else _LLVM[results[0]] if len(results) == 1 else ir.LiteralStructType([_LLVM[r] for r in results])
    )

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        kind = ir.FunctionType(llvm_returns, [_LLVM[a] for a in arguments])
        value = builder.call(ir.InlineAsm(kind, text, constraints, side_effect=not pure), operands)
        if not results:
            return context.get_dummy_value()
        if len(results) == 1:
            return value
        return context.make_tuple(builder, returns, [builder.extract_value(value, i) for i in range(len(results))])

    def typed(typingctx: Any, *given: Any) -> Any:
        return returns(*arguments), generate

    typed.__signature__ = _signature(len(arguments))  # type: ignore[attr-defined]
    return intrinsic(typed)


def _signature(count: int) -> inspect.Signature:
    """What numba reads to count the arguments of a call."""
    parameter = inspect.Parameter
    names = ["typingctx", *(f"a{i}" for i in range(count))]
    return inspect.Signature([parameter(name, parameter.POSITIONAL_OR_KEYWORD) for name in names])


def _tuple(results: list[Any]) -> Any:
    return types.UniTuple(results[0], len(results)) if len(set(results)) == 1 else types.Tuple(results)


def unrolled(count: int, function: Any) -> Any:
    """An intrinsic that calls function(0, ...) .. function(count - 1, ...) with its own arguments.

    A loop that is certain to unroll, however long its body: local arrays indexed by the counter stay registers. The body is
    typed once, its copies are made by the assembler's compiler.
    """

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        flags = ConfigStack().top().copy()
        flags.forceinline = True
        body = types.none(i32, *signature.args)
        compiled = context.compile_subroutine(builder, function, body, flags=flags, caching=False)
        for i in range(count):
            context.call_internal(builder, compiled.fndesc, body, [ir.Constant(ir.IntType(32), i), *operands])
        return context.get_dummy_value()

    def typed(typingctx: Any, *given: Any) -> Any:
        return types.void(*given), generate

    parameter = inspect.Parameter
    names = ["typingctx", *list(inspect.signature(function).parameters)[1:]]
    typed.__signature__ = inspect.Signature([parameter(name, parameter.POSITIONAL_OR_KEYWORD) for name in names])  # type: ignore[attr-defined]
    return intrinsic(typed)


def device_function(returns: Any, *arguments: Any) -> Any:
    """A Python function as a typed one that kernels call: compiled once a kernel for the kernel's own architecture, then inlined by
    LLVM. (`cuda.jit(device=True)` asks the driver for an architecture, or copies the function into each caller before types are
    known, which is slow where functions call functions.)"""

    def decorate(body: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
            flags = ConfigStack().top().copy()
            flags.forceinline = True
            compiled = context.compile_subroutine(builder, body, signature, flags=flags)
            return context.call_internal(builder, compiled.fndesc, signature, operands)

        def typed(typingctx: Any, *given: Any) -> Any:
            return returns(*arguments), generate

        typed.__signature__ = _signature(len(arguments))  # type: ignore[attr-defined]
        return intrinsic(typed)

    return decorate


# -- addresses ----------------------------------------------------------------------------------------------------------


@intrinsic
def address(typingctx: Any, pointer: Any) -> Any:
    """uint64: the address that a pointer argument holds."""
    if not isinstance(pointer, types.CPointer):
        return None

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        return builder.ptrtoint(operands[0], ir.IntType(64))

    return u64(pointer), generate


@intrinsic
def generic_address(typingctx: Any, array: Any) -> Any:
    """uint64 of a shared or local array; to_shared(generic_address(a)) for the shared loads below."""
    if not isinstance(array, types.Array):
        return None

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        return builder.ptrtoint(context.make_array(array)(context, builder, value=operands[0]).data, ir.IntType(64))

    return u64(array), generate


to_shared = _asm("{ .reg .u64 t; cvta.to.shared.u64 t, $1; cvt.u32.u64 $0, t; }", [u32], [u64], pure=True)  # cvta

# -- loads and stores: ld, st ---------------------------------------------------------------------------------------------
# `stream`: read once, do not keep in L1. `constant`: nobody writes it during the kernel (ld.global.nc).

load_32 = _asm("ld.global.u32 $0, [$1];", [u32], [u64], memory=True)
load_64 = _asm("ld.global.v2.u32 {$0,$1}, [$2];", [u32] * 2, [u64], memory=True)
load_128 = _asm("ld.global.v4.u32 {$0,$1,$2,$3}, [$4];", [u32] * 4, [u64], memory=True)
load_constant_64 = _asm("ld.global.nc.v2.u32 {$0,$1}, [$2];", [u32] * 2, [u64], pure=True)
load_constant_128 = _asm("ld.global.nc.v4.u32 {$0,$1,$2,$3}, [$4];", [u32] * 4, [u64], pure=True)
load_stream_128 = _asm("ld.global.nc.L1::no_allocate.v4.u32 {$0,$1,$2,$3}, [$4];", [u32] * 4, [u64], pure=True)
store_32 = _asm("st.global.u32 [$0], $1;", [], [u64, u32], memory=True)
store_8 = _asm("st.global.u8 [$0], $1;", [], [u64, u32], memory=True)  # the low byte
store_16 = _asm("st.global.u16 [$0], $1;", [], [u64, u32], memory=True)
store_64 = _asm("st.global.v2.u32 [$0], {$1,$2};", [], [u64, u32, u32], memory=True)
store_128 = _asm("st.global.v4.u32 [$0], {$1,$2,$3,$4};", [], [u64, u32, u32, u32, u32], memory=True)

prefetch = _asm("prefetch.global.L2 [$0];", [], [u64], memory=True)  # to the L2 cache, where every later write is seen

load_shared_32 = _asm("ld.shared.u32 $0, [$1];", [u32], [u32], memory=True)
load_shared_64 = _asm("ld.shared.v2.u32 {$0,$1}, [$2];", [u32] * 2, [u32], memory=True)
load_shared_128 = _asm("ld.shared.v4.u32 {$0,$1,$2,$3}, [$4];", [u32] * 4, [u32], memory=True)
load_shared_f32 = _asm("ld.shared.f32 $0, [$1];", [f32], [u32], memory=True)
store_shared_32 = _asm("st.shared.u32 [$0], $1;", [], [u32, u32], memory=True)
store_shared_64 = _asm("st.shared.v2.u32 [$0], {$1,$2};", [], [u32, u32, u32], memory=True)
store_shared_128 = _asm("st.shared.v4.u32 [$0], {$1,$2,$3,$4};", [], [u32, u32, u32, u32, u32], memory=True)
store_shared_f32 = _asm("st.shared.f32 [$0], $1;", [], [u32, f32], memory=True)

# -- asynchronous copies to shared memory: cp.async (9.7.9.25) --------------------------------------------------------------

copy_async_16 = _asm("cp.async.cg.shared.global [$0], [$1], 16;", [], [u32, u64], memory=True)
# of 16 bytes the first `a2` are read, the rest of the destination becomes 0
copy_async_16_or_zero = _asm("cp.async.cg.shared.global [$0], [$1], 16, $2;", [], [u32, u64, u32], memory=True)
copy_async_4 = _asm("cp.async.ca.shared.global [$0], [$1], 4;", [], [u32, u64], memory=True)
copy_async_8 = _asm("cp.async.ca.shared.global [$0], [$1], 8;", [], [u32, u64], memory=True)
copy_commit = _asm("cp.async.commit_group;", [], [], memory=True)
COPY_WAIT = tuple(_asm(f"cp.async.wait_group {n};", [], [], memory=True) for n in range(8))  # all groups but the last n are there

# -- matrices: ldmatrix, mma (9.7.14) ---------------------------------------------------------------------------------------
# Fragments of m16n8k16, lane = 4 g + t. A, four registers: rows g, g + 8, g, g + 8 at k = 2t, 2t, 2t + 8, 2t + 8 (and + 1).
# B, two: column g at k = 2t, 2t + 8. C and D, four floats: row g at columns 2t, 2t + 1, then row g + 8.

load_matrix_4 = _asm("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];", [u32] * 4, [u32], memory=True)
load_matrix_4_transposed = _asm("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];", [u32] * 4, [u32], memory=True)

_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
mma_bf16 = _asm(_MMA.format("bf16"), [f32] * 4, [u32] * 6 + [f32] * 4, pure=True)
mma_f16 = _asm(_MMA.format("f16"), [f32] * 4, [u32] * 6 + [f32] * 4, pure=True)
MMA = {"bfloat16": mma_bf16, "float16": mma_f16}


# -- bits -------------------------------------------------------------------------------------------------------------------

permute_bytes = _asm("prmt.b32 $0, $1, $2, $3;", [u32], [u32, u32, u32], pure=True)  # prmt
and_or = _asm("lop3.b32 $0, $1, $2, $3, 0xEA;", [u32], [u32, u32, u32], pure=True)  # lop3: (a & b) | c
rotate_right = _asm("shf.r.wrap.b32 $0, $1, $1, $2;", [u32], [u32, u32], pure=True)  # shf: bits $1 by $2
float_of_bits = _asm("mov.b32 $0, $1;", [f32], [u32], pure=True)
bits_of_float = _asm("mov.b32 $0, $1;", [u32], [f32], pure=True)

# -- 16-bit pairs -----------------------------------------------------------------------------------------------------------

pack_bf16 = _asm("cvt.rn.bf16x2.f32 $0, $2, $1;", [u32], [f32, f32], pure=True)  # (low, high)
pack_f16 = _asm("cvt.rn.f16x2.f32 $0, $2, $1;", [u32], [f32, f32], pure=True)
# cvt.rn.f16x2.f32 needs compute capability 8.0; this does not
pack_f16_portable = _asm(
    "{ .reg .b16 l, h; cvt.rn.f16.f32 l, $1; cvt.rn.f16.f32 h, $2; mov.b32 $0, {l, h}; }", [u32], [f32, f32], pure=True
)
low_f16 = _asm("{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l; }", [f32], [u32], pure=True)
high_f16 = _asm("{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h; }", [f32], [u32], pure=True)
low_bf16 = _asm("shl.b32 $0, $1, 16;", [f32], [u32], pure=True)
high_bf16 = _asm("and.b32 $0, $1, 0xffff0000;", [f32], [u32], pure=True)
half_f16 = _asm("cvt.rn.f16.f32 $0, $1;", [u16], [f32], pure=True)
half_bf16 = _asm("cvt.rn.bf16.f32 $0, $1;", [u16], [f32], pure=True)
float_f16 = _asm("cvt.f32.f16 $0, $1;", [f32], [u16], pure=True)
float_bf16 = _asm("{ .reg .b16 z; mov.u16 z, 0; mov.b32 $0, {z, $1}; }", [f32], [u16], pure=True)
pack_e4m3 = _asm("cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", [u16], [f32, f32], pure=True)  # (low, high); compute capability 8.9

PACK = {"bfloat16": pack_bf16, "float16": pack_f16}
LOW = {"bfloat16": low_bf16, "float16": low_f16}
HIGH = {"bfloat16": high_bf16, "float16": high_f16}
HALF = {"bfloat16": half_bf16, "float16": half_f16}
FLOAT = {"bfloat16": float_bf16, "float16": float_f16}

# -- functions ----------------------------------------------------------------------------------------------------------------

exp2 = _asm("ex2.approx.ftz.f32 $0, $1;", [f32], [f32], pure=True)  # relative error 2^-22
reciprocal = _asm("rcp.approx.ftz.f32 $0, $1;", [f32], [f32], pure=True)  # 1 ulp
rsqrt = _asm("rsqrt.approx.ftz.f32 $0, $1;", [f32], [f32], pure=True)  # relative error 2^-22.9
log2 = _asm("lg2.approx.ftz.f32 $0, $1;", [f32], [f32], pure=True)  # absolute error 2^-22 near 1, relative elsewhere

# -- a warp -------------------------------------------------------------------------------------------------------------------

shuffle_xor = _asm("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", [u32], [u32, u32], memory=True)
shuffle_xor_f32 = _asm("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", [f32], [f32, u32], memory=True)
shuffle_first = _asm("shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", [u32], [u32], memory=True)  # lane 0's
shuffle_first_f32 = _asm("shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", [f32], [f32], memory=True)
any_lane = _asm(  # 1 where a0 is not 0 in some lane: the same answer in all
    "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff; selp.u32 $0, 1, 0, p; }", [u32], [u32], memory=True
)
warp_barrier = _asm("bar.warp.sync 0xffffffff;", [], [], memory=True)

# -- between thread blocks ------------------------------------------------------------------------------------------------------

# Programmatic dependent launch, for kernels marked `early` (launch.Kernel). Comments here: `launch.to_ptx` writes griddepcontrol in
# their place for cards that have it (cc 9.0). Before `after_previous` a kernel may only read what no kernel writes: weights. The next
# kernel's thread blocks are started where there is room once all of this one's have passed `next_may_begin` or ended: early in
# a small kernel, whose multiprocessors are mostly free; behind the work of one that fills them, or the next one's blocks would
# crowd where room happens to be.
after_previous = _asm(AFTER_PREVIOUS, [], [], memory=True)
next_may_begin = _asm(NEXT_MAY_BEGIN, [], [], memory=True)
fence_device = _asm("fence.acq_rel.gpu;", [], [], memory=True)  # membar: what was written before is seen by who sees what comes after
add_counter = _asm("atom.add.acq_rel.gpu.global.u32 $0, [$1], $2;", [u32], [u64, u32], memory=True)  # the value before

# -- attention: exact pieces of an online softmax -------------------------------------------------------------------------------

move_matrix_transposed = _asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", [u32], [u32], memory=True)  # movmatrix, sm_75
# `a1` threads, whole warps, that all name barrier a0 of 1 .. 15. Of 32 threads it is a warp's barrier that stays one instruction:
# nvJitLink makes a call of bar.warp.sync on compute capability 8.x, and registers that live across it spill.
some_barrier = _asm("bar.sync $0, $1;", [], [u32, u32], memory=True)
maximum = _asm("max.f32 $0, $1, $2;", [f32], [f32, f32], pure=True)  # of a number and NaN, the number
fma = _asm("fma.rn.f32 $0, $1, $2, $3;", [f32], [f32, f32, f32], pure=True)  # a * b + c that no compiler splits or joins otherwise

# -- sampling: float32 arithmetic as written, wide integers, a sum in shared memory ------------------------------------------------
# `.rn` on add, sub and mul keeps the compiler from joining them: the results are those of the CPU, bit for bit.

add_exact = _asm("add.rn.f32 $0, $1, $2;", [f32], [f32, f32], pure=True)
subtract_exact = _asm("sub.rn.f32 $0, $1, $2;", [f32], [f32, f32], pure=True)
multiply_exact = _asm("mul.rn.f32 $0, $1, $2;", [f32], [f32, f32], pure=True)
divide_exact = _asm("div.rn.f32 $0, $1, $2;", [f32], [f32, f32], pure=True)
multiply_high_64 = _asm("mul.hi.u64 $0, $1, $2;", [u64], [u64, u64], pure=True)  # the upper half of the product
_SHUFFLE_64 = (
    "{{ .reg .b32 l, h; mov.b64 {{l, h}}, $1; shfl.sync.{0}.b32 l, l, $2, {1}, 0xffffffff; "
    "shfl.sync.{0}.b32 h, h, $2, {1}, 0xffffffff; mov.b64 $0, {{l, h}}; }}"
)
shuffle_xor_64 = _asm(_SHUFFLE_64.format("bfly", "0x1f"), [u64], [u64, u32], memory=True)
shuffle_up = _asm("shfl.sync.up.b32 $0, $1, $2, 0x0, 0xffffffff;", [u32], [u32, u32], memory=True)  # from lane - a1; else its own
shuffle_up_64 = _asm(_SHUFFLE_64.format("up", "0x0"), [u64], [u64, u32], memory=True)
shuffle_from_64 = _asm(_SHUFFLE_64.format("idx", "0x1f"), [u64], [u64, u32], memory=True)  # from lane a1
load_f32 = _asm("ld.global.f32 $0, [$1];", [f32], [u64], memory=True)
add_shared = _asm("atom.shared.add.u32 $0, [$1], $2;", [u32], [u32, u32], memory=True)  # the value before
double_of_bits = _asm("mov.b64 $0, $1;", [f64], [u64], pure=True)
ceiling = _asm("cvt.rpi.f64.f64 $0, $1;", [f64], [f64], pure=True)

# -- between cards: what one writes with release the other sees after acquire (8.5, memory consistency) -----------------------------

# 16 bytes of another card, number by number: each is seen whole, in no order among them
store_relaxed_system_128 = _asm("st.relaxed.sys.global.v4.u32 [$0], {$1,$2,$3,$4};", [], [u64, u32, u32, u32, u32], memory=True)
load_relaxed_system_128 = _asm("ld.relaxed.sys.global.v4.u32 {$0,$1,$2,$3}, [$4];", [u32] * 4, [u64], memory=True)

# -- Hopper: barriers in shared memory that know phases, and the asynchronous proxy (mbarrier, fence.proxy; cc 9.0) -------------------

mbarrier_init = _asm("mbarrier.init.shared::cta.b64 [$0], $1;", [], [u32, u32], memory=True)  # a1: arrivals of a phase
mbarrier_arrive = _asm("mbarrier.arrive.shared::cta.b64 _, [$0];", [], [u32], memory=True)
# 1 when the phase of parity a1 is over; may wait a while before it says 0
mbarrier_over = _asm(
    "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; selp.u32 $0, 1, 0, p; }", [u32], [u32, u32], memory=True
)
fence_async_proxy = _asm("fence.proxy.async.shared::cta;", [], [], memory=True)  # what this thread stored is seen by wgmma


def on_arrays(text: str, changed: tuple[Any, int], given: tuple[tuple[Any, int], ...], scalars: tuple[Any, ...] = ()) -> Any:
    """An intrinsic that emits `text` on the elements of local arrays: (changed array, *given arrays, *scalars).

    `changed` and `given`: element type and number of elements. Operands: `$0 ..` the elements of the changed array, in place; then, after
    as many numbers that `text` does not use, those of the given arrays in order, then the scalars.
    """
    arrays = (changed, *given)
    first = changed[1]
    constraints = ",".join(
        [f"={_CONSTRAINT[changed[0]]}"] * first
        + [str(i) for i in range(first)]
        + [_CONSTRAINT[kind] for kind, count in given for _ in range(count)]
        + [_CONSTRAINT[kind] for kind in scalars]
        + ["~{memory}"]
    )
    operand_types = [_LLVM[kind] for kind, count in arrays for _ in range(count)] + [_LLVM[kind] for kind in scalars]
    returns = ir.LiteralStructType([_LLVM[changed[0]]] * first)

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        places = []
        for (_, count), kind, operand in zip(arrays, signature.args, operands, strict=False):
            data = context.make_array(kind)(context, builder, value=operand).data
            places += [builder.gep(data, [ir.Constant(ir.IntType(32), i)], inbounds=True) for i in range(count)]
        values = [builder.load(place) for place in places] + list(operands[len(arrays) :])
        results = builder.call(ir.InlineAsm(ir.FunctionType(returns, operand_types), text, constraints, side_effect=True), values)
        for i in range(first):
            builder.store(builder.extract_value(results, i), places[i])
        return context.get_dummy_value()

    def typed(typingctx: Any, *kinds: Any) -> Any:
        if any(not isinstance(kind, types.Array) for kind in kinds[: len(arrays)]):
            return None
        return types.void(*kinds[: len(arrays)], *scalars), generate

    typed.__signature__ = _signature(len(arrays) + len(scalars))  # type: ignore[attr-defined]
    return intrinsic(typed)
