"""POST /v1/messages and POST /v1/messages/count_tokens: Anthropic's protocol over the same engine.

Errors have Anthropic's shape (`api/errors.py`), the stream its named events. A last message of the assistant is gone on
with, as Anthropic does. What is not text is refused by name.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from typing import Any

import orjson
from aiohttp import web

from api.body import read_object
from api.chat import render_messages
from api.errors import ApiError, anthropic_body, bad, json_response
from api.generate import Answer, Choice, Delta
from api.respond import respond
from api.sampling import Wanted, model_field, shared_fields
from api.schema import Field, Table, check_list, check_str, choice, integer, number, parse_object, table, unsupported, wrong_type
from api.service import CALLER, REQUEST_ID, SERVICE, Served, Service
from api.sse import Framing, named_event
from api.text_parts import NO_TOOLS, Parts, role_of
from config.schema import Request

ROLES = ("user", "assistant")
BLOCKS = Parts(extras=("cache_control", "citations"), noun="block", may_be_empty=True)


def message_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    """The body of /v1/messages."""
    known = table(shared_fields(limits, model, session_len, vocab_size))
    stop = known["stop"]
    strings = {"type": "array", "items": stop.schema["anyOf"][0], "maxItems": limits.max_stop_strings}
    return table([
        *_counted_fields(limits, model),
        replace(integer("max_tokens", 1, session_len - 1, "Most tokens to generate."), required=True),
        number("temperature", 0, 1, "0 is greedy.", 1.0),
        number("top_p", 0, 1, "Keep the most likely ids whose probabilities sum to this.", 1.0),
        integer("top_k", 0, (1 << 31) - 1, "Keep this many most likely ids; 0 switches it off.", 0),
        Field("stop_sequences", stop.doc, strings, _strings(stop), ()),
        known["stream"],
        known["seed"],
        _metadata(),
        choice("service_tier", ("auto", "standard_only"), "Accepted; there is one tier."),
        unsupported("output_config", "structured output comes in a later version."),
        unsupported("container", "there is no code execution."),
        unsupported("mcp_servers", NO_TOOLS),
        unsupported("context_management", "send the messages that shall count."),
        unsupported("inference_geo", "this server is where it is."),
        unsupported("speed", "there is one speed.", ("standard",), {"type": "string", "const": "standard"}),
    ])  # fmt: skip


def count_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    """The body of /v1/messages/count_tokens."""
    return table(_counted_fields(limits, model))


def _counted_fields(limits: Request, model: str) -> list[Field]:
    return [
        model_field(model),
        _messages(limits.max_messages),
        Field("system", "What the assistant is to know or to be.", BLOCKS.schema(), BLOCKS.read),
        unsupported("tools", NO_TOOLS, ([],), {"type": "array", "maxItems": 0}),
        unsupported("tool_choice", NO_TOOLS, ({"type": "none"}, {"type": "auto"}), _one_of_types("none", "auto")),
        unsupported("thinking", "set it with the model's chat template.", ({"type": "disabled"},), _one_of_types("disabled")),
        Field("cache_control", "Accepted; cached prefixes are found by themselves.", {"type": "object"}, _object),
    ]


async def messages(request: web.Request) -> web.StreamResponse:
    """POST /v1/messages"""
    service = request.app[SERVICE]
    served, started_s = service.served(), time.monotonic()
    body = await read_object(request, service.config.http, served.session_len)
    values = parse_object(service.tables(message_fields), body)
    prompt = await _render(service, served, values)
    fields = {name: values[name] for name in ("max_tokens", "temperature", "top_p", "top_k", "stream", "seed")}
    wanted = service.wanted(**fields, stop=values["stop_sequences"], user_id=(values["metadata"] or {}).get("user_id") or "")
    frames = MessageFrames(served, wanted)
    answer = service.submit(
        [prompt], wanted, request[CALLER], default_tokens=None, param="messages", started_s=started_s, chat=True,
        names=(request[REQUEST_ID], frames.id),
    )  # fmt: skip
    return await respond(request, answer, frames, stream=wanted.stream)


async def count_tokens(request: web.Request) -> web.Response:
    """POST /v1/messages/count_tokens"""
    service = request.app[SERVICE]
    served = service.served()
    body = await read_object(request, service.config.http, served.session_len)
    prompt = await _render(service, served, parse_object(service.tables(count_fields), body))
    return json_response({"input_tokens": len(prompt)})


async def _render(service: Service, served: Served, values: dict[str, Any]) -> list[int]:
    system = [{"role": "system", "content": values["system"]}] if values["system"] else []
    goes_on = values["messages"][-1]["role"] == "assistant"
    return await render_messages(
        service, served, system + values["messages"], add_generation_prompt=not goes_on, continue_final_message=goes_on
    )


class MessageFrames(Framing):
    """Anthropic's events, and the whole message."""

    done = b""

    def __init__(self, served: Served, wanted: Wanted) -> None:
        self.id = f"msg_{secrets.token_hex(12)}"
        self._model = served.name
        self._stop = wanted.stop

    def opening(self) -> bytes:
        assert self._answer is not None
        start = {**self._message([], None, None), "usage": {**_usage(self._answer), "output_tokens": 0}}
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        return named_event("message_start", {"type": "message_start", "message": start}) + named_event("content_block_start", block)

    def delta(self, delta: Delta) -> bytes:
        if not delta.text:
            return b""
        head = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":'
        return head + orjson.dumps(delta.text) + b"}}\n\n"

    def closing(self, answer: Answer) -> bytes:
        reason, sequence = self._stopped(answer.choices[0])
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return (
            named_event("content_block_stop", {"type": "content_block_stop", "index": 0})
            + named_event("message_delta", {"type": "message_delta", "delta": delta, "usage": _usage(answer)})
            + named_event("message_stop", {"type": "message_stop"})
        )

    def failed(self, error: ApiError) -> bytes:
        return named_event("error", anthropic_body(error))

    async def fold(self, answer: Answer) -> dict[str, Any]:
        texts = [delta.text async for batch in answer.deltas() for delta in batch]
        content = [{"type": "text", "text": "".join(texts)}]
        return {**self._message(content, *self._stopped(answer.choices[0])), "usage": _usage(answer)}

    def _message(self, content: list[dict[str, Any]], reason: str | None, sequence: str | None) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self._model}
        return {**head, "content": content, "stop_reason": reason, "stop_sequence": sequence}

    def _stopped(self, choice: Choice) -> tuple[str, str | None]:
        if choice.finish_reason == "length":
            return "max_tokens", None
        matched = choice.matched_stop
        return ("stop_sequence", matched) if matched in self._stop else ("end_turn", None)


