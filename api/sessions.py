"""GET /v1/sessions, GET and DELETE /v1/sessions/{id}: what this API key's conversations keep on the server.

A session is what is remembered of /v1/chat/interactive (`api/session_history.py`), a lease on the K/V of the last turn
(`engine/cache/sessions.py`), or both. Names of leases begin with the caller's key, so nobody can name another's.
"""

from __future__ import annotations

import re
import time
from typing import Any

from aiohttp import web

from api.access import Caller
from api.errors import ApiError, json_response
from api.sampling import MAX_SESSION_ID
from api.service import CALLER, SERVICE, Service, lease_name, session_name

SESSION_ID = re.compile("[1-9][0-9]{0,18}")


async def list_sessions(request: web.Request) -> web.Response:
    """GET /v1/sessions"""
    service, caller = request.app[SERVICE], request[CALLER]
    leases = service.served(awake=False).engine.manager.leases
    prefix = lease_name(caller, "")
    ids = {int(name.removeprefix(prefix)) for name in leases.names() if name.startswith(prefix)} | set(service.sessions.ids(caller.key))
    found = [_described(service, caller, session_id) for session_id in sorted(ids)]
    return json_response({"object": "list", "data": [session for session in found if session is not None]})


async def get_session(request: web.Request) -> web.Response:
    """GET /v1/sessions/{id}"""
    service = request.app[SERVICE]
    session = _described(service, request[CALLER], _session_id(request))
    if session is None:
        raise _not_found()
    return json_response(session)


async def delete_session(request: web.Request) -> web.Response:
    """DELETE /v1/sessions/{id}: an answer that runs is cancelled; messages and K/V are forgotten."""
    service, caller, session_id = request.app[SERVICE], request[CALLER], _session_id(request)
    if _described(service, caller, session_id) is None:
        raise _not_found()
    for answer in service.running(session_name(session_id), caller):
        answer.cancel()
    service.end_session(caller, session_id)
    return json_response({"id": session_id, "object": "session", "deleted": True})


def _described(service: Service, caller: Caller, session_id: int) -> dict[str, Any] | None:
    """`leased_tokens`: of the history, those whose K/V is there now; `expires_in_s`: until it may be given up."""
    engine = service.served(awake=False).engine
    engine.manager.leases.expire(time.monotonic())
    lease = engine.manager.leases.get(lease_name(caller, session_id))
    history = service.sessions.get(caller.key, session_id)
    if lease is None and history is None:
        return None
    held = lease is not None and bool(lease.table)
    return {
        "id": session_id,
        "object": "session",
        "busy": bool(service.running(session_name(session_id), caller)),
        "history_tokens": history.num_tokens if history is not None else 0,
        "leased_tokens": lease.num_tokens if lease is not None else 0,
        "expires_in_s": round(lease.expires_s - time.monotonic(), 1) if lease is not None and held else None,
    }


def _session_id(request: web.Request) -> int:
    text = request.match_info["id"]
    if not SESSION_ID.fullmatch(text) or int(text) > MAX_SESSION_ID:
        raise _not_found()
    return int(text)


def _not_found() -> ApiError:
    return ApiError(404, "There is no such session of this API key.", param="id", code="session_not_found")
