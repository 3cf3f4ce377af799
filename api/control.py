"""What an operator asks of a running server: end an answer, forget the prefix cache, sleep and wake, say what it is.

Sleep: no new requests (503 until /wakeup), the running ones finish, then the prefix cache is dropped. The weights and the
pool's memory stay with the process: a server that gave them up would have to load again, which is what a restart does.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from api.access import Caller
from api.body import read_optional
from api.errors import ApiError, bad, json_response
from api.sampling import REQUEST_NAME
from api.schema import Field, Table, boolean, check_int, parse_object, pattern, table
from api.service import CALLER, SERVICE, Service, session_name
from config.schema import Request
from config.version import VERSION

LEVELS = "0 (refuse new requests) and 1 (drop the KV cache as well) are there; giving up the weights is what stopping the server does."


def abort_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    """One of the three."""
    return table([
        pattern("rid", REQUEST_NAME, "Which: the answer's id, its X-Request-Id, or the request_id (rid) that was sent."),
        pattern("request_id", REQUEST_NAME, "The same."),
        Field("session_id", "Which: the session whose answer runs.", {"type": "integer", "minimum": 1, "maximum": (1 << 63) - 1}, _session),
        boolean("abort_all", "All answers of this API key."),
    ])  # fmt: skip


async def abort_request(request: web.Request) -> web.Response:
    """POST /abort_request"""
    service = request.app[SERVICE]
    body = await read_optional(request, service.config.http, service.served().session_len)
    values = parse_object(service.tables(abort_fields), body)
    name = values["rid"] or values["request_id"] or (session_name(values["session_id"]) if values["session_id"] else "")
    if bool(name) == values["abort_all"]:
        raise bad("rid", "Give one of rid, request_id, session_id or abort_all.", "invalid_value")
    found = [a for a in service.live if a.key == request[CALLER].key] if values["abort_all"] else service.running(name, request[CALLER])
    for answer in found:
        answer.cancel()
    return json_response({"aborted": len(found)})


async def reset_prefix_cache(request: web.Request) -> web.Response:
    """POST /reset_prefix_cache: nothing is found in it any more; running answers keep what they use."""
    service = request.app[SERVICE]
    service.access.check_origin(request)
    served = service.served()
    served.engine.manager.reset_cache()
    return json_response({"success": True})


async def sleep(request: web.Request) -> web.Response:
    """POST /sleep?level=1: answers when nothing runs any more and the cache is empty."""
    service = request.app[SERVICE]
    service.access.check_origin(request)
    level = _level(request)
    served = service.served()
    service.sleeping = True
    await service.quiet.wait()
    await served.engine.idle()
    if level and service.sleeping:  # else somebody woke it up meanwhile
        served.engine.manager.reset_cache()
    return json_response({"is_sleeping": service.sleeping})


async def wakeup(request: web.Request) -> web.Response:
    """POST /wakeup"""
    service = request.app[SERVICE]
    service.access.check_origin(request)
    service.sleeping = False
    service.served()
    return json_response({"is_sleeping": False})


async def is_sleeping(request: web.Request) -> web.Response:
    """GET /is_sleeping"""
    return json_response({"is_sleeping": request.app[SERVICE].sleeping})


async def server_info(request: web.Request) -> web.Response:
    """GET /server_info: the model, its limits, and how full the server is."""
    return json_response(info(request.app[SERVICE], request[CALLER]))


def info(service: Service, caller: Caller) -> dict[str, Any]:
    served = service.served(awake=False)
    engine, config = served.engine, service.config
    seen = engine.snapshot()
    return {
        "version": VERSION,
        "model": served.name,
        "model_path": config.model.path.rstrip("/").rpartition("/")[2],  # where it lies on this machine is nobody's business
        "family": engine.spec.family,
        "device": engine.config.engine.device,
        "tp": config.engine.tp,
        "session_len": served.session_len,
        "vocab_size": served.vocab_size,
        "max_batch_size": engine.config.engine.max_batch_size,
        "max_prefill_token_num": engine.config.engine.max_prefill_token_num,
        "cache_block_seq_len": config.cache.cache_block_seq_len,
        "enable_prefix_caching": config.cache.enable_prefix_caching,
        "quant_policy": config.cache.quant_policy,
        "is_sleeping": service.sleeping,
        "num_running": seen.num_running,
        "num_waiting": seen.num_waiting,
        "kv_blocks": {"total": seen.num_blocks, "free": seen.free, "active": seen.active, "cached": seen.cached},
        "mine": sum(1 for answer in service.live if answer.key == caller.key),
    }


def _level(request: web.Request) -> int:
    for name in request.query:
        if name not in ("level", "mode"):
            raise bad(name[:64], f"There is no parameter {name[:64]!r} of /sleep.", "unknown_parameter")
    mode = request.query.get("mode", "wait")
    if mode not in ("wait", "abort"):
        raise bad("mode", "mode must be wait (running answers finish) or abort (they end now).", "invalid_value")
    text = request.query.get("level", "1")
    if text not in ("0", "1"):
        raise bad("level", f"level must be 0 or 1: {LEVELS}", "invalid_value")
    if mode == "abort":
        for answer in list(request.app[SERVICE].live):
            answer.cancel()
    return int(text)


def _session(name: str, value: Any) -> int:
    return check_int(name, value, 1, (1 << 63) - 1)


def refused(why: str, param: str | None) -> Any:
    """A handler of a route that other servers have and this one does not."""

    async def handler(request: web.Request) -> web.Response:
        raise ApiError(400, why, param=param, code="unsupported_endpoint")

    return handler


NO_ENDPOINT: dict[str, tuple[str, str]] = {
    "/v1/embeddings": ("Embeddings are not supported: this server serves generation models.", "input"),
    "/v1/rerank": ("Reranking is not supported: this server serves generation models.", "documents"),
    "/v1/score": ("Scoring pairs is not supported; /get_ppl scores texts.", "text_1"),
    "/v1/classify": ("Classification is not supported: this server serves generation models.", "input"),
    "/v1/moderations": ("Moderation is not supported: this server serves generation models.", "input"),
    "/v1/images/generations": ("Images are not supported: this server reads and writes text.", "prompt"),
    "/v1/images/edits": ("Images are not supported: this server reads and writes text.", "image"),
    "/v1/audio/speech": ("Audio is not supported: this server reads and writes text.", "input"),
    "/v1/audio/transcriptions": ("Audio is not supported: this server reads and writes text.", "file"),
    "/v1/audio/translations": ("Audio is not supported: this server reads and writes text.", "file"),
    "/v1/load_lora_adapter": ("LoRA adapters come in a later version.", "lora_name"),
    "/v1/unload_lora_adapter": ("LoRA adapters come in a later version.", "lora_name"),
    "/pooling": ("Pooling is not supported: this server serves generation models.", "input"),
}