def _usage(answer: Answer) -> dict[str, int]:
    """Anthropic counts what was read from the cache apart."""
    usage = answer.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


# -- fields with a shape of their own ----------------------------------------------------------------------


def _strings(stop: Field) -> Any:
    def parse(name: str, value: Any) -> Any:
        if type(value) is not list:
            raise wrong_type(name, "an array of strings", value)
        return stop.parse(name, value)

    return parse


def _messages(most: int) -> Field:
    def parse(name: str, value: Any) -> list[dict[str, str]]:
        given = check_list(name, value, most)
        if not given:
            raise bad(name, "messages is empty; send at least one message.", "invalid_value")
        return [_message(f"{name}[{i}]", message) for i, message in enumerate(given)]

    properties = {"role": {"type": "string", "enum": list(ROLES)}, "content": BLOCKS.schema()}
    message = {"type": "object", "properties": properties, "required": ["role", "content"], "additionalProperties": False}
    schema = {"type": "array", "items": message, "minItems": 1, "maxItems": most}
    return Field("messages", "The conversation so far.", schema, parse, required=True)


def _message(where: str, message: Any) -> dict[str, str]:
    if type(message) is not dict:
        raise wrong_type(where, "an object", message)
    for key in message:
        if key not in ("role", "content"):
            raise bad(f"{where}.{key[:64]}", f"There is no field {key[:64]!r} in a message.", "unknown_parameter")
    role = role_of(where, message, ROLES, hint=" The system's text goes into 'system'.")
    return {"role": role, "content": BLOCKS.read(f"{where}.content", message.get("content"))}


def _metadata() -> Field:
    def parse(name: str, value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise wrong_type(name, "an object", value)
        for key, item in value.items():
            if key != "user_id":
                raise bad(f"{name}.{key[:64]}", f"There is no field {key[:64]!r} in metadata.", "unknown_parameter")
            if item is not None:
                check_str(f"{name}.user_id", item, 512)
        return value

    properties = {"user_id": {"type": ["string", "null"], "maxLength": 512}}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return Field("metadata", "`user_id`: whose request it is, for QoS.", schema, parse)


def _object(name: str, value: Any) -> None:
    if type(value) is not dict:
        raise wrong_type(name, "an object", value)


def _one_of_types(*names: str) -> dict[str, Any]:
    properties = {"type": {"type": "string", "enum": list(names)}}
    return {"type": "object", "properties": properties, "required": ["type"], "additionalProperties": False}
