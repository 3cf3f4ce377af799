"""A whole server on a real socket, in a thread of the test process: the application, the listener, the mock engine."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import uvloop

from api.app import make_app
from api.loading import load, model_name
from api.protocol import Listener, tls_context
from api.service import Service
from config.schema import Config
from engine.loop import Engine
from tests.harness import configure

MOCK: dict[str, dict[str, Any]] = {
    "engine": {"device": "mock", "max_batch_size": 64, "session_len": 512},
    "cache": {"num_blocks": 512, "cache_block_seq_len": 16},
    "server": {"log_stats_s": 0.0},
}


def mock_config(**sections: dict[str, Any]) -> Config:
    """The mock engine with small limits; sections are merged over them."""
    merged = {name: {**MOCK.get(name, {}), **sections.get(name, {})} for name in {*MOCK, *sections}}
    return configure(**merged)


class Running:
    """The server from the outside (host, port) and from the inside (`service`, `run`)."""

    host = "127.0.0.1"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.port = 0
        self.service: Service
        self.listener: Listener
        self.loop: asyncio.AbstractEventLoop
        self._up = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="server", daemon=True)

    @property
    def engine(self) -> Engine:
        assert self.service.engine is not None
        return self.service.engine

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        self._thread.start()
        assert self._up.wait(30), "the server did not start"
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server did not stop"

    def run(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """A coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work(), self.loop).result(20)

    def call(self, work: Callable[[], Any]) -> Any:
        """A function on the server's loop."""

        async def inside() -> Any:
            return work()

        return self.run(inside)

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            try:
                runner.run(self._serve())
            except BaseException as error:
                self._error = error
                self._up.set()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self.service = Service(self.config, model_name(self.config))
        self.listener = Listener(make_app(self.service), self.config.http)
        self.service.gate = self.listener.gate
        knobs = self.config.server
        self.port = await self.listener.start(knobs.server_name, 0, tls_context(knobs.ssl_certfile, knobs.ssl_keyfile))
        loaded = load(self.config)
        self.service.engine = loaded.engine
        await loaded.engine.start()
        self.service.serve(loaded.engine, loaded.tokenizer, loaded.template)
        self._up.set()
        await self._end.wait()
        await self.listener.close(1.0)
        await loaded.engine.stop()
        if loaded.template is not None:
            loaded.template.close()
        self.service.close()

    # -- as a client --------------------------------------------------------------------------------------

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case), body; `body` is sent as JSON unless it is bytes."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=20)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **(headers or {})} if data is not None else (headers or {})
        try:
            connection.request(method, path, data, sent)
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        status, _, data = self.request("POST", path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        return status, json.loads(data)

    def events(self, path: str, body: Any) -> list[Any]:
        """The `data:` payloads of a stream, parsed; [DONE] as the string it is."""
        status, headers, data = self.request("POST", path, {**body, "stream": True})
        assert status == 200, data
        assert headers["content-type"].startswith("text/event-stream")
        payloads = [block.removeprefix("data: ") for block in data.decode().split("\n\n") if block and not block.startswith(":")]
        return [p if p == "[DONE]" else json.loads(p) for p in payloads]

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        raw = socket.socket()
        if receive_buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.settimeout(20)
        raw.connect((self.host, self.port))
        return raw

    def settled(self, timeout_s: float = 5.0) -> None:
        """Nothing runs, every block is FREE or CACHED, and the books balance."""
        until(lambda: self.call(self._is_quiet), timeout_s, "sequences or requests are left")
        self.call(self.engine.check_integrity)

    def _is_quiet(self) -> bool:
        s = self.engine.snapshot()
        return not (s.num_running or s.num_waiting or s.active or self.service.live)


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@contextmanager
def serving(config: Config | None = None) -> Iterator[Running]:
    running = Running(config or mock_config())
    running.start()
    try:
        yield running
    finally:
        running.stop()


def post_bytes(path: str, body: bytes, extra: str = "") -> bytes:
    """A raw POST with JSON headers."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode()
        + body
    )


def receive_all(raw: socket.socket, limit: int = 1 << 24) -> bytes:
    """Until the other side closes (or resets)."""
    data = b""
    try:
        while len(data) < limit and (chunk := raw.recv(65536)):
            data += chunk
    except ConnectionResetError:
        return data
    return data
