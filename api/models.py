"""GET /v1/models, GET /v1/models/{model} and GET /version: what is served here; to Anthropic's clients in their shape."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from api.errors import json_response, no_such_model
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


def anthropic_card(service: Service) -> dict[str, Any]:
    served = service.described
    created = datetime.fromtimestamp(served.created if served else 0, UTC)
    most = served.session_len if served else None
    name = service.model_name
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created.isoformat(),
        "lifecycle": "active",
        "max_input_tokens": most and most - 1,
        "max_tokens": most and most - 1,
    }


def _is_anthropic(request: web.Request) -> bool:
    return "anthropic-version" in request.headers


async def models(request: web.Request) -> web.Response:
    """GET /v1/models"""
    service = request.app[SERVICE]
    if _is_anthropic(request):
        name = service.model_name
        return json_response({"data": [anthropic_card(service)], "has_more": False, "first_id": name, "last_id": name})
    return json_response({"object": "list", "data": [card(service)]})


async def model(request: web.Request) -> web.Response:
    """GET /v1/models/{model}"""
    service = request.app[SERVICE]
    if request.match_info["model"] != service.model_name:
        raise no_such_model(request.match_info["model"], service.model_name)
    return json_response(anthropic_card(service) if _is_anthropic(request) else card(service))


async def version(request: web.Request) -> web.Response:
    """GET /version"""
    return json_response({"version": VERSION})
