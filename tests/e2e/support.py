"""A server in a process of its own, and a client made of bare sockets, for tests that look at the whole house.

The client speaks HTTP/1.0, so that a stream is its events and nothing else, and costs little: on a small machine the
client competes with the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
START_S = 180.0  # a first start compiles


def many_files() -> None:
    """Thousands of sockets need as many file descriptors as this process may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def descendants(pid: int) -> list[int]:
    """Living processes below `pid`, zombies not counted."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents[int(entry.name)] = int(fields[1])
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def ranks(pid: int) -> list[int]:
    """The spawned rank processes of a server (not multiprocessing's resource tracker), in order of rank."""
    found = []
    for child in sorted(descendants(pid)):
        with contextlib.suppress(OSError):
            if b"spawn_main" in (Path("/proc") / str(child) / "cmdline").read_bytes():
                found.append(child)
    return found


class Server:
    """`python server.py`, killed with all its children at the end of the `with` whatever happened."""

    def __init__(self, *sets: str, config: str = "config/mock.toml", api_key: str = "") -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = open(os.memfd_create("server-log"), "w+b", buffering=0)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        knobs = [f"server.server_port={self.port}", *([f'server.api_keys=["{api_key}"]'] if api_key else []), *sets]
        command = [sys.executable, "server.py", "--config", config, *(word for knob in knobs for word in ("--set", knob))]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self._log, stderr=self._log, start_new_session=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()

    @property
    def log(self) -> str:
        return os.pread(self._log.fileno(), 1 << 24, 0).decode(errors="replace")

    def ready(self) -> Self:
        """Wait for /health to say 200."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log}")
            if self.get("/health")[0] == 200:
                return self
            time.sleep(0.05)
        raise AssertionError(f"the server was not ready within {START_S} s:\n{self.log}")

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; status 0 where nobody answers."""
        return self._call(urllib.request.Request(self.url + path, headers=self._headers))

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        status, text = self.post_raw(path, body)
        return status, json.loads(text) if text else None

    def post_raw(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        return self._call(urllib.request.Request(self.url + path, json.dumps(body).encode(), self._headers))

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """The exit code."""
        return self.process.wait(timeout_s)

    def metric(self, name: str) -> float:
        """Sum over the labels of a metric."""
        lines = [line.rsplit(" ", 1) for line in self.get("/metrics")[1].splitlines() if line.startswith(name)]
        values = [float(value) for series, value in lines if series in (name,) or series.startswith(name + "{")]
        if not values:
            raise KeyError(name)
        return sum(values)

    @staticmethod
    def _call(request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except (OSError, ValueError):
            return 0, ""


@dataclass
class Event:
    name: str  # "" for plain data
    data: str

    def json(self) -> Any:
        return json.loads(self.data)


class Stream:
    """One streamed answer over one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: int) -> None:
        self.reader = reader
        self.writer = writer
        self.status = status

    @classmethod
    async def open(cls, port: int, body: dict[str, Any], path: str = "/v1/completions") -> Self:
        """Returns when the response's headers are there."""
        reader, writer = await send(port, body, path)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except BaseException:
            writer.transport.abort()
            raise
        return cls(reader, writer, int(head.split(" ", 2)[1]))

    async def events(self) -> list[Event]:
        """All events up to the end of the connection; comments are skipped."""
        return list(parse((await self.reader.read()).decode()))

    async def text(self) -> tuple[str, list[Event]]:
        """The text of a completions stream and all its events; the connection is closed."""
        events = await self.events()
        self.close()
        pieces = [e.json()["choices"] for e in events if not e.name and e.data != "[DONE]"]
        return "".join(choices[0]["text"] for choices in pieces if choices), events

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """End the connection with RST."""
        found = self.writer.get_extra_info("socket")
        if found is not None:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.writer.transport.abort()


async def send(port: int, body: dict[str, Any], path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect and send a whole request; nothing is read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    writer.write(request_bytes(port, body, path))
    return reader, writer


def request_bytes(port: int, body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    return head.encode() + payload


def parse(text: str) -> Iterator[Event]:
    for block in text.split("\n\n"):
        name, data = "", []
        for line in block.splitlines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                data.append(line[6:])
        if data:
            yield Event(name, "\n".join(data))
