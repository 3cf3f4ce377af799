"""Weight times activations for any number of rows: `linear` and `logits` of reference.py, and the products of attention.

Layout. A weight [N, K] is cut into *tiles* of 16 output channels, one a vector lane, and each tile into chunks of 32 input
channels; a tile is one stream of bytes, chunk after chunk (K padded to 32, N to 16, with zeros):

    kind   a chunk of 16 x 32 weights                                                              bytes
    W4     scale f16 [16], bias f16 [16], then 4 vectors of nibbles                                 320
    W4F    the same with f32 scale and bias (where float16 would round them)                        384
    W8     scale f32 [16], then int8 [32][16]                                                       576
    D16    16 vectors, lane = output channel, bfloat16 (k, k + 1) in its low and high half         1024
    D32    32 vectors of float32                                                                   2048
    I8     8 vectors, lane = output channel, int8 k .. k + 3 in its bytes                           512
           and behind the last chunk of a tile: scale f32 [16], -128 times the sum of q int32 [16]  128 a tile

    nibbles: lane = output channel; vector v holds k = 8 v .. 8 v + 7; nibble j of the lane's low half is k = 8 v + 2 j, of
    its high half k = 8 v + 2 j + 1. One 16-bit table look-up (vpermw, which reads the low bits of each half) turns
    `vector >> 4 j` into two bfloat16 a lane, exact; one vdpbf16ps multiplies them with a pair of activations.

Activations are bfloat16 [T, K padded] (float32 for D32, bytes for I8), and for W4 float32 sums of each 32 of them [T, K / 32]:

    y[t, n] = bias[n] + sum over chunks g of  scale[n, g] * (sum over k in g of q[n, k] x[t, k]) + bias[n, g] * xsum[t, g]

I8 takes activations as x[t, k] = s[t] * (u[t, k] - 128) with u uint8 and the scale s[t] in the place of the first sum
(`quantize_rows` of engine/eight_bit.py); vpdpbusd adds four products of u and q to an int32, exactly:

    y[t, n] = bias[n] + s[t] * scale[n] * (sum over k of q[n, k] u[t, k]  -  128 * sum over k of q[n, k])

so weights are never rounded, and the order of additions of one row is the same whatever the other rows are.

Work split. A register tile is 16 channels x 1, 2, 4 or 8 rows, or 32 x 8, all of K. Versions tried (one core of a 4.5 GHz
Zen 5, 576 x 960, 96 rows; peak of vdpbf16ps 545 GFLOP/s): 8 rows x 2 tiles 457, 12 x 1 440, 6 x 2 441, 12 x 2 436, 8 x 1 394,
6 x 4 396, 24 x 1 359. One row from memory: 1 tile 30 GB/s, 2 tiles 25 GB/s; prefetch distance 0 / 1280 / 5120 / 10240 bytes:
24 / 24 / 28 / 30 GB/s. Fetching past the caches (prefetchnta) 15 % slower. Eight rows x 2 tiles of W8 from memory: each tile
fetching ahead for itself 2.8 ms for 28 M weights, both as one stream 1.5 ms. Pieces of a stage for a pass of 30 layers on two
threads, one row / 8 / 16: three quarters in two pieces and the rest tile by tile 2.4 / 4.3 / 7.3 ms, two halves 1.5 / 3.7 / 7.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from engine.cpu.target import FEATURES
from engine.cpu.threads import aligned, atomic_add, finish, piece_start
from engine.cpu.vector import (
    F32,
    I32,
    I64,
    LANES,
    V_F16,
    V_F32,
    V_I8,
    V_I16X2,
    V_I32,
    Emit,
    Value,
    caller,
    compiled,
    kernel,
)  # fmt: skip

W4, W4F, W8, D16, D32, I8 = range(6)
CHUNK = 32
CHUNK_BYTES = (320, 384, 576, 1024, 2048, 512)
SCALE_BYTES = (64, 128, 64, 0, 0, 0)
TAIL_BYTES = 128  # of a tile of I8
MOST_INT8 = 1 << 16  # input channels whose products of bytes an int32 holds
ROUNDED, WIDE_FLOAT, BYTES = range(3)  # what `put_row` makes of a row: bfloat16, float32, uint8 with a scale
PREFETCH = 10240  # bytes ahead
PREFETCH_PAIR = 2048  # beyond one tile
WIDE = FEATURES.wide
ROWS = (8, 4, 2, 1) if WIDE else (4, 2, 1)  # of register tiles
ROW_BLOCK = 96  # rows of one piece of work: 96 x 1536 bfloat16 stay in a core's L2


def _nibble_table() -> ir.Constant:
    """bfloat16 of 0 .. 15, twice: the look-up reads five bits, of which the highest belongs to the next nibble."""
    values = np.arange(16, dtype=np.float32).view(np.uint32) >> 16
    return ir.Constant(V_I16X2, [int(v) for v in values] * 2)


_NIBBLES = _nibble_table()


def _pairs_w4(e: Emit, at: Value, offset: Value) -> Any:
    """16 times: two bfloat16 a lane, in the order of k."""
    for v in range(4):
        nibbles = e.load(V_I32, at, e.b.add(offset, I64(64 * v)))
        for j in range(4):
            if FEATURES.bf16_dot:
                table = e.function("llvm.x86.avx512.permvar.hi.512", V_I16X2, [V_I16X2, V_I16X2])
                shifted = e.b.lshr(e.b.bitcast(nibbles, V_I16X2), ir.Constant(V_I16X2, [4 * j] * 2 * LANES))
                yield e.b.bitcast(e.b.call(table, [_NIBBLES, shifted]), V_I32)
            else:
                low, high = (e.b.and_(e.b.lshr(nibbles, e.ints(4 * j + s)), e.ints(15)) for s in (0, 16))
                yield _pair_of_integers(e, low, high)


def _pairs_w8(e: Emit, at: Value, offset: Value) -> Any:
    for k in range(0, CHUNK, 2):
        low, high = (e.b.sext(e.load(V_I8, at, e.b.add(offset, I64(LANES * (k + i)))), V_I32) for i in range(2))
        yield _pair_of_integers(e, low, high)


def _pair_of_integers(e: Emit, low: Value, high: Value) -> Value:
    """Integers of at most 8 bits are exact in bfloat16: the upper half of their float32 pattern."""
    low_bits, high_bits = (e.b.bitcast(e.b.sitofp(v, V_F32), V_I32) for v in (low, high))
    return e.b.or_(e.b.lshr(low_bits, e.ints(16)), high_bits)


def _pairs_d16(e: Emit, at: Value, offset: Value) -> Any:
    for k in range(CHUNK // 2):
        yield e.load(V_I32, at, e.b.add(offset, I64(64 * k)))


_PAIRS = {W4: _pairs_w4, W4F: _pairs_w4, W8: _pairs_w8, D16: _pairs_d16}


def _chunk_products(
    e: Emit, kind: int, tiles: list[Value], offset: Value, rows: list[Value], x_offset: Value, acc: list[Value]
) -> list[Value]:
    """acc[row * tiles + tile] + 32 products of each tile's chunk at `offset` with each row."""
    acc = list(acc)
    if kind == D32:
        for k in range(CHUNK):
            ws = [e.load(V_F32, at, e.b.add(offset, I64(64 * k))) for at in tiles]
            for m, row in enumerate(rows):
                x = e.broadcast(e.load(F32, row, e.b.add(x_offset, I64(4 * k)), 4))
                for n, w in enumerate(ws):
                    acc[m * len(tiles) + n] = e.fma(w, x, acc[m * len(tiles) + n])
        return acc
    data = e.b.add(offset, I64(SCALE_BYTES[kind]))
    for index, pairs in enumerate(zip(*(_PAIRS[kind](e, at, data) for at in tiles), strict=True)):
        for m, row in enumerate(rows):
            x = e.broadcast(e.load(I32, row, e.b.add(x_offset, I64(4 * index)), 4))
            for n, pair in enumerate(pairs):
                acc[m * len(tiles) + n] = e.dot_pairs(acc[m * len(tiles) + n], pair, x)
    return acc


