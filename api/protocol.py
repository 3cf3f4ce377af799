"""The connection limits that aiohttp's server does not have, on its own protocol class.

Deadline for the headers (from the connect, or from the first byte of a further request), a cap on open
connections, a stall clock on writing, and a bad request answered in OpenAI's shape with one short log line.
Below requests: knows no route, no engine.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from api.errors import ApiError, error_response
from config.schema import Http

log = logging.getLogger("numbatch.http")

LINGER_S = 2.0  # how long the rest of a refused body is read and dropped, so that the answer arrives
MAX_BAD_LINES = 10  # log lines about bad requests in a second; the rest is counted


class Gate:
    """What all connections share: the limits, how many are open, and how often a limit was hit."""

    def __init__(self, limits: Http) -> None:
        self.limits = limits
        self.max_connections = limits.max_connections  # lower where the system allows fewer open files
        self.num_open = 0
        self.num_refused = 0  # connections over the cap
        self.num_bad = 0  # requests that could not be parsed
        self.num_stalled = 0  # readers cut off
        self._second = 0
        self._lines = 0

    def note_bad(self, remote: object, what: str, now_s: float) -> None:
        """One line, bounded in length and in number."""
        self.num_bad += 1
        if int(now_s) != self._second:
            self._second, self._lines = int(now_s), 0
        self._lines += 1
        if self._lines <= MAX_BAD_LINES:
            log.warning("bad request from %.60s: %.80s (%d so far)", remote, what, self.num_bad)


class Connection(RequestHandler):
    """aiohttp's protocol with deadlines."""

    __slots__ = ("_counted", "_gate", "_header_timer", "_stall_timer")

    def __init__(self, manager: web.Server, gate: Gate, **options: Any) -> None:
        super().__init__(manager, **options)
        self._gate = gate
        self._counted = False
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        gate = self._gate
        if gate.num_open >= gate.max_connections:
            gate.num_refused += 1
            self._manager = None  # never registered: connection_lost has nothing to undo
            self._force_close = True
            transport.abort()  # type: ignore[attr-defined]
            return
        gate.num_open += 1
        self._counted = True
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._counted:
            self._counted = False
            self._gate.num_open -= 1
        self._got_headers()
        self._stop_stall_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._request_count
        super().data_received(data)
        if self._request_count != before:
            self._got_headers()
        elif data and self._header_timer is None and not self._request_in_progress and not self._messages:
            self._expect_headers()  # the first bytes of a further request

    def pause_writing(self) -> None:
        super().pause_writing()
        limit = self._gate.limits.write_stall_timeout_s
        self._stall_timer = self._loop.call_later(limit, self._stalled)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_stall_clock()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """A request that could not be parsed (400), or a handler that failed below the middleware (500)."""
        remote = self.peername[0] if isinstance(self.peername, tuple) else self.peername
        self._gate.note_bad(remote, type(exc).__name__, self._loop.time())
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun; it cannot become an error")
        text = "The HTTP request is malformed." if status < 500 else "The server failed on this request."
        return error_response(ApiError(status, text, code="malformed_http" if status < 500 else None, headers={"Connection": "close"}))

    def _expect_headers(self) -> None:
        self._header_timer = self._loop.call_later(self._gate.limits.header_timeout_s, self._headers_late)

    def _got_headers(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_late(self) -> None:
        self._header_timer = None
        self.force_close()

    def _stalled(self) -> None:
        self._stall_timer = None
        self._gate.num_stalled += 1
        log.warning("a reader stalled for %g s; its connection is closed", self._gate.limits.write_stall_timeout_s)
        if self.transport is not None:
            self.transport.abort()

    def _stop_stall_clock(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


class Listener:
    """The listening socket and every connection that came through it."""

    def __init__(self, app: web.Application, limits: Http) -> None:
        self.gate = Gate(limits)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None) -> int:
        """Bind and listen; returns the port. Raises OSError where the address cannot be bound."""
        await self._runner.setup()
        limits, loop = self.gate.limits, asyncio.get_running_loop()
        manager = self._runner.server
        if manager is None:
            raise OSError("the HTTP server was not set up")
        options: dict[str, Any] = {
            "loop": loop,
            "keepalive_timeout": limits.keepalive_s,
            "max_line_size": limits.max_header_line,
            "max_field_size": limits.max_header_line,
            "max_headers": limits.max_headers,
            "lingering_time": LINGER_S,
            "access_log": None,
            "auto_decompress": False,
            "logger": log,
        }
        self._server = await loop.create_server(
            lambda: Connection(manager, self.gate, **options),
            host,
            port,
            backlog=1024,
            reuse_address=True,
            ssl=tls,
            ssl_handshake_timeout=limits.header_timeout_s if tls else None,
        )
        return self._server.sockets[0].getsockname()[1]

    def stop_accepting(self) -> None:
        if self._server is not None:
            self._server.close()

    async def close(self, timeout_s: float) -> None:
        """Close the listener, then every connection; handlers get `timeout_s` to end."""
        self.stop_accepting()
        if self._runner.server is not None:
            await self._runner.server.shutdown(timeout_s)
        await self._runner.cleanup()


def tls_context(certfile: str, keyfile: str) -> ssl.SSLContext | None:
    """TLS 1.2 or newer, or None when no certificate is configured."""
    if not certfile:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certfile, keyfile)
    return context
