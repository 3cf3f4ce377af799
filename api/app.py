"""The HTTP application: every route in one function, one guard around all of them, one renderer for errors.

Order for each request: request id, HTTP version and target form, Host, CORS preflight, API key (on the resolved
route, deny by default), handler. Whatever a handler raises becomes an OpenAI error body with the request id; a
client that leaves cancels its handler.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import time
import traceback
from collections.abc import Awaitable, Callable

import orjson
from aiohttp import web

from api import kserve, native
from api.access import request_id
from api.chat import chat_completions
from api.completions import completions
from api.control import NO_ENDPOINT, abort_request, is_sleeping, refused, reset_prefix_cache, server_info, sleep, wakeup
from api.errors import ApiError, error_response, from_engine
from api.health import live, ready
from api.interactive import interactive
from api.log import FIELDS, noted
from api.messages import count_tokens, messages
from api.metrics import metrics
from api.models import model, models, version
from api.openapi import docs, openapi
from api.responses import cancel_response, delete_response, get_response, list_input_items, responses
from api.service import CALLER, NOTE, REQUEST_ID, SERVICE, Service
from api.sessions import delete_session, get_session, list_sessions
from api.status import status_json, status_page
from api.tokenize import detokenize, tokenize
from engine.errors import EngineError

log = logging.getLogger("numbatch.http")
access_log = logging.getLogger("numbatch.access")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
QUIET = frozenset({  # asked again and again: logged at DEBUG only
    "/health", "/health/live", "/health/ready", "/metrics", "/status.json", "/v2/health/live", "/v2/health/ready",
})  # fmt: skip
CLIENT_GONE = 499


def make_app(service: Service) -> web.Application:
    app = web.Application(middlewares=[guard])
    app[SERVICE] = service
    app.on_response_prepare.append(_add_headers)
    add_routes(app.router)
    return app


def add_routes(router: web.UrlDispatcher) -> None:
    """The whole surface; the last route answers 404 or 405 for everything else."""
    for path, handler in GET.items():
        router.add_get(path, handler, expect_handler=on_expect)
    for path, handler in POST.items():
        router.add_post(path, handler, expect_handler=on_expect)
    for path, (why, param) in NO_ENDPOINT.items():
        router.add_post(path, refused(why, param), expect_handler=on_expect)
    router.add_delete("/v1/responses/{id}", delete_response, expect_handler=on_expect)
    router.add_delete("/v1/sessions/{id}", delete_session, expect_handler=on_expect)
    router.add_route("*", "/{path:.*}", nowhere, expect_handler=on_expect)


GET: dict[str, Handler] = {
    "/health": ready,
    "/health/ready": ready,
    "/health/live": live,
    "/metrics": metrics,
    "/version": version,
    "/server_info": server_info,
    "/is_sleeping": is_sleeping,
    "/openapi.json": openapi,
    "/docs": docs,
    "/": status_page,
    "/status.json": status_json,
    "/v1/models": models,
    "/v1/models/{model:.+}": model,
    "/v1/responses/{id}": get_response,
    "/v1/responses/{id}/input_items": list_input_items,
    "/v1/sessions": list_sessions,
    "/v1/sessions/{id}": get_session,
    "/v2": kserve.server_metadata,
    "/v2/health/live": kserve.server_live,
    "/v2/health/ready": kserve.server_ready,
    "/v2/models/{model}": kserve.model_metadata,
    "/v2/models/{model}/ready": kserve.model_ready,
    "/v2/models/{model}/config": kserve.model_config,
    "/v2/models/{model}/versions/{version}": kserve.model_metadata,
    "/v2/models/{model}/versions/{version}/ready": kserve.model_ready,
    "/v2/models/{model}/versions/{version}/config": kserve.model_config,
}
POST: dict[str, Handler] = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/responses": responses,
    "/v1/responses/{id}/cancel": cancel_response,
    "/v1/messages": messages,
    "/v1/messages/count_tokens": count_tokens,
    "/v1/chat/interactive": interactive,
    "/v1/chat/completions_qos": chat_completions,  # LMDeploy 0.4's names, for requests with user_id
    "/v1/completions_qos": completions,
    "/v1/chat/interactive_qos": interactive,
    "/generate": native.generate,
    "/get_ppl": native.get_ppl,
    "/v1/encode": native.encode,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
    "/abort_request": abort_request,
    "/reset_prefix_cache": reset_prefix_cache,
    "/sleep": sleep,
    "/wakeup": wakeup,
    "/v2/repository/index": kserve.repository_index,
    "/v2/models/{model}/infer": kserve.infer,
    "/v2/models/{model}/generate": kserve.generate,
    "/v2/models/{model}/generate_stream": kserve.generate_stream,
    "/v2/models/{model}/versions/{version}/infer": kserve.infer,
    "/v2/models/{model}/versions/{version}/generate": kserve.generate,
    "/v2/models/{model}/versions/{version}/generate_stream": kserve.generate_stream,
}


async def nowhere(request: web.Request) -> web.StreamResponse:
    """404, or 405 when the path exists with other methods."""
    allowed: set[str] = set()
    for resource in request.app.router.resources():
        if resource.canonical != "/{path}":
            allowed |= (await resource.resolve(request))[1]
    if allowed:
        names = ", ".join(sorted(allowed))
        raise ApiError(405, f"This path answers {names} only.", code="method_not_allowed", headers={"Allow": names})
    known = [*GET, *POST]
    near = [path for path in known if path == f"/v1{request.path}"] or difflib.get_close_matches(request.path[:100], known, 1, 0.8)
    hint = f"did you mean {near[0]}? All paths are in /docs." if near else "see /docs."
    raise ApiError(404, f"There is no such path; {hint}", code="not_found")


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    started_s = time.monotonic()
    request[REQUEST_ID] = request_id(request)
    tracing = request.app[SERVICE].tracing
    if tracing is not None:
        tracing.begin()
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
        response = error_response(_as_api_error(request, error), _protocol(request))
        status = response.status
        return response
    finally:
        _log_request(request, status, time.monotonic() - started_s)
        route = _shown(request)
        if tracing is not None and route not in QUIET:
            tracing.record(request, route, status, started_s, request[REQUEST_ID])


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


def _protocol(request: web.Request) -> str:
    """The route, or where there is none the path that was asked for: whose shape an error takes."""
    route = _route(request)
    return request.path if route in ("", "/{path}") else route


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else ""


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    identity = request.get(REQUEST_ID)
    if identity:
        response.headers["X-Request-Id"] = identity
        if _route(request).startswith("/v1/messages"):
            response.headers["Request-Id"] = identity  # Anthropic's name
        response.headers.update(request.app[SERVICE].access.cors_headers(request))
    response.headers["Server"] = "numbatch"


def _log_request(request: web.Request, status: int, seconds: float) -> None:
    """Method, known route, status, time, id and counts: never a path from outside, never text."""
    shown = _shown(request)
    level = logging.DEBUG if shown in QUIET else logging.INFO
    if access_log.isEnabledFor(level):
        note, ms, method = request.get(NOTE, ""), seconds * 1e3, request.method[:8]
        fields = {"method": method, "route": shown, "status": status, "ms": round(ms, 1), "id": request[REQUEST_ID], **noted(note)}
        access_log.log(level, "%s %s %d %.1f ms id=%s%s", method, shown, status, ms, request[REQUEST_ID], note, extra={FIELDS: fields})


def _shown(request: web.Request) -> str:
    """The route as it is written down."""
    route = _route(request)
    return "(unknown)" if route == "/{path}" else route
