"""One rank in a process of its own: builds a runner, then turns plans into results until the pipe ends.

Started by `engine.executor.ProcessExecutor` through multiprocessing's spawn, which imports the main module again as
`__mp_main__`: nothing heavy may be imported at the top of this file or of `server.py`. A reader thread empties the
pipe, so that the server never blocks on a full one and a vanished parent is noticed at once, also in mid-step.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from engine.step import StepPlan, StepResult

EXIT_LOST_PARENT, EXIT_FAILED = 1, 5
PR_SET_PDEATHSIG = 1


def worker_main(rank: int, size: int, config_json: str, private_dir: str, pipe: Any) -> None:
    """Runs until the parent closes the pipe (exit code 0) or something fails (not 0)."""
    _die_with_parent()
    # the parent decides when a rank ends: by closing the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    plans: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    try:
        runner = _build(rank, size, config_json, private_dir)
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send_bytes(json.dumps({"error": type(error).__name__, "message": str(error)}).encode())
        os._exit(EXIT_FAILED)
    if rank == 0:
        pipe.send_bytes(json.dumps({"num_blocks": runner.num_blocks}).encode())
    threading.Thread(target=_read, args=(pipe, plans), name="pipe-reader", daemon=True).start()
    launched: queue.SimpleQueue[Callable[[], StepResult]] = queue.SimpleQueue()
    threading.Thread(target=_answer, args=(rank, pipe, launched), name="results", daemon=True).start()
    while (data := plans.get()) is not None:
        try:
            launched.put(runner.launch(StepPlan.decode(data)))
        except Exception as error:
            _fail(rank, error)
    os._exit(0)  # no clean-up that could hang: collectives may wait for ranks that are gone


def _answer(rank: int, pipe: Any, launched: queue.SimpleQueue[Callable[[], StepResult]]) -> None:
    """Waits for each step in turn, while the main thread queues the next one behind it; rank 0 tells the parent."""
    while True:
        finish = launched.get()
        try:
            result = finish()
        except Exception as error:
            _fail(rank, error)
        if rank == 0:
            try:
                pipe.send_bytes(result.encode())
            except OSError:
                os._exit(EXIT_LOST_PARENT)


def _fail(rank: int, error: Exception) -> NoReturn:
    print(f"rank {rank}: step failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(EXIT_FAILED)


def _build(rank: int, size: int, config_json: str, private_dir: str) -> Any:
    from config.wire import config_from_json
    from engine.build import build_runner
    from engine.parallel import Ranks

    config = config_from_json(config_json)
    return build_runner(config, Ranks(rank, size, private_dir, config.engine.init_timeout_s, cuda=config.engine.device == "cuda"))


def _read(pipe: Any, plans: queue.SimpleQueue[bytes | None]) -> None:
    """Ends the process when the parent is gone, even while the main thread computes."""
    try:
        while True:
            plans.put(pipe.recv_bytes())
    except (EOFError, OSError):
        plans.put(None)
        timer = threading.Timer(2.0, os._exit, (0,))
        timer.daemon = True
        timer.start()


def _die_with_parent() -> None:
    """Linux: SIGKILL when the parent's main thread ends, whatever this process is doing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
