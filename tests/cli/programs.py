"""Commands as a user runs them: in a process of their own, with pipes or on a terminal (a pty of the standard library)."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
NUMBATCH = [sys.executable, "-m", "cli"]
LIMIT_S = 60.0  # a first run compiles
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>])")


def run(*words: str, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`numbatch WORDS` to its end."""
    return subprocess.run(
        [*NUMBATCH, *words], cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, **(env or {})}
    )


# the terminal becomes the session's, so that Ctrl-C is a signal
ON_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A command on a terminal of its own. `said` is all that it wrote, without escape sequences."""

    def __init__(self, command: Sequence[str]) -> None:
        self._master, slave = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "100", "LINES": "40"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL, *command],
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            start_new_session=True,
        )
        os.close(slave)
        self._raw = b""
        self._seen = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._master)

    @property
    def said(self) -> str:
        return ESCAPES.sub("", self._raw.decode(errors="replace")).replace("\r", "")

    def until(self, text: str, limit_s: float = 30.0) -> str:
        """What was written since the last call, up to and with `text`."""
        end = time.monotonic() + limit_s
        while text not in self.said[self._seen :]:
            left = end - time.monotonic()
            assert left > 0 and self._read(left), f"{text!r} did not come; the terminal shows:\n{self.said}"
        start = self._seen
        self._seen = self.said.index(text, start) + len(text)
        return self.said[start : self._seen]

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def ends(self, limit_s: float = LIMIT_S) -> int:
        """The exit code, once the command has ended."""
        end = time.monotonic() + limit_s
        while self.process.poll() is None:
            assert time.monotonic() < end, f"still there:\n{self.said}"
            self._read(0.05)
        return self.process.returncode

    def _read(self, wait_s: float) -> bool:
        """Whether something may still come."""
        ready, _, _ = select.select([self._master], [], [], min(wait_s, 0.2))
        if ready:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # the other side is gone
                return False
            self._raw += data
        return True
