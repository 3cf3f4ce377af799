"""What this machine can do at best: bytes read and multiply-adds a second, by plain loops on all threads, for bench/kernels.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
from numba import njit

from engine.cpu.target import FEATURES
from engine.cpu.threads import aligned
from engine.cpu.vector import I64, V_F32, V_I32, Emit, Value, kernel

READ_BYTES = 128 << 20  # a thread: several times any cache
ROUNDS = 6_000_000  # some 20 ms: starting a thread is not to count
ACCUMULATORS = 24


@kernel("iii")
def _read(e: Emit, data: Value, lines: Value, out: Value) -> None:
    with e.loop(lines, [e.ints(0)] * 4) as (i, now, after):
        for j in range(4):
            at = e.b.mul(i, I64(256))
            e.prefetch(data, e.b.add(at, I64(8192 + 64 * j)))
            after[j] = e.b.or_(now[j], e.load(V_I32, data, e.b.add(at, I64(64 * j))))
    total = e.results[0]
    for part in e.results[1:]:
        total = e.b.or_(total, part)
    e.store(total, out)


@kernel("ii")
def _multiply(e: Emit, rounds: Value, out: Value) -> None:
    """On an AVX-512 BF16 machine vdpbf16ps (64 operations), else a float32 multiply-add of 16 lanes (32)."""
    operands = [e.load(V_I32, out, 64 * i) for i in range(3)]
    with e.loop(rounds, [e.const(0.0)] * ACCUMULATORS) as (_, now, after):
        for j in range(ACCUMULATORS):
            a, b = operands[j % 3], operands[(j + 1) % 3]
            after[j] = e.dot_pairs(now[j], a, b) if FEATURES.bf16_dot else e.fma(e.b.bitcast(a, V_F32), e.b.bitcast(b, V_F32), now[j])
    total = e.results[0]
    for part in e.results[1:]:
        total = e.b.fadd(total, part)
    e.store(total, out)


@njit("void(int64, int64, int64)", nogil=True, cache=True)
def _run_read(data, lines, out):  # type: ignore[no-untyped-def]
    _read(data, lines, out)


@njit("void(int64, int64)", nogil=True, cache=True)
def _run_multiply(rounds, out):  # type: ignore[no-untyped-def]
    _multiply(rounds, out)


def _seconds(threads: int, call: Callable[[int], None]) -> float:
    """From the moment all are ready to the end of the last."""
    gate = threading.Barrier(threads + 1)

    def work(tid: int) -> None:
        gate.wait()
        call(tid)

    workers = [threading.Thread(target=work, args=(tid,)) for tid in range(threads)]
    for worker in workers:
        worker.start()
    gate.wait()
    begin = time.perf_counter()
    for worker in workers:
        worker.join()
    return time.perf_counter() - begin


def read_bytes(threads: int) -> float:
    """Bytes a second."""
    data = [aligned(READ_BYTES + 16384, np.uint8) for _ in range(threads)]
    for block in data:
        block[:] = 1
    out = aligned(16 * threads, np.int32)
    return (
        threads
        * READ_BYTES
        / _seconds(threads, lambda tid: _run_read(data[tid].ctypes.data, READ_BYTES // 256, out.ctypes.data + 64 * tid))
    )


def multiply_adds(threads: int) -> float:
    """Float operations a second: a multiply-add is two."""
    out = aligned(64 * threads, np.float32)
    out[:] = 0
    each = ROUNDS * ACCUMULATORS * (64 if FEATURES.bf16_dot else 32)
    return threads * each / _seconds(threads, lambda tid: _run_multiply(ROUNDS, out.ctypes.data + 256 * tid))
