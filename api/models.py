"""GET /v1/models, GET /v1/models/{model} and GET /version: what is served here."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from api.errors import ApiError, json_response
from api.service import SERVICE, Service
from config.version import VERSION


def card(service: Service) -> dict[str, Any]:
    served = service.described
    return {
        "id": service.model_name,
        "object": "model",
        "created": served.created if served else 0,
        "owned_by": "numbatch",
        "root": service.model_name,
        "parent": None,
        "max_model_len": served.session_len if served else None,
    }


async def models(request: web.Request) -> web.Response:
    """GET /v1/models"""
    return json_response({"object": "list", "data": [card(request.app[SERVICE])]})


async def model(request: web.Request) -> web.Response:
    """GET /v1/models/{model}"""
    service = request.app[SERVICE]
    if request.match_info["model"] != service.model_name:
        raise ApiError(404, f"There is no such model; this server has {service.model_name!r}.", param="model", code="model_not_found")
    return json_response(card(service))


async def version(request: web.Request) -> web.Response:
    """GET /version"""
    return json_response({"version": VERSION})
