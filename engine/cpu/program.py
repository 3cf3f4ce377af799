"""What the pool's threads run: one function a job, the largest of them the pass over all layers.

A job is a row of int64 parameters: the address of its function, then addresses, strides in bytes, and counts. `P` names the
places for operations on a step (`layers`, `rope_store`, `attention`); the others say theirs in their docstring. `L` names the
words of one layer in the table that `layers` walks; a packed weight is six of them (the address of its tile function, data,
bias, tiles, chunks, bytes of a tile). Every operation is compiled on its own, when it is first needed (`compiled`).

Only this file knows the order of operations in a layer; it must not know where parameters come from. Stages of a layer, a
barrier between any two:
norm | qkv | rope, K/V store | attention | merge, round | o + residual | norm | gate, up, silu | down + residual
"""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.cpu.elementwise import add_norm_rows, embed_row, norm_row, norm_rows, put_rows, silu_rows, silu_vectors
from engine.cpu.kv_store import rope_store_rows
from engine.cpu.matmul import CHUNK, ROW_BLOCK, call_tile_rows, product, put_row
from engine.cpu.paged_attention import call_split, empty_split, merge
from engine.cpu.prefill_attention import call_piece
from engine.cpu.threads import STOP, atomic_add, await_job, barrier, clear_claims, next_stage, post_job
from engine.cpu.vector import caller, f64_at, i32_at, i64_at


class P:
    """Parameters of the operations on a step."""

    FUNCTION = 0
    TOKENS = 1
    EPS = 2  # bits of a float64
    # the model
    EXACT = 3  # activations and dense weights float32
    HIDDEN = 4
    INTERMEDIATE = 5
    HEADS = 6
    KV_HEADS = 7
    HEAD_DIM = 8
    HALF = 9  # rotary_dim / 2
    COS = 10
    SIN = 11
    LOGN_LENGTH = 12
    TABLE = 13  # of layers
    NUM_LAYERS = 14
    FINAL_NORM = 15
    # the KV pool
    POOL = 16
    POOL_LAYER_BYTES = 17
    BLOCK_LEN = 18
    POOL_EXACT = 19
    # the step
    POSITIONS = 20
    SLOTS = 21
    BLOCK_TABLES = 22
    BLOCK_TABLE_STRIDE = 23
    NUM_SPLITS = 24
    SPLITS = 25  # int32 [splits, 4]: token, row, first position, stop
    NUM_PIECES = 26
    PIECES = 27  # int32 [pieces, 4]: row, first token, tokens, position of the first
    TOKEN_SPLITS = 28  # int32 [T, 2]: first split, splits (0: a token of a piece)
    PARTIAL = 29
    SCRATCH = 30
    SCRATCH_BYTES = 31  # of one thread
    # activations
    RESIDUAL = 32  # float32 [T, hidden]
    X = 33
    X_STRIDE = 34
    SUMS = 35
    SUMS_STRIDE = 36
    QKV = 37
    QKV_STRIDE = 38
    ATTENDED = 39  # float32 [T, heads * head_dim]
    H = 40
    H_STRIDE = 41
    H_SUMS = 42
    H_SUMS_STRIDE = 43
    OUT = 44  # float32 [T, hidden]
    # one layer of ROPE_STORE and ATTENTION
    Q_NORM = 45
    K_NORM = 46
    WINDOW = 47
    # compiled functions, by address
    PIECE_FUNCTION = 48
    SPLIT_FUNCTION = 49
    TILE_FUNCTION = 50  # of the KV dtype
    PRODUCT = 51
    GATE_UP = 52
    ROPE_STORE = 53
    ATTEND = 54
    COUNT = 55


class L:
    """Words of one layer."""

    INPUT_NORM = 0
    QKV = 1
    Q_NORM = 7
    K_NORM = 8
    O = 9
    POST_NORM = 15
    GATE_UP = 16
    DOWN = 22
    WINDOW = 28
    COUNT = 29


