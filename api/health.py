"""Three separate answers: is the process alive, can it take a request, does the engine make progress.

/health and /health/ready: 200 once a first token can be served; 503 with the reason before, while draining, when the
engine is dead, and when a running engine has brought no result for half of engine.step_timeout_s.
/health/live: 200 until the engine is dead. None needs an API key.
"""

from __future__ import annotations

import time

from aiohttp import web

from api.errors import json_response
from api.service import SERVICE, Service
from engine.loop import EngineStatus


def verdict(service: Service) -> tuple[str, str]:
    """(status, reason); status "ready" is the only healthy one."""
    engine = service.engine
    if engine is not None and engine.status is EngineStatus.DEAD:
        return "dead", "the engine stopped"
    if service.draining or (engine is not None and engine.status is EngineStatus.DRAINING):
        return "draining", "shutting down"
    if engine is None or service.described is None or engine.status is EngineStatus.STARTING:
        return "starting", (engine.reason if engine is not None else "") or service.reason
    if service.sleeping:
        return "sleeping", "asleep until POST /wakeup"
    snapshot = engine.snapshot()
    silent_s = time.monotonic() - snapshot.last_progress_s
    if snapshot.num_running and silent_s > service.config.engine.step_timeout_s / 2:
        return "stalled", f"no step has ended for {silent_s:.0f} s"
    return "ready", ""


async def ready(request: web.Request) -> web.Response:
    """GET /health and /health/ready"""
    status, reason = verdict(request.app[SERVICE])
    return _answer(status, reason, status == "ready")


async def live(request: web.Request) -> web.Response:
    """GET /health/live"""
    status, reason = verdict(request.app[SERVICE])
    return _answer(status, reason, status != "dead")


def _answer(status: str, reason: str, good: bool) -> web.Response:
    response = json_response({"status": status, "reason": reason}, 200 if good else 503)
    response.headers["Cache-Control"] = "no-store"
    return response
