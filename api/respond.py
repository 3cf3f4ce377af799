"""How a handler ends: its answer as a stream or as one object, and the accounting whatever happened to it."""

from __future__ import annotations

from aiohttp import web

from api.errors import json_response
from api.generate import Answer
from api.service import NOTE, SERVICE
from api.sse import Frames, stream_answer


async def respond(request: web.Request, answer: Answer, frames: Frames, *, stream: bool) -> web.StreamResponse:
    """The answer in the words of `frames`; afterwards it is counted, and what is left of it ends."""
    service = request.app[SERVICE]
    frames.of(answer)
    try:
        if stream:
            return await stream_answer(request, answer, frames, service.config.http)
        return json_response(await frames.fold(answer))
    finally:
        request[NOTE] = service.finished(answer)
