"""A quantized KV pool on the CPU: `quantize` of engine/kv_quant.py where a head is stored, `dequantize` where attention reads.

    pool  one layer, uint8 [num_blocks, bytes]: codes, then pairs (engine/cache/layout.py)
    rows  [2, room, head_dim] in the computing dtype: K and V of up to `room` positions of one KV head, in a thread's scratch

`rows` looks like a pool of one block with one KV head, so that the kernels of attention read it as they read any pool.
head_dim is a multiple of 16. Arithmetic is float32, 16 lanes at a time; codes are rounded to nearest even, as numpy does it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from engine.cache.layout import ALIGNMENT, PAIR_BYTES
from engine.cpu.vector import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    V_F32,
    V_I8,
    V_I32,
    Emit,
    Value,
    bfloat_bits,
    caller,
    compiled,
    f32_at,
    i32_at,
    kernel,
)  # fmt: skip

SMALLEST_SCALE = np.float32(2.0**-60)
V_I8_HALF = ir.VectorType(I8, LANES // 2)


def rows_bytes(room: int, head_dim: int) -> int:
    """Of `rows`, for the wider dtype."""
    return 4 * 2 * room * head_dim


@kernel("iii")
def span(e: Emit, x: Value, vectors: Value, out: Value) -> None:
    """out = the least and the largest of 16 * vectors float32, and 0, or NaN where one of them is not finite."""
    b = e.b
    first = e.load(V_F32, x)
    with e.loop(vectors, [first, first, e.const(0.0)]) as (i, now, after):
        value = e.load(V_F32, x, b.mul(i, I64(64)))
        after[:] = [e.minimum(value, now[0]), e.maximum(value, now[1]), e.fma(value, e.const(0.0), now[2])]
    low, high, poison = e.results
    for place, (vector, choose) in enumerate(((low, e.minimum), (high, e.maximum))):
        width = LANES
        while width > 1:
            width //= 2
            rest = ir.Constant(V_I32, [(lane + width) % LANES for lane in range(LANES)])
            vector = choose(vector, b.shuffle_vector(vector, vector, rest))
        b.store(b.extract_element(vector, I32(0)), e.at(out, 4 * place), align=4)
    b.store(e.sum(poison), e.at(out, 8), align=4)


def _put_codes(bits: int) -> Any:
    """codes of 16 * vectors float32: rint((x - zero) * inverse) + half."""
    half = float(1 << (bits - 1))

    def put_codes(e: Emit, x: Value, codes: Value, vectors: Value, zero: Value, inverse: Value) -> None:
        b = e.b
        shift, factor = e.broadcast(zero), e.broadcast(inverse)
        with e.loop(vectors, []) as (i, _, _after):
            value = b.fsub(e.load(V_F32, x, b.mul(i, I64(64))), shift)
            value = b.fadd(e.unary("rint", b.fmul(value, factor)), e.const(half))
            value = e.maximum(e.minimum(value, e.const(2 * half - 1)), e.const(0.0))
            code = b.fptoui(value, V_I32)
            if bits == 8:
                e.store(b.trunc(code, V_I8), codes, b.mul(i, I64(LANES)))
            else:
                kind = ir.VectorType(I32, LANES // 2)
                even, odd = (
                    b.shuffle_vector(code, code, ir.Constant(kind, [2 * lane + j for lane in range(LANES // 2)])) for j in range(2)
                )
                pairs = b.or_(even, b.shl(odd, ir.Constant(kind, [4] * (LANES // 2))))
                e.store(b.trunc(pairs, V_I8_HALF), codes, b.mul(i, I64(LANES // 2)))

    return kernel("iiiff")(put_codes)


def _take_codes(bits: int, exact: bool) -> Any:
    """zero + scale * (code - half) of 16 * vectors codes, as float32 or bfloat16."""
    half = float(1 << (bits - 1))

    def take_codes(e: Emit, codes: Value, out: Value, vectors: Value, scale: Value, zero: Value) -> None:
        b = e.b
        factor, shift = e.broadcast(scale), e.broadcast(zero)
        with e.loop(vectors, []) as (i, _, _after):
            if bits == 8:
                code = b.zext(e.load(V_I8, codes, b.mul(i, I64(LANES))), V_I32)
            else:
                packed = e.load(V_I8_HALF, codes, b.mul(i, I64(LANES // 2)))
                twice = b.zext(b.shuffle_vector(packed, packed, ir.Constant(V_I32, [lane // 2 for lane in range(LANES)])), V_I32)
                code = b.and_(b.lshr(twice, ir.Constant(V_I32, [lane % 2 * 4 for lane in range(LANES)])), e.ints(15))
            value = e.fma(b.fsub(b.uitofp(code, V_F32), e.const(half)), factor, shift)
            if exact:
                e.store(value, out, b.mul(i, I64(64)))
            else:
                e.store(e.narrow(value), out, b.mul(i, I64(32)))

    return kernel("iiiff")(take_codes)


_put_8, _put_4 = _put_codes(8), _put_codes(4)
_take_8, _take_4, _take_8_exact, _take_4_exact = _take_codes(8, False), _take_codes(4, False), _take_codes(8, True), _take_codes(4, True)


@kernel("f", "i")
def bits_above(e: Emit, x: Value) -> Value:
    """The least bfloat16 that is not below x > 0, as 16 bits; a NaN stays one."""
    bits = e.b.bitcast(x, I32)
    up = e.b.lshr(e.b.add(bits, I32(0xFFFF)), I32(16))
    return e.b.zext(e.b.select(e.b.fcmp_unordered("uno", x, x), I32(0x7FC0), up), I64)


@kernel("i", "f")
def bfloat(e: Emit, bits: Value) -> Value:
    """float32 of a bfloat16 in the low 16 bits."""
    return e.b.bitcast(e.b.shl(e.b.trunc(bits, I32), I32(16)), F32)


@njit(nogil=True)
def block_bytes(kv_heads, block_len, head_dim, bits):  # type: ignore[no-untyped-def]
    """Of a block of one layer: `KVLayout.layer_block_bytes`."""
    return (2 * kv_heads * block_len * (head_dim * bits // 8 + PAIR_BYTES) + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@njit(nogil=True)
def quantize_head(x, block, row, rows_of_block, head_dim, bits, scratch):  # type: ignore[no-untyped-def]
    """head_dim float32 to row `row` (k_or_v, head, offset) of a block; scratch: 12 bytes."""
    vectors = head_dim // LANES
    span(x, vectors, scratch)
    seen = f32_at(scratch)
    low, high, poison = seen[0], seen[1], seen[2]
    half = np.float32(1 << (bits - 1))
    zero_bits = bfloat_bits(low + (high - low) * (half / np.float32((1 << bits) - 1)) + poison)
    zero = bfloat(zero_bits)
    reach = max((high - zero) * (np.float32(1.0) / (half - np.float32(1.0))), (zero - low) * (np.float32(1.0) / half))
    scale_bits = bits_above(max(reach, SMALLEST_SCALE) + poison)
    inverse = np.float32(1.0) / bfloat(scale_bits)
    row_bytes = head_dim * bits // 8
    codes = block + row * row_bytes
    if bits == 8:
        _put_8(x, codes, vectors, zero, inverse)
    else:
        _put_4(x, codes, vectors, zero, inverse)
    i32_at(block + rows_of_block * row_bytes)[row] = np.int32(np.uint32(scale_bits | zero_bits << 16))


@njit(nogil=True, fastmath={"contract"})
def rotate_heads(x, heads, head_dim, size):  # type: ignore[no-untyped-def]
    """Float32 heads in place, `size` numbers at a time (`rotate` of engine/kv_quant.py)."""
    v, factor = f32_at(x), np.float32(1.0 / np.sqrt(float(size)))
    count, step = heads * head_dim, 1
    while step < size:
        for first in range(0, count, 2 * step):
            for i in range(first, first + step):
                a, b = v[i], v[i + step]
                v[i], v[i + step] = a + b, a - b
        step *= 2
    for i in range(count):
        v[i] *= factor


def _take_rows(pool, table, first, stop, kv_head, kv_heads, head_dim, block_len, bits, exact, room, rows):  # type: ignore[no-untyped-def]
    """K and V of positions first .. stop - 1 of one KV head to `rows`, which has `room` rows for each."""
    row_bytes = head_dim * bits // 8
    rows_of_block, vectors = 2 * kv_heads * block_len, head_dim // LANES
    size = 4 if exact else 2
    blocks = i32_at(table)
    stride = block_bytes(kv_heads, block_len, head_dim, bits)
    for position in range(first, stop):
        block = pool + np.int64(blocks[position // block_len]) * stride
        for kind in range(2):
            row = (kind * kv_heads + kv_head) * block_len + position % block_len
            pair = i32_at(block + rows_of_block * row_bytes)[row]
            scale, zero = bfloat(np.int64(pair)), bfloat(np.int64(pair) >> 16)
            codes, out = block + row * row_bytes, rows + (kind * room + position - first) * head_dim * size
            if bits == 8:
                if exact:
                    _take_8_exact(codes, out, vectors, scale, zero)
                else:
                    _take_8(codes, out, vectors, scale, zero)
            elif exact:
                _take_4_exact(codes, out, vectors, scale, zero)
            else:
                _take_4(codes, out, vectors, scale, zero)


call_take_rows = caller(12)


def take_rows_function() -> int:
    """Address of the compiled function, for `call_take_rows`."""
    return compiled(_take_rows)
