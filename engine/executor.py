"""Where a plan is carried to: a thread of this process, or one spawned process a rank.

Both take plans in order with `send` (which never blocks) and give results in the same order with `recv`; plans may
be queued behind the one that computes. Whatever ends the other side is raised by `recv` as `EngineDead`.
A process gets a plan as its int32 encoding through a pipe; nothing is pickled after the spawn. Knows no models.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import queue
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from engine.errors import ConfigError, DeviceError, EngineDead, EngineError, ModelError
from engine.step import StepPlan, StepResult

CLOSE_S = 2.0  # for ranks to end by themselves
RAISABLE = {cls.__name__: cls for cls in (ConfigError, DeviceError, ModelError, EngineError)}


class StepRunner(Protocol):
    """What an executor drives: `engine.runner.Runner` or `engine.mock.MockRunner`."""

    num_blocks: int

    def step(self, plan: StepPlan) -> StepResult: ...

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Queue a step; what it returns waits for the result, in another thread and in order. Where computing is the
        caller's own work the step is done when this returns."""

    def close(self) -> None:
        """End the threads it started."""


class Executor(Protocol):
    on_error: Callable[[], None]  # called on the event loop when the other side died, also while nobody is in `recv`

    @property
    def error(self) -> EngineDead | None:
        """What ended the other side."""

    async def start(self) -> int:
        """Build the runner(s) and warm up; the number of KV blocks. Raises EngineError with what is wrong."""

    def send(self, plan: StepPlan) -> None:
        """Queue a plan; returns at once."""

    async def recv(self) -> StepResult:
        """The next result, in the order of `send`; raises EngineDead."""

    async def close(self) -> None:
        """Stop and wait; idempotent."""


class _Inbox:
    """Results (or the error that ended them) on their way to one `recv` at a time; filled on the event loop."""

    def __init__(self) -> None:
        self._items: deque[StepResult] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.error: EngineDead | None = None
        self.on_error: Callable[[], None] = _nothing

    def put(self, result: StepResult) -> None:
        self._items.append(result)
        self._wake()

    def fail(self, error: EngineDead) -> None:
        if self.error is None:
            self.error = error
            self._wake()
            self.on_error()

    async def get(self) -> StepResult:
        if self._items and self.error is None:
            await asyncio.sleep(0)  # a result that is already there must not starve the other tasks
        while not self._items:
            if self.error is not None:
                raise self.error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _WithInbox:
    """What both executors share: results and the error arrive through an inbox."""

    def __init__(self) -> None:
        self._inbox = _Inbox()

    @property
    def error(self) -> EngineDead | None:
        return self._inbox.error

    @property
    def on_error(self) -> Callable[[], None]:
        return self._inbox.on_error

    @on_error.setter
    def on_error(self, call: Callable[[], None]) -> None:
        self._inbox.on_error = call

    async def recv(self) -> StepResult:
        return await self._inbox.get()