def _scales(e: Emit, kind: int, at: Value, offset: Value) -> tuple[Value, Value | None]:
    if kind == W8:
        return e.load(V_F32, at, offset), None
    if kind == W4F:
        return e.load(V_F32, at, offset), e.load(V_F32, at, e.b.add(offset, I64(64)))
    scale, bias = (e.b.fpext(e.load(V_F16, at, e.b.add(offset, I64(32 * i))), V_F32) for i in range(2))
    return scale, bias


@dataclass(frozen=True, slots=True)
class _Operands:
    """What a register tile reads and writes; addresses, and bytes from row to row (or tile to tile)."""

    w: Value
    tile_bytes: Value
    x: Value
    x_stride: Value
    sums: Value
    sums_stride: Value
    bias: Value
    y: Value
    y_stride: Value


def _int8_tile(e: Emit, tiles: list[Value], rows: list[Value], sum_rows: list[Value], o: _Operands, chunks: Value) -> list[Value]:
    """I8: float32 results, index row * tiles + tile."""
    b = e.b
    tail = b.mul(chunks, I64(CHUNK_BYTES[I8]))
    corrections = [e.load(V_I32, at, b.add(tail, I64(64))) for at in tiles]
    with e.loop(chunks, corrections * len(rows)) as (g, now, after):
        offset, x_offset = b.mul(g, I64(CHUNK_BYTES[I8])), b.mul(g, I64(CHUNK))
        ahead = I64(PREFETCH) if len(tiles) == 1 else b.add(offset, b.add(o.tile_bytes, I64(PREFETCH_PAIR)))
        for line in range(0, CHUNK_BYTES[I8] * len(tiles), 64):
            e.prefetch(o.w, b.add(b.add(offset, ahead), I64(line)))
        acc = list(now)
        for k in range(0, CHUNK, 4):
            ws = [e.load(V_I32, at, b.add(offset, I64(LANES * k))) for at in tiles]
            for m, row in enumerate(rows):
                x = e.broadcast(e.load(I32, row, b.add(x_offset, I64(k)), 4))
                for n, w in enumerate(ws):
                    acc[m * len(tiles) + n] = e.dot_bytes(acc[m * len(tiles) + n], x, w)
        after[:] = acc
    sums, results = list(e.results), []
    for i, value in enumerate(sums):
        m, n = divmod(i, len(tiles))
        scale = b.fmul(e.load(V_F32, tiles[n], tail), e.broadcast(e.load(F32, sum_rows[m], 0, 4)))
        results.append(e.fma(b.sitofp(value, V_F32), scale, e.load(V_F32, o.bias, 64 * n)))
    return results


