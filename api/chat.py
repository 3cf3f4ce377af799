"""POST /v1/chat/completions: messages in, one or more assistant messages out, at once or as chunks.

Control tokens come from the chat template only: message text is always encoded as plain text.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web

from api.body import read_object
from api.errors import ApiError, bad, from_text, json_response
from api.generate import Answer, Delta, TokenLogprob
from api.sampling import Wanted, read, shared_fields
from api.schema import Field, Table, boolean, check_list, integer, kind, parse_object, table, unsupported, wrong_type
from api.service import CALLER, NOTE, SERVICE, Served, Service
from api.sse import event, joined, stream_answer
from config.schema import Request
from text.errors import TextError
from text.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant")
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "documents", "chat_template"})
MAX_TEMPLATE_VALUES = 16
MAX_TEMPLATE_CHARS = 1024
NO_TOOLS = "tool calls come in a later version."


def chat_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    """The whole body of a chat request."""
    most = session_len - 1
    return table([
        _messages(limits.max_messages),
        *shared_fields(limits, model, session_len, vocab_size),
        integer("max_completion_tokens", 1, most, "The newer name of max_tokens. Default: the rest of the context."),
        boolean("logprobs", "Give the logprob of each token."),
        integer("top_logprobs", 0, limits.max_top_logprobs, "Likeliest tokens at each position; needs logprobs = true."),
        _template_values(),
        unsupported("response_format", "only {\"type\": \"text\"} is.", ({"type": "text"},), _one_object("type", "text")),
        unsupported("tools", NO_TOOLS, ([],), {"type": "array", "maxItems": 0}),
        unsupported("tool_choice", NO_TOOLS, ("none", "auto"), {"type": "string", "enum": ["none", "auto"]}),
        unsupported("parallel_tool_calls", NO_TOOLS, (True, False), {"type": "boolean"}),
        unsupported("functions", NO_TOOLS, ([],), {"type": "array", "maxItems": 0}),
        unsupported("function_call", NO_TOOLS, ("none", "auto"), {"type": "string", "enum": ["none", "auto"]}),
        unsupported("modalities", "answers are text.", (["text"],), _one_text()),
        unsupported("audio", "answers are text."),
        unsupported("prediction", "there is no speculative decoding."),
        unsupported("reasoning_effort", "set it with chat_template_kwargs if the model's template knows it."),
        unsupported("verbosity", "ask for it in the messages."),
        unsupported("web_search_options", "this server makes no connections."),
        unsupported("session_id", "send the whole conversation; cached prefixes are reused by themselves."),
    ])  # fmt: skip


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions"""
    service = request.app[SERVICE]
    served, started_s = service.served(), time.monotonic()
    body = await read_object(request, service.config.http, served.session_len)
    values = parse_object(service.tables(chat_fields), body)
    wanted = read(_one_limit(values), _logprobs(values))
    prompt = await render_messages(service, served, values["messages"], values["chat_template_kwargs"])
    answer = service.submit([prompt], wanted, request[CALLER], default_tokens=None, param="messages", started_s=started_s)
    frames = ChatFrames(served, wanted)
    try:
        if wanted.stream:
            return await stream_answer(request, answer, frames, service.config.http)
        return json_response(await frames.fold(answer))
    finally:
        request[NOTE] = service.finished(answer)


