"""Activations in 8 bits, a scale a token: `quantize_rows` of `engine/eight_bit.py`, alone and after SiLU x up.

    x        [T, K] 16-bit                         q  [T, K'] int8 or e4m3, K' = K padded with zeros
    gate_up  [T, gate I | up I] 16-bit, or int32   scales  float32 [T], or [K' / 128, T] of blocks of 128 channels
             sums of an int8 product with the scales of its rows and of its weight

s = max |x| / 127 or max |x| / 448 of a row (of a block of it), q = x / s rounded.

work split: one thread block a row, whose numbers stay in registers between the maximum and the rounding: read once, written once.
The maximum is of the bits of |x| as integers, among which a NaN is the largest: a row that holds a number that is none keeps one
in its scale. Knows no weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.cuda import ptx
from engine.cuda.elementwise import LOG2E, VECTOR, norm_threads
from engine.cuda.launch import Kernel, Variant
from engine.cuda.target import cuda, pointer, types
from engine.eight_bit import E4M3_LARGEST, INT8_LARGEST

ROUNDING = 12582912.0  # 1.5 * 2^23: added to a float below 2^22, its low byte is the float as an integer
MAGNITUDE = 0x7FFFFFFF

i32, u32, u64, f32 = types.int32, types.uint32, types.uint64, types.float32
WORDS, FLOATS = pointer(u32), pointer(f32)


def rows_variant(inputs: int, width: int, kind: str, dtype: str) -> Variant:
    """Of `quantize_rows`."""
    return Variant(__name__, "quantize_rows", (inputs, width, kind, dtype, norm_threads(width)))


def silu_variant(intermediate: int, kind: str, dtype: str) -> Variant:
    """Of `silu_quantize`."""
    return Variant(__name__, "silu_quantize", (intermediate, kind, dtype, norm_threads(intermediate)))


def _writer(kind: str) -> tuple[Callable[..., Any], Callable[..., None], float]:
    """Device functions (the factor of a maximum), (8 numbers from `values[v]` times it to address `to`); the largest number."""
    eight_bits = kind != "int8"
    largest_number = E4M3_LARGEST if eight_bits else INT8_LARGEST
    most_number, rounding = f32(largest_number), f32(ROUNDING)
    add_exact, multiply_exact, bits, permute = ptx.add_exact, ptx.multiply_exact, ptx.bits_of_float, ptx.permute_bytes

    @cuda.jit(device=True, inline="always")
    def factor(most: Any) -> Any:
        largest = ptx.float_of_bits(most)
        return ptx.divide_exact(most_number, largest) if largest > f32(0.0) else f32(0.0)

    @cuda.jit(device=True, inline="always")
    def four_bytes(a: Any, b: Any, c: Any, d: Any) -> Any:
        if eight_bits:
            return u32(u32(ptx.pack_e4m3(a, b)) | u32(u32(ptx.pack_e4m3(c, d)) << u32(16)))
        first = permute(bits(add_exact(a, rounding)), bits(add_exact(b, rounding)), u32(0x0040))
        second = permute(bits(add_exact(c, rounding)), bits(add_exact(d, rounding)), u32(0x0040))
        return permute(first, second, u32(0x5410))

    @cuda.jit(device=True, inline="always")
    def store(values: Any, v: Any, by: Any, to: Any) -> None:
        a = four_bytes(
            multiply_exact(values[v], by), multiply_exact(values[v + 1], by), multiply_exact(values[v + 2], by),
            multiply_exact(values[v + 3], by),
        )  # fmt: skip
        b = four_bytes(
            multiply_exact(values[v + 4], by), multiply_exact(values[v + 5], by), multiply_exact(values[v + 6], by),
            multiply_exact(values[v + 7], by),
        )  # fmt: skip
        ptx.store_64(to, a, b)

    return factor, store, largest_number


def _row_maximum(threads: int) -> Callable[..., Any]:
    """A device function (a thread's maximum, 32 words of shared memory): that of the row, in every thread."""
    warps = threads // 32
    lane_steps, warp_steps = (16, 8, 4, 2, 1), tuple(n for n in (16, 8, 4, 2, 1) if n < warps)

    @cuda.jit(device=True, inline="always")
    def row_maximum(most: Any, partial: Any) -> Any:
        thread = i32(cuda.threadIdx.x)
        for lanes in lane_steps:
            most = max(most, ptx.shuffle_xor(most, u32(lanes)))
        if warps > 1:
            if thread & i32(31) == i32(0):
                partial[thread >> i32(5)] = most
            cuda.syncthreads()
            lane = thread & i32(31)
            most = partial[lane] if lane < i32(warps) else u32(0)
            for lanes in warp_steps:
                most = max(most, ptx.shuffle_xor(most, u32(lanes)))
            most = ptx.shuffle_first(most)
        return most

    return row_maximum


def quantize_rows(inputs: int, width: int, kind: str, dtype: str, threads: int) -> Kernel:
    """(x, q, scales, rows of the scales)."""
    low, high, bits = ptx.LOW[dtype], ptx.HIGH[dtype], ptx.bits_of_float
    vectors, all_vectors = inputs // VECTOR, width // VECTOR
    rounds = -(-all_vectors // threads)
    whole = vectors == all_vectors and vectors % threads == 0
    by_block, numbers, magnitude = kind == "fp8 blocks", VECTOR * rounds, u32(MAGNITUDE)
    factor, store, largest_number = _writer(kind)
    step, row_maximum = f32(1.0 / largest_number), _row_maximum(threads)
    multiply_exact = ptx.multiply_exact

    def kernel(x, q, scales, scale_rows):  # type: ignore[no-untyped-def]
        row, thread = u32(cuda.blockIdx.x), i32(cuda.threadIdx.x)
        source = ptx.address(x) + u64(row) * u64(2 * inputs)
        target = ptx.address(q) + u64(row) * u64(width)
        values = cuda.local.array(numbers, f32)
        mosts = cuda.local.array(rounds, u32)
        partial = cuda.shared.array(32, u32)
        for r in range(rounds):
            at = thread + i32(r * threads)
            most = u32(0)
            if whole or at < i32(vectors):
                words = ptx.load_constant_128(source + u64(u32(at) * u32(16)))
                for i in range(4):
                    values[8 * r + 2 * i], values[8 * r + 2 * i + 1] = low(words[i]), high(words[i])
                    most = max(most, max(u32(bits(low(words[i])) & magnitude), u32(bits(high(words[i])) & magnitude)))
            else:
                for i in range(VECTOR):
                    values[8 * r + i] = f32(0.0)
            mosts[r] = most
        if by_block:
            for r in range(rounds):
                for lanes in (8, 4, 2, 1):
                    mosts[r] = max(mosts[r], ptx.shuffle_xor(mosts[r], u32(lanes)))
        else:
            most = mosts[0]
            for r in range(1, rounds):
                most = max(most, mosts[r])
            most = row_maximum(most, partial)
            for r in range(rounds):
                mosts[r] = most
            if thread == i32(0):
                scales[row] = multiply_exact(ptx.float_of_bits(most), step)
        for r in range(rounds):
            at = thread + i32(r * threads)
            if whole or at < i32(all_vectors):
                store(values, 8 * r, factor(mosts[r]), target + u64(u32(at) * u32(8)))
                if by_block and thread & i32(15) == i32(0):
                    scales[u64(u32(at) >> u32(4)) * u64(scale_rows) + u64(row)] = multiply_exact(ptx.float_of_bits(mosts[r]), step)

    return Kernel(kernel, (WORDS, WORDS, FLOATS, u32), threads)


def silu_quantize(intermediate: int, kind: str, dtype: str, threads: int) -> Kernel:
    """(gate_up, row scales, weight scales, q, scales): of an int8 product its sums and scales, else 16-bit numbers (scales unread)."""
    low, high, bits, number = ptx.LOW[dtype], ptx.HIGH[dtype], ptx.bits_of_float, ptx.float_of_bits
    vectors = intermediate // VECTOR
    rounds, whole = -(-vectors // threads), vectors % threads == 0
    numbers, magnitude, from_sums = VECTOR * rounds, u32(MAGNITUDE), kind == "int8"
    number_bytes = 4 if from_sums else 2
    minus_log2e, one = f32(-LOG2E), f32(1.0)
    factor, store, largest_number = _writer(kind)
    step, row_maximum = f32(1.0 / largest_number), _row_maximum(threads)

    @cuda.jit(device=True, inline="always")
    def gated(gate: Any, up: Any) -> Any:
        return gate * ptx.reciprocal(one + ptx.exp2(gate * minus_log2e)) * up

    @cuda.jit(device=True, inline="always")
    def of_sums(values: Any, v: Any, gate: Any, scales: Any, scale: Any) -> None:
        for half in range(2):
            g, u = ptx.load_constant_128(gate + u64(16 * half)), ptx.load_constant_128(gate + u64(4 * intermediate + 16 * half))
            a, b = ptx.load_constant_128(scales + u64(16 * half)), ptx.load_constant_128(scales + u64(4 * intermediate + 16 * half))
            for i in range(4):
                values[v + 4 * half + i] = gated(f32(i32(g[i])) * (scale * number(a[i])), f32(i32(u[i])) * (scale * number(b[i])))

    @cuda.jit(device=True, inline="always")
    def of_halves(values: Any, v: Any, gate: Any) -> None:
        g, u = ptx.load_constant_128(gate), ptx.load_constant_128(gate + u64(2 * intermediate))
        for i in range(4):
            values[v + 2 * i], values[v + 2 * i + 1] = gated(low(g[i]), low(u[i])), gated(high(g[i]), high(u[i]))

    def kernel(gate_up, row_scales, weight_scales, q, scales):  # type: ignore[no-untyped-def]
        row, thread = u32(cuda.blockIdx.x), i32(cuda.threadIdx.x)
        source = ptx.address(gate_up) + u64(row) * u64(2 * number_bytes * intermediate)
        target = ptx.address(q) + u64(row) * u64(intermediate)
        values = cuda.local.array(numbers, f32)
        partial = cuda.shared.array(32, u32)
        most = u32(0)
        for r in range(rounds):
            at = thread + i32(r * threads)
            if whole or at < i32(vectors):
                gate = source + u64(u32(at) * u32(8 * number_bytes))
                if from_sums:
                    of_sums(values, 8 * r, gate, ptx.address(weight_scales) + u64(u32(at) * u32(32)), row_scales[row])
                else:
                    of_halves(values, 8 * r, gate)
                for i in range(VECTOR):
                    most = max(most, u32(bits(values[8 * r + i]) & magnitude))
        most = row_maximum(most, partial)
        if thread == i32(0):
            scales[row] = ptx.multiply_exact(number(most), step)
        by = factor(most)
        for r in range(rounds):
            at = thread + i32(r * threads)
            if whole or at < i32(vectors):
                store(values, 8 * r, by, target + u64(u32(at) * u32(8)))

    return Kernel(kernel, (WORDS, FLOATS, WORDS, WORDS, FLOATS), threads)
