"""`rotate` and `quantize` of engine/kv_quant.py by one warp that holds a head in registers. Device functions that kernels inline.

A lane holds words (two numbers each) of the head as float32: `held` of them, in x[2 i], x[2 i + 1]. `word_of(i, lane)` says which word
the i-th is, int32; head_dim / 2 or more: none. Scale and zero are rounded by integer arithmetic, exactly as on the CPU, and on
cards before compute capability 8.0 too. Knows no layout of the pool and no rope.
"""

from __future__ import annotations

from typing import Any

from engine import kv_quant
from engine.cuda import ptx
from engine.cuda.target import cuda, types

i32, u32, u64, f32 = types.int32, types.uint32, types.uint64, types.float32
LANE_STEPS = (1, 2, 4, 8, 16)
NAN_PAIR = 0x7FC07FC0
TO_INTEGER = 2.0**23  # added to a number from 0 to 2^22, leaves the nearest integer in the low bits, ties to even
NONE = -3.0e38


def rotator(head_dim: int) -> Any:
    """rotate(x, lane): heads whose i-th word is lane + 32 i; head_dim a multiple of 64."""
    size, words = kv_quant.rotated(head_dim, 4), head_dim // 64
    numbers, factor = 2 * words, f32(size**-0.5)

    @cuda.jit(device=True, inline="always")
    def rotate(x, lane):  # type: ignore[no-untyped-def]
        for i in range(words):
            a, b = x[2 * i], x[2 * i + 1]
            x[2 * i], x[2 * i + 1] = a + b, a - b
        for step in LANE_STEPS:
            for i in range(numbers):
                other = ptx.shuffle_xor_f32(x[i], u32(step))
                x[i] = other + x[i] if (u32(lane) & u32(step)) == u32(0) else other - x[i]
        if size == 128:
            for i in range(words // 2):
                for j in range(2):
                    a, b = x[4 * i + j], x[4 * i + 2 + j]
                    x[4 * i + j], x[4 * i + 2 + j] = a + b, a - b
        for i in range(numbers):
            x[i] = x[i] * factor

    return rotate


def quantizer(head_dim: int, bits: int, held: int, word_of: Any) -> Any:
    """quantize(x, codes, pair, lane): the codes of a head to the address `codes`, its scale and zero to `pair`."""
    words, levels = i32(head_dim // 2), f32((1 << bits) - 1)
    half, part = f32(1 << (bits - 1)), f32((1 << (bits - 1)) / ((1 << bits) - 1))
    above, below = f32(1.0 / ((1 << (bits - 1)) - 1)), f32(1.0 / (1 << (bits - 1)))
    smallest, to_integer, none, zero, one = f32(kv_quant.SMALLEST_SCALE), f32(TO_INTEGER), f32(NONE), f32(0.0), f32(1.0)
    eight = bits == 8

    @cuda.jit(device=True, inline="always")
    def code(number, middle, inverse):  # type: ignore[no-untyped-def]
        value = ptx.add_exact(ptx.multiply_exact(ptx.subtract_exact(number, middle), inverse), half)
        value = ptx.maximum(-ptx.maximum(-value, -levels), zero)
        return u32(ptx.bits_of_float(ptx.add_exact(value, to_integer)) & u32(255))

    @cuda.jit(device=True, inline="always")
    def quantize(x, codes, pair, lane):  # type: ignore[no-untyped-def]
        least, largest, poison = none, none, zero  # `least`: of all, with its sign turned
        for i in range(held):
            if word_of(i, lane) < words:
                for j in range(2):
                    least, largest = ptx.maximum(least, -x[2 * i + j]), ptx.maximum(largest, x[2 * i + j])
                    poison = ptx.fma(x[2 * i + j], zero, poison)
        for step in LANE_STEPS:
            least = ptx.maximum(least, ptx.shuffle_xor_f32(least, u32(step)))
            largest = ptx.maximum(largest, ptx.shuffle_xor_f32(largest, u32(step)))
            poison = poison + ptx.shuffle_xor_f32(poison, u32(step))
        spread = ptx.multiply_exact(ptx.add_exact(largest, least), part)
        bits_of_zero = ptx.bits_of_float(ptx.subtract_exact(spread, least))
        odd = u32(u32(bits_of_zero >> u32(16)) & u32(1))
        bits_of_zero = u32(u32(bits_of_zero + u32(0x7FFF) + odd) & u32(0xFFFF0000))
        middle = ptx.float_of_bits(bits_of_zero)
        over = ptx.multiply_exact(ptx.subtract_exact(largest, middle), above)
        under = ptx.multiply_exact(ptx.add_exact(middle, least), below)
        scale = ptx.maximum(ptx.maximum(over, under), smallest)
        bits_of_scale = u32(u32(ptx.bits_of_float(scale) + u32(0xFFFF)) & u32(0xFFFF0000))
        inverse = ptx.divide_exact(one, ptx.float_of_bits(bits_of_scale))
        for i in range(held):
            word = word_of(i, lane)
            if word < words:
                first, second = code(x[2 * i], middle, inverse), code(x[2 * i + 1], middle, inverse)
                if eight:
                    ptx.store_16(u64(codes + u64(u32(word) * u32(2))), u32(first | u32(second << u32(8))))
                else:
                    ptx.store_8(u64(codes + u64(u32(word))), u32(first | u32(second << u32(4))))
        if lane == i32(0):
            both = u32(u32(bits_of_scale >> u32(16)) | bits_of_zero)
            ptx.store_32(pair, both if poison == zero else u32(NAN_PAIR))

    return quantize


def piece_rotator(head_dim: int) -> Any:
    """rotate_piece(x, at): heads of which a lane holds 4 numbers that follow each other, x[at .. at + 3], and the next lane the next."""
    size = kv_quant.rotated(head_dim, 4)
    steps, factor = tuple(step for step in LANE_STEPS if 4 * step < size), f32(size**-0.5)

    @cuda.jit(device=True, inline="always")
    def rotate_piece(x, at):  # type: ignore[no-untyped-def]
        lane = u32(u32(cuda.threadIdx.x) & u32(31))
        a, b, c, d = x[at] + x[at + 1], x[at] - x[at + 1], x[at + 2] + x[at + 3], x[at + 2] - x[at + 3]
        x[at], x[at + 1], x[at + 2], x[at + 3] = (a + c) * factor, (b + d) * factor, (a - c) * factor, (b - d) * factor
        for step in steps:
            for j in range(4):
                other = ptx.shuffle_xor_f32(x[at + j], u32(step))
                x[at + j] = other + x[at + j] if u32(lane & u32(step)) == u32(0) else other - x[at + j]

    return rotate_piece


def fragment_rotator(head_dim: int, tiles: int) -> Any:
    """rotate_fragments(x, lane): the accumulators of m16n8k16 products, x[(m columns + n) 4 ..], of `tiles` tiles of 16 rows."""
    size, columns = kv_quant.rotated(head_dim, 4), head_dim // 8
    factor, pairs = f32(size**-0.5), tiles * columns * 2

    def within(i, x):  # type: ignore[no-untyped-def]
        a, b = x[2 * i], x[2 * i + 1]
        x[2 * i], x[2 * i + 1] = (a + b) * factor, (a - b) * factor

    def between_lanes(i, x, lane):  # type: ignore[no-untyped-def]
        for step in (1, 2):
            other = ptx.shuffle_xor_f32(x[i], u32(step))
            x[i] = other + x[i] if u32(lane & u32(step)) == u32(0) else other - x[i]

    def butterflies(step: int) -> Any:
        """Of columns `step` apart, then twice as far, while they are turned together."""
        further = butterflies(2 * step) if 16 * step < size else None
        goes_on = further is not None

        def one(k, x):  # type: ignore[no-untyped-def]
            of, j = k // 4, k % 4
            at = ((of // step * 2 * step) + of % step) * 4 + j
            a, b = x[at], x[at + 4 * step]
            x[at], x[at + 4 * step] = a + b, a - b

        all_of_them = ptx.unrolled(pairs, one)

        @cuda.jit(device=True, inline="always")
        def turn(x):  # type: ignore[no-untyped-def]
            all_of_them(x)
            if goes_on:
                further(x)

        return turn

    in_pairs, in_lanes, across = ptx.unrolled(pairs, within), ptx.unrolled(2 * pairs, between_lanes), butterflies(1)

    @cuda.jit(device=True, inline="always")
    def rotate_fragments(x, lane):  # type: ignore[no-untyped-def]
        in_pairs(x)
        in_lanes(x, u32(lane))
        across(x)

    return rotate_fragments