# njit reads module constants, not attributes of a class
_TOKENS, _EPS, _EXACT, _HIDDEN, _INTERMEDIATE, _HEADS, _KV_HEADS, _HEAD_DIM = (
    P.TOKENS,
    P.EPS,
    P.EXACT,
    P.HIDDEN,
    P.INTERMEDIATE,
    P.HEADS,
    P.KV_HEADS,
    P.HEAD_DIM,
)
_HALF, _COS, _SIN, _LOGN_LENGTH, _TABLE, _NUM_LAYERS, _FINAL_NORM, _POOL = (
    P.HALF,
    P.COS,
    P.SIN,
    P.LOGN_LENGTH,
    P.TABLE,
    P.NUM_LAYERS,
    P.FINAL_NORM,
    P.POOL,
)
_POOL_LAYER_BYTES, _BLOCK_LEN, _POOL_EXACT, _POSITIONS, _SLOTS, _BLOCK_TABLES, _BLOCK_TABLE_STRIDE, _NUM_SPLITS = (
    P.POOL_LAYER_BYTES,
    P.BLOCK_LEN,
    P.POOL_EXACT,
    P.POSITIONS,
    P.SLOTS,
    P.BLOCK_TABLES,
    P.BLOCK_TABLE_STRIDE,
    P.NUM_SPLITS,
)
_SPLITS, _NUM_PIECES, _PIECES, _TOKEN_SPLITS, _PARTIAL, _SCRATCH, _SCRATCH_BYTES, _RESIDUAL = (
    P.SPLITS,
    P.NUM_PIECES,
    P.PIECES,
    P.TOKEN_SPLITS,
    P.PARTIAL,
    P.SCRATCH,
    P.SCRATCH_BYTES,
    P.RESIDUAL,
)
_X, _X_STRIDE, _SUMS, _SUMS_STRIDE, _QKV, _QKV_STRIDE, _ATTENDED, _H = (
    P.X,
    P.X_STRIDE,
    P.SUMS,
    P.SUMS_STRIDE,
    P.QKV,
    P.QKV_STRIDE,
    P.ATTENDED,
    P.H,
)
_H_STRIDE, _H_SUMS, _H_SUMS_STRIDE, _OUT, _Q_NORM, _K_NORM, _WINDOW, _PIECE_FUNCTION = (
    P.H_STRIDE,
    P.H_SUMS,
    P.H_SUMS_STRIDE,
    P.OUT,
    P.Q_NORM,
    P.K_NORM,
    P.WINDOW,
    P.PIECE_FUNCTION,
)
_SPLIT_FUNCTION, _TILE_FUNCTION, _PRODUCT, _GATE_UP, _ROPE_STORE, _ATTEND = (
    P.SPLIT_FUNCTION,
    P.TILE_FUNCTION,
    P.PRODUCT,
    P.GATE_UP,
    P.ROPE_STORE,
    P.ATTEND,
)
_L_INPUT_NORM, _L_QKV, _L_Q_NORM, _L_K_NORM, _L_O, _L_POST_NORM, _L_GATE_UP, _L_DOWN = (
    L.INPUT_NORM,
    L.QKV,
    L.Q_NORM,
    L.K_NORM,
    L.O,
    L.POST_NORM,
    L.GATE_UP,
    L.DOWN,
)
_L_WINDOW, _L_COUNT = L.WINDOW, L.COUNT


call_rope_store = caller(6)
call_attend = caller(5)
call_gate_up = caller(8)
call_product = caller(16)
call_job = caller(4)


def store_stage(params, tid, n, pool, q_norm, k_norm):  # type: ignore[no-untyped-def]
    p = i64_at(params)
    rope_store_rows(
        tid, n, p[_TOKENS], p[_QKV], p[_QKV_STRIDE], p[_HEADS], p[_KV_HEADS], p[_HEAD_DIM], p[_POSITIONS], p[_SLOTS],
        p[_COS], p[_SIN], p[_HALF], q_norm, k_norm, np.float32(f64_at(params)[_EPS]), p[_LOGN_LENGTH], pool, p[_BLOCK_LEN],
        p[_POOL_EXACT],
    )  # fmt: skip


