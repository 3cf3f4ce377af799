"""`attention` of reference.py for rows of one token: one query position against all K and V of its sequence.

    q        float32 [T, heads, head_dim]
    pool     one layer, [num_blocks, 2, kv_heads, block_seq_len, head_dim]: bfloat16 (as uint16) or float32
    partial  float32 [splits, heads, head_dim + 2]: sum of exp(s - m) v; then m and the sum of exp(s - m)

Work split. A row's context is cut at multiples of SPLIT positions, the same for every batch, so that a row's result does not
depend on its neighbours; a piece of work is (split, KV head) for all query heads of the KV head. `merge` then adds up a
row's splits in order.

    split: scores of all positions, head by head  ->  max, exp, sum  ->  weighted sum of V
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit

from engine.cpu.vector import F32, I64, LANES, V_F32, V_I16, V_I32, Emit, Value, caller, compiled, f32_at, i32_at, kernel

SPLIT = 256
NEVER = np.float32(-1e30)  # a score of nothing visible


def _load_kv(e: Emit, exact: bool, address: Value, offset: Value | int) -> Value:
    return e.load(V_F32, address, offset) if exact else e.widen(e.load(V_I16, address, offset))


def _scores(exact: bool, fixed: int) -> object:
    """scores[h, i] = q[h] . k[i] for `count` positions that follow each other; `fixed` vectors a head, 0: counted."""
    size = 64 if exact else 32

    def scores(e: Emit, q: Value, k: Value, out: Value, out_stride: Value, count: Value, heads: Value, vectors: Value) -> None:
        b = e.b
        if fixed:
            vectors = I64(fixed)
        row_bytes, q_bytes = b.mul(vectors, I64(size)), b.mul(vectors, I64(64))
        with e.loop(count, []) as (i, _, _after):
            key = b.add(k, b.mul(i, row_bytes))
            held = [_load_kv(e, exact, key, size * v) for v in range(fixed)]
            with e.loop(heads, []) as (h, _, _after2):
                query = b.add(q, b.mul(h, q_bytes))
                total = e.const(0.0)
                if fixed:
                    for v in range(fixed):
                        total = e.fma(e.load(V_F32, query, 64 * v), held[v], total)
                else:
                    with e.loop(vectors, [total]) as (v, now, after):
                        value = _load_kv(e, exact, key, b.mul(v, I64(size)))
                        after[0] = e.fma(e.load(V_F32, query, b.mul(v, I64(64))), value, now[0])
                    total = e.results[0]
                e.store(e.sum(total), b.add(out, b.mul(h, out_stride)), b.mul(i, I64(4)))

    return kernel("iiiiiii")(scores)


def _weigh(exact: bool, fixed: int) -> object:
    """acc[d] += sum over `count` positions of p[i] v[i, d], for one head."""
    size = 64 if exact else 32

    def weigh(e: Emit, p: Value, v: Value, acc: Value, count: Value, vectors: Value) -> None:
        b = e.b
        if fixed:
            with e.loop(count, [e.load(V_F32, acc, 64 * j) for j in range(fixed)]) as (i, now, after):
                weight = e.broadcast(e.load(F32, p, b.mul(i, I64(4)), 4))
                row = b.add(v, b.mul(i, I64(size * fixed)))
                for j in range(fixed):
                    after[j] = e.fma(weight, _load_kv(e, exact, row, size * j), now[j])
            for j, value in enumerate(e.results):
                e.store(value, acc, 64 * j)
            return
        with e.loop(vectors, []) as (j, _, _after):
            offset = b.mul(j, I64(64))
            with e.loop(count, [e.load(V_F32, acc, offset)]) as (i, now, after):
                weight = e.broadcast(e.load(F32, p, b.mul(i, I64(4)), 4))
                at = b.mul(b.add(b.mul(i, vectors), j), I64(size))
                after[0] = e.fma(weight, _load_kv(e, exact, v, at), now[0])
            e.store(e.results[0], acc, offset)

    return kernel("iiiii")(weigh)


_scores_16_4, _scores_16_8, _scores_16_n, _scores_32_n = _scores(False, 4), _scores(False, 8), _scores(False, 0), _scores(True, 0)
_weigh_16_4, _weigh_16_8, _weigh_16_n, _weigh_32_n = _weigh(False, 4), _weigh(False, 8), _weigh(False, 0), _weigh(True, 0)


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


def _split_16_4(q, pool, table, first, stop, kv_head, heads, kv_heads, head_dim, block_len, scores, partial):  # type: ignore[no-untyped-def]
    """Positions first .. stop - 1 for the query heads of one KV head of 64; `partial` is the split's [heads, head_dim + 2]."""
    group, vectors = heads // kv_heads, head_dim // LANES
    blocks = i32_at(table)
    query = q + 4 * kv_head * group * head_dim
    position = first
    while position < stop:
        count = min(block_len - position % block_len, stop - position)
        k = pool + _element(blocks, position, 0, kv_head, kv_heads, head_dim, block_len) * 2
        _scores_16_4(query, k, scores + 4 * (position - first), SCORE_STRIDE, count, group, vectors)
        position += count
    _soften_heads(scores, stop - first, group, head_dim, partial + kv_head * group * 4 * (head_dim + 2))
    position = first
    while position < stop:
        count = min(block_len - position % block_len, stop - position)
        v = pool + _element(blocks, position, 1, kv_head, kv_heads, head_dim, block_len) * 2
        for g in range(group):
            row = partial + (kv_head * group + g) * 4 * (head_dim + 2)
            _weigh_16_4(scores + g * SCORE_STRIDE + 4 * (position - first), v, row, count, vectors)
        position += count