def _register_tile(e: Emit, kind: int, num_rows: int, num_tiles: int, o: _Operands, chunks: Value, add: Value) -> None:
    b = e.b
    tiles = [b.add(o.w, b.mul(o.tile_bytes, I64(n))) for n in range(num_tiles)]
    rows, sum_rows, outs = (
        [b.add(base, b.mul(stride, I64(m))) for m in range(num_rows)]
        for base, stride in ((o.x, o.x_stride), (o.sums, o.sums_stride), (o.y, o.y_stride))
    )
    if kind == I8:
        _write_tile(e, _int8_tile(e, tiles, rows, sum_rows, o, chunks), num_tiles, outs, add)
        return
    with e.loop(chunks, [e.load(V_F32, o.bias, 64 * n) for n in range(num_tiles)] * num_rows) as (g, now, after):
        offset, x_offset = b.mul(g, I64(CHUNK_BYTES[kind])), b.mul(g, I64(CHUNK * (4 if kind == D32 else 2)))
        # two tiles are read side by side: fetch the next two as one stream, at twice the pace
        ahead = I64(PREFETCH) if num_tiles == 1 else b.add(offset, b.add(o.tile_bytes, I64(PREFETCH_PAIR)))
        for line in range(0, CHUNK_BYTES[kind] * num_tiles, 64):
            e.prefetch(o.w, b.add(b.add(offset, ahead), I64(line)))
        if kind in (D16, D32):
            after[:] = _chunk_products(e, kind, tiles, offset, rows, x_offset, now)
        else:
            acc = _chunk_products(e, kind, tiles, offset, rows, x_offset, [e.const(0.0)] * len(now))
            for n, at in enumerate(tiles):
                scale, group_bias = _scales(e, kind, at, offset)
                for m in range(num_rows):
                    i = m * num_tiles + n
                    base = now[i]
                    if group_bias is not None:
                        base = e.fma(group_bias, e.broadcast(e.load(F32, sum_rows[m], b.mul(g, I64(4)), 4)), base)
                    after[i] = e.fma(scale, acc[i], base)
    _write_tile(e, e.results, num_tiles, outs, add)


