"""`attention` of reference.py for rows of several tokens: tiles of 64 positions, softmax carried along (Milakov & Gimelshein
2018; Dao et al. 2022), products by the register tiles of matmul.py.

    q     float32 [T, heads, head_dim]        out  float32 [T, heads, head_dim]
    pool  one layer, [num_blocks, 2, kv_heads, block_seq_len, head_dim]: bfloat16 (as uint16) or float32; of a quantized one
          each tile is dequantized into `rows`, which is such a pool of one block of TILE positions (kv_quant.py)

A piece of work is (up to `rows_of_piece` tokens of one row, one KV head, all its query heads): M = tokens * group rows of q,
row (token, head). For each tile of positions that begins at a multiple of 64:

    K tile  ->  packed as a weight of 64 channels and K = head_dim:  S [M, 64] = q . K
    S       ->  masked, m and l carried along, P = exp(S - m) in the KV dtype, O *= exp(m_before - m)
    V tile  ->  packed as a weight of head_dim channels and K = 64:  O [M, head_dim] += P . V

Tiles begin at the same positions whatever part of a prompt is computed, so a token's result does not depend on how the
prompt was cut. Positions beyond the context are zeros in K and V (the pool may hold anything there).

Scratch of a thread, float32 words unless said (M at most MAX_M, D = head_dim padded to 32):
    q [M, D] in the KV dtype | S [M, 64] | P [M, 64] in the KV dtype | O [M, D] | m, l [M, 2] | K tile | V tile | D zeros
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from engine.cpu.kv_quant import call_take_rows
from engine.cpu.kv_store import narrow_vectors
from engine.cpu.matmul import CHUNK, call_tile_rows
from engine.cpu.vector import (
    I32,
    I64,
    LANES,
    V_F32,
    V_I16,
    V_I32,
    Emit,
    Value,
    bfloat_bits,
    caller,
    compiled,
    f32_at,
    i32_at,
    kernel,
    u16_at,
)  # fmt: skip

TILE = 64  # positions
MAX_M = 192
NEVER = -1e30


def tokens_of_piece(group: int) -> int:
    return max(1, MAX_M // group)


def padded(head_dim: int) -> int:
    return -(-head_dim // CHUNK) * CHUNK


def scratch_bytes(head_dim: int, group: int) -> int:
    """Of one thread."""
    m, d = max(MAX_M, group), padded(head_dim)
    return 4 * (m * d + m * TILE + m * TILE + m * d + 2 * m + 2 * TILE * d + d) + 64


@kernel("iiii")
def interleave(e: Emit, even: Value, odd: Value, out: Value, vectors: Value) -> None:
    """Two rows of bfloat16 -> pairs, 16 a vector."""
    with e.loop(vectors, []) as (i, _, _after):
        offset = e.b.mul(i, I64(32))
        low, high = (e.b.zext(e.load(V_I16, row, offset), V_I32) for row in (even, odd))
        e.store(e.b.or_(low, e.b.shl(high, e.ints(16))), out, e.b.mul(i, I64(64 * (TILE // 2))))


def _soften_row(exact: bool) -> Any:
    """One row of S -> P. Columns low .. high - 1 are visible (at least one). state: m, l. Also scales its row of O."""

    def soften_row(e: Emit, s: Value, p: Value, o: Value, state: Value, low: Value, high: Value, vectors: Value, scale: Value) -> None:
        b = e.b
        first, last = (e.broadcast(b.trunc(v, I32)) for v in (low, high))
        factor = e.broadcast(scale)
        xs, seen = [], []
        for j in range(TILE // LANES):
            lane = ir.Constant(V_I32, list(range(j * LANES, (j + 1) * LANES)))
            visible = b.and_(b.icmp_signed(">=", lane, first), b.icmp_signed("<", lane, last))
            seen.append(visible)
            xs.append(b.select(visible, b.fmul(e.load(V_F32, s, 64 * j), factor), e.const(NEVER)))
        before, total = (b.load(e.at(state, 4 * i), typ=ir.FloatType(), align=4) for i in range(2))
        largest = e.broadcast(before)
        for x in xs:
            largest = e.maximum(x, largest)
        width = LANES
        while width > 1:
            width //= 2
            rest = ir.Constant(V_I32, [(k + width) % LANES for k in range(LANES)])
            largest = e.maximum(largest, b.shuffle_vector(largest, largest, rest))
        weights = None
        for j, (x, visible) in enumerate(zip(xs, seen, strict=True)):
            w = b.select(visible, e.exp(b.fsub(x, largest)), e.const(0.0))
            if exact:
                e.store(w, p, 64 * j)
            else:
                e.store(e.narrow(w), p, 32 * j)
            weights = w if weights is None else b.fadd(weights, w)
        shrink = e.exp(b.fsub(e.broadcast(before), largest))
        one = b.extract_element(shrink, I32(0))
        b.store(b.extract_element(largest, I32(0)), e.at(state), align=4)
        b.store(b.fadd(b.fmul(total, one), e.sum(weights)), e.at(state, 4), align=4)
        with e.loop(vectors, []) as (i, _, _after):
            offset = b.mul(i, I64(64))
            e.store(b.fmul(e.load(V_F32, o, offset), shrink), o, offset)

    return kernel("iiiiiiif")(soften_row)


_soften_16, _soften_32 = _soften_row(False), _soften_row(True)


@njit(nogil=True)
def _pack_k(pool, blocks, first, count, kv_head, kv_heads, head_dim, block_len, exact, out):  # type: ignore[no-untyped-def]
    """Lane = position: 4 tiles of 16 positions x head_dim. Only the first `count` positions exist."""
    words = head_dim if exact else head_dim // 2
    chunk_words = LANES * (CHUNK if exact else CHUNK // 2)
    tile_words = (head_dim + CHUNK - 1) // CHUNK * chunk_words
    size = 4 if exact else 2
    target = i32_at(out)
    for i in range(TILE):
        at = i // LANES * tile_words + i % LANES
        if i >= count:
            for w in range(words):
                target[at + w * LANES] = 0
            continue
        position = first + i
        block = blocks[position // block_len]
        index = ((block * 2 * kv_heads + kv_head) * block_len + position % block_len) * head_dim
        source = i32_at(pool + index * size)
        for w in range(words):
            target[at + w * LANES] = source[w]


@njit(nogil=True)
def _pack_v(pool, blocks, first, count, kv_head, kv_heads, head_dim, block_len, exact, zeros, out):  # type: ignore[no-untyped-def]
    """Lane = dimension: head_dim / 16 tiles of 16 dimensions x 64 positions. `zeros`: a row of them."""
    size = 4 if exact else 2
    vectors = (head_dim + LANES - 1) // LANES
    for i in range(0, TILE, 2):
        even, odd = zeros, zeros
        for j in range(2):
            if i + j < count:
                position = first + i + j
                block = blocks[position // block_len]
                row = pool + (((block * 2 + 1) * kv_heads + kv_head) * block_len + position % block_len) * head_dim * size
                if j == 0:
                    even = row
                else:
                    odd = row
        if exact:
            for j in range(2):
                source = f32_at(even if j == 0 else odd)
                for d in range(head_dim):
                    f32_at(out + 4 * (d // LANES * LANES * TILE + (i + j) * LANES + d % LANES))[0] = source[d]
        else:
            interleave(even, odd, out + 64 * (i // 2), head_dim // LANES)
            low, high = u16_at(even), u16_at(odd)
            for d in range(head_dim // LANES * LANES, head_dim):
                pair = u16_at(out + 4 * (d // LANES * LANES * (TILE // 2) + i // 2 * LANES + d % LANES))
                pair[0], pair[1] = low[d], high[d]
    return vectors


@njit(nogil=True)
def _gather_q(q, heads, head_dim, first_head, group, tokens, exact, width, out):  # type: ignore[no-untyped-def]
    """[tokens, group] rows of q in the KV dtype, `width` values a row (padding is zero already)."""
    for t in range(tokens):
        for g in range(group):
            source = q + 4 * (t * heads + first_head + g) * head_dim
            row = t * group + g
            values = f32_at(source)
            if exact:
                target = f32_at(out + 4 * row * width)
                for d in range(head_dim):
                    target[d] = values[d]
            else:
                narrow_vectors(source, out + 2 * row * width, head_dim // LANES)
                halves = u16_at(out + 2 * row * width)
                for d in range(head_dim // LANES * LANES, head_dim):
                    halves[d] = np.uint16(bfloat_bits(values[d]))


@njit(nogil=True)
def _clear(address, words):  # type: ignore[no-untyped-def]
    target = f32_at(address)
    for i in range(words):
        target[i] = np.float32(0.0)


def _piece(  # type: ignore[no-untyped-def]
    product, q, q_stride, tokens, position, pool, table, window, kv_head, heads, kv_heads, head_dim, block_len, exact, scratch, out,
    out_stride, take_rows, bits, rows_at, only_block,
):  # fmt: skip
    """`tokens` tokens at `position` and on, one KV head. q, out: of the first token; strides in bytes are those of [T, heads, head_dim].
    Of a quantized pool: take_rows, the address of what dequantizes, its bits (else 0), room for `rows`, an int32 that is 0."""
    group = heads // kv_heads
    size = 4 if exact else 2
    rows = tokens * group
    width = (head_dim + CHUNK - 1) // CHUNK * CHUNK
    blocks = i32_at(table)
    chunks, o_tiles = width // CHUNK, (head_dim + LANES - 1) // LANES
    tile_q = scratch
    s = tile_q + 4 * rows * width
    p = s + 4 * rows * TILE
    o = p + 4 * rows * TILE
    state = o + 4 * rows * width
    k_tile = (state + 8 * rows + 63) // 64 * 64
    v_tile = k_tile + 4 * TILE * width
    zeros = v_tile + 4 * TILE * width
    _clear(o, rows * width)
    _clear(zeros, width)  # at least 32: the bias of two tiles
    _clear(state, 2 * rows)
    if width != head_dim:  # padding, never written again
        _clear(tile_q, rows * width)
        _clear(k_tile, (zeros - k_tile) // 4)
    for r in range(rows):
        f32_at(state + 8 * r)[0] = np.float32(NEVER)
    first_head = kv_head * group
    for t in range(tokens):
        _gather_q(q + t * q_stride, heads, head_dim, first_head, group, 1, exact, width, tile_q + size * t * group * width)
    scale = np.float32(1.0 / np.sqrt(float(head_dim)))
    context = position + tokens
    start = 0
    if window > 0:
        start = max(0, position - window + 1) // TILE * TILE
    for first in range(start, context, TILE):
        # rows before this one see nothing of the tile; rows from `until` on have their window behind it
        skip = max(0, first - position)
        until = tokens
        if window > 0:
            until = min(tokens, first + TILE - 1 + window - position)
        if skip >= until:
            continue
        count = min(TILE, context - first)
        if bits != 0:
            call_take_rows(take_rows, pool, table, first, first + count, kv_head, kv_heads, head_dim, block_len, bits, exact, TILE, rows_at)
            one = i32_at(only_block)
            _pack_k(rows_at, one, 0, count, 0, 1, head_dim, TILE, exact, k_tile)
            _pack_v(rows_at, one, 0, count, 0, 1, head_dim, TILE, exact, zeros, v_tile)
        else:
            _pack_k(pool, blocks, first, count, kv_head, kv_heads, head_dim, block_len, exact, k_tile)
            _pack_v(pool, blocks, first, count, kv_head, kv_heads, head_dim, block_len, exact, zeros, v_tile)
        r0, m = skip * group, (until - skip) * group
        for j in range(0, TILE // LANES, 2):
            call_tile_rows(
                product, k_tile + j * LANES * width * size, 2, LANES * width * size, tile_q + size * r0 * width, size * width, 0, 0, zeros,
                s + 4 * (r0 * TILE + j * LANES), 4 * TILE, chunks, 0, m,
            )  # fmt: skip
        for t in range(skip, until):
            own = position + t
            high = min(TILE, own - first + 1)
            low = 0
            if window > 0:
                low = max(0, own - window + 1 - first)
            for r in range(t * group, (t + 1) * group):
                if exact:
                    _soften_32(s + 4 * r * TILE, p + 4 * r * TILE, o + 4 * r * width, state + 8 * r, low, high, o_tiles, scale)
                else:
                    _soften_16(s + 4 * r * TILE, p + 2 * r * TILE, o + 4 * r * width, state + 8 * r, low, high, o_tiles, scale)
        for j in range(0, o_tiles, 2):
            call_tile_rows(
                product, v_tile + j * LANES * TILE * size, min(2, o_tiles - j), LANES * TILE * size, p + size * r0 * TILE,
                size * TILE, 0, 0, zeros, o + 4 * (r0 * width + j * LANES), 4 * width, TILE // CHUNK, 1, m,
            )  # fmt: skip
    for t in range(tokens):
        for g in range(group):
            r = t * group + g
            source, target = f32_at(o + 4 * r * width), f32_at(out + t * out_stride + 4 * (first_head + g) * head_dim)
            inverse = np.float32(1.0) / f32_at(state + 8 * r)[1]
            for d in range(head_dim):
                target[d] = source[d] * inverse


call_piece = caller(21)


def piece_function() -> int:
    """Address of the compiled function, for `call_piece`."""
    return compiled(_piece)
