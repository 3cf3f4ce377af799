"""The HTTP application: every route in one function, one guard around all of them, one renderer for errors.

Order for each request: request id, HTTP version and target form, Host, CORS preflight, API key (on the resolved
route, deny by default), handler. Whatever a handler raises becomes an OpenAI error body with the request id; a
client that leaves cancels its handler.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Awaitable, Callable

import orjson
from aiohttp import web

from api.access import request_id
from api.chat import chat_completions
from api.completions import completions
from api.errors import ApiError, error_response, from_engine
from api.health import live, ready
from api.metrics import metrics
from api.models import model, models, version
from api.openapi import docs, openapi
from api.service import CALLER, NOTE, REQUEST_ID, SERVICE, Service
from api.tokenize import detokenize, tokenize
from engine.errors import EngineError

log = logging.getLogger("numbatch.http")
access_log = logging.getLogger("numbatch.access")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
QUIET = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})  # logged at DEBUG only
CLIENT_GONE = 499


def make_app(service: Service) -> web.Application:
    app = web.Application(middlewares=[guard])
    app[SERVICE] = service
    app.on_response_prepare.append(_add_headers)
    add_routes(app.router)
    return app


def add_routes(router: web.UrlDispatcher) -> None:
    """The whole surface; the last route answers 404 or 405 for everything else."""
    router.add_get("/health", ready, expect_handler=on_expect)
    router.add_get("/health/ready", ready, expect_handler=on_expect)
    router.add_get("/health/live", live, expect_handler=on_expect)
    router.add_get("/metrics", metrics, expect_handler=on_expect)
    router.add_get("/version", version, expect_handler=on_expect)
    router.add_get("/openapi.json", openapi, expect_handler=on_expect)
    router.add_get("/docs", docs, expect_handler=on_expect)
    router.add_get("/v1/models", models, expect_handler=on_expect)
    router.add_get("/v1/models/{model:.+}", model, expect_handler=on_expect)
    router.add_post("/v1/chat/completions", chat_completions, expect_handler=on_expect)
    router.add_post("/v1/completions", completions, expect_handler=on_expect)
    router.add_post("/tokenize", tokenize, expect_handler=on_expect)
    router.add_post("/detokenize", detokenize, expect_handler=on_expect)
    router.add_route("*", "/{path:.*}", nowhere, expect_handler=on_expect)


async def nowhere(request: web.Request) -> web.StreamResponse:
    """404, or 405 when the path exists with other methods."""
    allowed: set[str] = set()
    for resource in request.app.router.resources():
        if resource.canonical != "/{path}":
            allowed |= (await resource.resolve(request))[1]
    if allowed:
        names = ", ".join(sorted(allowed))
        raise ApiError(405, f"This path answers {names} only.", code="method_not_allowed", headers={"Allow": names})
    raise ApiError(404, "There is no such path; see /docs.", code="not_found")


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    started_s = time.monotonic()
    request[REQUEST_ID] = request_id(request)
    status = 500
    try:
        response = await _checked(request, handler)
        status = response.status
        return response
    except asyncio.CancelledError:
        status = CLIENT_GONE
        raise
    except ConnectionError:
        status = CLIENT_GONE
        raise
    except Exception as error:  # every failure has one shape
        response = error_response(_as_api_error(request, error))
        status = response.status
        return response
    finally:
        _log_request(request, status, time.monotonic() - started_s)


async def _checked(request: web.Request, handler: Handler) -> web.StreamResponse:
    service = request.app[SERVICE]
    if request.version not in ((1, 0), (1, 1)):
        raise ApiError(400, "This server speaks HTTP/1.0 and HTTP/1.1.", headers={"Connection": "close"})
    if not request.raw_path.startswith("/") or request.method == "CONNECT":
        raise ApiError(400, "The request target must be a path.", headers={"Connection": "close"})
    service.access.check_host(request)
    preflight = service.access.preflight(request)
    if preflight is not None:
        return preflight
    request[CALLER] = service.access.check_key(request, _route(request))
    return await handler(request)


def _as_api_error(request: web.Request, error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return from_engine(error)
    if isinstance(error, web.HTTPException):
        return ApiError(error.status, error.reason)
    # the message of an unexpected exception may hold a prompt: only its type and the places are logged
    places = "".join(traceback.format_tb(error.__traceback__)[-6:])
    log.error("request %s failed: %s\n%s", request[REQUEST_ID], type(error).__name__, places)
    return ApiError(500, "The server failed on this request.", code="internal_error")


async def on_expect(request: web.Request) -> None:
    """`Expect: 100-continue` is answered unless the announced body is refused anyway; other expectations are not met."""
    limit = request.app[SERVICE].config.http.max_body_bytes
    if request.headers.get("Expect", "").lower() != "100-continue":
        error = ApiError(417, "The only expectation that is met is 100-continue.")
    elif (request.content_length or 0) > limit:
        error = ApiError(413, f"The body is larger than {limit} bytes (http.max_body_bytes).", code="body_too_large")
    else:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # nothing of the response itself has been sent
        return
    raise _Refused(error)


class _Refused(web.HTTPException):
    """An error body for the one place above the guard, which can only raise aiohttp's exceptions."""

    def __init__(self, error: ApiError) -> None:
        self.status_code = error.status
        super().__init__(text=orjson.dumps(error.body()).decode(), content_type="application/json")
        self.force_close()


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else ""


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    identity = request.get(REQUEST_ID)
    if identity:
        response.headers["X-Request-Id"] = identity
        response.headers.update(request.app[SERVICE].access.cors_headers(request))
    response.headers["Server"] = "numbatch"


def _log_request(request: web.Request, status: int, seconds: float) -> None:
    """Method, known route, status, time, id and counts: never a path from outside, never text."""
    route = _route(request)
    level = logging.DEBUG if route in QUIET else logging.INFO
    if access_log.isEnabledFor(level):
        shown = "(unknown)" if route == "/{path}" else route
        note = request.get(NOTE, "")
        access_log.log(level, "%.8s %s %d %.1f ms id=%s%s", request.method, shown, status, seconds * 1e3, request[REQUEST_ID], note)
