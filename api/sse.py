"""Server-sent events with as little work per event as the wire allows.

`EventStream` sends its headers through aiohttp and then writes chunks straight to the transport: no task, no await
and no header work per event. When a reader is behind by more than the configured bytes or events the transport
pauses its protocol; `api/protocol.py` runs the stall clock on that pause and cuts the connection when it runs out,
which cancels the handler and aborts the sequences. Silence is filled with SSE comments.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from typing import Any, Protocol, Self

import orjson
from aiohttp import web

from api.errors import ApiError
from api.generate import Answer, Delta
from config.schema import Http

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
SEND_BUFFER = 128 << 10  # kernel bytes a stream may be ahead of its reader; the default grows to megabytes
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


Deltas = AsyncGenerator[list[Delta], None]


class Frames(Protocol):
    """How one endpoint writes an answer: chunks, each method returning complete events, or one object (`fold`)."""

    headers: dict[str, str]
    ping: bytes
    done: bytes

    def of(self, answer: Answer) -> object: ...

    def opening(self) -> bytes: ...

    def delta(self, delta: Delta) -> bytes: ...

    def closing(self, answer: Answer) -> bytes: ...

    def failed(self, error: ApiError) -> bytes: ...

    async def fold(self, answer: Answer) -> Any: ...


class Framing:
    """OpenAI's stream: server-sent events, comments in silence, [DONE] at the end, an `error` object where it fails."""

    headers = HEADERS
    ping = PING
    done = DONE
    _answer: Answer | None = None

    def of(self, answer: Answer) -> Self:
        """Whose frames these are; before anything is written."""
        self._answer = answer
        return self

    def opening(self) -> bytes:
        return b""

    def closing(self, answer: Answer) -> bytes:
        return b""

    def failed(self, error: ApiError) -> bytes:
        return event(error.body())


def event(value: object) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def named_event(name: str, value: object) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(value) + b"\n\n"


def joined(parts: list[bytes]) -> orjson.Fragment:
    """Pieces of a JSON array, already rendered, as one array."""
    return orjson.Fragment(b"[" + b",".join(parts) + b"]")


class EventStream:
    """One text/event-stream response on one connection."""

    def __init__(self, request: web.Request, limits: Http, headers: dict[str, str] = HEADERS, ping: bytes = PING) -> None:
        """`ping`: what fills silence; b"" leaves it empty."""
        self.response = web.StreamResponse(headers=headers)
        self.opened = False
        self.ping = ping
        self.ping_s = limits.sse_ping_s if ping else 0.0
        self._request = request
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._chunked = request.version >= (1, 1)
        self._transport = request.transport
        self._protocol = request.protocol
        self._unsent_events = 0
        self._squeezed = False
        self._last_write_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def open(self, first: bytes) -> None:
        """Send the headers and the first bytes; limits how far the reader may fall behind."""
        transport = self._transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        if self._chunked:
            self.response.enable_chunked_encoding()
        await self.response.prepare(self._request)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._set_limits(self._limits.stream_buffer_bytes)
        self.opened = True
        await self.response.write(first)
        self._last_write_s = self._loop.time()
        if self.ping_s:
            self._timer = self._loop.call_later(self.ping_s, self._ping)

    def write(self, data: bytes, num_events: int = 1) -> bool:
        """Hand complete events to the transport; True means the reader is behind: `await drain()` before more."""
        transport = self._transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        if not data:  # an empty chunk would end the response
            return self._protocol.writing_paused
        if transport.get_write_buffer_size():
            self._unsent_events += num_events
        else:
            self._unsent_events = num_events
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        self._last_write_s = self._loop.time()
        if self._unsent_events > self._limits.stream_buffer_events and not self._squeezed:
            self._squeezed = True
            self._set_limits(0)  # any unsent byte is now too much: the transport pauses us
        return self._protocol.writing_paused

    @property
    def paused(self) -> bool:
        """The reader is behind."""
        return self._protocol.writing_paused

    async def drain(self) -> None:
        """Wait until the reader has caught up; the stall clock of the protocol bounds this."""
        await self._request.writer.drain()
        if self._squeezed and self._transport is not None:
            self._squeezed = False
            self._set_limits(self._limits.stream_buffer_bytes)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _set_limits(self, high: int) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.set_write_buffer_limits(high=high, low=high // 4)

    def _ping(self) -> None:
        """Runs once an interval, not once an event: looks when the last write was."""
        silent = self._loop.time() - self._last_write_s
        interval = self.ping_s
        if self._transport is None or self._transport.is_closing():
            return
        if silent >= interval and not self._protocol.writing_paused:
            self.write(self.ping, 0)
            silent = 0.0
        self._timer = self._loop.call_later(max(interval - silent, 0.01), self._ping)


async def stream_answer(request: web.Request, answer: Answer, frames: Frames, limits: Http) -> web.StreamResponse:
    """The streaming fold. An error before the first byte is raised (a status); after it, it is an event, and no [DONE]."""
    stream = EventStream(request, limits, frames.headers, frames.ping)
    deltas = answer.deltas()
    try:
        first = await _first_batch(deltas, answer, stream, frames)
        write, delta = stream.write, frames.delta
        write(b"".join(map(delta, first)), len(first))
        async for batch in deltas:
            if write(b"".join(map(delta, batch)), len(batch)):
                await stream.drain()
        stream.write(frames.closing(answer) + frames.done)
    except ApiError as error:
        if not stream.opened:
            raise
        stream.write(frames.failed(error))
        stream.response.force_close()
    finally:
        stream.close()
        answer.close()
        await deltas.aclose()
    if stream.paused:
        await stream.drain()
    return stream.response


async def _first_batch(deltas: Deltas, answer: Answer, stream: EventStream, frames: Frames) -> list[Delta]:
    """Headers go out with the first token, or earlier as a ping once the engine works on a long prompt."""
    interval = stream.ping_s or None
    first = asyncio.create_task(_take(deltas))
    try:
        while not (await asyncio.wait({first}, timeout=interval))[0]:
            if answer.scheduled and not stream.opened:
                await stream.open(stream.ping)
        batch = first.result()
    finally:
        if not first.done():
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
    if stream.opened:
        stream.write(frames.opening(), 0)
    else:
        await stream.open(frames.opening())
    return batch


async def _take(deltas: Deltas) -> list[Delta]:
    return await anext(deltas, [])