def attend_stage(params, tid, claim, pool, window):  # type: ignore[no-untyped-def]
    """Pieces (several tokens) first, they take longest; then splits of single tokens."""
    p = i64_at(params)
    kv_heads, heads, head_dim = p[_KV_HEADS], p[_HEADS], p[_HEAD_DIM]
    scratch = p[_SCRATCH] + tid * p[_SCRATCH_BYTES]
    pieces, splits = i32_at(p[_PIECES]), i32_at(p[_SPLITS])
    num_pieces = p[_NUM_PIECES] * kv_heads
    items = num_pieces + p[_NUM_SPLITS] * kv_heads
    out_stride = 4 * heads * head_dim
    while True:
        item = atomic_add(claim, 1)
        if item >= items:
            return
        if item < num_pieces:
            at, kv_head = 4 * (item // kv_heads), item % kv_heads
            row, first, tokens, position = pieces[at], pieces[at + 1], pieces[at + 2], pieces[at + 3]
            call_piece(
                p[_PIECE_FUNCTION], p[_TILE_FUNCTION], p[_QKV] + first * p[_QKV_STRIDE], p[_QKV_STRIDE], tokens, position, pool, p[_BLOCK_TABLES] + row * p[_BLOCK_TABLE_STRIDE],
                window, kv_head, heads, kv_heads, head_dim, p[_BLOCK_LEN], p[_POOL_EXACT], scratch,
                p[_ATTENDED] + first * out_stride, out_stride,
            )  # fmt: skip
            continue
        split, kv_head = (item - num_pieces) // kv_heads, (item - num_pieces) % kv_heads
        token, row, begin, stop = splits[4 * split], splits[4 * split + 1], splits[4 * split + 2], splits[4 * split + 3]
        partial = p[_PARTIAL] + split * 4 * heads * (head_dim + 2)
        if window > 0:
            begin = max(begin, i32_at(p[_POSITIONS])[token] - window + 1)
        if begin >= stop:
            empty_split(kv_head, heads // kv_heads, head_dim, partial)
            continue
        call_split(
            p[_SPLIT_FUNCTION], p[_QKV] + token * p[_QKV_STRIDE], pool, p[_BLOCK_TABLES] + row * p[_BLOCK_TABLE_STRIDE], begin, stop, kv_head, heads,
            kv_heads, head_dim, p[_BLOCK_LEN], scratch, partial,
        )  # fmt: skip


def product_stage(claim, n, tile_function, w, bias, tiles, chunks, tile_bytes, x, x_stride, sums, sums_stride, y, y_stride, add, num_rows):  # type: ignore[no-untyped-def]
    product(claim, n, tile_function, w, bias, tiles, chunks, tile_bytes, x, x_stride, sums, sums_stride, y, y_stride, add, num_rows)


@njit(nogil=True)
def _merge(p, tid, n):  # type: ignore[no-untyped-def]
    """The splits of single tokens -> ATTENDED."""
    heads, head_dim = p[_HEADS], p[_HEAD_DIM]
    token_splits = i32_at(p[_TOKEN_SPLITS])
    for t in range(tid, p[_TOKENS], n):
        first, splits = token_splits[2 * t], token_splits[2 * t + 1]
        if splits > 0:
            merge(p[_PARTIAL] + first * 4 * heads * (head_dim + 2), splits, heads, head_dim, p[_ATTENDED] + t * 4 * heads * head_dim)


def gate_up_stage(params, tid, claim, tile_function, w, bias, chunks, tile_bytes):  # type: ignore[no-untyped-def]
    """H = silu(gate) * up, 32 columns of up to ROW_BLOCK rows at a time; gate and up go no further than the scratch."""
    p = i64_at(params)
    tokens, exact = p[_TOKENS], p[_EXACT]
    up_tile = p[_INTERMEDIATE] // 16
    columns = p[_INTERMEDIATE] // CHUNK
    scratch = p[_SCRATCH] + tid * p[_SCRATCH_BYTES]
    product_row = scratch + ROW_BLOCK * 256
    element = 4 if exact else 2
    items = columns * ((tokens + ROW_BLOCK - 1) // ROW_BLOCK)
    while True:
        item = atomic_add(claim, 1)
        if item >= items:
            return
        column, first = item % columns, item // columns * ROW_BLOCK
        rows = min(ROW_BLOCK, tokens - first)
        x, sums = p[_X] + first * p[_X_STRIDE], p[_SUMS] + first * p[_SUMS_STRIDE]
        for part in range(2):
            tile = 2 * column + part * up_tile
            call_tile_rows(
                tile_function, w + tile * tile_bytes, 2, tile_bytes, x, p[_X_STRIDE], sums, p[_SUMS_STRIDE], bias + 64 * tile,
                scratch + 128 * part, 256, chunks, 0, rows,
            )  # fmt: skip
        for t in range(rows):
            silu_vectors(scratch + 256 * t, scratch + 256 * t + 128, product_row, 2)
            h = p[_H] + (first + t) * p[_H_STRIDE] + CHUNK * element * column
            put_row(exact, product_row, h, p[_H_SUMS] + (first + t) * p[_H_SUMS_STRIDE] + 4 * column, 1)


@njit(nogil=True)
def _norm_put(p, tid, n, weight, scratch, eps):  # type: ignore[no-untyped-def]
    """X = rms_norm(RESIDUAL)."""
    hidden = p[_HIDDEN]
    for t in range(tid, p[_TOKENS], n):
        norm_row(p[_RESIDUAL] + t * 4 * hidden, weight, scratch, hidden, eps)
        put_row(p[_EXACT], scratch, p[_X] + t * p[_X_STRIDE], p[_SUMS] + t * p[_SUMS_STRIDE], hidden // CHUNK)


def layers(ctrl, params, tid, n):  # type: ignore[no-untyped-def]
    """All layers and the final norm: RESIDUAL -> OUT."""
    p = i64_at(params)
    eps = np.float32(f64_at(params)[_EPS])
    tokens, hidden, attended = p[_TOKENS], p[_HIDDEN], p[_HEADS] * p[_HEAD_DIM]
    scratch = p[_SCRATCH] + tid * p[_SCRATCH_BYTES]
    stage = 0
    for index in range(p[_NUM_LAYERS]):
        w = i64_at(p[_TABLE] + 8 * _L_COUNT * index)
        pool = p[_POOL] + index * p[_POOL_LAYER_BYTES]
        _norm_put(p, tid, n, w[_L_INPUT_NORM], scratch, eps)
        stage += 1
        claim = next_stage(ctrl, tid, n, stage)
        call_product(
            p[_PRODUCT], claim, n, w[_L_QKV], w[_L_QKV + 1], w[_L_QKV + 2], w[_L_QKV + 3], w[_L_QKV + 4], w[_L_QKV + 5], p[_X], p[_X_STRIDE], p[_SUMS],
            p[_SUMS_STRIDE], p[_QKV], p[_QKV_STRIDE], 0, tokens,
        )  # fmt: skip
        barrier(ctrl, tid, n)
        call_rope_store(p[_ROPE_STORE], params, tid, n, pool, w[_L_Q_NORM], w[_L_K_NORM])
        stage += 1
        claim = next_stage(ctrl, tid, n, stage)
        call_attend(p[_ATTEND], params, tid, claim, pool, w[_L_WINDOW])
        barrier(ctrl, tid, n)
        _merge(p, tid, n)
        put_rows(tid, n, tokens, p[_EXACT], p[_ATTENDED], 4 * attended, p[_X], p[_X_STRIDE], p[_SUMS], p[_SUMS_STRIDE], attended // CHUNK)
        stage += 1
        claim = next_stage(ctrl, tid, n, stage)
        call_product(
            p[_PRODUCT], claim, n, w[_L_O], w[_L_O + 1], w[_L_O + 2], w[_L_O + 3], w[_L_O + 4], w[_L_O + 5], p[_X], p[_X_STRIDE], p[_SUMS],
            p[_SUMS_STRIDE], p[_RESIDUAL], 4 * hidden, 1, tokens,
        )  # fmt: skip
        barrier(ctrl, tid, n)
        _norm_put(p, tid, n, w[_L_POST_NORM], scratch, eps)
        stage += 1
        claim = next_stage(ctrl, tid, n, stage)
        call_gate_up(
            p[_GATE_UP], params, tid, claim, w[_L_GATE_UP], w[_L_GATE_UP + 1], w[_L_GATE_UP + 2], w[_L_GATE_UP + 4], w[_L_GATE_UP + 5]
        )
        stage += 1
        claim = next_stage(ctrl, tid, n, stage)
        call_product(
            p[_PRODUCT], claim, n, w[_L_DOWN], w[_L_DOWN + 1], w[_L_DOWN + 2], w[_L_DOWN + 3], w[_L_DOWN + 4], w[_L_DOWN + 5], p[_H], p[_H_STRIDE], p[_H_SUMS],
            p[_H_SUMS_STRIDE], p[_RESIDUAL], 4 * hidden, 1, tokens,
        )  # fmt: skip
        barrier(ctrl, tid, n)
    norm_rows(tid, n, tokens, p[_RESIDUAL], 4 * hidden, p[_FINAL_NORM], p[_OUT], 4 * hidden, hidden, eps)


def linear(ctrl, params, tid, n):  # type: ignore[no-untyped-def]
    """1 exact, 2 rows, 3 source, 4 its stride, 5 x, 6 stride, 7 sums, 8 stride, 9 y, 10 stride, 11 weight (6 words)."""
    p = i64_at(params)
    put_rows(tid, n, p[2], p[1], p[3], p[4], p[5], p[6], p[7], p[8], p[15])
    claim = next_stage(ctrl, tid, n, 1)
    product(claim, n, p[11], p[12], p[13], p[14], p[15], p[16], p[5], p[6], p[7], p[8], p[9], p[10], 0, p[2])


def norm(ctrl, params, tid, n):  # type: ignore[no-untyped-def]
    """1 rows, 2 eps (bits), 3 x, 4 weight, 5 out, 6 count."""
    p = i64_at(params)
    norm_rows(tid, n, p[1], p[3], 4 * p[6], p[4], p[5], 4 * p[6], p[6], np.float32(f64_at(params)[_EPS]))


def add_norm(ctrl, params, tid, n):  # type: ignore[no-untyped-def]
    """1 rows, 2 eps (bits), 3 x, 4 residual, 5 total, 6 weight, 7 out, 8 count."""
    p = i64_at(params)
    add_norm_rows(tid, n, p[1], p[3], p[4], p[5], p[6], p[7], 4 * p[8], p[8], np.float32(f64_at(params)[_EPS]))


def silu_mul(ctrl, params, tid, n):  # type: ignore[no-untyped-def]
    """1 rows, 2 gate_up, 3 its stride, 4 out, 5 its stride, 6 count."""
    p = i64_at(params)
    silu_rows(tid, n, p[1], p[2], p[3], p[4], p[5], p[6])


def embed(ctrl, params, tid, n):  # type: ignore[no-untyped-def]
    """1 tokens, 2 ids, 3 out, 4 its stride, 5 count, 6 kind, 7 data, 8 bytes of a tile, 9 bytes of a chunk."""
    p = i64_at(params)
    ids = i32_at(p[2])
    for t in range(tid, p[1], n):
        embed_row(p[6], p[7], p[8], p[9], ids[t], p[3] + t * p[4], p[5])


def rope_store(ctrl, params, tid, n):  # type: ignore[no-untyped-def]
    """One layer: QKV in place, K and V to POOL."""
    p = i64_at(params)
    call_rope_store(p[_ROPE_STORE], params, tid, n, p[_POOL], p[_Q_NORM], p[_K_NORM])


def attention(ctrl, params, tid, n):  # type: ignore[no-untyped-def]
    """One layer: QKV (its q) -> ATTENDED."""
    p = i64_at(params)
    claim = next_stage(ctrl, tid, n, 1)
    call_attend(p[_ATTEND], params, tid, claim, p[_POOL], p[_WINDOW])
    barrier(ctrl, tid, n)
    _merge(p, tid, n)


@njit("void(int64, int64, int64, int64)", nogil=True, cache=True)
def serve(ctrl, params, tid, n):  # type: ignore[no-untyped-def]
    """Thread 0: post the job in `params`, do a share, return when all have. Others: jobs until the stop."""
    p = i64_at(params)
    if tid == 0:
        clear_claims(ctrl)
        post_job(ctrl, 1)
        call_job(p[0], ctrl, params, 0, n)
        barrier(ctrl, 0, n)
        return
    seen = 0
    while True:
        seen = await_job(ctrl, seen)
        if seen >= STOP:
            return
        call_job(p[0], ctrl, params, tid, n)
        barrier(ctrl, tid, n)
