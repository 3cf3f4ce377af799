"""What lies between the products: embed, RMSNorm with and without the residual sum, SiLU x up, rows taken, tables updated.

`embed`, `rms_norm`, `silu_mul` of `engine/reference.py`; `AddRmsNorm` is `ReferenceBackend.add_rms_norm`; `TakeRows` its `take`.
Knows no model and owns no memory.

Layout: rows of 16-bit numbers, consecutive, of a multiple of 8 numbers, so that every access is one of 128 bits (8 numbers, a
"vector"). The residual stream and norm weights are float32: what every layer adds to is not rounded at every layer.

    residual           float32 [T, hidden]
    x, out             [T, hidden]           gate_up [T, gate I | up I] -> out [T, I]
    weight             float32 [hidden]      ids [slots + 1, session_len + 1], tables [slots + 1, blocks_per_slot] int32

Work split:

    a norm      one thread block a row; thread i holds vectors i, i + threads, .. in registers: global memory is passed over once.
                Sum of squares: float32, lanes of a warp (shuffles), then the warps (32 floats of shared memory), in a fixed order:
                a row's result does not depend on the rows beside it
    silu_mul    one thread a vector of `out`
    copies      one thread block a row

`AddRmsNorm` is exactly "add, then RmsNorm". It and `SiluMul` also take what a product left in parts (`engine/cuda/parts.py`).
Portable: float16 variants use no instruction that compute capability 7.5 lacks.

Measured on an H200 (hidden 4,096): 1.1 to 2 us each at one row; at 8,192 rows norms, add_norm and silu_mul at 85 to 94 % of what a read
kernel reaches, embed at 55 %. Threads a row is a factory constant; no other was tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engine.cuda import ptx
from engine.cuda.launch import Kernel, Library, Variant
from engine.cuda.parts import DTYPES, PACK, check_parts, part_adder, part_arguments
from engine.cuda.target import cuda, pointer, types

VECTOR = 8  # 16-bit numbers of a 128-bit access
COPY_THREADS = 128
MAX_HIDDEN = 16384
LOG2E = 1.4426950408889634

i32, u32, u64, f32 = types.int32, types.uint32, types.uint64, types.float32
WORDS, INTS, FLOATS = pointer(u32), pointer(i32), pointer(f32)


def norm_threads(hidden: int) -> int:
    """Threads of a row: a vector each up to 512 of them, whole warps."""
    return min(512, -(-hidden // VECTOR // 32) * 32)


# -- kernels --------------------------------------------------------------------------------------------------------------------


def block_adder(threads: int) -> Callable[..., Any]:
    """A device function (total, partial) -> the sum of `total` over the thread block, in all its threads; `partial`: 32 floats of
    shared memory. Lanes of a warp first, then the warps: a fixed order."""
    warps = threads // 32
    lane_steps, warp_steps = (16, 8, 4, 2, 1), tuple(n for n in (16, 8, 4, 2, 1) if n < warps)
    zero = f32(0.0)

    @cuda.jit(device=True, inline="always")
    def add_up(total: Any, partial: Any) -> Any:
        for step in lane_steps:
            total += ptx.shuffle_xor_f32(total, u32(step))
        if warps > 1:
            thread = i32(cuda.threadIdx.x)
            if thread & i32(31) == i32(0):
                partial[thread >> i32(5)] = total
            cuda.syncthreads()
            lane = thread & i32(31)
            total = partial[lane] if lane < i32(warps) else zero
            for step in warp_steps:
                total += ptx.shuffle_xor_f32(total, u32(step))
            total = ptx.shuffle_first_f32(total)
        return total

    return add_up


def rms_norm(hidden: int, dtype: str, add: str, threads: int) -> Kernel:
    """(residual, weight, out, eps); add "rows": (x, residual, weight, out, eps); "parts": (parts, how many, bytes of one, residual, ..)."""
    pack, low, high = PACK[dtype], ptx.LOW[dtype], ptx.HIGH[dtype]
    vectors = hidden // VECTOR
    rounds = -(-vectors // threads)  # vectors of a thread
    whole = vectors % threads == 0
    numbers, words = VECTOR * rounds, 4 * rounds
    inverse = f32(1.0 / hidden)
    row_bytes, zero = 2 * hidden, f32(0.0)
    add_parts, add_up = part_adder(VECTOR), block_adder(threads)

    @cuda.jit(device=True, inline="always")
    def normalise(values: Any, weight: Any, out: Any, eps: Any, partial: Any) -> None:
        thread = i32(cuda.threadIdx.x)
        total = zero
        for i in range(numbers):
            total += values[i] * values[i]
        scale = ptx.rsqrt(add_up(total, partial) * inverse + eps)
        for r in range(rounds):
            at = thread + i32(r * threads)
            if whole or at < i32(vectors):
                w = ptx.address(weight) + u64(u32(at) * u32(32))
                w0, w1, w2, w3 = ptx.load_constant_128(w)
                w4, w5, w6, w7 = ptx.load_constant_128(w + u64(16))
                a = pack(values[8 * r] * scale * ptx.float_of_bits(w0), values[8 * r + 1] * scale * ptx.float_of_bits(w1))
                b = pack(values[8 * r + 2] * scale * ptx.float_of_bits(w2), values[8 * r + 3] * scale * ptx.float_of_bits(w3))
                c = pack(values[8 * r + 4] * scale * ptx.float_of_bits(w4), values[8 * r + 5] * scale * ptx.float_of_bits(w5))
                d = pack(values[8 * r + 6] * scale * ptx.float_of_bits(w6), values[8 * r + 7] * scale * ptx.float_of_bits(w7))
                ptx.store_128(out + u64(u32(at) * u32(16)), a, b, c, d)

    @cuda.jit(device=True, inline="always")
    def load(row: Any, packed: Any) -> None:
        thread = i32(cuda.threadIdx.x)
        for r in range(rounds):
            at = thread + i32(r * threads)
            if whole or at < i32(vectors):
                packed[4 * r], packed[4 * r + 1], packed[4 * r + 2], packed[4 * r + 3] = ptx.load_128(row + u64(u32(at) * u32(16)))
            else:
                packed[4 * r], packed[4 * r + 1], packed[4 * r + 2], packed[4 * r + 3] = u32(0), u32(0), u32(0), u32(0)

    @cuda.jit(device=True, inline="always")
    def load_wide(row: Any, values: Any) -> None:
        """float32 numbers of the row, 0 beyond it."""
        thread = i32(cuda.threadIdx.x)
        for r in range(rounds):
            at = thread + i32(r * threads)
            for half in range(2):
                first = 8 * r + 4 * half
                if whole or at < i32(vectors):
                    w = ptx.load_128(row + u64(u32(at) * u32(32)) + u64(16 * half))
                    values[first], values[first + 1] = ptx.float_of_bits(w[0]), ptx.float_of_bits(w[1])
                    values[first + 2], values[first + 3] = ptx.float_of_bits(w[2]), ptx.float_of_bits(w[3])
                else:
                    values[first], values[first + 1], values[first + 2], values[first + 3] = zero, zero, zero, zero

    def norm_kernel(residual, weight, out, eps):  # type: ignore[no-untyped-def]
        ptx.next_may_begin()
        ptx.after_previous()
        row = u64(cuda.blockIdx.x) * u64(row_bytes)
        values = cuda.local.array(numbers, f32)
        partial = cuda.shared.array(32, f32)
        load_wide(ptx.address(residual) + row + row, values)
        normalise(values, weight, ptx.address(out) + row, eps, partial)

    @cuda.jit(device=True, inline="always")
    def load_parts(row: Any, values: Any, parts: Any, stride: Any) -> None:
        thread = i32(cuda.threadIdx.x)
        for r in range(rounds):
            at = thread + i32(r * threads)
            if whole or at < i32(vectors):
                add_parts(values, 8 * r, row + u64(u32(at) * u32(32)), parts, stride)
            else:
                for i in range(VECTOR):
                    values[8 * r + i] = zero

    @cuda.jit(device=True, inline="always")
    def store_wide(row: Any, values: Any) -> None:
        thread = i32(cuda.threadIdx.x)
        for r in range(rounds):
            at = thread + i32(r * threads)
            if whole or at < i32(vectors):
                to = row + u64(u32(at) * u32(32))
                for half in range(2):
                    first = 8 * r + 4 * half
                    ptx.store_128(
                        to + u64(16 * half), ptx.bits_of_float(values[first]), ptx.bits_of_float(values[first + 1]),
                        ptx.bits_of_float(values[first + 2]), ptx.bits_of_float(values[first + 3]),
                    )  # fmt: skip

    def add_norm_kernel(x, residual, weight, out, eps):  # type: ignore[no-untyped-def]
        ptx.next_may_begin()
        ptx.after_previous()
        row = u64(cuda.blockIdx.x) * u64(row_bytes)
        packed = cuda.local.array(words, u32)
        values = cuda.local.array(numbers, f32)
        partial = cuda.shared.array(32, f32)
        load(ptx.address(x) + row, packed)
        load_wide(ptx.address(residual) + row + row, values)
        for i in range(words):
            values[2 * i], values[2 * i + 1] = values[2 * i] + low(packed[i]), values[2 * i + 1] + high(packed[i])
        store_wide(ptx.address(residual) + row + row, values)
        normalise(values, weight, ptx.address(out) + row, eps, partial)

    def add_parts_kernel(parts, count, stride, residual, weight, out, eps):  # type: ignore[no-untyped-def]
        ptx.next_may_begin()
        ptx.after_previous()
        row = u64(cuda.blockIdx.x) * u64(row_bytes)
        values = cuda.local.array(numbers, f32)
        added = cuda.local.array(numbers, f32)
        partial = cuda.shared.array(32, f32)
        load_wide(ptx.address(residual) + row + row, values)
        load_parts(ptx.address(parts) + row + row, added, count, stride)
        for i in range(numbers):
            values[i] = values[i] + added[i]
        store_wide(ptx.address(residual) + row + row, values)
        normalise(values, weight, ptx.address(out) + row, eps, partial)

    if add == "parts":
        return Kernel(add_parts_kernel, (WORDS, u32, u64, WORDS, FLOATS, WORDS, f32), threads, early=True)
    if add == "rows":
        return Kernel(add_norm_kernel, (WORDS, WORDS, FLOATS, WORDS, f32), threads, early=True)
    return Kernel(norm_kernel, (WORDS, FLOATS, WORDS, f32), threads, early=True)


def silu_mul(intermediate: int, dtype: str, threads: int, parted: bool) -> Kernel:
    """(gate_up, out, vectors of out); parted: (parts, how many, bytes of one, out, vectors of out)."""
    pack, low, high = PACK[dtype], ptx.LOW[dtype], ptx.HIGH[dtype]
    per_row, minus_log2e, one = intermediate // VECTOR, f32(-LOG2E), f32(1.0)
    add_parts = part_adder(VECTOR)

    @cuda.jit(device=True, inline="always")
    def silu(x: Any) -> Any:
        return x * ptx.reciprocal(one + ptx.exp2(x * minus_log2e))

    @cuda.jit(device=True, inline="always")
    def both(gate: Any, up: Any) -> Any:
        return pack(silu(low(gate)) * low(up), silu(high(gate)) * high(up))

    def kernel(gate_up, out, count):  # type: ignore[no-untyped-def]
        ptx.next_may_begin()
        ptx.after_previous()
        at = u32(cuda.blockIdx.x) * u32(threads) + u32(cuda.threadIdx.x)
        if at < u32(count):
            row = at // u32(per_row)
            gate = ptx.address(gate_up) + (u64(at) + u64(row) * u64(per_row)) * u64(16)
            g0, g1, g2, g3 = ptx.load_constant_128(gate)
            u0, u1, u2, u3 = ptx.load_constant_128(gate + u64(16 * per_row))
            ptx.store_128(ptx.address(out) + u64(at) * u64(16), both(g0, u0), both(g1, u1), both(g2, u2), both(g3, u3))

    def parted_kernel(parts, number, stride, out, count):  # type: ignore[no-untyped-def]
        ptx.next_may_begin()
        ptx.after_previous()
        at = u32(cuda.blockIdx.x) * u32(threads) + u32(cuda.threadIdx.x)
        if at < u32(count):
            row = at // u32(per_row)
            gate = ptx.address(parts) + (u64(at) + u64(row) * u64(per_row)) * u64(32)
            g, u = cuda.local.array(VECTOR, f32), cuda.local.array(VECTOR, f32)
            add_parts(g, 0, gate, number, stride)
            add_parts(u, 0, gate + u64(32 * per_row), number, stride)
            for i in range(VECTOR):
                g[i] = silu(g[i]) * u[i]
            ptx.store_128(ptx.address(out) + u64(at) * u64(16), pack(g[0], g[1]), pack(g[2], g[3]), pack(g[4], g[5]), pack(g[6], g[7]))

    if parted:
        return Kernel(parted_kernel, (WORDS, u32, u64, WORDS, i32), threads, early=True)
    return Kernel(kernel, (WORDS, WORDS, i32), threads, early=True)


def embed(hidden: int, dtype: str) -> Kernel:
    """(table, ids, ids of a slot, token_slots, positions, out)."""
    vectors, threads = hidden // VECTOR, COPY_THREADS
    low, high, bits = ptx.LOW[dtype], ptx.HIGH[dtype], ptx.bits_of_float
    rounds, whole = -(-vectors // threads), vectors % threads == 0

    def kernel(table, ids, stride, token_slots, positions, out):  # type: ignore[no-untyped-def]
        ptx.next_may_begin()
        ptx.after_previous()
        token, thread = i32(cuda.blockIdx.x), i32(cuda.threadIdx.x)
        at = u64(token_slots[token]) * u64(stride) + u64(positions[token])
        source = ptx.address(table) + u64(ids[at]) * u64(2 * hidden)
        to = ptx.address(out) + u64(token) * u64(4 * hidden)
        for r in range(rounds):
            vector = thread + i32(r * threads)
            if whole or vector < i32(vectors):
                a, b, c, d = ptx.load_constant_128(source + u64(u32(vector) * u32(16)))
                place = to + u64(u32(vector) * u32(32))
                ptx.store_128(place, bits(low(a)), bits(high(a)), bits(low(b)), bits(high(b)))
                ptx.store_128(place + u64(16), bits(low(c)), bits(high(c)), bits(low(d)), bits(high(d)))

    return Kernel(kernel, (WORDS, INTS, i32, INTS, INTS, WORDS), threads, early=True)


def take_rows(hidden: int) -> Kernel:
    """(x, indices, out)."""
    vectors, threads = hidden // VECTOR, COPY_THREADS
    rounds, whole = -(-vectors // threads), vectors % threads == 0

    def kernel(x, indices, out):  # type: ignore[no-untyped-def]
        ptx.next_may_begin()
        ptx.after_previous()
        row, thread = i32(cuda.blockIdx.x), i32(cuda.threadIdx.x)
        source = ptx.address(x) + u64(indices[row]) * u64(2 * hidden)
        to = ptx.address(out) + u64(row) * u64(2 * hidden)
        for r in range(rounds):
            vector = thread + i32(r * threads)
            if whole or vector < i32(vectors):
                a, b, c, d = ptx.load_constant_128(source + u64(u32(vector) * u32(16)))
                ptx.store_128(to + u64(u32(vector) * u32(16)), a, b, c, d)

    return Kernel(kernel, (WORDS, INTS, WORDS), threads, early=True)


def apply_updates() -> Kernel:
    """(tables, entries of a slot, updates, how many)."""

    def kernel(tables, stride, updates, count):  # type: ignore[no-untyped-def]
        ptx.next_may_begin()
        ptx.after_previous()
        at = i32(cuda.blockIdx.x) * i32(COPY_THREADS) + i32(cuda.threadIdx.x)
        if at < count:
            entry = i32(3) * at
            tables[u64(updates[entry]) * u64(stride) + u64(updates[entry + i32(1)])] = updates[entry + i32(2)]

    return Kernel(kernel, (INTS, i32, INTS, i32), COPY_THREADS, early=True)


# -- operations -----------------------------------------------------------------------------------------------------------------


def check_rows(what: str, x: torch.Tensor, rows: int, width: int, dtype: torch.dtype) -> None:
    """ValueError unless x is [rows, width] of dtype, consecutive."""
    if x.shape != (rows, width) or x.dtype != dtype or not x.is_contiguous():
        raise ValueError(f"{what} is {x.dtype} {tuple(x.shape)}, not consecutive {dtype} {(rows, width)}")


def _check_width(what: str, width: int, most: int = 1 << 20) -> None:
    if width % VECTOR or not 2 * VECTOR <= width <= most:
        raise ValueError(f"{what} is {width}; a multiple of {VECTOR} from {2 * VECTOR} to {most} is needed")


class RmsNorm:
    """out = rms_norm(residual) * weight. residual float32 [T, hidden], out in the computing dtype, weight float32 [hidden]."""

    def __init__(self, library: Library, hidden: int, dtype: str, threads: int = 0) -> None:
        _check_width("hidden", hidden, MAX_HIDDEN)
        self._library, self._hidden, self._dtype = library, hidden, DTYPES[dtype]
        self._variant = Variant(__name__, "rms_norm", (hidden, dtype, "", threads or norm_threads(hidden)))
        self.variants = (self._variant,)

    def __call__(self, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float) -> None:
        check_rows("residual", residual, len(out), self._hidden, torch.float32)
        check_rows("out", out, len(out), self._hidden, self._dtype)
        if len(out):
            self._library[self._variant](len(out), residual, weight, out, eps)


class AddRmsNorm:
    """residual += x, out = rms_norm(residual) * weight. [T, hidden], x and out in the computing dtype, residual float32; weight
    float32 [hidden]. `out` may be the memory of x. x may be the parts of a product instead, float32 [S, T, hidden].
    """

    def __init__(self, library: Library, hidden: int, dtype: str, threads: int = 0) -> None:
        _check_width("hidden", hidden, MAX_HIDDEN)
        self._library, self._hidden, self._dtype = library, hidden, DTYPES[dtype]
        threads = threads or norm_threads(hidden)
        self.variants = tuple(Variant(__name__, "rms_norm", (hidden, dtype, add, threads)) for add in ("rows", "parts"))

    def __call__(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float) -> None:
        check_rows("residual", residual, len(out), self._hidden, torch.float32)
        check_rows("out", out, len(out), self._hidden, self._dtype)
        parted = x.ndim == 3
        if parted:
            check_parts("x", x, len(out), self._hidden)
        else:
            check_rows("x", x, len(out), self._hidden, self._dtype)
        if len(out):
            given = part_arguments(x) if parted else (x,)
            self._library[self.variants[parted]](len(out), *given, residual, weight, out, eps)


class SiluMul:
    """out [T, I] = silu(gate) * up of gate_up [T, gate | up], in the computing dtype, or of its parts, float32 [S, T, gate | up]."""

    def __init__(self, library: Library, intermediate: int, dtype: str, threads: int = 256) -> None:
        _check_width("the intermediate size", intermediate)
        self._library, self._intermediate, self._dtype, self._threads = library, intermediate, DTYPES[dtype], threads
        self.variants = tuple(Variant(__name__, "silu_mul", (intermediate, dtype, threads, parted)) for parted in (False, True))

    def __call__(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        parted = gate_up.ndim == 3
        if parted:
            check_parts("gate_up", gate_up, len(out), 2 * self._intermediate)
        else:
            check_rows("gate_up", gate_up, len(out), 2 * self._intermediate, self._dtype)
        check_rows("out", out, len(out), self._intermediate, self._dtype)
        vectors = len(out) * self._intermediate // VECTOR
        if vectors:
            given = part_arguments(gate_up) if parted else (gate_up,)
            self._library[self.variants[parted]](-(-vectors // self._threads), *given, out, vectors)


class Embed:
    """out[t] = table[ids[token_slots[t], positions[t]]]; table [vocab, hidden] in the computing dtype, out float32 [T, hidden]."""

    def __init__(self, library: Library, hidden: int, dtype: str) -> None:
        _check_width("hidden", hidden)
        self._library, self._hidden, self._dtype = library, hidden, DTYPES[dtype]
        self._variant = Variant(__name__, "embed", (hidden, dtype))
        self.variants = (self._variant,)

    def __call__(
        self, table: torch.Tensor, ids: torch.Tensor, token_slots: torch.Tensor, positions: torch.Tensor, out: torch.Tensor
    ) -> None:
        check_rows("table", table, len(table), self._hidden, self._dtype)
        check_rows("out", out, len(positions), self._hidden, torch.float32)
        if len(out):
            self._library[self._variant](len(out), table, ids, ids.stride(0), token_slots, positions, out)


class TakeRows:
    """out[i] = x[indices[i]]; x [T, hidden], out [S, hidden] of one 16-bit dtype, indices int32 [S]."""

    def __init__(self, library: Library, hidden: int) -> None:
        _check_width("hidden", hidden)
        self._library, self._hidden = library, hidden
        self._variant = Variant(__name__, "take_rows", (hidden,))
        self.variants = (self._variant,)

    def __call__(self, x: torch.Tensor, indices: torch.Tensor, out: torch.Tensor) -> None:
        check_rows("x", x, len(x), self._hidden, out.dtype)
        check_rows("out", out, len(indices), self._hidden, out.dtype)
        if len(out):
            self._library[self._variant](len(out), x, indices, out)


class ApplyUpdates:
    """tables[slot, index] = block for each row (slot, index, block) of updates int32 [U, 3]; equal rows may repeat."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._variant = Variant(__name__, "apply_updates")
        self.variants = (self._variant,)

    def __call__(self, tables: torch.Tensor, updates: torch.Tensor) -> None:
        if len(updates):
            self._library[self._variant](-(-len(updates) // COPY_THREADS), tables, tables.stride(0), updates, len(updates))
