"""The life of the server process: listen, load, serve, drain, and the exit code that says how it ended.

Order at start: bind (a port in use is known before seconds are spent), answer health checks with 503, load in a
thread, start the engine, be ready. On SIGTERM, SIGINT or SIGHUP: readiness goes red at once, the listener stays for
`shutdown.drain_delay_s`, running answers may finish within `shutdown.drain_timeout_s`, then they get an error event.
A second signal skips the waiting. A program that starts the server can make its own end such a signal: standard input
is then a pipe whose other end it holds, and which the system closes however it dies. When the engine dies every stream
gets an error event first, then the process ends.

Exit codes: 0 clean, 2 configuration, 3 model, 4 device, 5 engine died, 6 watchdog, 70 anything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import multiprocessing
import os
import resource
import signal
import socket
import stat
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from api.app import make_app
from api.loading import Loaded, load, model_name
from api.log import log_throughput, measure_lag, trace_step
from api.protocol import Listener, tls_context
from api.service import Service
from api.tracing import Tracing
from config.errors import ConfigError
from config.schema import Config
from engine.errors import DeviceError, EngineDead, EngineError, ModelError
from formats.errors import FormatError
from text.errors import TextError

T = TypeVar("T")

log = logging.getLogger("numbatch.server")

EXIT_OK, EXIT_CONFIG, EXIT_MODEL, EXIT_DEVICE, EXIT_DIED, EXIT_INTERNAL = 0, 2, 3, 4, 5, 70
DEATH_NOTICE_S = 1.0  # how long health checks can see 503 before the port closes
LAST_WORDS_S = 2.0  # for handlers to send their error events
STOP_S = 15.0  # for the engine to end its threads or processes in good order
HURRY_S = 1.0  # the same when there is nothing to save: stopped while loading, or the engine is dead
STDIN = 0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def exit_code(error: BaseException) -> int:
    """How the process ends after this error."""
    if isinstance(error, ConfigError):
        return EXIT_CONFIG
    if isinstance(error, ModelError | FormatError | TextError):
        return EXIT_MODEL
    if isinstance(error, DeviceError):
        return EXIT_DEVICE
    if isinstance(error, EngineDead):
        return error.exit_code
    return EXIT_DIED if isinstance(error, EngineError) else EXIT_INTERNAL


class _Signals:
    """Counts requests to stop."""

    def __init__(self, with_stdin: bool) -> None:
        self.count = 0
        self._with_stdin = with_stdin
        self._arrived = asyncio.Event()

    def install(self) -> None:
        """Raises OSError where standard input is to be watched and is no pipe."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.arrive)
        if self._with_stdin:
            if not stat.S_ISFIFO(os.fstat(STDIN).st_mode):
                raise OSError("--stop-with-stdin: standard input is no pipe; leave the flag out, or start the server with a pipe there")
            loop.add_reader(STDIN, self._read)

    def _read(self) -> None:
        if not os.read(STDIN, 4096):
            asyncio.get_running_loop().remove_reader(STDIN)
            self.arrive()

    def arrive(self) -> None:
        self.count += 1
        self._arrived.set()

    async def wait(self, count: int) -> None:
        """Returns once `count` signals have come."""
        while self.count < count:
            self._arrived.clear()
            await self._arrived.wait()


