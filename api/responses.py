"""/v1/responses: OpenAI's newer protocol. Create (at once or as named events), get, delete, cancel, list the input.

Answers are stored (`api/response_store.py`) unless store = false; previous_response_id goes on from one. A response that
failed or was cancelled is stored too, with that status.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import orjson
from aiohttp import web

from api.body import read_object
from api.chat import render_messages
from api.errors import ApiError, bad, json_response
from api.generate import Answer, Delta, TokenLogprob
from api.logprobs import entries
from api.respond import respond
from api.response_fields import LOGPROBS, SHARED, input_items, response_fields
from api.response_store import Stored
from api.sampling import Wanted, truncated
from api.schema import parse_object
from api.service import CALLER, REQUEST_ID, SERVICE, Served, Service
from api.sse import Framing, named_event

STATUS = {"stop": "completed", "length": "incomplete", "abort": "cancelled", "error": "failed"}
NOT_SAMPLING = ("model", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "metadata", "service_tier")
MAX_PAGE = 100


async def responses(request: web.Request) -> web.StreamResponse:
    """POST /v1/responses"""
    service = request.app[SERVICE]
    served, started_s = service.served(), time.monotonic()
    caller = request[CALLER]
    body = await read_object(request, service.config.http, served.session_len)
    values = parse_object(service.tables(response_fields), body)
    history = _history(service, values["previous_response_id"], caller.key)
    instructions = [{"role": "system", "content": values["instructions"]}] if values["instructions"] is not None else []
    wanted = _wanted(service, values)
    prompt = await render_messages(service, served, instructions + history + values["input"], param="input")
    prompt = truncated(prompt, wanted.values, served.session_len)
    frames = ResponseFrames(served, values, wanted)
    stored = Stored(caller.key, frames.response("in_progress"), input_items(values["input"], frames.id), history + values["input"])
    answer = service.submit(
        [prompt], wanted, caller, default_tokens=None, param="input", started_s=started_s, chat=True, names=(request[REQUEST_ID], frames.id)
    )
    if values["store"]:
        service.responses.put(frames.id, stored)
    try:
        return await respond(request, answer, frames, stream=wanted.stream)
    finally:
        _keep(service, frames, stored, answer, values["store"])


def _history(service: Service, name: str | None, key: str) -> list[dict[str, str]]:
    if name is None:
        return []
    found = service.responses.get(name, key)
    if found is None:
        message = f"There is no response {name!r} (any more); answers are kept in memory, the oldest go first."
        raise ApiError(404, message, param="previous_response_id", code="previous_response_not_found")
    if found.response["status"] == "in_progress":
        raise bad("previous_response_id", f"Response {name!r} is not finished.", "invalid_value")
    return found.messages


def _wanted(service: Service, values: dict[str, Any]) -> Wanted:
    chosen = {name: values[name] for name in SHARED if name not in NOT_SAMPLING}
    wants = LOGPROBS in values["include"]
    if values["top_logprobs"] and not wants:
        raise bad("top_logprobs", f"top_logprobs needs include = [{LOGPROBS!r}].", "invalid_value")
    return service.wanted(**chosen, max_tokens=values["max_output_tokens"], logprobs=values["top_logprobs"] if wants else -1)


def _keep(service: Service, frames: ResponseFrames, stored: Stored, answer: Answer, store: bool) -> None:
    """What is stored in the end, also of an answer that its client did not wait for."""
    if store and service.responses.get(frames.id, stored.key) is not None:
        status = STATUS.get(answer.choices[0].finish_reason, "cancelled")
        stored.response = frames.response(status, answer)
        stored.messages = [*stored.messages, {"role": "assistant", "content": frames.text}]
        service.responses.put(frames.id, stored)


class ResponseFrames(Framing):
    """One response as an object, and as the events that build it up."""

    done = b""

    def __init__(self, served: Served, values: dict[str, Any], wanted: Wanted) -> None:
        self.id = f"resp_{secrets.token_hex(16)}"
        self._item = f"msg_{secrets.token_hex(16)}"
        self._tokenizer = served.tokenizer
        self._model = served.name
        self._values = values
        self._want_logprobs = wanted.logprobs >= 0
        self._created = int(time.time())
        self._texts: list[str] = []
        self._notes: list[TokenLogprob] = []
        self._sequence = 0
        place = {"type": "response.output_text.delta", "item_id": self._item, "output_index": 0, "content_index": 0}
        self._delta = b"event: response.output_text.delta\ndata: " + orjson.dumps(place)[:-1]

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def opening(self) -> bytes:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return (
            self._event("response.created", response=self.response("in_progress"))
            + self._event("response.in_progress", response=self.response("in_progress"))
            + self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
            + self._event("response.content_part.added", item_id=self._item, output_index=0, content_index=0, part=part)
        )

    def delta(self, delta: Delta) -> bytes:
        if not delta.text and not delta.logprobs:
            return b""
        self._take(delta)
        logprobs = orjson.dumps(_without_bytes(self._entries(delta.logprobs))) if delta.logprobs else b"[]"
        number = self._number()
        return b'%b,"delta":%b,"logprobs":%b,"sequence_number":%d}\n\n' % (self._delta, orjson.dumps(delta.text), logprobs, number)

    def closing(self, answer: Answer) -> bytes:
        status = STATUS[answer.choices[0].finish_reason]
        part, place = self._part(), {"output_index": 0, "content_index": 0, "item_id": self._item}
        logprobs = _without_bytes(part["logprobs"])
        last = {"completed": "response.completed", "incomplete": "response.incomplete"}.get(status, "response.failed")
        return (
            self._event("response.output_text.done", **place, text=part["text"], logprobs=logprobs)
            + self._event("response.content_part.done", **place, part=part)
            + self._event("response.output_item.done", output_index=0, item=self._message(status, [part]))
            + self._event(last, response=self.response(status, answer))
        )

    def failed(self, error: ApiError) -> bytes:
        response = {**self.response("failed", self._answer), "error": {"code": "server_error", "message": str(error)}}
        return self._event("response.failed", response=response)

    async def fold(self, answer: Answer) -> dict[str, Any]:
        async for batch in answer.deltas():
            for delta in batch:
                self._take(delta)
        return self.response(STATUS[answer.choices[0].finish_reason], answer)

    def response(self, status: str, answer: Answer | None = None) -> dict[str, Any]:
        """The whole object; `answer` once there is one to show."""
        values = self._values
        done = answer is not None and status != "in_progress"
        why = {"reason": "max_output_tokens"} if status == "incomplete" else None
        failure = {"code": "server_error", "message": "The answer could not be completed."} if status == "failed" else None
        echoed = ("instructions", "max_output_tokens", "previous_response_id", "prompt_cache_key", "safety_identifier", "user", "store")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": failure,
            "incomplete_details": why,
            **{name: values[name] for name in echoed},
            "max_tool_calls": None,
            "metadata": values["metadata"] or {},
            "model": self._model,
            "output": [self._message(status, [self._part()])] if done else [],
            "parallel_tool_calls": True,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "temperature": values["temperature"],
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": values["top_logprobs"],
            "top_p": values["top_p"],
            "truncation": values["truncation"],
            "usage": _usage(answer) if answer is not None and done else None,
        }

    def _take(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self._notes += delta.logprobs

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self._entries(self._notes)}

    def _entries(self, notes: Any) -> list[dict[str, Any]]:
        return entries(notes, self._tokenizer) if self._want_logprobs else []

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        status = status if status in ("in_progress", "completed") else "incomplete"
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _number(self) -> int:
        self._sequence += 1
        return self._sequence - 1

    def _event(self, name: str, **fields: Any) -> bytes:
        return named_event(name, {"type": name, "sequence_number": self._number(), **fields})


def _without_bytes(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the events have them, other than the parts."""

    def bare(item: dict[str, Any]) -> dict[str, Any]:
        return {"token": item["token"], "logprob": item["logprob"]}

    return [{**bare(item), "top_logprobs": [bare(other) for other in item["top_logprobs"]]} for item in found]


