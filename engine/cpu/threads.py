"""Threads of our own that stay: one Python thread a core, asleep or computing inside njit code without the interpreter lock.

A job is a sequence of *stages*; a stage is a number of items that threads claim from a counter. A stage is over when all its
items are done, not when all threads are there: a thread that the system has taken off its core holds up the others only if it
has an item in hand, and catches up by finding every earlier stage done. Thread 0 is the caller; it returns when the last stage
is over. A worker enters a job if it comes before the job is closed. Between jobs it spins for some tens of microseconds, then
sleeps in the kernel (futex on Linux; short naps elsewhere).

The control block, int64 words; fields that several threads write have a cache line (8 words) each:

    0 JOB          number of the last job posted; STOP + 1 added: the end
    8 SLEEPERS     workers asleep
    16 SLOT_WORDS  size of a slot
    24 ..          two slots, job j in slot j % 2, so that a straggler of one job does not hold up the next:

    0 OPEN         number of the job that may be entered, 0 for none
    8 INSIDE       workers that are in it
    16 .. 79       the job's parameters; the first is the address of its function, the second its number of stages
    80 + 8 s       stage s: items claimed, items done

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

JOB, SLEEPERS, SLOT_WORDS, SLOTS = 0, 8, 16, 24
OPEN, INSIDE, PARAMS, STAGES = 0, 8, 16, 88
MAX_PARAMS = STAGES - PARAMS
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
def wait_until(address: int, least: int) -> None:
    """Until the word at `address` is at least `least`."""
    spins = 0
    while atomic_load(address) < least:
        spins += 1
        if spins < SPINS_BEFORE_YIELD:
            pause()
        else:
            give_way()


@njit(nogil=True)
def finish(stage: int, done: int, items: int) -> None:
    """This thread has done `done` of the stage's items and found no more: wait until all are."""
    if done > 0:
        atomic_add(stage + 8, done)
    wait_until(stage + 8, items)


@njit(nogil=True)
def rows_at_once(rows: int, n: int) -> int:
    """How many rows one claim takes."""
    return 1 + rows // (8 * n)


@njit(nogil=True)
def piece_start(index: int, count: int, n: int, least: int) -> int:
    """Where piece `index` of `count` items begins: n large pieces that cover three quarters, then pieces of `least`.

    least = 0: n pieces, all of one size. Bound by memory, a thread must read one long stretch: what it fetches ahead
    at the end of a stretch lands in the wrong core's cache.
    """
    if least == 0:
        return min(count, index * ((count + n - 1) // n))
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
def slot_of(ctrl: int, job: int) -> int:
    return ctrl + 8 * (SLOTS + job % 2 * i64_at(ctrl)[SLOT_WORDS])


@njit(nogil=True)
def open_job(ctrl: int, params: int) -> int:
    """Thread 0: put the job of `params` where workers find it, and wake them. Its slot."""
    job = atomic_load(ctrl + 8 * JOB) + 1
    slot = slot_of(ctrl, job)
    spins = 0
    while atomic_load(slot + 8 * INSIDE) > 0:  # a straggler of the job before the last
        spins += 1
        if spins < SPINS_BEFORE_YIELD:
            pause()
        else:
            give_way()
    words, source = i64_at(slot), i64_at(params)
    for i in range(MAX_PARAMS):
        words[PARAMS + i] = source[i]
    for i in range(8 * source[1]):
        words[STAGES + i] = 0
    atomic_store(slot + 8 * OPEN, job)
    post_job(ctrl, 1)
    return slot


@njit(nogil=True)
def enter_job(ctrl: int, job: int) -> int:
    """A worker: the slot of `job`, or 0 where it is over. `leave_job` in any case."""
    slot = slot_of(ctrl, job)
    atomic_add(slot + 8 * INSIDE, 1)
    return slot if atomic_load(slot + 8 * OPEN) == job else 0


@njit(nogil=True)
def leave_job(ctrl: int, job: int) -> None:
    atomic_add(slot_of(ctrl, job) + 8 * INSIDE, -1)


@njit(nogil=True)
def close_job(slot: int) -> None:
    atomic_store(slot + 8 * OPEN, 0)


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

    def __init__(self, num_threads: int, serve: Serve, max_stages: int) -> None:
        self.num_threads = num_threads
        self._serve = serve
        self._params = aligned(MAX_PARAMS, np.int64)
        self._params[:] = 0
        slot_words = STAGES + 8 * max_stages
        block = aligned(SLOTS + 2 * slot_words, np.int64)
        block[:] = 0
        block[SLOT_WORDS] = slot_words
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
        """One job: params[0] the address of its function, params[1] its stages; returns when all stages are over."""
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
