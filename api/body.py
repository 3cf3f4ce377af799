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
EXACT_BYTES = 1 << 16  # bodies up to this size are searched for duplicate keys at every level
MAX_GAPS = 20  # a body may take this many times http.body_gap_timeout_s in all


async def read_object(request: web.Request, limits: Http) -> dict[str, Any]:
    """The body as a JSON object."""
    _check_headers(request, limits)
    body = await _read(request, limits)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad(None, f"The body is not valid JSON: {error.msg} at byte {error.pos}.", "invalid_json") from None
    if type(value) is not dict:
        raise bad(None, "The body must be a JSON object.", "invalid_json")
    _refuse_duplicates(body, value)
    return value


def _check_headers(request: web.Request, limits: Http) -> None:
    media, _, charset = request.headers.get("Content-Type", "").partition(";")
    if media.strip().lower() != "application/json":
        raise ApiError(415, "Content-Type must be application/json.", code="unsupported_media_type")
    name, _, value = charset.partition("=")
    if name.strip().lower() == "charset" and value.strip(' "').lower() not in ("utf-8", "utf8"):
        raise bad(None, "JSON is UTF-8; leave the charset out of Content-Type.", "invalid_json")
    if request.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "Compressed bodies are not accepted; send the JSON as it is.", code="unsupported_media_type")
    if (request.content_length or 0) > limits.max_body_bytes:
        raise _too_large(limits)


async def _read(request: web.Request, limits: Http) -> bytes:
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


def _refuse_duplicates(body: bytes, value: dict[str, Any]) -> None:
    """A key given twice would silently lose one of its values."""
    if len(body) > EXACT_BYTES and not any(body.count(b'"%b"' % key.encode()) > 1 for key in value if len(key) < 64):
        return
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
