"""Threads of our own that stay: one Python thread a core, asleep or computing inside njit code without the interpreter lock.

All threads run the same function on the same job, each with its `tid` (0 is the caller). Inside a job they meet at
`barrier` and take pieces of a stage with `share` / `claim`, so that a thread that is descheduled holds up little. Between
jobs a worker spins for some tens of microseconds, then sleeps in the kernel (futex on Linux; short naps elsewhere).

The control block, int64 words, one cache line (8 words) a field:

    0 JOB        jobs posted so far; -1 << 40 added: stop
    8 BARRIER    arrivals at all barriers so far
    16 SLEEPERS  workers asleep
    24 .. 48     four claim counters, used in turn
    56 + 8 tid   barriers this thread has passed

Knows nothing of what a job computes.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from engine.cpu.target import FEATURES
from engine.cpu.vector import I32, I64, PTR, Emit, Value, i64_at, kernel

JOB, BARRIER, SLEEPERS, CLAIMS, PASSED = 0, 8, 16, 24, 56
STOP = 1 << 40
SPINS_BEFORE_YIELD = 20000
SPINS_BEFORE_SLEEP = 3000  # about 60 us on a 4.5 GHz Zen 5: longer than the gap between two calls of one step
Serve = Callable[[int, int, int, int], None]
FUTEX_WAIT, FUTEX_WAKE = 128, 129  # private to the process
SYS_FUTEX = {"x86_64": 202, "aarch64": 98}


def _syscall_number() -> int:
    import platform

    return SYS_FUTEX.get(platform.machine(), 0) if sys.platform == "linux" else 0


_FUTEX = _syscall_number()


@kernel("ii", "i")
def atomic_add(e: Emit, address: Value, amount: Value) -> Value:
    """Add to the word at `address`; its value before."""
    return e.b.atomic_rmw("add", e.at(address), amount, "seq_cst")


@kernel("i", "i")
def atomic_load(e: Emit, address: Value) -> Value:
    return e.b.load_atomic(e.at(address), "acquire", 8, typ=I64)


@kernel("ii")
def atomic_store(e: Emit, address: Value, value: Value) -> None:
    e.b.atomic_rmw("xchg", e.at(address), value, "seq_cst")


@kernel("")
def pause(e: Emit) -> None:
    """Tell the core that this is a spin loop."""
    if FEATURES.x86:
        e.b.call(e.function("llvm.x86.sse2.pause", ir.VoidType(), []), [])


@kernel("")
def give_way(e: Emit) -> None:
    e.b.call(e.function("sched_yield", I32, []), [])


@kernel("ii")
def sleep_while(e: Emit, address: Value, seen: Value) -> None:
    """Sleep until woken, unless the low word at `address` is no longer `seen`."""
    if not _FUTEX:
        e.b.call(e.function("usleep", I32, [I32]), [I32(50)])
        return
    syscall = e.function("syscall", I64, [I64, PTR, I64, I64, PTR, PTR, I64])
    null = ir.Constant(PTR, None)
    e.b.call(syscall, [I64(_FUTEX), e.at(address), I64(FUTEX_WAIT), e.b.and_(seen, I64(0xFFFFFFFF)), null, null, I64(0)])


@kernel("i")
def wake_all(e: Emit, address: Value) -> None:
    if _FUTEX:
        syscall = e.function("syscall", I64, [I64, PTR, I64, I64, PTR, PTR, I64])
        null = ir.Constant(PTR, None)
        e.b.call(syscall, [I64(_FUTEX), e.at(address), I64(FUTEX_WAKE), I64(1 << 20), null, null, I64(0)])


@njit(nogil=True)
def barrier(ctrl: int, tid: int, n: int) -> None:
    """All threads arrive before any leaves; what they wrote before is seen after."""
    if n == 1:
        return
    passed = i64_at(ctrl + 8 * (PASSED + 8 * tid))
    passed[0] += 1
    goal = passed[0] * n
    atomic_add(ctrl + 8 * BARRIER, 1)
    spins = 0
    while atomic_load(ctrl + 8 * BARRIER) < goal:
        spins += 1
        if spins < SPINS_BEFORE_YIELD:
            pause()
        else:
            give_way()


@njit(nogil=True)
def next_stage(ctrl: int, tid: int, n: int, stage: int) -> int:
    """A barrier, then a claim counter at 0 for the new stage: its address. `stage` counts up by one each time.

    The counter cleared here was last used two stages ago and is next used in two: nobody can be at it.
    """
    barrier(ctrl, tid, n)
    if tid == 0:
        atomic_store(ctrl + 8 * (CLAIMS + 8 * ((stage + 2) % 4)), 0)
    return ctrl + 8 * (CLAIMS + 8 * (stage % 4))


@njit(nogil=True)
def clear_claims(ctrl: int) -> None:
    """By thread 0, before a job is posted."""
    for i in range(4):
        atomic_store(ctrl + 8 * (CLAIMS + 8 * i), 0)


@njit(nogil=True)
def piece_start(index: int, count: int, n: int, least: int) -> int:
    """Where piece `index` of `count` items begins: n large pieces that cover three quarters, then pieces of `least`."""
    large = count * 3 // (4 * n) // least * least
    if index <= n:
        return index * large
    return min(count, n * large + (index - n) * least)


@njit(nogil=True)
def await_job(ctrl: int, seen: int) -> int:
    """Until a job beyond `seen` is posted; its number."""
    spins = 0
    while True:
        job = atomic_load(ctrl + 8 * JOB)
        if job != seen:
            return job
        spins += 1
        if spins < SPINS_BEFORE_SLEEP:
            pause()
        else:
            atomic_add(ctrl + 8 * SLEEPERS, 1)
            sleep_while(ctrl + 8 * JOB, seen)
            atomic_add(ctrl + 8 * SLEEPERS, -1)


@njit(nogil=True)
def post_job(ctrl: int, amount: int) -> None:
    atomic_add(ctrl + 8 * JOB, amount)
    if atomic_load(ctrl + 8 * SLEEPERS) > 0:
        wake_all(ctrl + 8 * JOB)


def aligned(count: int, dtype: Any) -> np.ndarray:
    """Uninitialised, on a cache line of its own."""
    size = count * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype)


class Pool:
    """`num_threads` threads, the caller's among them, around one njit function `serve(ctrl, params, tid, n)`.

    For tid 0 `serve` posts a job, does its share and returns when all are done; for others it stays until the stop, which
    comes with `close`, with the last reference to the pool, or with the end of the process.
    """

    def __init__(self, num_threads: int, serve: Serve, num_params: int) -> None:
        self.num_threads = num_threads
        self._serve = serve
        self._params = aligned(num_params, np.int64)
        self._params[:] = 0
        block = aligned(PASSED + 8 * num_threads, np.int64)
        block[:] = 0
        self._addresses = (block.ctypes.data, self._params.ctypes.data)
        self._lock = threading.Lock()
        workers = [
            threading.Thread(target=_work, args=(serve, block, self._params, tid, num_threads), name=f"cpu-{tid}", daemon=True)
            for tid in range(1, num_threads)
        ]
        for worker in workers:
            worker.start()
        self._stop = weakref.finalize(self, _end, block, workers)

    def run(self, *params: int) -> None:
        """One job, params[0] the address of its function; returns when every thread is done."""
        with self._lock:
            if not self._stop.alive:
                raise RuntimeError("The pool of CPU threads is closed.")
            self._params[: len(params)] = params
            self._serve(*self._addresses, 0, self.num_threads)

    def close(self) -> None:
        """End the workers; the pool is of no use afterwards."""
        with self._lock:
            self._stop()


def _work(serve: Serve, block: np.ndarray, params: np.ndarray, tid: int, num_threads: int) -> None:
    """A worker's life. It holds the arrays whose addresses it reads: the pool may be gone before it has seen the stop."""
    serve(block.ctypes.data, params.ctypes.data, tid, num_threads)


def _end(block: np.ndarray, workers: list[threading.Thread]) -> None:
    stop_workers(block.ctypes.data)
    for worker in workers:
        worker.join()


@njit("void(int64)", nogil=True, cache=True)
def stop_workers(ctrl: int) -> None:
    post_job(ctrl, STOP + 1)  # the low word must change too: it is what a sleeper compares
