"""A request's body as a checked JSON object: bounded while it arrives, refused before it is understood.

Size, silence and media type are decided before anything is buffered; JSON is UTF-8, finite, of bounded depth and
without duplicate keys. Every refusal is an `ApiError` with a 4xx status.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import orjson
from aiohttp import web

from api.errors import ApiError, bad
from config.schema import Http

CLOSE = {"Connection": "close"}
EXACT_BYTES = 1 << 16  # larger bodies are searched for duplicate keys only where a key at the top occurs twice
MAX_CONTAINERS = 50_000
MAX_COMMAS = 1_000_000  # more token ids than fit into 8 MiB
MAX_GAPS = 20  # a body may take this many times http.body_gap_timeout_s in all


async def read_object(request: web.Request, limits: Http, session_len: int) -> dict[str, Any]:
    """The body as a JSON object. `session_len` bounds how much structure a sensible request can have."""
    _check_headers(request, limits)
    return await parse_json(await read_bytes(request, limits), session_len)


async def read_optional(request: web.Request, limits: Http, session_len: int) -> dict[str, Any]:
    """The same, where an empty body stands for an empty object."""
    if not request.can_read_body:
        return {}
    _check_headers(request, limits)
    body = await read_bytes(request, limits)
    return await parse_json(body, session_len) if body else {}


async def parse_json(body: bytes, session_len: int) -> dict[str, Any]:
    if not body.strip():
        raise bad(None, "The body is empty; send a JSON object.", "invalid_json")
    _check_structure(body, session_len)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad(None, f"The body is not valid JSON: {error.msg} at byte {error.pos}.", "invalid_json") from None
    if type(value) is not dict:
        raise bad(None, "The body must be a JSON object.", "invalid_json")
    if len(body) <= EXACT_BYTES:
        _refuse_duplicates(body)
    elif any(body.count(b'"%b"' % key.encode()) > 1 for key in value if len(key) < 64):
        await asyncio.to_thread(_refuse_duplicates, body)
    return value


def _check_headers(request: web.Request, limits: Http) -> None:
    media, _, charset = request.headers.get("Content-Type", "").partition(";")
    if media.strip().lower() != "application/json":
        state = f"it is {media.strip()[:64]!r}" if media else "there is none"
        raise ApiError(415, f"Content-Type must be application/json; {state}.", code="unsupported_media_type")
    name, _, value = charset.partition("=")
    if name.strip().lower() == "charset" and value.strip(' "').lower() not in ("utf-8", "utf8"):
        raise bad(None, "JSON is UTF-8; leave the charset out of Content-Type.", "invalid_json")
    if request.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "Compressed bodies are not accepted; send the JSON as it is.", code="unsupported_media_type")


async def read_bytes(request: web.Request, limits: Http) -> bytes:
    """The whole body, refused as soon as it is too large or too slow."""
    if (request.content_length or 0) > limits.max_body_bytes:
        raise _too_large(limits)
    chunks: list[bytes] = []
    size = 0
    loop = asyncio.get_running_loop()
    end = loop.time() + MAX_GAPS * limits.body_gap_timeout_s
    try:
        while True:
            async with asyncio.timeout_at(min(end, loop.time() + limits.body_gap_timeout_s)):
                chunk = await request.content.readany()
            if not chunk:
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)
            size += len(chunk)
            if size > limits.max_body_bytes:
                raise _too_large(limits)
            chunks.append(chunk)
            if len(chunks) > 1024:  # a body that drips costs no more memory than one that does not
                chunks = [b"".join(chunks)]
    except TimeoutError:
        raise ApiError(408, "The body did not arrive in time.", code="body_timeout", headers=CLOSE) from None
    except (web.RequestPayloadError, web.HTTPException):
        raise ApiError(400, "The body is not framed as HTTP says.", code="malformed_http", headers=CLOSE) from None


def _too_large(limits: Http) -> ApiError:
    message = f"The body is larger than {limits.max_body_bytes} bytes (http.max_body_bytes)."
    return ApiError(413, message, code="body_too_large", headers=CLOSE)


def _check_structure(body: bytes, session_len: int) -> None:
    """Parsing holds the event loop: 8 MB of `[]` take a second, 8 MB of text 10 ms. Counted in text as well, generously."""
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS + session_len // 2 or body.count(b",") > MAX_COMMAS:
        raise bad(None, "The body has too many arrays, objects or values.", "invalid_json")


def _refuse_duplicates(body: bytes) -> None:
    """A key given twice would silently lose one of its values."""
    try:
        json.loads(body, object_pairs_hook=_pairs, parse_int=str, parse_float=str)
    except RecursionError:
        raise bad(None, "The body is nested too deeply.", "invalid_json") from None


def _pairs(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise bad(key[:64], f"The body has the key {key[:64]!r} twice.", "duplicate_key")
        seen.add(key)
