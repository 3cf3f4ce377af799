"""Rendering Jinja templates in a helper process, from the outside: start it, talk to it, kill it when time is up.

`render` is synchronous and may be called from several threads; they take turns. The helper is started by the first
render and kept: a render then costs one round trip over a socket pair.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from text.errors import TemplateBudget, TemplateError, TemplateRefused, TextError

WORKER = Path(__file__).with_name("template_worker.py")
MEMORY_BYTES = 512 << 20
START_TIMEOUT_S = 30.0
# what a Python child needs to find its libraries; nothing else of ours (API keys live in the environment) is its business
KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TZ", "SYSTEMROOT")


class TemplateHost:
    """A set of templates by name and the process that renders them."""

    def __init__(self, templates: dict[str, str], timeout_s: float, max_chars: int) -> None:
        self._templates = templates
        self._timeout_s = timeout_s
        self._max_chars = max_chars
        self._lock = threading.Lock()
        self._helper: _Helper | None = None

    def render(self, name: str, variables: dict[str, Any]) -> str:
        """Raises TemplateRefused, TemplateError (syntax) or TemplateBudget."""
        limits = {"max_chars": self._max_chars, "timeout_s": self._timeout_s}
        try:
            request = json.dumps({"template": name, "variables": variables, **limits}).encode("ascii")
        except RecursionError as e:
            raise TemplateRefused("the messages are nested too deeply") from e
        with self._lock:
            reply = self._exchange(request)
        if "text" in reply:
            text: str = reply["text"]
            return text
        raise _as_error(reply)

    def _exchange(self, request: bytes) -> dict[str, Any]:
        helper = self._helper
        if helper is None or not helper.is_alive():  # the first render, or somebody killed it while it was idle
            helper = self._start()
        try:
            reply = helper.ask(request, self._timeout_s)
        except TimeoutError as e:
            self._stop()
            raise TemplateBudget(f"the chat template took longer than {self._timeout_s:g} s; see request.template_timeout_s") from e
        except (OSError, EOFError) as e:
            self._stop()
            raise TemplateBudget("the chat template used more memory or time than it may; its process ended") from e
        if reply.get("error") == "budget":
            self._stop()
        return reply

    def _start(self) -> _Helper:
        self._stop()
        setup = json.dumps({"templates": self._templates, "memory_bytes": MEMORY_BYTES}).encode("ascii")
        helper = self._helper = _Helper()
        try:
            helper.send(setup, time.monotonic() + START_TIMEOUT_S)
            warm_up = {"template": "", "variables": {}, "max_chars": 1, "timeout_s": self._timeout_s}
            helper.ask(json.dumps(warm_up).encode(), START_TIMEOUT_S)  # imports are not the template's time
        except (OSError, EOFError) as e:
            self._stop()
            raise TemplateError("the process that renders chat templates did not start; is jinja2 installed for this Python?") from e
        return helper

    def _stop(self) -> None:
        if self._helper is not None:
            self._helper.stop()
            self._helper = None

    def close(self) -> None:
        """End the helper; a later render starts another."""
        with self._lock:
            self._stop()


def _as_error(reply: dict[str, Any]) -> TextError:
    kind, message = reply.get("error"), str(reply.get("message"))
    if kind == "syntax":
        return TemplateError(f"the chat template does not parse: {message}")
    if kind == "budget":
        return TemplateBudget(f"the chat template went over its budget: {message}")
    if kind == "refused":
        return TemplateRefused(f"the chat template refuses these messages: {message}")
    return TemplateRefused(f"the chat template fails on these messages: {message}")


class _Helper:
    """One process and our end of its socket pair."""

    def __init__(self) -> None:
        self.connection, theirs = socket.socketpair()
        environment = {k: v for k in KEPT_ENVIRONMENT if (v := os.environ.get(k)) is not None}
        command = [sys.executable, "-P", "-B", str(WORKER)]
        try:
            # a session of its own: Ctrl-C in a terminal is for the server, which then closes this process
            self.process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd=os.sep,
                start_new_session=True,
            )
        finally:
            theirs.close()
        self.stop = weakref.finalize(self, _end, self.process, self.connection)

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, request: bytes, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        self.send(request, deadline)
        size = struct.unpack("<I", self._receive(4, deadline))[0]
        reply: dict[str, Any] = json.loads(self._receive(size, deadline))
        return reply

    def send(self, data: bytes, deadline: float) -> None:
        self.connection.settimeout(max(deadline - time.monotonic(), 0.001))
        self.connection.sendall(struct.pack("<I", len(data)) + data)

    def _receive(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self.connection.settimeout(max(deadline - time.monotonic(), 0.001))
            part = self.connection.recv(min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
            if len(data) < size and time.monotonic() > deadline:
                raise TimeoutError
        return bytes(data)


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()
