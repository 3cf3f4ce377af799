"""What the pool's threads run: one function a job, the largest of them the pass over all layers.

A job is a row of int64 parameters: the address of its function, then addresses, strides in bytes, and counts. `P` names the
places for operations on a step (`layers`, `rope_store`, `attention`); the others say theirs in their docstring. `L` names the
words of one layer in the table that `layers` walks; a packed weight is eight of them (the address of its tile function, data,
bias, tiles, chunks, bytes of a tile, what its activations are made into, the address of their order or 0). Every operation is
compiled on its own, when it is first needed (`compiled`).

Only this file knows the order of operations in a layer; it must not know where parameters come from. Stages of a layer:
norm | qkv | rope, K/V store | attention | merge, round | o + residual | norm | gate, up, silu | (quantize) | down + residual
"""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.cpu.elementwise import add_norm_rows, embed_row, norm_row, norm_rows, put_rows, silu_rows, silu_vectors
from engine.cpu.kv_quant import call_take_rows, rotate_heads
from engine.cpu.kv_store import rope_store_rows
from engine.cpu.matmul import BYTES, CHUNK, ROW_BLOCK, WIDE_FLOAT, call_tile_rows, product, put_row
from engine.cpu.paged_attention import SPLIT, call_split, empty_split, merge
from engine.cpu.prefill_attention import call_piece
from engine.cpu.threads import (
    PARAMS,
    STAGES,
    STOP,
    atomic_add,
    await_job,
    close_job,
    enter_job,
    finish,
    leave_job,
    open_job,
    piece_start,
    rows_at_once,
)  # fmt: skip
from engine.cpu.vector import caller, f32_at, f64_at, i32_at, i64_at


class P:
    """Parameters of the operations on a step."""

    FUNCTION = 0
    STAGES = 1
    TOKENS = 55
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
    KEY_FRAME = 64
    WINDOW = 47
    # compiled functions, by address
    PIECE_FUNCTION = 48
    SPLIT_FUNCTION = 49
    TILE_FUNCTION = 50  # of the KV dtype
    PRODUCT = 51
    GATE_UP = 52
    ROPE_STORE = 53
    ATTEND = 54
    NORM_STAGE = 56
    MERGE = 57
    TAKE_ROWS = 58  # of a quantized pool, its bits (0: none), room for what is dequantized in a thread's scratch, an int32 that is 0
    POOL_BITS = 59
    ROWS_AT = 60  # from the thread's scratch
    ONLY_BLOCK = 61
    QUANTIZE = 62
    ROTATED = 63  # numbers of a head that a 4-bit pool turns together, else 0
    COUNT = 65


class L:
    """Words of one layer."""

    INPUT_NORM = 0
    QKV = 1
    Q_NORM = 9
    K_NORM = 10
    O = 11
    POST_NORM = 19
    GATE_UP = 20
    DOWN = 28
    WINDOW = 36
    KEY_FRAME = 37
    COUNT = 38


MODE, ORDER = 6, 7  # words of a packed weight that who makes its activations reads


