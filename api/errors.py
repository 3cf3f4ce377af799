"""Every refusal of the HTTP door: one exception, one renderer, one shape (OpenAI's).

`ApiError` carries status, message, `param` and `code`; `from_engine` maps what the engine raises. Messages never
hold prompt text, paths or addresses of objects. Nothing here knows a route.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web

from engine.errors import (
    BadParameter,
    ContextLengthExceeded,
    EngineDead,
    EngineDraining,
    EngineError,
    EngineNotReady,
    QueueFull,
)
from text.errors import TemplateArgument, TemplateBudget, TemplateRefused, TextError, Unencodable

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
NOT_READY_RETRY_S = 5


class ApiError(Exception):
    """A request that is answered with an error body; `headers` go out with it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        return TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


def bad(param: str | None, message: str, code: str | None = None) -> ApiError:
    """400 for one field of a request."""
    return ApiError(400, message, param=param, code=code)


def no_such_model(name: str, served: str) -> ApiError:
    return ApiError(404, f"There is no model {name[:64]!r}; this server has {served!r}.", param="model", code="model_not_found")


def retry_headers(seconds: float) -> dict[str, str]:
    """Retry-After, integer, stretched by up to a quarter at random so that refused clients do not return together."""
    return {"Retry-After": str(max(1, math.ceil(seconds * random.uniform(1.0, 1.25))))}


def from_engine(error: EngineError) -> ApiError:
    """The HTTP face of an engine error."""
    message = str(error)
    if isinstance(error, ContextLengthExceeded):
        return bad(error.param, message, "context_length_exceeded")
    if isinstance(error, BadParameter):
        return bad(error.param, message, "invalid_value")
    if isinstance(error, QueueFull):
        status, code = (429, "rate_limit_exceeded") if error.per_key else (503, "overloaded")
        return ApiError(status, message, code=code, headers=retry_headers(error.retry_after_s))
    if isinstance(error, EngineDraining):
        return ApiError(503, message, code="shutting_down", headers={"Connection": "close", **retry_headers(NOT_READY_RETRY_S)})
    if isinstance(error, EngineNotReady):
        return ApiError(503, message, code="not_ready", headers=retry_headers(NOT_READY_RETRY_S))
    if isinstance(error, EngineDead):
        return ApiError(503, message, code="engine_dead", headers={"Connection": "close"})
    return ApiError(500, "The engine could not answer this request.", code="internal_error")


def from_text(error: TextError, param: str) -> ApiError:
    """The HTTP face of what went wrong between strings and ids."""
    if isinstance(error, TemplateArgument):
        return bad("chat_template_kwargs", str(error), "invalid_value")
    if isinstance(error, TemplateRefused | TemplateBudget | Unencodable):
        return bad(param, str(error), "invalid_value")
    return ApiError(500, "The model's chat template failed; set model.chat_template.", code="chat_template_failed")


def anthropic_body(error: ApiError) -> dict[str, Any]:
    kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def body_for(route: str, error: ApiError) -> dict[str, Any]:
    """The error in the shape of the route's protocol: Anthropic's, KServe's, else OpenAI's."""
    if route.startswith("/v1/messages"):
        return anthropic_body(error)
    if route == "/v2" or route.startswith("/v2/"):
        return {"error": str(error)}
    return error.body()


def error_response(error: ApiError, route: str = "") -> web.Response:
    """The error as a response; `Connection: close` also ends the connection after it."""
    response = web.Response(status=error.status, body=orjson.dumps(body_for(route, error)), content_type="application/json")
    for name, value in error.headers.items():
        if name == "Connection":
            response.force_close()
        else:
            response.headers[name] = value
    return response


def json_response(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")