class ChatFrames:
    """Chat's two folds: chunks with everything but the text rendered once, and the whole answer."""

    def __init__(self, served: Served, wanted: Wanted) -> None:
        self._tokenizer = served.tokenizer
        self._include_usage = wanted.include_usage
        self._want_logprobs = wanted.logprobs >= 0
        self._n = n = wanted.n
        self._base = {
            "id": f"chatcmpl-{secrets.token_hex(16)}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }
        opening = b"data: " + orjson.dumps(self._base)[:-1] + b',"choices":[{"index":'
        self._text = [opening + b'%d,"delta":{"content":' % i for i in range(n)]
        self._empty = [opening + b'%d,"delta":{' % i for i in range(n)]
        self._end = b'}],"usage":null}\n\n' if wanted.include_usage else b"}]}\n\n"
        self._plain = b'},"logprobs":null,"finish_reason":null' + self._end

    def opening(self) -> bytes:
        role = b'"role":"assistant","content":"","refusal":null'
        return b"".join(start + role + self._plain for start in self._empty)

    def delta(self, delta: Delta) -> bytes:
        if delta.finish_reason is None and not delta.logprobs:  # the hot path
            return self._text[delta.index] + orjson.dumps(delta.text) + self._plain
        out = b""
        if delta.text or delta.logprobs:
            logprobs = orjson.dumps(_logprobs_json(delta.logprobs, self._tokenizer))
            out = self._text[delta.index] + orjson.dumps(delta.text) + b'},"logprobs":' + logprobs
            out += b',"finish_reason":null' + self._end
        if delta.finish_reason is not None:
            reason = orjson.dumps(delta.finish_reason)
            out += self._empty[delta.index] + b'},"logprobs":null,"finish_reason":' + reason + self._end
        return out

    def closing(self, answer: Answer) -> bytes:
        if not self._include_usage:
            return b""
        return event({**self._base, "choices": [], "usage": answer.usage.as_json()})

    async def fold(self, answer: Answer) -> dict[str, Any]:
        """The answer as one object."""
        texts: list[list[str]] = [[] for _ in range(self._n)]
        notes: list[list[bytes]] = [[] for _ in range(self._n)]
        async for batch in answer.deltas():
            for delta in batch:
                texts[delta.index].append(delta.text)
                if delta.logprobs:  # rendered as they come: a long answer must not stop the loop at its end
                    notes[delta.index].append(orjson.dumps(_entries(delta.logprobs, self._tokenizer))[1:-1])
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": "".join(texts[i]), "refusal": None},
                "logprobs": {"content": joined(notes[i]), "refusal": None} if self._want_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for i, choice in enumerate(answer.choices)
        ]
        return {**self._base, "object": "chat.completion", "choices": choices, "usage": answer.usage.as_json()}


def _logprobs_json(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any] | None:
    return {"content": _entries(logprobs, tokenizer), "refusal": None} if logprobs else None


