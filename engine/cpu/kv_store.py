"""`rope_store` of reference.py: q and k normed (where there is a norm) and rotated, k and v written to their KV slots; q and k in
a frame where a quantized pool has one.

    qkv   float32 [T, heads + 2 kv_heads, head_dim], rows `stride` bytes apart; q is rotated in place
    pool  one layer, [num_blocks, 2, kv_heads, block_seq_len, head_dim]: bfloat16 (as uint16) or float32; or quantized
    cos, sin  float32 [max_position, rotary_dim / 2]

Work split: one stage (threads.py), its items are tokens.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from engine.cpu.elementwise import norm_row
from engine.cpu.kv_quant import block_bytes, quantize_head, rotate_heads
from engine.cpu.threads import atomic_add, finish, rows_at_once
from engine.cpu.vector import I64, V_F32, Emit, Value, bfloat_bits, f32_at, i32_at, i64_at, kernel, u16_at


@kernel("iii")
def narrow_vectors(e: Emit, source: Value, target: Value, vectors: Value) -> None:
    """float32 -> bfloat16, 16 a vector."""
    with e.loop(vectors, []) as (i, _, _after):
        e.store(e.narrow(e.load(V_F32, source, e.b.mul(i, I64(64)))), target, e.b.mul(i, I64(32)))


@njit(nogil=True, fastmath={"contract"})
def rotate_head(x, cos, sin, half):  # type: ignore[no-untyped-def]
    """Dimension i pairs with i + half; dimensions from 2 * half on stay."""
    v, c, s = f32_at(x), f32_at(cos), f32_at(sin)
    for i in range(half):
        a, b = v[i], v[i + half]
        v[i] = a * c[i] - b * s[i]
        v[i + half] = b * c[i] + a * s[i]


@njit(nogil=True)
def enter_frame(row, frame, heads, kv_heads, head_dim):  # type: ignore[no-untyped-def]
    """q * unit, (k - origin) / unit, in place; frame: float32 [2, kv_heads, head_dim], origin and unit."""
    q, k, origin, group = f32_at(row), f32_at(row + 4 * heads * head_dim), f32_at(frame), heads // kv_heads
    unit = f32_at(frame + 4 * kv_heads * head_dim)
    for h in range(heads):
        for i in range(head_dim):
            q[h * head_dim + i] *= unit[h // group * head_dim + i]
    for i in range(kv_heads * head_dim):
        k[i] = (k[i] - origin[i]) / unit[i]


@njit(nogil=True)
def store_head(x, pool, index, head_dim, exact):  # type: ignore[no-untyped-def]
    """head_dim float32 to the element `index` of the pool and on."""
    source = f32_at(x)
    if exact:
        wide = f32_at(pool + 4 * index)
        for i in range(head_dim):
            wide[i] = source[i]
        return
    target = pool + 2 * index
    narrow_vectors(x, target, head_dim // 16)
    narrow = u16_at(target)
    for i in range(head_dim // 16 * 16, head_dim):
        narrow[i] = np.uint16(bfloat_bits(source[i]))


@njit(nogil=True)
def rope_store_rows(  # type: ignore[no-untyped-def]
    stage, n, tokens, qkv, stride, heads, kv_heads, head_dim, positions, slots, cos, sin, half, q_norm, k_norm, key_frame, eps,
    logn_length, pool, block_len, exact, bits, rotated, scratch,
):  # fmt: skip
    """q_norm, k_norm: addresses of float32 [head_dim] weights, key_frame: of float32 [2, kv_heads, head_dim]; 0 without. logn_length:
    trained length, 0 without. bits: of a quantized pool, 0: it has none; rotated: numbers that are turned together in it.
    scratch: the thread's, 12 bytes."""
    position_of, slot_of = i32_at(positions), i64_at(slots)
    done, chunk = 0, rows_at_once(tokens, n)
    while True:
        begin = atomic_add(stage, chunk)
        if begin >= tokens:
            break
        stop = min(tokens, begin + chunk)
        done += stop - begin
        for t in range(begin, stop):
            position, slot = position_of[t], slot_of[t]
            row = qkv + t * stride
            angle = 4 * position * half
            for h in range(heads + kv_heads):
                x = row + 4 * h * head_dim
                weight = q_norm if h < heads else k_norm
                if weight != 0:
                    norm_row(x, weight, x, head_dim, eps)
                rotate_head(x, cos + angle, sin + angle, half)
            if logn_length > 0 and position + 1 > logn_length:
                factor = np.float32(math.log(position + 1.0) / math.log(float(logn_length)))
                q = f32_at(row)
                for i in range(heads * head_dim):
                    q[i] *= factor
            if key_frame != 0:
                enter_frame(row, key_frame, heads, kv_heads, head_dim)
            if rotated != 0:
                rotate_heads(row, heads + 2 * kv_heads, head_dim, rotated)
            block, offset = slot // block_len, slot % block_len
            for h in range(kv_heads):
                for kind in range(2):
                    source = row + 4 * (heads + kind * kv_heads + h) * head_dim
                    if bits != 0:
                        at = pool + block * block_bytes(kv_heads, block_len, head_dim, bits)
                        place = (kind * kv_heads + h) * block_len + offset
                        quantize_head(source, at, place, 2 * kv_heads * block_len, head_dim, bits, scratch)
                        continue
                    index = (((block * 2 + kind) * kv_heads + h) * block_len + offset) * head_dim
                    store_head(source, pool, index, head_dim, exact)
    finish(stage, done, tokens)