def _usage(answer: Answer) -> dict[str, Any]:
    usage = answer.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


# -- what is stored ----------------------------------------------------------------------------------------


async def get_response(request: web.Request) -> web.Response:
    """GET /v1/responses/{id}"""
    _check_query(request, ())
    return json_response(_stored(request).response)


async def delete_response(request: web.Request) -> web.Response:
    """DELETE /v1/responses/{id}"""
    _stored(request)
    name = request.match_info["id"]
    request.app[SERVICE].responses.delete(name, request[CALLER].key)
    return json_response({"id": name, "object": "response", "deleted": True})


async def cancel_response(request: web.Request) -> web.Response:
    """POST /v1/responses/{id}/cancel: of one that is being streamed."""
    service, name = request.app[SERVICE], request.match_info["id"]
    running = service.running(name, request[CALLER])
    stored = service.responses.get(name, request[CALLER].key)
    if not running:
        _stored(request)
        raise bad("id", "This response is not running any more; there is nothing to cancel.", "invalid_value")
    for answer in running:
        answer.cancel()
    if stored is None:
        return json_response({"id": name, "object": "response", "status": "cancelled"})
    return json_response({**stored.response, "status": "cancelled"})


async def list_input_items(request: web.Request) -> web.Response:
    """GET /v1/responses/{id}/input_items"""
    _check_query(request, ("limit", "order", "after"))
    items = _stored(request).input_items
    order, limit = request.query.get("order", "desc"), request.query.get("limit", "20")
    if order not in ("asc", "desc"):
        raise bad("order", "order must be asc or desc.", "invalid_value")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_PAGE):
        raise bad("limit", f"limit must be between 1 and {MAX_PAGE}.", "invalid_value")
    listed = items if order == "asc" else items[::-1]
    after = request.query.get("after")
    if after is not None:
        at = next((i for i, item in enumerate(listed) if item["id"] == after), None)
        if at is None:
            raise bad("after", "after names no item of this response.", "invalid_value")
        listed = listed[at + 1 :]
    page = listed[: int(limit)]
    first, last = (page[0]["id"], page[-1]["id"]) if page else ("", "")
    return json_response({"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": len(listed) > len(page)})


def _stored(request: web.Request) -> Stored:
    name = request.match_info["id"]
    found = request.app[SERVICE].responses.get(name, request[CALLER].key)
    if found is None:
        raise ApiError(404, "There is no such response (any more).", param="id", code="not_found")
    return found


def _check_query(request: web.Request, known: tuple[str, ...]) -> None:
    for name in request.query:
        if name not in known:
            raise bad(name[:64], f"The parameter {name[:64]!r} is not supported here.", "unsupported_parameter")
