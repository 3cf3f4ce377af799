"""Row by row operations: `rms_norm`, `embed`, `silu_mul` of reference.py. Addresses in, float32 throughout.

Work split: each operation is one stage (threads.py), its items are rows; a row is done by one thread in a fixed order.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit

from engine.cpu.matmul import CHUNK, D16, D32, W4, W4F, W8, put_row
from engine.cpu.threads import atomic_add, finish, rows_at_once
from engine.cpu.vector import F16, F32, I8, I64, LANES, V_F32, Emit, Value, f32_at, i32_at, kernel

FAST_SUM = {"reassoc", "contract", "nsz"}


@njit(nogil=True, fastmath=FAST_SUM)
def norm_row(x, weight, out, count, eps):  # type: ignore[no-untyped-def]
    """out = x / sqrt(mean(x^2) + eps) * weight, `count` float32 each; out may be x."""
    source, scale, target = f32_at(x), f32_at(weight), f32_at(out)
    total = np.float32(0.0)
    for i in range(count):
        total += source[i] * source[i]
    factor = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(count) + eps))
    for i in range(count):
        target[i] = source[i] * factor * scale[i]


@njit(nogil=True)
def norm_rows(stage, n, rows, x, x_stride, weight, out, out_stride, count, eps):  # type: ignore[no-untyped-def]
    done, chunk = 0, rows_at_once(rows, n)
    while True:
        begin = atomic_add(stage, chunk)
        if begin >= rows:
            break
        stop = min(rows, begin + chunk)
        done += stop - begin
        for t in range(begin, stop):
            norm_row(x + t * x_stride, weight, out + t * out_stride, count, eps)
    finish(stage, done, rows)


@njit(nogil=True)
def add_norm_rows(stage, n, rows, x, residual, total, weight, out, stride, count, eps):  # type: ignore[no-untyped-def]
    """total = x + residual; out = rms_norm(total)."""
    done, chunk = 0, rows_at_once(rows, n)
    while True:
        begin = atomic_add(stage, chunk)
        if begin >= rows:
            break
        stop = min(rows, begin + chunk)
        done += stop - begin
        for t in range(begin, stop):
            a, b, c = f32_at(x + t * stride), f32_at(residual + t * stride), f32_at(total + t * stride)
            for i in range(count):
                c[i] = a[i] + b[i]
            norm_row(total + t * stride, weight, out + t * stride, count, eps)
    finish(stage, done, rows)


@kernel("iiii")
def silu_vectors(e: Emit, gate: Value, up: Value, out: Value, vectors: Value) -> None:
    """out = gate / (1 + exp(-gate)) * up, 16 float32 a vector."""
    with e.loop(vectors, []) as (i, _, _after):
        offset = e.b.mul(i, I64(64))
        g, u = e.load(V_F32, gate, offset), e.load(V_F32, up, offset)
        denominator = e.b.fadd(e.const(1.0), e.exp(e.b.fsub(e.const(-0.0), g)))
        e.store(e.b.fmul(e.b.fdiv(g, denominator), u), out, offset)


@njit(nogil=True)
def silu_rows(stage, n, rows, gate_up, stride, out, out_stride, count):  # type: ignore[no-untyped-def]
    """[T, gate | up] -> [T, count]."""
    done, chunk = 0, rows_at_once(rows, n)
    while True:
        begin = atomic_add(stage, chunk)
        if begin >= rows:
            break
        stop = min(rows, begin + chunk)
        done += stop - begin
        for t in range(begin, stop):
            gate, target = gate_up + t * stride, out + t * out_stride
            silu_vectors(gate, gate + 4 * count, target, count // 16)
            g, u, o = f32_at(gate), f32_at(gate + 4 * count), f32_at(target)
            for i in range(count // 16 * 16, count):
                o[i] = g[i] / (np.float32(1.0) + np.float32(math.exp(-g[i]))) * u[i]
    finish(stage, done, rows)


@kernel("i", "f")
def half_at(e: Emit, address: Value) -> Value:
    return e.b.fpext(e.load(F16, address), F32)


@kernel("i", "i")
def byte_at(e: Emit, address: Value) -> Value:
    """Signed."""
    return e.b.sext(e.load(I8, address), I64)


@kernel("i", "f")
def bfloat_at(e: Emit, address: Value) -> Value:
    wide = e.b.shl(e.b.zext(e.load(ir.IntType(16), address), ir.IntType(32)), ir.IntType(32)(16))
    return e.b.bitcast(wide, F32)


@njit(nogil=True)
def _w4_value(chunk, wide_scales, lane, k, scale, bias):  # type: ignore[no-untyped-def]
    nibbles = chunk + (128 if wide_scales else 64)
    word = i32_at(nibbles + 64 * (k // 8) + 4 * lane)[0]
    return scale * np.float32((word >> (4 * (k % 8 // 2) + 16 * (k % 2))) & 15) + bias


@njit(nogil=True)
def embed_row(kind, data, tile_bytes, chunk_bytes, index, out, count):  # type: ignore[no-untyped-def]
    """Row `index` of a packed table (layouts: matmul.py) as float32."""
    tile, lane = data + index // LANES * tile_bytes, index % LANES
    target = f32_at(out)
    scale, bias = np.float32(0.0), np.float32(0.0)
    for k in range(count):
        chunk, kk = tile + k // CHUNK * chunk_bytes, k % CHUNK
        if kind == W4:
            if kk == 0:
                scale, bias = half_at(chunk + 2 * lane), half_at(chunk + 32 + 2 * lane)
            target[k] = _w4_value(chunk, False, lane, kk, scale, bias)
        elif kind == W4F:
            if kk == 0:
                scale, bias = f32_at(chunk)[lane], f32_at(chunk + 64)[lane]
            target[k] = _w4_value(chunk, True, lane, kk, scale, bias)
        elif kind == W8:
            target[k] = f32_at(chunk)[lane] * np.float32(byte_at(chunk + 64 + LANES * kk + lane))
        elif kind == D16:
            target[k] = bfloat_at(chunk + 64 * (kk // 2) + 4 * lane + 2 * (kk % 2))
        elif kind == D32:
            target[k] = f32_at(chunk + 64 * kk)[lane]


@njit(nogil=True)
def put_rows(stage, n, rows, mode, source, source_stride, target, target_stride, sums, sums_stride, chunks):  # type: ignore[no-untyped-def]
    """Float32 rows as the activations of the next product; `mode` as `put_row` has it."""
    done, chunk = 0, rows_at_once(rows, n)
    while True:
        begin = atomic_add(stage, chunk)
        if begin >= rows:
            break
        stop = min(rows, begin + chunk)
        done += stop - begin
        for t in range(begin, stop):
            put_row(mode, source + t * source_stride, target + t * target_stride, sums + t * sums_stride, chunks)
    finish(stage, done, rows)