def _split_16_8(q, pool, table, first, stop, kv_head, heads, kv_heads, head_dim, block_len, scores, partial):  # type: ignore[no-untyped-def]
    """Heads of 128."""
    group, vectors = heads // kv_heads, head_dim // LANES
    blocks = i32_at(table)
    query = q + 4 * kv_head * group * head_dim
    position = first
    while position < stop:
        count = min(block_len - position % block_len, stop - position)
        k = pool + _element(blocks, position, 0, kv_head, kv_heads, head_dim, block_len) * 2
        _scores_16_8(query, k, scores + 4 * (position - first), SCORE_STRIDE, count, group, vectors)
        position += count
    _soften_heads(scores, stop - first, group, head_dim, partial + kv_head * group * 4 * (head_dim + 2))
    position = first
    while position < stop:
        count = min(block_len - position % block_len, stop - position)
        v = pool + _element(blocks, position, 1, kv_head, kv_heads, head_dim, block_len) * 2
        for g in range(group):
            row = partial + (kv_head * group + g) * 4 * (head_dim + 2)
            _weigh_16_8(scores + g * SCORE_STRIDE + 4 * (position - first), v, row, count, vectors)
        position += count


def _split_16_n(q, pool, table, first, stop, kv_head, heads, kv_heads, head_dim, block_len, scores, partial):  # type: ignore[no-untyped-def]
    """Heads of any multiple of 16."""
    group, vectors = heads // kv_heads, head_dim // LANES
    blocks = i32_at(table)
    query = q + 4 * kv_head * group * head_dim
    position = first
    while position < stop:
        count = min(block_len - position % block_len, stop - position)
        k = pool + _element(blocks, position, 0, kv_head, kv_heads, head_dim, block_len) * 2
        _scores_16_n(query, k, scores + 4 * (position - first), SCORE_STRIDE, count, group, vectors)
        position += count
    _soften_heads(scores, stop - first, group, head_dim, partial + kv_head * group * 4 * (head_dim + 2))
    position = first
    while position < stop:
        count = min(block_len - position % block_len, stop - position)
        v = pool + _element(blocks, position, 1, kv_head, kv_heads, head_dim, block_len) * 2
        for g in range(group):
            row = partial + (kv_head * group + g) * 4 * (head_dim + 2)
            _weigh_16_n(scores + g * SCORE_STRIDE + 4 * (position - first), v, row, count, vectors)
        position += count


def _split_32_n(q, pool, table, first, stop, kv_head, heads, kv_heads, head_dim, block_len, scores, partial):  # type: ignore[no-untyped-def]
    """A float32 pool."""
    group, vectors = heads // kv_heads, head_dim // LANES
    blocks = i32_at(table)
    query = q + 4 * kv_head * group * head_dim
    position = first
    while position < stop:
        count = min(block_len - position % block_len, stop - position)
        k = pool + _element(blocks, position, 0, kv_head, kv_heads, head_dim, block_len) * 4
        _scores_32_n(query, k, scores + 4 * (position - first), SCORE_STRIDE, count, group, vectors)
        position += count
    _soften_heads(scores, stop - first, group, head_dim, partial + kv_head * group * 4 * (head_dim + 2))
    position = first
    while position < stop:
        count = min(block_len - position % block_len, stop - position)
        v = pool + _element(blocks, position, 1, kv_head, kv_heads, head_dim, block_len) * 4
        for g in range(group):
            row = partial + (kv_head * group + g) * 4 * (head_dim + 2)
            _weigh_32_n(scores + g * SCORE_STRIDE + 4 * (position - first), v, row, count, vectors)
        position += count


call_split = caller(12)


def split_function(head_dim: int, exact: bool) -> int:
    """Address of the compiled function for a pool of this kind, for `call_split`."""
    if exact:
        return compiled(_split_32_n)
    return compiled({64: _split_16_4, 128: _split_16_8}.get(head_dim, _split_16_n))


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
