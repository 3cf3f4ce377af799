"""One streamed answer from an OpenAI-compatible server: the SSE parser and the coroutine that fills an `Answer`.

Kept cheap, because on a small machine the client competes with the server: bytes are split as they come, each event is
parsed once with orjson, and every content chunk gets the time at which its bytes were read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from bench.metrics import Answer
from bench.workload import Job

MAX_EVENT_BYTES = 8 << 20
MAX_ERROR_CHARS = 200


class SseParser:
    """Incremental `text/event-stream`: feed bytes cut anywhere, get (event, data) pairs.

    Lines end in LF or CRLF; comments and unknown fields are skipped; several data lines are joined with LF.
    An event over 8 MiB is a ValueError.
    """

    __slots__ = ("_data", "_event", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._event = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[tuple[bytes, bytes]]:
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise ValueError(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        for line in lines:
            if line.endswith(b"\r"):
                line = line[:-1]
            if not line:
                if self._data:
                    yield self._event, b"\n".join(self._data)
                self._event, self._data = b"", []
                continue
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if name == b"data":
                self._data.append(value)
            elif name == b"event":
                self._event = value


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go and what they have in common."""

    url: str  # http://host:port
    model: str
    endpoint: str = "completions"  # or "chat"
    temperature: float = 0.0
    ignore_eos: bool = False
    api_key: str = ""
    timeout_s: float = 600.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"

    @property
    def headers(self) -> dict[str, str]:
        auth = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"Content-Type": "application/json", "Accept": "text/event-stream"} | auth

    def body(self, job: Job) -> bytes:
        """The request as JSON. Built before the run starts, so that encoding is not part of any latency."""
        if self.endpoint == "chat":
            if isinstance(job.prompt, list) and job.prompt and not isinstance(job.prompt[0], dict):
                raise ValueError("the chat endpoint takes text or messages, not token ids; use --endpoint completions for ids.")
            messages = job.prompt if isinstance(job.prompt, list) else [{"role": "user", "content": job.prompt}]
            prompt: dict[str, Any] = {"messages": messages}
        else:
            if isinstance(job.prompt, list) and job.prompt and isinstance(job.prompt[0], dict):
                raise ValueError("the completions endpoint takes text or ids, not messages; use --endpoint chat.")
            prompt = {"prompt": job.prompt}
        common = {
            "model": self.model,
            "max_tokens": job.output_len,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return orjson.dumps(prompt | common | ({"ignore_eos": True} if self.ignore_eos else {}) | self.extra)


def session(limit: int = 0) -> aiohttp.ClientSession:
    """A client session without a connection limit. Each request has a connection of its own, as a user has: none can be found closed."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=limit, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None),
        auto_decompress=False,
    )


async def ask(http: aiohttp.ClientSession, target: Target, body: bytes, answer: Answer, start_s: float, keep_text: bool) -> Answer:
    """Send one request and read its stream to the end; every failure becomes `answer.error`, none is raised but cancellation."""
    answer.sent_s = time.perf_counter() - start_s
    try:
        async with asyncio.timeout(target.timeout_s), http.post(target.url + target.path, data=body, headers=target.headers) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}: {_message(await response.content.read(4096))}"
            else:
                await _read(response, answer, start_s, keep_text)
    except TimeoutError:
        answer.error = f"no end within {target.timeout_s:g} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
    except asyncio.CancelledError:
        answer.error = "cut off at the end of the run"
        raise
    finally:
        if answer.end_s < 0:
            answer.end_s = time.perf_counter() - start_s
    return answer


async def _read(response: aiohttp.ClientResponse, answer: Answer, start_s: float, keep_text: bool) -> None:
    parser, texts, completion_tokens, done = SseParser(), [], None, False
    content = response.content
    while chunk := await content.readany():
        now = time.perf_counter() - start_s
        for event, data in parser.feed(chunk):
            if data == b"[DONE]":
                done = True
                continue
            message = orjson.loads(data)
            if event == b"error" or "error" in message:
                answer.error = f"error event: {_message(data)}"
                return
            for choice in message.get("choices", ()):
                text = choice.get("text")
                if text is None:
                    delta = choice.get("delta") or {}
                    text = delta.get("content") or delta.get("reasoning_content")
                if text:
                    answer.chunk_s.append(now)
                    if keep_text:
                        texts.append(text)
                if choice.get("finish_reason"):
                    answer.end_s = now
            if usage := message.get("usage"):
                completion_tokens = usage.get("completion_tokens")
                answer.input_len = usage.get("prompt_tokens") or answer.input_len
    if not done:
        answer.error = "the stream ended without [DONE]"
    elif answer.end_s < 0:
        answer.error = "the stream ended without a finish reason"
    answer.text = "".join(texts)
    # A server that reports no usage: one token a chunk is the best that can be known.
    answer.output_len = len(answer.chunk_s) if completion_tokens is None else completion_tokens
    answer.first_s = answer.chunk_s[0] if answer.chunk_s else answer.end_s


def _message(body: bytes) -> str:
    """The sentence of an OpenAI error body, or the beginning of whatever came."""
    try:
        error = orjson.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        text = body.decode("utf-8", "replace")
    return text[:MAX_ERROR_CHARS]