def _write_tile(e: Emit, values: list[Value], num_tiles: int, outs: list[Value], add: Value) -> None:
    b = e.b
    results = [(outs[i // num_tiles], 64 * (i % num_tiles), value) for i, value in enumerate(values)]
    with b.if_else(b.icmp_signed("!=", add, I64(0))) as (adding, writing):
        with adding:
            for out, column, value in results:
                e.store(b.fadd(e.load(V_F32, out, column), value), out, column)
        with writing:
            for out, column, value in results:
                e.store(value, out, column)


def _tile_rows(kind: int) -> Any:
    """One or two tiles for all of `num_rows` rows: as many blocks of the largest size as there are, then smaller ones."""

    def tile_rows(e: Emit, w: Value, num_tiles: Value, tile_bytes: Value, x: Value, x_stride: Value, sums: Value, sums_stride: Value,
                  bias: Value, y: Value, y_stride: Value, chunks: Value, add: Value, num_rows: Value) -> None:  # fmt: skip
        b = e.b

        def block(rows: int, tiles: int, m: Value, n: Value) -> None:
            o = _Operands(
                b.add(w, b.mul(n, tile_bytes)), tile_bytes, b.add(x, b.mul(m, x_stride)), x_stride, b.add(sums, b.mul(m, sums_stride)),
                sums_stride, b.add(bias, b.mul(n, I64(64))), b.add(y, b.add(b.mul(m, y_stride), b.mul(n, I64(64)))), y_stride,
            )  # fmt: skip
            _register_tile(e, kind, rows, tiles, o, chunks, add)

        whole = b.sdiv(num_rows, I64(ROWS[0]))
        two = b.icmp_signed("==", num_tiles, I64(2))
        together = b.select(two, whole, I64(0)) if WIDE else I64(0)
        if WIDE:
            with e.loop(together, []) as (i, _, _after):
                block(ROWS[0], 2, b.mul(i, I64(ROWS[0])), I64(0))
        with e.loop(num_tiles, []) as (n, _, _after):
            with e.loop(b.sub(whole, together), []) as (i, _, _after2):
                block(ROWS[0], 1, b.mul(i, I64(ROWS[0])), n)
            done = b.mul(whole, I64(ROWS[0]))
            for size in ROWS[1:]:
                # what is left is less than twice the size
                fits = b.icmp_signed(">=", b.sub(num_rows, done), I64(size))
                with b.if_then(fits):
                    block(size, 1, done, n)
                done = b.add(done, b.select(fits, I64(size), I64(0)))

    return kernel("i" * 13)(tile_rows)


_rows_w4, _rows_w4f, _rows_w8, _rows_d16, _rows_d32, _rows_i8 = (_tile_rows(kind) for kind in range(6))
call_tile_rows = caller(13)


def _w4(w, num_tiles, tile_bytes, x, x_stride, sums, sums_stride, bias, y, y_stride, chunks, add, num_rows):  # type: ignore[no-untyped-def]
    """One or two tiles times all rows.

    w: the first tile, the second `tile_bytes` on; x, x_stride: activations, bytes from row to row; sums, sums_stride: of chunks (W4); bias:
    float32 [16 a tile]; y, y_stride: 16 float32 a tile and row; chunks: K / 32; add: y += instead of y =.
    """
    _rows_w4(w, num_tiles, tile_bytes, x, x_stride, sums, sums_stride, bias, y, y_stride, chunks, add, num_rows)


def _w4f(w, num_tiles, tile_bytes, x, x_stride, sums, sums_stride, bias, y, y_stride, chunks, add, num_rows):  # type: ignore[no-untyped-def]
    _rows_w4f(w, num_tiles, tile_bytes, x, x_stride, sums, sums_stride, bias, y, y_stride, chunks, add, num_rows)


def _w8(w, num_tiles, tile_bytes, x, x_stride, sums, sums_stride, bias, y, y_stride, chunks, add, num_rows):  # type: ignore[no-untyped-def]
    _rows_w8(w, num_tiles, tile_bytes, x, x_stride, sums, sums_stride, bias, y, y_stride, chunks, add, num_rows)


def _d16(w, num_tiles, tile_bytes, x, x_stride, sums, sums_stride, bias, y, y_stride, chunks, add, num_rows):  # type: ignore[no-untyped-def]
    _rows_d16(w, num_tiles, tile_bytes, x, x_stride, sums, sums_stride, bias, y, y_stride, chunks, add, num_rows)


def _d32(w, num_tiles, tile_bytes, x, x_stride, sums, sums_stride, bias, y, y_stride, chunks, add, num_rows):  # type: ignore[no-untyped-def]
    _rows_d32(w, num_tiles, tile_bytes, x, x_stride, sums, sums_stride, bias, y, y_stride, chunks, add, num_rows)


def _i8(w, num_tiles, tile_bytes, x, x_stride, sums, sums_stride, bias, y, y_stride, chunks, add, num_rows):  # type: ignore[no-untyped-def]
    _rows_i8(w, num_tiles, tile_bytes, x, x_stride, sums, sums_stride, bias, y, y_stride, chunks, add, num_rows)


def tile_function(kind: int) -> int:
    """Address of the compiled function of a kind, for `call_tile_rows`."""
    return compiled((_w4, _w4f, _w8, _d16, _d32, _i8)[kind])


def input_mode(kind: int) -> int:
    """What `put_row` is to make of the activations of a product."""
    return {D32: WIDE_FLOAT, I8: BYTES}.get(kind, ROUNDED)


@njit(nogil=True)
def product(stage, n, tile_function, w, bias, tiles, chunks, tile_bytes, x, x_stride, sums, sums_stride, y, y_stride, add, num_rows):  # type: ignore[no-untyped-def]
    """A stage: y (+)= x @ w.T + bias. An item is a tile for a block of rows; the same tiles for block after block."""
    blocks = (num_rows + ROW_BLOCK - 1) // ROW_BLOCK
    items, done = tiles * blocks, 0
    least = 0 if num_rows <= 32 else 2 if blocks == 1 else 4
    while True:
        piece = atomic_add(stage, 1)
        item, stop = piece_start(piece, items, n, least), piece_start(piece + 1, items, n, least)
        if item >= items:
            break
        done += stop - item
        while item < stop:
            block = item // tiles
            first, tile = block * ROW_BLOCK, item - block * tiles
            together = min(2, stop - item, tiles - tile)
            call_tile_rows(
                tile_function, w + tile * tile_bytes, together, tile_bytes, x + first * x_stride, x_stride,
                sums + first * sums_stride, sums_stride, bias + tile * 64, y + first * y_stride + tile * 64, y_stride, chunks, add,
                min(ROW_BLOCK, num_rows - first),
            )  # fmt: skip
            item += together
    finish(stage, done, items)


@kernel("iiii")
def round_row(e: Emit, source: Value, target: Value, sums: Value, chunks: Value) -> None:
    """float32 -> bfloat16, and the float32 sum of each 32 rounded values."""
    with e.loop(chunks, []) as (g, _, _after):
        total = None
        for half in range(2):
            x = e.load(V_F32, source, e.b.add(e.b.mul(g, I64(128)), I64(64 * half)))
            narrow = e.narrow(x)
            e.store(narrow, target, e.b.add(e.b.mul(g, I64(64)), I64(32 * half)))
            wide = e.widen(narrow)
            total = wide if total is None else e.b.fadd(total, wide)
        e.store(e.sum(total), sums, e.b.mul(g, I64(4)))


@kernel("iii")
def copy_row(e: Emit, source: Value, target: Value, chunks: Value) -> None:
    """32 float32 a chunk."""
    with e.loop(chunks, []) as (g, _, _after):
        for half in range(2):
            offset = e.b.add(e.b.mul(g, I64(128)), I64(64 * half))
            e.store(e.load(V_F32, source, offset), target, offset)


@kernel("iiii")
def quantize_row(e: Emit, source: Value, target: Value, scale: Value, chunks: Value) -> None:
    """float32 -> bytes around 128, and the scale: `quantize_rows` of engine/eight_bit.py. `target` may be `source`."""
    b = e.b
    with e.loop(b.mul(chunks, I64(2)), [e.const(0.0)]) as (i, now, after):
        x = e.unary("fabs", e.load(V_F32, source, b.mul(i, I64(64))))
        after[0] = b.call(e.function("llvm.maximum.v16f32", V_F32, [V_F32] * 2), [now[0], x])  # a NaN stays one
    largest = b.call(e.function("llvm.vector.reduce.fmaximum.v16f32", F32, [V_F32]), [e.results[0]])
    e.store(b.fmul(largest, F32(1 / 127)), scale)
    inverse = b.select(b.fcmp_ordered(">", largest, F32(0.0)), b.fdiv(F32(127.0), largest), F32(0.0))
    factor = e.broadcast(inverse)
    with e.loop(b.mul(chunks, I64(2)), []) as (i, _, _after):
        x = e.unary("rint", b.fmul(e.load(V_F32, source, b.mul(i, I64(64))), factor))
        whole = b.add(b.fptosi(x, V_I32), e.ints(128))
        e.store(b.trunc(whole, V_I8), target, b.mul(i, I64(16)))


@njit(nogil=True)
def put_row(mode, source, target, sums, chunks):  # type: ignore[no-untyped-def]
    """A float32 row as the activations of the next product."""
    if mode == WIDE_FLOAT:
        copy_row(source, target, chunks)
    elif mode == BYTES:
        quantize_row(source, target, sums, chunks)
    else:
        round_row(source, target, sums, chunks)


# -- packing, at load ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A weight as the kernels read it."""

    kind: int
    out_features: int
    in_features: int
    data: np.ndarray  # uint8 [tiles, chunks, CHUNK_BYTES[kind]], aligned; of I8 [tiles, bytes]
    bias: np.ndarray  # float32 [tiles * 16]
    order: np.ndarray | None = None  # int32 [K]: which activation each input channel takes, None: its own

    @property
    def tiles(self) -> int:
        return self.data.shape[0]

    @property
    def chunks(self) -> int:
        return -(-self.in_features // CHUNK)

    @property
    def tile_bytes(self) -> int:
        return self.data[0].nbytes

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def _empty(kind: int, n: int, k: int) -> np.ndarray:
    tiles, chunks = -(-n // LANES), -(-k // CHUNK)
    data = aligned(tiles * chunks * CHUNK_BYTES[kind], np.uint8)
    data[:] = 0
    return data.reshape(tiles, chunks, CHUNK_BYTES[kind])


def _padded_bias(bias: np.ndarray | None, n: int) -> np.ndarray:
    out = aligned(-(-n // LANES) * LANES, np.float32)
    out[:] = 0
    if bias is not None:
        out[:n] = bias
    return out


def _lanes(values: np.ndarray, tiles: int) -> np.ndarray:
    """[N, ...] -> [tiles, 16, ...], padded with zeros."""
    padded = np.zeros((tiles * LANES, *values.shape[1:]), values.dtype)
    padded[: len(values)] = values
    return padded.reshape(tiles, LANES, *values.shape[1:])


def exact_in_half(values: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values))


def pack_w4(qweight: np.ndarray, scale: np.ndarray, bias: np.ndarray, out_bias: np.ndarray | None) -> Packed:
    """The canonical 4-bit form (engine/w4.py) of any group size; groups of 64 and 128 repeat their scale every 32."""
    n, k = qweight.shape[0], qweight.shape[1] * 2
    repeat = k // CHUNK // scale.shape[1]
    scale, bias = (np.repeat(v, repeat, axis=1) if repeat > 1 else v for v in (scale, bias))
    kind = W4 if FEATURES.half_convert and exact_in_half(scale) and exact_in_half(bias) else W4F
    data = _empty(kind, n, k)
    tiles, chunks = data.shape[:2]
    dtype = np.float16 if kind == W4 else np.float32
    head = data[:, :, : SCALE_BYTES[kind]].view(dtype).reshape(tiles, chunks, 2, LANES)
    head[:, :, 0] = _lanes(scale, tiles).transpose(0, 2, 1)
    head[:, :, 1] = _lanes(bias, tiles).transpose(0, 2, 1)
    # bytes hold (even, odd); gather the even nibbles of 8 channels into 16 bits, and the odd
    b = qweight.reshape(n, chunks, 4, 4).astype(np.uint32)
    shifts = np.arange(0, 16, 4, dtype=np.uint32)
    low = np.bitwise_or.reduce((b & 15) << shifts, axis=-1)
    high = np.bitwise_or.reduce((b >> 4) << shifts, axis=-1)
    lanes = _lanes((low | (high << 16)).astype(np.uint32), tiles)  # [tiles, 16, chunks, 4]
    data[:, :, SCALE_BYTES[kind] :].view(np.uint32).reshape(tiles, chunks, 4, LANES)[:] = lanes.transpose(0, 2, 3, 1)
    return Packed(kind, n, k, data, _padded_bias(out_bias, n))


def pack_w8(q: np.ndarray, scale: np.ndarray, out_bias: np.ndarray | None) -> Packed:
    n, k = q.shape
    data = _empty(W8, n, k)
    tiles, chunks = data.shape[:2]
    data[:, :, :64].view(np.float32)[:] = _lanes(scale, tiles).transpose(0, 2, 1)
    body = data[:, :, 64:].view(np.int8).reshape(tiles, chunks, CHUNK, LANES)
    body[:] = _lanes(q, tiles).reshape(tiles, LANES, chunks, CHUNK).transpose(0, 2, 3, 1)
    return Packed(W8, n, k, data, _padded_bias(out_bias, n))


def pack_i8(q: np.ndarray, scale: np.ndarray, out_bias: np.ndarray | None) -> Packed:
    """int8 [N, K], float32 [N]."""
    n, k = q.shape
    tiles, chunks = -(-n // LANES), -(-k // CHUNK)
    tail = chunks * CHUNK_BYTES[I8]
    data = aligned(tiles * (tail + TAIL_BYTES), np.uint8).reshape(tiles, tail + TAIL_BYTES)
    padded = np.zeros((n, chunks * CHUNK), np.int8)
    padded[:, :k] = q
    words = _lanes(padded.view(np.int32), tiles)  # [tiles, 16, chunks * 8], four input channels each
    data[:, :tail].view(np.int32).reshape(tiles, chunks * CHUNK // 4, LANES)[:] = words.transpose(0, 2, 1)
    data[:, tail : tail + 64].view(np.float32)[:] = _lanes(scale, tiles)
    data[:, tail + 64 :].view(np.int32)[:] = _lanes(-128 * q.sum(axis=1, dtype=np.int32), tiles)
    return Packed(I8, n, k, data, _padded_bias(out_bias, n))


def pack_d32(weight: np.ndarray, out_bias: np.ndarray | None) -> Packed:
    """float32 [N, K]."""
    n, k = weight.shape
    data = _empty(D32, n, k)
    tiles, chunks = data.shape[:2]
    padded = np.zeros((n, chunks * CHUNK), np.float32)
    padded[:, :k] = weight
    body = data.view(np.float32).reshape(tiles, chunks, CHUNK, LANES)
    body[:] = _lanes(padded, tiles).reshape(tiles, LANES, chunks, CHUNK).transpose(0, 2, 3, 1)
    return Packed(D32, n, k, data, _padded_bias(out_bias, n))


def pack_d16(weight: np.ndarray, out_bias: np.ndarray | None) -> Packed:
    """uint16 [N, K] of bfloat16."""
    n, k = weight.shape
    data = _empty(D16, n, k)
    tiles, chunks = data.shape[:2]
    padded = np.zeros((n, chunks * CHUNK), np.uint16)
    padded[:, :k] = weight
    body = data.view(np.uint32).reshape(tiles, chunks, CHUNK // 2, LANES)
    pairs = padded.view(np.uint32)  # little endian: the even channel in the low half
    body[:] = _lanes(pairs, tiles).reshape(tiles, LANES, chunks, CHUNK // 2).transpose(0, 2, 3, 1)
    return Packed(D16, n, k, data, _padded_bias(out_bias, n))