class Server:
    """One run of the server; `run` returns the exit code."""

    def __init__(self, config: Config, with_stdin: bool = False) -> None:
        """`with_stdin`: the end of standard input counts as SIGTERM."""
        self.config = config
        self.service = Service(config, model_name(config))
        self.listener = Listener(make_app(self.service), config.http)
        self.service.gate = self.listener.gate
        self._signals = _Signals(with_stdin)
        self._tasks: list[asyncio.Task[Any]] = []
        self._loaded: Loaded | None = None
        self._orderly = False  # drained: nothing of value is interrupted any more

    async def run(self) -> int:
        try:
            self._signals.install()
        except OSError as error:
            log.error("%s", error)
            return EXIT_CONFIG
        server = self.config.server
        try:
            _raise_file_limit(self.listener)
            tls = tls_context(server.ssl_certfile, server.ssl_keyfile)
            port = await self.listener.start(server.server_name, server.server_port, tls)
        except OSError as error:
            log.error("cannot listen on %s port %d: %s", server.server_name, server.server_port, _listen_reason(error))
            return EXIT_CONFIG
        scheme, host = "https" if tls else "http", server.server_name
        address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        log.info("listening on %s, loading %s", address, self.service.model_name)
        try:
            return await self._serve(address)
        finally:
            await self._close()

    async def _serve(self, address: str) -> int:
        stop = self._task(self._signals.wait(1))
        start = self._task(self._start())
        await asyncio.wait({stop, start}, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            log.info("stopped before the model was ready")
            self.service.draining = True
            return EXIT_OK
        error = start.exception()
        if error is not None:
            code = exit_code(error)
            detail = str(error) if code != EXIT_INTERNAL else f"{type(error).__name__}: {error}"
            log.error("%s", detail, exc_info=error if code == EXIT_INTERNAL else None)
            return code
        log.info("ready: %s on %s", self.service.model_name, address)
        dead = self._task(self._engine().wait_dead())
        await asyncio.wait({stop, dead}, return_when=asyncio.FIRST_COMPLETED)
        if dead.done():
            return await self._died(dead.result())
        return await self._drain(dead)

    async def _start(self) -> None:
        if self.config.telemetry.otlp_endpoint:
            self.service.tracing = Tracing(self.config.telemetry)
        self.service.reason = "loading the model"
        self._loaded = loaded = await _in_daemon_thread(lambda: load(self.config))
        self.service.engine = loaded.engine
        await loaded.engine.start()
        server = self.config.server
        if server.log_level == "DEBUG":
            loaded.engine.observers.append(trace_step)
        if server.log_stats_s:
            self._task(log_throughput(self.service, server.log_stats_s))
        self._task(measure_lag(self.service))
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not walk it while streams run
        self.service.serve(loaded.engine, loaded.tokenizer, loaded.template)

    async def _died(self, error: EngineDead) -> int:
        log.critical("%s Streams get an error event; the process ends with code %d.", error, error.exit_code, exc_info=_cause(error))
        await asyncio.gather(asyncio.sleep(DEATH_NOTICE_S), self._until_quiet(LAST_WORDS_S))
        return error.exit_code

    async def _drain(self, dead: asyncio.Task[EngineDead]) -> int:
        """Contract 2.3-3 of the reliability rules."""
        knobs, service = self.config.shutdown, self.service
        service.draining = True
        self._engine().drain()
        log.info("stopping: %d requests may finish within %g s", len(service.live), knobs.drain_timeout_s)
        hurry = self._task(self._signals.wait(self._signals.count + 1))
        await asyncio.wait({hurry}, timeout=knobs.drain_delay_s)
        self.listener.stop_accepting()
        quiet = self._task(self._until_quiet(knobs.drain_timeout_s))
        await asyncio.wait({hurry, quiet, dead}, return_when=asyncio.FIRST_COMPLETED)
        if dead.done() and not quiet.done():
            return await self._died(dead.result())
        unfinished = service.generations()
        for generation in unfinished:
            generation.abort()
        if unfinished:
            log.warning("%d answers were ended before they were complete", len(unfinished))
            await self._until_quiet(LAST_WORDS_S)
        self._orderly = True
        return EXIT_OK

    async def _until_quiet(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.service.quiet.wait()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self.listener.close(LAST_WORDS_S if self.service.live else 0.1)
        if not self._orderly:
            for rank in multiprocessing.active_children():
                rank.kill()  # one that loads, or is frozen, would not hear anything milder
        if self._loaded is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S if self._orderly else HURRY_S):
                    await self._loaded.engine.stop()
            if self._loaded.template is not None:
                self._loaded.template.close()
        self.service.close()
        if self.service.tracing is not None:
            await self.service.tracing.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _engine(self) -> Any:
        if self._loaded is None:
            raise EngineDead("there is no engine")
        return self._loaded.engine

    def _task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task


def _listen_reason(error: OSError) -> str:
    """What is wrong, and the knob that mends it."""
    if isinstance(error, socket.gaierror):
        return "there is no such host; change server.server_name"
    known = {
        errno.EADDRINUSE: "another program listens there; change server.server_port",
        errno.EADDRNOTAVAIL: "this machine has no such address; change server.server_name",
        errno.EACCES: "this user may not; change server.server_port to 1024 or more",
    }
    return known.get(error.errno or 0) or error.strerror or str(error)


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """Like asyncio.to_thread, but the process does not wait for it: a stop while loading is quick."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(setter: Callable[[Any], None], value: Any) -> None:
        if not done.done():
            setter(value)

    def body() -> None:
        try:
            result = work()
        except BaseException as error:  # carried over to the event loop, which decides
            _call(loop, tell, done.set_exception, error)
        else:
            _call(loop, tell, done.set_result, result)

    threading.Thread(target=body, name="load", daemon=True).start()
    return await done


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
        loop.call_soon_threadsafe(function, *arguments)


def _cause(error: EngineDead) -> BaseException | None:
    return error.__cause__


def _raise_file_limit(listener: Listener) -> None:
    """As many descriptors as the system allows; connections stay 64 below, so that health checks and pipes find one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = listener.gate.max_connections + 64
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < wanted:
            listener.gate.max_connections = max(1, most - 64)
            log.warning("only %d connections at a time: the system allows %d open files", listener.gate.max_connections, most)