def _entries(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    entries = []
    for item in logprobs:
        top = [_token_json(tokenizer, token, logprob) for token, logprob in item.top]
        entries.append({**_token_json(tokenizer, item.token_id, item.logprob), "top_logprobs": top})
    return entries


def _token_json(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": tokenizer.token_text(token_id), "logprob": logprob, "bytes": list(data)}


def _logprobs(values: dict[str, Any]) -> int:
    top = values["top_logprobs"]
    if top is not None and not values["logprobs"]:
        raise bad("top_logprobs", "top_logprobs needs logprobs = true.", "invalid_value")
    return (top or 0) if values["logprobs"] else -1


def _one_limit(values: dict[str, Any]) -> dict[str, Any]:
    old, new = values["max_tokens"], values["max_completion_tokens"]
    if old is not None and new is not None and old != new:
        raise bad("max_tokens", "max_tokens and max_completion_tokens differ; give one of them.", "invalid_value")
    return {**values, "max_tokens": new if old is None else old}


async def render_messages(
    service: Service, served: Served, messages: list[dict[str, str]], values: dict[str, Any] | None, *, add_generation_prompt: bool = True
) -> list[int]:
    """The messages through the template, as ids; in a thread, because templates and long texts take their time."""
    template = served.template
    if template is None:
        message = "This model has no chat template; use /v1/completions, or set model.chat_template."
        raise ApiError(400, message, param="messages", code="no_chat_template")
    service.check_chars(sum(len(message["content"]) for message in messages), served, "messages")
    try:
        return await service.in_thread(lambda: template.render(messages, add_generation_prompt=add_generation_prompt, kwargs=values))
    except TextError as error:
        raise from_text(error, "messages") from None


# -- fields with a shape of their own ----------------------------------------------------------------------


def _messages(most: int) -> Field:
    def parse(name: str, value: Any) -> list[dict[str, str]]:
        messages = check_list(name, value, most)
        if not messages:
            raise bad(name, "messages is empty; send at least one message.", "invalid_value")
        return [_message(f"{name}[{i}]", message) for i, message in enumerate(messages)]

    part = {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
        "additionalProperties": False,
    }
    content = {"anyOf": [{"type": "string"}, {"type": "array", "items": part, "minItems": 1}]}
    message = {
        "type": "object",
        "properties": {
            "role": {"type": "string", "enum": list(ROLES), "description": "developer is read as system."},
            "content": content,
            "name": {"type": ["string", "null"], "maxLength": 64},
        },
        "required": ["role", "content"],
        "additionalProperties": False,
    }
    schema = {"type": "array", "items": message, "minItems": 1, "maxItems": most}
    return Field("messages", "The conversation so far.", schema, parse, required=True)


def _message(where: str, message: Any) -> dict[str, str]:
    if type(message) is not dict:
        raise wrong_type(where, "an object", message)
    role = message.get("role")
    if role in ("tool", "function"):
        raise bad(f"{where}.role", f"{where}.role {role!r} is not supported: {NO_TOOLS}", "unsupported_value")
    if type(role) is not str or role not in ROLES:
        raise bad(f"{where}.role", f"{where}.role must be one of {', '.join(ROLES)}.", "invalid_value")
    out = {"role": "system" if role == "developer" else role, "content": _content(f"{where}.content", message.get("content"))}
    for key, value in message.items():
        if key == "name" and value is not None:
            if type(value) is not str or not 1 <= len(value) <= 64:
                raise bad(f"{where}.name", f"{where}.name must be a string of 1 to 64 characters.", "invalid_value")
            out["name"] = value
        elif key in ("tool_calls", "function_call", "tool_call_id", "refusal", "audio", "reasoning_content", "annotations"):
            if value not in (None, [], ""):
                raise bad(f"{where}.{key}", f"{where}.{key} is not supported: messages are text.", "unsupported_parameter")
        elif key not in ("role", "content", "name"):
            raise bad(f"{where}.{key[:64]}", f"There is no field {key[:64]!r} in a message.", "unknown_parameter")
    return out


def _content(where: str, content: Any) -> str:
    """A string, or text parts joined as they are."""
    if type(content) is str:
        return content
    if type(content) is not list:
        raise wrong_type(where, "a string or an array of text parts", content)
    if not content:
        raise bad(where, f"{where} is an empty array.", "invalid_value")
    texts = []
    for i, part in enumerate(content):
        here = f"{where}[{i}]"
        if type(part) is not dict or type(part.get("type")) is not str:
            raise bad(here, f"{here} must be an object with a type, not {kind(part)}.", "invalid_type")
        if part["type"] != "text":
            raise bad(f"{here}.type", f"{here}.type must be 'text'; this server reads no other kind.", "unsupported_value")
        if type(part.get("text")) is not str:
            raise wrong_type(f"{here}.text", "a string", part.get("text"))
        for key in part:
            if key not in ("type", "text"):
                raise bad(f"{here}.{key[:64]}", f"There is no field {key[:64]!r} in a text part.", "unknown_parameter")
        texts.append(part["text"])
    return "".join(texts)


def _template_values() -> Field:
    def parse(name: str, value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise wrong_type(name, "an object", value)
        if len(value) > MAX_TEMPLATE_VALUES:
            raise bad(name, f"{name} has {len(value)} entries; at most {MAX_TEMPLATE_VALUES} are allowed.", "invalid_value")
        for key, item in value.items():
            if key in RESERVED or not key.isidentifier() or not key.isascii() or key.startswith("_"):
                raise bad(f"{name}.{key[:64]}", f"{name} may not set {key[:64]!r}.", "invalid_value")
            if type(item) not in (bool, int, float, str) or (type(item) is str and len(item) > MAX_TEMPLATE_CHARS):
                raise bad(f"{name}.{key}", f"{name}.{key} must be a boolean, a number or a short string.", "invalid_type")
        return value

    values = {"anyOf": [{"type": ["boolean", "number"]}, {"type": "string", "maxLength": MAX_TEMPLATE_CHARS}]}
    names = {"pattern": "^[a-zA-Z][a-zA-Z0-9_]{0,63}$", "not": {"enum": sorted(RESERVED)}}
    schema = {"type": "object", "additionalProperties": values, "propertyNames": names, "maxProperties": MAX_TEMPLATE_VALUES}
    return Field("chat_template_kwargs", "Variables for the chat template, e.g. enable_thinking.", schema, parse)


def _one_object(key: str, value: str) -> dict[str, Any]:
    return {"type": "object", "properties": {key: {"const": value}}, "required": [key], "additionalProperties": False}


def _one_text() -> dict[str, Any]:
    return {"type": "array", "items": {"const": "text"}, "minItems": 1, "maxItems": 1}