# njit reads module constants, not attributes of a class
# fmt: off
(_TOKENS, _EPS, _EXACT, _HIDDEN) = (P.TOKENS, P.EPS, P.EXACT, P.HIDDEN)
(_INTERMEDIATE, _HEADS, _KV_HEADS, _HEAD_DIM) = (P.INTERMEDIATE, P.HEADS, P.KV_HEADS, P.HEAD_DIM)
(_HALF, _COS, _SIN, _LOGN_LENGTH) = (P.HALF, P.COS, P.SIN, P.LOGN_LENGTH)
(_TABLE, _NUM_LAYERS, _FINAL_NORM, _POOL) = (P.TABLE, P.NUM_LAYERS, P.FINAL_NORM, P.POOL)
(_POOL_LAYER_BYTES, _BLOCK_LEN, _POOL_EXACT, _POSITIONS) = (P.POOL_LAYER_BYTES, P.BLOCK_LEN, P.POOL_EXACT, P.POSITIONS)
(_SLOTS, _BLOCK_TABLES, _BLOCK_TABLE_STRIDE, _NUM_SPLITS) = (P.SLOTS, P.BLOCK_TABLES, P.BLOCK_TABLE_STRIDE, P.NUM_SPLITS)
(_SPLITS, _NUM_PIECES, _PIECES, _TOKEN_SPLITS) = (P.SPLITS, P.NUM_PIECES, P.PIECES, P.TOKEN_SPLITS)
(_PARTIAL, _SCRATCH, _SCRATCH_BYTES, _RESIDUAL) = (P.PARTIAL, P.SCRATCH, P.SCRATCH_BYTES, P.RESIDUAL)
(_X, _X_STRIDE, _SUMS, _SUMS_STRIDE) = (P.X, P.X_STRIDE, P.SUMS, P.SUMS_STRIDE)
(_QKV, _QKV_STRIDE, _ATTENDED, _H) = (P.QKV, P.QKV_STRIDE, P.ATTENDED, P.H)
(_H_STRIDE, _H_SUMS, _H_SUMS_STRIDE, _OUT) = (P.H_STRIDE, P.H_SUMS, P.H_SUMS_STRIDE, P.OUT)
(_Q_NORM, _K_NORM, _WINDOW, _PIECE_FUNCTION) = (P.Q_NORM, P.K_NORM, P.WINDOW, P.PIECE_FUNCTION)
(_SPLIT_FUNCTION, _TILE_FUNCTION, _PRODUCT, _GATE_UP) = (P.SPLIT_FUNCTION, P.TILE_FUNCTION, P.PRODUCT, P.GATE_UP)
(_ROPE_STORE, _ATTEND, _NORM_STAGE, _MERGE) = (P.ROPE_STORE, P.ATTEND, P.NORM_STAGE, P.MERGE)
(_TAKE_ROWS, _POOL_BITS, _ROWS_AT, _ONLY_BLOCK) = (P.TAKE_ROWS, P.POOL_BITS, P.ROWS_AT, P.ONLY_BLOCK)
_QUANTIZE, _ROTATED, _KEY_FRAME, _L_KEY_FRAME = P.QUANTIZE, P.ROTATED, P.KEY_FRAME, L.KEY_FRAME
(_L_INPUT_NORM, _L_QKV, _L_Q_NORM, _L_K_NORM, _L_O) = (L.INPUT_NORM, L.QKV, L.Q_NORM, L.K_NORM, L.O)
(_L_POST_NORM, _L_GATE_UP, _L_DOWN, _L_WINDOW, _L_COUNT) = (L.POST_NORM, L.GATE_UP, L.DOWN, L.WINDOW, L.COUNT)
# fmt: on

STAGES_OF_A_LAYER = 10
call_norm = caller(6)
call_merge = caller(5)
call_quantize = caller(3)
call_rope_store = caller(8)
call_attend = caller(5)
call_gate_up = caller(10)
call_product = caller(16)
call_job = caller(4)


def store_stage(params, stage, tid, n, pool, q_norm, k_norm, key_frame):  # type: ignore[no-untyped-def]
    p = i64_at(params)
    scratch = p[_SCRATCH] + tid * p[_SCRATCH_BYTES]
    rope_store_rows(
        stage, n, p[_TOKENS], p[_QKV], p[_QKV_STRIDE], p[_HEADS], p[_KV_HEADS], p[_HEAD_DIM], p[_POSITIONS], p[_SLOTS],
        p[_COS], p[_SIN], p[_HALF], q_norm, k_norm, key_frame, np.float32(f64_at(params)[_EPS]), p[_LOGN_LENGTH], pool, p[_BLOCK_LEN],
        p[_POOL_EXACT], p[_POOL_BITS], p[_ROTATED], scratch,
    )  # fmt: skip


