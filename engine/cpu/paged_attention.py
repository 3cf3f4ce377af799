"""`attention` of reference.py for rows of one token: one query position against all K and V of its sequence.

    q        float32 [T, heads, head_dim]
    pool     one layer, [num_blocks, 2, kv_heads, block_seq_len, head_dim]: bfloat16 (as uint16) or float32
    partial  float32 [splits, heads, head_dim + 2]: sum of exp(s - m) v; then m and the sum of exp(s - m)

Work split. A row's context is cut at multiples of SPLIT positions, the same for every batch, so that a row's result does not
depend on its neighbours; a piece of work is (split, KV head) for all query heads of the KV head. `merge` then adds up a
row's splits in order.

    split: scores of all positions, head by head  ->  max, exp, sum  ->  weighted sum of V

With a bfloat16 pool and heads of 64 or 128, q and the weights exp(s - m) are rounded to bfloat16 and every product is a
vdpbf16ps, as in prompts; else they stay float32. Versions tried (3 query heads of 64, 128 positions, one core): float32
products with a sum of lanes for every score 55 cycles a position; this one 33.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from engine.cpu.kv_store import narrow_vectors
from engine.cpu.vector import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    V_F32,
    V_I16,
    V_I16X2,
    V_I32,
    Emit,
    Value,
    caller,
    compiled,
    f32_at,
    i32_at,
    kernel,
)  # fmt: skip

SPLIT = 256
NEVER = np.float32(-1e30)  # a score of nothing visible


def _sums(e: Emit, vector: Callable[[int], Value], first: int = 0, count: int = LANES) -> Value:
    """Lane i is the sum of the lanes of vector(i): neighbours change halves and are added, four times; made as they are needed."""
    if count == 1:
        return vector(first)
    width = count // 2
    x, y = _sums(e, vector, first, width), _sums(e, vector, first + width, width)
    low = [(LANES if lane & width else 0) + (lane & ~width) for lane in range(LANES)]
    halves = (e.b.shuffle_vector(x, y, ir.Constant(V_I32, [i + add for i in low])) for add in (0, width))
    return e.b.fadd(*halves)


def _pair_scores(vectors: int) -> Any:
    """scores[h, i] = q[h] . k[i] for `count` positions that follow each other, `vectors` of 32 bfloat16 a head.

    16 positions at a time, the last of them again where fewer are left: room for 15 more scores is needed.
    """
    row = 64 * vectors

    def scores(e: Emit, q: Value, k: Value, out: Value, out_stride: Value, count: Value, heads: Value) -> None:
        b = e.b

        def block(first: Value, keys: list[Value], h: Value) -> None:
            query = b.add(q, b.mul(h, I64(row)))
            qs = [e.load(V_I32, query, 64 * v) for v in range(vectors)]

            def dots(i: int) -> Value:
                total = e.const(0.0)
                for v in range(vectors):
                    total = e.dot_pairs(total, e.load(V_I32, keys[i], 64 * v), qs[v])
                return total

            e.store(_sums(e, dots), b.add(out, b.mul(h, out_stride)), b.mul(first, I64(4)))

        whole = b.sdiv(count, I64(LANES))
        with e.loop(whole, []) as (j, _, _after):
            first = b.mul(j, I64(LANES))
            base = b.add(k, b.mul(first, I64(row)))
            with e.loop(heads, []) as (h, _, _after2):
                block(first, [b.add(base, I64(row * i)) for i in range(LANES)], h)
        first = b.mul(whole, I64(LANES))
        left = b.sub(count, first)
        base = b.add(k, b.mul(first, I64(row)))
        with b.if_then(b.icmp_signed(">", left, I64(0))):
            last = b.sub(left, I64(1))
            offsets = [b.mul(b.select(b.icmp_signed("<", I64(i), last), I64(i), last), I64(row)) for i in range(LANES)]
            with e.loop(heads, []) as (h, _, _after2):
                block(first, [b.add(base, offset) for offset in offsets], h)

    return kernel("iiiiii")(scores)


def _pair_weigh(vectors: int) -> Any:
    """acc[d] += sum over `count` positions of p[i] v[i, d], for one head: p bfloat16, two positions an instruction."""
    row = 64 * vectors

    def weigh(e: Emit, p: Value, v: Value, acc: Value, count: Value) -> None:
        b = e.b

        def two(even: Value, odd: Value, weights: Value, now: list[Value]) -> list[Value]:
            out = list(now)
            x = e.broadcast(weights)
            for j in range(vectors):
                rows = [e.load(V_I16X2, at, 64 * j) for at in (even, odd)]
                for half in range(2):
                    order = [source + half * LANES + lane for lane in range(LANES) for source in (0, 2 * LANES)]
                    pairs = b.shuffle_vector(*rows, ir.Constant(ir.VectorType(I32, 2 * LANES), order))
                    out[2 * j + half] = e.dot_pairs(out[2 * j + half], b.bitcast(pairs, V_I32), x)
            return out

        start = [e.load(V_F32, acc, 64 * j) for j in range(2 * vectors)]
        whole = b.sdiv(count, I64(2))
        with e.loop(whole, start) as (i, now, after):
            even = b.add(v, b.mul(i, I64(2 * row)))
            after[:] = two(even, b.add(even, I64(row)), e.load(I32, p, b.mul(i, I64(4)), 2), now)
        # the odd one out: its neighbour's weight may be that of another KV block
        with e.loop(b.and_(count, I64(1)), list(e.results)) as (_, now, after):
            even = b.add(v, b.mul(whole, I64(2 * row)))
            weight = b.zext(e.load(I16, p, b.mul(whole, I64(4)), 2), I32)
            after[:] = two(even, even, weight, now)
        for j, value in enumerate(e.results):
            e.store(value, acc, 64 * j)

    return kernel("iiii")(weigh)


def _load_kv(e: Emit, exact: bool, address: Value, offset: Value | int) -> Value:
    return e.load(V_F32, address, offset) if exact else e.widen(e.load(V_I16, address, offset))


def _scores(exact: bool) -> Any:
    """The same for heads of any number of `vectors` of 16, in float32."""
    size = 64 if exact else 32

    def scores(e: Emit, q: Value, k: Value, out: Value, out_stride: Value, count: Value, heads: Value, vectors: Value) -> None:
        b = e.b
        row_bytes, q_bytes = b.mul(vectors, I64(size)), b.mul(vectors, I64(64))
        with e.loop(count, []) as (i, _, _after):
            key = b.add(k, b.mul(i, row_bytes))
            with e.loop(heads, []) as (h, _, _after2):
                query = b.add(q, b.mul(h, q_bytes))
                with e.loop(vectors, [e.const(0.0)]) as (v, now, after):
                    value = _load_kv(e, exact, key, b.mul(v, I64(size)))
                    after[0] = e.fma(e.load(V_F32, query, b.mul(v, I64(64))), value, now[0])
                e.store(e.sum(e.results[0]), b.add(out, b.mul(h, out_stride)), b.mul(i, I64(4)))

    return kernel("iiiiiii")(scores)


def _weigh(exact: bool) -> Any:
    """The same for heads of any number of `vectors` of 16, p float32."""
    size = 64 if exact else 32

    def weigh(e: Emit, p: Value, v: Value, acc: Value, count: Value, vectors: Value) -> None:
        b = e.b
        with e.loop(vectors, []) as (j, _, _after):
            offset = b.mul(j, I64(64))
            with e.loop(count, [e.load(V_F32, acc, offset)]) as (i, now, after):
                weight = e.broadcast(e.load(F32, p, b.mul(i, I64(4)), 4))
                at = b.mul(b.add(b.mul(i, vectors), j), I64(size))
                after[0] = e.fma(weight, _load_kv(e, exact, v, at), now[0])
            e.store(e.results[0], acc, offset)

    return kernel("iiiii")(weigh)


_scores_2, _scores_4, _scores_16, _scores_32 = _pair_scores(2), _pair_scores(4), _scores(False), _scores(True)
_weigh_2, _weigh_4, _weigh_16, _weigh_32 = _pair_weigh(2), _pair_weigh(4), _weigh(False), _weigh(True)


@kernel("iifi")
def soften(e: Emit, scores: Value, count: Value, scale: Value, out: Value) -> None:
    """scores [count] *= scale, then exp(score - max) in place; out[0] = max, out[1] = sum. Room for 16 more scores is needed."""
    b = e.b
    vectors = b.sdiv(b.add(count, I64(LANES - 1)), I64(LANES))
    lane = ir.Constant(V_I32, list(range(LANES)))
    factor = e.broadcast(scale)

    def is_real(i: Value) -> Value:
        left = b.trunc(b.sub(count, b.mul(i, I64(LANES))), ir.IntType(32))
        return b.icmp_signed("<", lane, e.broadcast(left))

    with e.loop(vectors, [e.const(float(NEVER))]) as (i, now, after):
        x = b.fmul(e.load(V_F32, scores, b.mul(i, I64(64))), factor)
        after[0] = e.maximum(b.select(is_real(i), x, e.const(float(NEVER))), now[0])
    largest = e.broadcast(_lane_max(e, e.results[0]))
    with e.loop(vectors, [e.const(0.0)]) as (i, now, after):
        x = b.fmul(e.load(V_F32, scores, b.mul(i, I64(64))), factor)
        weight = b.select(is_real(i), e.exp(b.fsub(x, largest)), e.const(0.0))
        e.store(weight, scores, b.mul(i, I64(64)))
        after[0] = b.fadd(now[0], weight)
    e.b.store(b.extract_element(largest, ir.IntType(32)(0)), e.at(out), align=4)
    e.b.store(e.sum(e.results[0]), e.at(out, 4), align=4)


def _lane_max(e: Emit, x: Value) -> Value:
    """A NaN among the lanes is not lost: maximum(a, b) is b where they do not compare, and b is the other half each time."""
    width = LANES
    while width > 1:
        width //= 2
        rest = ir.Constant(V_I32, [(lane + width) % LANES for lane in range(LANES)])
        x = e.maximum(x, e.b.shuffle_vector(x, x, rest))
    return e.b.extract_element(x, ir.IntType(32)(0))


SCORE_STRIDE = 4 * (SPLIT + LANES)


@njit(nogil=True)
def _element(blocks, position, k_or_v, kv_head, kv_heads, head_dim, block_len):  # type: ignore[no-untyped-def]
    """Index into one layer of the pool."""
    block = np.int64(blocks[position // block_len])
    return (((block * 2 + k_or_v) * kv_heads + kv_head) * block_len + position % block_len) * head_dim


@njit(nogil=True)
def _soften_heads(scores, count, group, head_dim, partial):  # type: ignore[no-untyped-def]
    scale = np.float32(1.0 / np.sqrt(float(head_dim)))
    for g in range(group):
        row = partial + g * 4 * (head_dim + 2)
        soften(scores + g * SCORE_STRIDE, count, scale, row + 4 * head_dim)
        acc = f32_at(row)
        for d in range(head_dim):
            acc[d] = np.float32(0.0)


def _split_64(q, pool, table, first, stop, kv_head, heads, kv_heads, head_dim, block_len, scores, partial):  # type: ignore[no-untyped-def]
    """Positions first .. stop - 1 for the query heads of one KV head of 64; `partial` is the split's [heads, head_dim + 2]."""
    group = heads // kv_heads
    blocks = i32_at(table)
    query = scores + group * SCORE_STRIDE
    narrow_vectors(q + 4 * kv_head * group * head_dim, query, group * head_dim // LANES)
    position = first
    while position < stop:
        count = min(block_len - position % block_len, stop - position)
        k = pool + _element(blocks, position, 0, kv_head, kv_heads, head_dim, block_len) * 2
        _scores_2(query, k, scores + 4 * (position - first), SCORE_STRIDE, count, group)
        position += count
    _soften_heads(scores, stop - first, group, head_dim, partial + kv_head * group * 4 * (head_dim + 2))
    for g in range(group):
        narrow_vectors(scores + g * SCORE_STRIDE, scores + g * SCORE_STRIDE, (stop - first + LANES - 1) // LANES)
    position = first
    while position < stop:
        count = min(block_len - position % block_len, stop - position)
        v = pool + _element(blocks, position, 1, kv_head, kv_heads, head_dim, block_len) * 2
        for g in range(group):
            row = partial + (kv_head * group + g) * 4 * (head_dim + 2)
            _weigh_2(scores + g * SCORE_STRIDE + 2 * (position - first), v, row, count)
        position += count


def _split_128(q, pool, table, first, stop, kv_head, heads, kv_heads, head_dim, block_len, scores, partial):  # type: ignore[no-untyped-def]
    """Heads of 128."""
    group = heads // kv_heads
    blocks = i32_at(table)
    query = scores + group * SCORE_STRIDE
    narrow_vectors(q + 4 * kv_head * group * head_dim, query, group * head_dim // LANES)
    position = first
    while position < stop:
        count = min(block_len - position % block_len, stop - position)
        k = pool + _element(blocks, position, 0, kv_head, kv_heads, head_dim, block_len) * 2
        _scores_4(query, k, scores + 4 * (position - first), SCORE_STRIDE, count, group)
        position += count
    _soften_heads(scores, stop - first, group, head_dim, partial + kv_head * group * 4 * (head_dim + 2))
    for g in range(group):
        narrow_vectors(scores + g * SCORE_STRIDE, scores + g * SCORE_STRIDE, (stop - first + LANES - 1) // LANES)
    position = first
    while position < stop:
        count = min(block_len - position % block_len, stop - position)
        v = pool + _element(blocks, position, 1, kv_head, kv_heads, head_dim, block_len) * 2
        for g in range(group):
            row = partial + (kv_head * group + g) * 4 * (head_dim + 2)
            _weigh_4(scores + g * SCORE_STRIDE + 2 * (position - first), v, row, count)
        position += count


def _split_any(q, pool, table, first, stop, kv_head, heads, kv_heads, head_dim, block_len, scores, partial):  # type: ignore[no-untyped-def]
    """Heads of any multiple of 16."""
    group, vectors = heads // kv_heads, head_dim // LANES
    blocks = i32_at(table)
    query = q + 4 * kv_head * group * head_dim
    position = first
    while position < stop:
        count = min(block_len - position % block_len, stop - position)
        k = pool + _element(blocks, position, 0, kv_head, kv_heads, head_dim, block_len) * 2
        _scores_16(query, k, scores + 4 * (position - first), SCORE_STRIDE, count, group, vectors)
        position += count
    _soften_heads(scores, stop - first, group, head_dim, partial + kv_head * group * 4 * (head_dim + 2))
    position = first
    while position < stop:
        count = min(block_len - position % block_len, stop - position)
        v = pool + _element(blocks, position, 1, kv_head, kv_heads, head_dim, block_len) * 2
        for g in range(group):
            row = partial + (kv_head * group + g) * 4 * (head_dim + 2)
            _weigh_16(scores + g * SCORE_STRIDE + 4 * (position - first), v, row, count, vectors)
        position += count


def _split_exact(q, pool, table, first, stop, kv_head, heads, kv_heads, head_dim, block_len, scores, partial):  # type: ignore[no-untyped-def]
    """A float32 pool."""
    group, vectors = heads // kv_heads, head_dim // LANES
    blocks = i32_at(table)
    query = q + 4 * kv_head * group * head_dim
    position = first
    while position < stop:
        count = min(block_len - position % block_len, stop - position)
        k = pool + _element(blocks, position, 0, kv_head, kv_heads, head_dim, block_len) * 4
        _scores_32(query, k, scores + 4 * (position - first), SCORE_STRIDE, count, group, vectors)
        position += count
    _soften_heads(scores, stop - first, group, head_dim, partial + kv_head * group * 4 * (head_dim + 2))
    position = first
    while position < stop:
        count = min(block_len - position % block_len, stop - position)
        v = pool + _element(blocks, position, 1, kv_head, kv_heads, head_dim, block_len) * 4
        for g in range(group):
            row = partial + (kv_head * group + g) * 4 * (head_dim + 2)
            _weigh_32(scores + g * SCORE_STRIDE + 4 * (position - first), v, row, count, vectors)
        position += count


call_split = caller(12)


def split_function(head_dim: int, exact: bool) -> int:
    """Address of the compiled function for a pool of this kind, for `call_split`."""
    if exact:
        return compiled(_split_exact)
    return compiled({64: _split_64, 128: _split_128}.get(head_dim, _split_any))


def split_scratch_bytes(head_dim: int, group: int) -> int:
    """Of one thread: scores of `group` heads, then their q in bfloat16."""
    return group * (SCORE_STRIDE + 2 * head_dim)


@njit(nogil=True)
def empty_split(kv_head, group, head_dim, partial):  # type: ignore[no-untyped-def]
    """A split that lies before the window: weighs nothing."""
    for h in range(kv_head * group, (kv_head + 1) * group):
        row = f32_at(partial + 4 * h * (head_dim + 2))
        for d in range(head_dim):
            row[d] = np.float32(0.0)
        row[head_dim] = NEVER
        row[head_dim + 1] = np.float32(0.0)


@njit(nogil=True, fastmath={"contract"})
def merge(partial, splits, heads, head_dim, out):  # type: ignore[no-untyped-def]
    """[splits, heads, head_dim + 2] -> [heads, head_dim]."""
    for h in range(heads):
        target = f32_at(out + 4 * h * head_dim)
        largest = NEVER
        for s in range(splits):
            largest = max(largest, f32_at(partial + 4 * (s * heads + h) * (head_dim + 2))[head_dim])
        total = np.float32(0.0)
        for d in range(head_dim):
            target[d] = np.float32(0.0)
        for s in range(splits):
            row = f32_at(partial + 4 * (s * heads + h) * (head_dim + 2))
            if row[head_dim + 1] == np.float32(0.0):
                continue
            factor = np.float32(np.exp(row[head_dim] - largest))
            total += row[head_dim + 1] * factor
            for d in range(head_dim):
                target[d] += row[d] * factor
        inverse = np.float32(1.0) / total
        for d in range(head_dim):
            target[d] *= inverse