class ThreadExecutor(_WithInbox):
    """The runner in a thread: for one rank whose kernels release the interpreter lock."""

    def __init__(self, make_runner: Callable[[], StepRunner]) -> None:
        super().__init__()
        self._make_runner = make_runner
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def start(self) -> int:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[int] = loop.create_future()
        self._thread = threading.Thread(target=self._main, args=(loop, ready), name="runner", daemon=True)
        self._thread.start()
        return await ready

    def send(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    async def close(self) -> None:
        self._plans.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 5.0)

    def _main(self, loop: asyncio.AbstractEventLoop, ready: asyncio.Future[int]) -> None:
        def tell(call: Callable[..., object], *args: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(call, *args)

        try:
            runner = self._make_runner()
        except BaseException as error:
            tell(_fail_start, ready, error)
            return
        tell(_set_start, ready, runner.num_blocks)
        try:
            while (plan := self._plans.get()) is not None:
                tell(self._inbox.put, runner.step(plan))
        except BaseException as error:
            dead = EngineDead(f"The runner failed: {type(error).__name__}.")
            dead.__cause__ = error
            tell(self._inbox.fail, dead)
        finally:
            runner.close()


class ProcessExecutor(_WithInbox):
    """One spawned process a rank. Rank 0 answers; the death of any rank is the death of the engine."""

    def __init__(self, config_json: str, tp: int, init_timeout_s: float) -> None:
        super().__init__()
        self._config_json = config_json
        self._tp = tp
        self._init_timeout_s = init_timeout_s
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._ready: asyncio.Future[int] | None = None
        self._private_dir = ""
        self._closing = False

    async def start(self) -> int:
        from engine.worker import worker_main  # here: the server process itself never needs the worker's imports

        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._private_dir = tempfile.mkdtemp(prefix="numbatch-")  # 0700: holds the rendezvous file of the ranks
        context = multiprocessing.get_context("spawn")
        for rank in range(self._tp):
            ours, theirs = context.Pipe(duplex=True)
            process = context.Process(
                target=worker_main, args=(rank, self._tp, self._config_json, self._private_dir, theirs), name=f"rank-{rank}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
            loop.add_reader(ours.fileno(), self._readable, rank)
            loop.add_reader(process.sentinel, self._died, rank)
        try:
            async with asyncio.timeout(self._init_timeout_s):
                return await self._ready
        except TimeoutError:
            raise DeviceError(f"The ranks were not ready within engine.init_timeout_s = {self._init_timeout_s:g} s.") from None

    def send(self, plan: StepPlan) -> None:
        data = plan.encode()
        for pipe in self._pipes:
            try:
                pipe.send_bytes(data)
            except OSError:
                self._lost(f"rank {self._pipes.index(pipe)} closed its pipe")

    async def close(self) -> None:
        self._closing = True
        loop = asyncio.get_running_loop()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            loop.remove_reader(process.sentinel)
            loop.remove_reader(pipe.fileno())
            pipe.close()  # a rank that sees the end of its pipe exits
        await asyncio.to_thread(_end, self._processes)
        self._processes, self._pipes = [], []
        if self._private_dir:
            shutil.rmtree(self._private_dir, ignore_errors=True)

    def _readable(self, rank: int) -> None:
        try:
            data = self._pipes[rank].recv_bytes()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._pipes[rank].fileno())
            return  # the sentinel tells the rest
        if self._ready is not None and not self._ready.done():
            self._first_word(data)
        else:
            self._inbox.put(StepResult.decode(data))

    def _first_word(self, data: bytes) -> None:
        """A rank's first message is JSON: {"num_blocks"} from rank 0 when ready, {"error", "message"} from any that failed."""
        word = json.loads(data)
        if "error" in word:
            _fail_start(self._ready, RAISABLE.get(word["error"], EngineError)(word["message"]))
        else:
            _set_start(self._ready, word["num_blocks"])

    def _died(self, rank: int) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._processes[rank].sentinel)
        if self._closing:
            return
        while self._ready is not None and not self._ready.done() and self._pipes[rank].poll():
            try:
                self._first_word(self._pipes[rank].recv_bytes())
            except (EOFError, OSError):
                break
        self._lost(f"rank {rank} ended with exit code {self._processes[rank].exitcode}")

    def _lost(self, what: str) -> None:
        error = EngineDead(f"The engine lost a process: {what}.")
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
        self._inbox.fail(error)


def _end(processes: list[Any]) -> None:
    """One deadline for all ranks; one that is frozen, loading or in a collective is killed (SIGTERM would not reach it)."""
    deadline = time.monotonic() + CLOSE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()
        process.close()


def _nothing() -> None:
    """The default `on_error`."""


def _set_start(ready: asyncio.Future[int] | None, num_blocks: int) -> None:
    if ready is not None and not ready.done():
        ready.set_result(num_blocks)


def _fail_start(ready: asyncio.Future[int] | None, error: BaseException) -> None:
    if ready is not None and not ready.done():
        ready.set_exception(error if isinstance(error, Exception) else EngineError(f"start-up was interrupted: {type(error).__name__}"))