def attend_stage(params, stage, tid, pool, window):  # type: ignore[no-untyped-def]
    """Pieces (several tokens) first, they take longest; then splits of single tokens. What a split reads of a quantized pool is
    dequantized first, as a pool of one block."""
    p = i64_at(params)
    kv_heads, heads, head_dim = p[_KV_HEADS], p[_HEADS], p[_HEAD_DIM]
    scratch = p[_SCRATCH] + tid * p[_SCRATCH_BYTES]
    bits, rows, group = p[_POOL_BITS], scratch + p[_ROWS_AT], heads // kv_heads
    pieces, splits = i32_at(p[_PIECES]), i32_at(p[_SPLITS])
    num_pieces = p[_NUM_PIECES] * kv_heads
    items = num_pieces + p[_NUM_SPLITS] * kv_heads
    out_stride, done = 4 * heads * head_dim, 0
    while True:
        item = atomic_add(stage, 1)
        if item >= items:
            break
        done += 1
        if item < num_pieces:
            at, kv_head = 4 * (item // kv_heads), item % kv_heads
            row, first, tokens, position = pieces[at], pieces[at + 1], pieces[at + 2], pieces[at + 3]
            call_piece(
                p[_PIECE_FUNCTION], p[_TILE_FUNCTION], p[_QKV] + first * p[_QKV_STRIDE], p[_QKV_STRIDE], tokens, position,
                pool, p[_BLOCK_TABLES] + row * p[_BLOCK_TABLE_STRIDE], window, kv_head, heads, kv_heads, head_dim,
                p[_BLOCK_LEN], p[_POOL_EXACT], scratch, p[_ATTENDED] + first * out_stride, out_stride,
                p[_TAKE_ROWS], bits, rows, p[_ONLY_BLOCK],
            )  # fmt: skip
            continue
        split, kv_head = (item - num_pieces) // kv_heads, (item - num_pieces) % kv_heads
        token, row, begin, stop = splits[4 * split], splits[4 * split + 1], splits[4 * split + 2], splits[4 * split + 3]
        partial = p[_PARTIAL] + split * 4 * heads * (head_dim + 2)
        if window > 0:
            begin = max(begin, i32_at(p[_POSITIONS])[token] - window + 1)
        if begin >= stop:
            empty_split(kv_head, group, head_dim, partial)
            continue
        if bits != 0:
            table = p[_BLOCK_TABLES] + row * p[_BLOCK_TABLE_STRIDE]
            exact, first_head = p[_POOL_EXACT], kv_head * group
            call_take_rows(p[_TAKE_ROWS], pool, table, begin, stop, kv_head, kv_heads, head_dim, p[_BLOCK_LEN], bits, exact, SPLIT, rows)
            call_split(
                p[_SPLIT_FUNCTION], p[_QKV] + token * p[_QKV_STRIDE] + 4 * first_head * head_dim, rows, p[_ONLY_BLOCK], 0,
                stop - begin, 0, group, 1, head_dim, SPLIT, scratch, partial + 4 * first_head * (head_dim + 2),
            )  # fmt: skip
            continue
        call_split(
            p[_SPLIT_FUNCTION], p[_QKV] + token * p[_QKV_STRIDE], pool, p[_BLOCK_TABLES] + row * p[_BLOCK_TABLE_STRIDE],
            begin, stop, kv_head, heads, kv_heads, head_dim, p[_BLOCK_LEN], scratch, partial,
        )  # fmt: skip
    finish(stage, done, items)


def product_stage(  # type: ignore[no-untyped-def]
    stage, n, tile_function, w, bias, tiles, chunks, tile_bytes, x, x_stride, sums, sums_stride, y, y_stride, add, num_rows
):  # fmt: skip
    """`product` by address: six words of the weight, activations, result."""
    product(stage, n, tile_function, w, bias, tiles, chunks, tile_bytes, x, x_stride, sums, sums_stride, y, y_stride, add, num_rows)


@njit(nogil=True)
def _merge_token(p, t):  # type: ignore[no-untyped-def]
    """The splits of a single token -> ATTENDED; a token of a piece is there already. Heads that the pool has turned are turned back."""
    heads, head_dim = p[_HEADS], p[_HEAD_DIM]
    token_splits = i32_at(p[_TOKEN_SPLITS])
    first, splits = token_splits[2 * t], token_splits[2 * t + 1]
    if splits > 0:
        merge(p[_PARTIAL] + first * 4 * heads * (head_dim + 2), splits, heads, head_dim, p[_ATTENDED] + t * 4 * heads * head_dim)
    if p[_ROTATED] != 0:
        rotate_heads(p[_ATTENDED] + t * 4 * heads * head_dim, heads, head_dim, p[_ROTATED])


@njit(nogil=True)
def _put_for(reader, source, spare, target, sums, count):  # type: ignore[no-untyped-def]
    """A float32 row as the activations of the weight whose words are at `reader`; `spare`: room for a row in another order."""
    w = i64_at(reader)
    if w[ORDER] != 0:
        order, values, sorted_values = i32_at(w[ORDER]), f32_at(source), f32_at(spare)
        for k in range(count):
            sorted_values[k] = values[order[k]]
        source = spare
    put_row(w[MODE], source, target, sums, count // CHUNK)


def merge_stage(params, stage, tid, n, reader):  # type: ignore[no-untyped-def]
    """Splits added up; with a `reader` (a weight's words), ATTENDED -> X."""
    p = i64_at(params)
    spare = p[_SCRATCH] + tid * p[_SCRATCH_BYTES]
    rows, width = p[_TOKENS], p[_HEADS] * p[_HEAD_DIM]
    done, chunk = 0, rows_at_once(rows, n)
    while True:
        begin = atomic_add(stage, chunk)
        if begin >= rows:
            break
        stop = min(rows, begin + chunk)
        done += stop - begin
        for t in range(begin, stop):
            _merge_token(p, t)
            if reader != 0:
                x, sums = p[_X] + t * p[_X_STRIDE], p[_SUMS] + t * p[_SUMS_STRIDE]
                _put_for(reader, p[_ATTENDED] + t * 4 * width, spare, x, sums, width)
    finish(stage, done, rows)


def quantize_stage(params, stage, n):  # type: ignore[no-untyped-def]
    """H, float32 rows -> bytes where they were, and their scales."""
    p = i64_at(params)
    rows, columns = p[_TOKENS], p[_INTERMEDIATE] // CHUNK
    done, chunk = 0, rows_at_once(rows, n)
    while True:
        begin = atomic_add(stage, chunk)
        if begin >= rows:
            break
        stop = min(rows, begin + chunk)
        done += stop - begin
        for t in range(begin, stop):
            h = p[_H] + t * p[_H_STRIDE]
            put_row(BYTES, h, h, p[_H_SUMS] + t * p[_H_SUMS_STRIDE], columns)
    finish(stage, done, rows)


def gate_up_stage(params, stage, tid, n, tile_function, w, bias, chunks, tile_bytes, mode):  # type: ignore[no-untyped-def]
    """H (as `mode` says) = silu(gate) * up, 32 columns of up to ROW_BLOCK rows at a time; gate and up go no further than the scratch."""
    p = i64_at(params)
    tokens = p[_TOKENS]
    up_tile = p[_INTERMEDIATE] // 16
    columns = p[_INTERMEDIATE] // CHUNK
    scratch = p[_SCRATCH] + tid * p[_SCRATCH_BYTES]
    product_row = scratch + ROW_BLOCK * 256
    element = 4 if mode == WIDE_FLOAT else 2
    items, done = columns * ((tokens + ROW_BLOCK - 1) // ROW_BLOCK), 0
    least = 0 if tokens <= 32 else 1
    while True:
        piece = atomic_add(stage, 1)
        begin, stop = piece_start(piece, items, n, least), piece_start(piece + 1, items, n, least)
        if begin >= items:
            break
        done += stop - begin
        for item in range(begin, stop):
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
                put_row(mode, product_row, h, p[_H_SUMS] + (first + t) * p[_H_SUMS_STRIDE] + 4 * column, 1)
    finish(stage, done, items)


def norm_stage(params, stage, tid, n, weight, reader):  # type: ignore[no-untyped-def]
    """X = rms_norm(RESIDUAL), for the weight whose words are at `reader`."""
    p = i64_at(params)
    rows, hidden, eps = p[_TOKENS], p[_HIDDEN], np.float32(f64_at(params)[_EPS])
    scratch = p[_SCRATCH] + tid * p[_SCRATCH_BYTES]
    done, chunk = 0, rows_at_once(rows, n)
    while True:
        begin = atomic_add(stage, chunk)
        if begin >= rows:
            break
        stop = min(rows, begin + chunk)
        done += stop - begin
        for t in range(begin, stop):
            norm_row(p[_RESIDUAL] + t * 4 * hidden, weight, scratch, hidden, eps)
            x, sums = p[_X] + t * p[_X_STRIDE], p[_SUMS] + t * p[_SUMS_STRIDE]
            _put_for(reader, scratch, scratch + 4 * hidden, x, sums, hidden)
    finish(stage, done, rows)


def layers(stages, params, tid, n):  # type: ignore[no-untyped-def]
    """All layers and the final norm: RESIDUAL -> OUT."""
    p = i64_at(params)
    tokens, hidden = p[_TOKENS], p[_HIDDEN]
    x, x_stride, sums, sums_stride = p[_X], p[_X_STRIDE], p[_SUMS], p[_SUMS_STRIDE]
    stage = stages
    for index in range(p[_NUM_LAYERS]):
        layer = p[_TABLE] + 8 * _L_COUNT * index
        w, pool = i64_at(layer), p[_POOL] + index * p[_POOL_LAYER_BYTES]
        call_norm(p[_NORM_STAGE], params, stage, tid, n, w[_L_INPUT_NORM], layer + 8 * _L_QKV)
        _product(p, layer + 8 * _L_QKV, stage + 64, n, x, x_stride, sums, sums_stride, p[_QKV], p[_QKV_STRIDE], 0, tokens)
        call_rope_store(p[_ROPE_STORE], params, stage + 128, tid, n, pool, w[_L_Q_NORM], w[_L_K_NORM], w[_L_KEY_FRAME])
        call_attend(p[_ATTEND], params, stage + 192, tid, pool, w[_L_WINDOW])
        call_merge(p[_MERGE], params, stage + 256, tid, n, layer + 8 * _L_O)
        _product(p, layer + 8 * _L_O, stage + 320, n, x, x_stride, sums, sums_stride, p[_RESIDUAL], 4 * hidden, 1, tokens)
        call_norm(p[_NORM_STAGE], params, stage + 384, tid, n, w[_L_POST_NORM], layer + 8 * _L_GATE_UP)
        gate, mode = i64_at(layer + 8 * _L_GATE_UP), i64_at(layer + 8 * _L_DOWN)[MODE]
        # a row's scale is known when all of the row is
        made = WIDE_FLOAT if mode == BYTES else mode
        call_gate_up(p[_GATE_UP], params, stage + 448, tid, n, gate[0], gate[1], gate[2], gate[4], gate[5], made)
        if mode == BYTES:
            call_quantize(p[_QUANTIZE], params, stage + 512, n)
        _product(
            p, layer + 8 * _L_DOWN, stage + 576, n, p[_H], p[_H_STRIDE], p[_H_SUMS], p[_H_SUMS_STRIDE], p[_RESIDUAL], 4 * hidden, 1, tokens
        )
        stage += 64 * STAGES_OF_A_LAYER
    eps = np.float32(f64_at(params)[_EPS])
    norm_rows(stage, n, tokens, p[_RESIDUAL], 4 * hidden, p[_FINAL_NORM], p[_OUT], 4 * hidden, hidden, eps)


@njit(nogil=True)
def _product(p, weight, stage, n, x, x_stride, sums, sums_stride, y, y_stride, add, rows):  # type: ignore[no-untyped-def]
    """`weight`: address of its words."""
    w = i64_at(weight)
    call_product(p[_PRODUCT], stage, n, w[0], w[1], w[2], w[3], w[4], w[5], x, x_stride, sums, sums_stride, y, y_stride, add, rows)


def linear(stages, params, tid, n):  # type: ignore[no-untyped-def]
    """2 rows, 3 source, 4 its stride, 5 x, 6 stride, 7 sums, 8 stride, 9 y, 10 stride, 11 weight (8 words, of which 17 is MODE)."""
    p = i64_at(params)
    put_rows(stages, n, p[2], p[17], p[3], p[4], p[5], p[6], p[7], p[8], p[15])
    product(stages + 64, n, p[11], p[12], p[13], p[14], p[15], p[16], p[5], p[6], p[7], p[8], p[9], p[10], 0, p[2])


def norm(stages, params, tid, n):  # type: ignore[no-untyped-def]
    """2 eps (bits), 3 rows, 4 x, 5 weight, 6 out, 7 count."""
    p = i64_at(params)
    norm_rows(stages, n, p[3], p[4], 4 * p[7], p[5], p[6], 4 * p[7], p[7], np.float32(f64_at(params)[_EPS]))


def add_norm(stages, params, tid, n):  # type: ignore[no-untyped-def]
    """2 eps (bits), 3 rows, 4 x, 5 residual, 6 total, 7 weight, 8 out, 9 count."""
    p = i64_at(params)
    add_norm_rows(stages, n, p[3], p[4], p[5], p[6], p[7], p[8], 4 * p[9], p[9], np.float32(f64_at(params)[_EPS]))


def silu_mul(stages, params, tid, n):  # type: ignore[no-untyped-def]
    """2 rows, 3 gate_up, 4 its stride, 5 out, 6 its stride, 7 count."""
    p = i64_at(params)
    silu_rows(stages, n, p[2], p[3], p[4], p[5], p[6], p[7])


def embed(stages, params, tid, n):  # type: ignore[no-untyped-def]
    """2 tokens, 3 ids, 4 out, 5 its stride, 6 count, 7 kind, 8 data, 9 bytes of a tile, 10 bytes of a chunk."""
    p = i64_at(params)
    ids, rows, stage = i32_at(p[3]), p[2], stages
    done, chunk = 0, rows_at_once(rows, n)
    while True:
        begin = atomic_add(stage, chunk)
        if begin >= rows:
            break
        stop = min(rows, begin + chunk)
        done += stop - begin
        for t in range(begin, stop):
            embed_row(p[7], p[8], p[9], p[10], ids[t], p[4] + t * p[5], p[6])
    finish(stage, done, rows)


def rope_store(stages, params, tid, n):  # type: ignore[no-untyped-def]
    """One layer: QKV in place, K and V to POOL."""
    p = i64_at(params)
    call_rope_store(p[_ROPE_STORE], params, stages, tid, n, p[_POOL], p[_Q_NORM], p[_K_NORM], p[_KEY_FRAME])


def attention(stages, params, tid, n):  # type: ignore[no-untyped-def]
    """One layer: QKV (its q) -> ATTENDED."""
    p = i64_at(params)
    call_attend(p[_ATTEND], params, stages, tid, p[_POOL], p[_WINDOW])
    call_merge(p[_MERGE], params, stages + 64, tid, n, 0)


@njit("void(int64, int64, int64, int64)", nogil=True, cache=True)
def serve(ctrl, params, tid, n):  # type: ignore[no-untyped-def]
    """Thread 0: run the job in `params`, return when it is over. Others: jobs until the stop."""
    if tid == 0:
        slot = open_job(ctrl, params)
        call_job(i64_at(params)[0], slot + 8 * STAGES, slot + 8 * PARAMS, 0, n)
        close_job(slot)
        return
    job = 0
    while True:
        job = await_job(ctrl, job)
        if job >= STOP:
            return
        slot = enter_job(ctrl, job)
        if slot != 0:
            call_job(i64_at(slot)[PARAMS], slot + 8 * STAGES, slot + 8 * PARAMS, tid, n)
        leave_job(ctrl, job)


# every function that is called by address
JOBS = (
    layers, norm_stage, product_stage, store_stage, attend_stage, merge_stage, gate_up_stage, quantize_stage,
    linear, norm, add_norm, silu_mul, embed, rope_store, attention,
)  # fmt: skip
