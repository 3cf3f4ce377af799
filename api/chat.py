"""POST /v1/chat/completions: messages in, one or more assistant messages out, at once or as chunks.

Control tokens come from the chat template only: message text is always encoded as plain text.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import orjson
from aiohttp import web

from api.body import read_object
from api.errors import ApiError, bad, from_text
from api.generate import Answer, Delta
from api.logprobs import entries, prompt_ids, prompt_logprobs_json
from api.respond import respond
from api.sampling import Wanted, read, shared_fields, truncated
from api.schema import Field, Table, boolean, check_list, integer, parse_object, table, unsupported, wrong_type
from api.service import CALLER, REQUEST_ID, SERVICE, Served, Service
from api.sse import Framing, event, joined
from api.text_parts import NO_TOOLS, ONLY_TEXT, Parts, role_of
from config.schema import Request
from text.errors import TextError

ROLES = ("system", "developer", "user", "assistant")
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "documents", "chat_template"})
MAX_TEMPLATE_VALUES = 16
MAX_TEMPLATE_CHARS = 1024
PARTS = Parts()


def chat_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    """The whole body of a chat request."""
    most = session_len - 1
    return table([
        messages_field(limits.max_messages),
        *shared_fields(limits, model, session_len, vocab_size),
        integer("max_completion_tokens", 1, most, "The newer name of max_tokens. Default: the rest of the context."),
        boolean("logprobs", "Give the logprob of each token."),
        integer("top_logprobs", 0, limits.max_top_logprobs, "Likeliest tokens at each position; needs logprobs = true."),
        _template_values(),
        boolean("enable_thinking", "The same as chat_template_kwargs.enable_thinking.", None),
        boolean("add_generation_prompt", "End with the opening of the assistant's turn; true unless continue_final_message.", None),
        boolean("continue_final_message", "Go on with the last message, which is the assistant's, instead of answering it."),
        boolean("echo", "Put the last message, which is the assistant's, before the answer."),
        unsupported("add_special_tokens", "the chat template decides.", (False,), {"type": "boolean", "const": False}),
        unsupported("documents", "put them into messages."),
        unsupported("chat_template", "the template is the server's; set model.chat_template."),
        unsupported("response_format", ONLY_TEXT, ({"type": "text"},), _one_object("type", "text")),
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
    ])  # fmt: skip


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions"""
    service = request.app[SERVICE]
    served, started_s = service.served(), time.monotonic()
    body = await read_object(request, service.config.http, served.session_len)
    values = _one_limit(parse_object(service.tables(chat_fields), body))
    wanted = read(values, _logprobs(values))
    echo = _check_together(values)
    prompt = await render_messages(
        service, served, values["messages"], _template_kwargs(values),
        add_generation_prompt=values["add_generation_prompt"] is not False and not values["continue_final_message"],
        continue_final_message=values["continue_final_message"],
    )  # fmt: skip
    prompt = truncated(prompt, values, served.session_len)
    frames = ChatFrames(served, wanted, echo)
    answer = service.submit(
        [prompt], wanted, request[CALLER], default_tokens=None, param="messages", started_s=started_s, chat=True,
        names=(request[REQUEST_ID], frames.id),
    )  # fmt: skip
    return await respond(request, answer, frames, stream=wanted.stream)


class ChatFrames(Framing):
    """Chat's two folds: chunks with everything but the text rendered once, and the whole answer."""

    def __init__(self, served: Served, wanted: Wanted, echo: str = "") -> None:
        """`echo`: text that every choice begins with."""
        self.id = f"chatcmpl-{secrets.token_hex(16)}"
        self._tokenizer = served.tokenizer
        self._include_usage = wanted.include_usage
        self._continuous = wanted.continuous_usage
        self._want_logprobs = wanted.logprobs >= 0
        self._want_ids = wanted.values["return_token_ids"]
        self._want_prompt = wanted.prompt_logprobs >= 0
        self._echo = echo
        self._n = n = wanted.n
        self._base = {
            "id": self.id,
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
        ids = ',"prompt_token_ids":' + _compact(prompt_ids(self._answer.choices[0])) if self._want_ids and self._answer else ""
        nothing = b'},"logprobs":null,"finish_reason":null'
        echo = orjson.dumps(self._echo) + nothing + self._tail() if self._echo else b""
        return b"".join(self._empty[i] + role + nothing + self._tail(ids) + (self._text[i] + echo if echo else b"") for i in range(self._n))

    def delta(self, delta: Delta) -> bytes:
        if delta.finish_reason is None and not delta.logprobs and not self._continuous and not delta.token_ids:  # the hot path
            return self._text[delta.index] + orjson.dumps(delta.text) + self._plain
        out = b""
        last = delta.finish_reason is not None
        if delta.text or delta.logprobs or delta.token_ids:
            logprobs = {"content": entries(delta.logprobs, self._tokenizer), "refusal": None} if delta.logprobs else None
            out = self._text[delta.index] + orjson.dumps(delta.text) + b'},"logprobs":' + orjson.dumps(logprobs)
            ids = b',"token_ids":' + orjson.dumps(delta.token_ids) if self._want_ids else b""
            out += b',"finish_reason":null' + ids + self._tail()
        if last:
            reason = orjson.dumps(delta.finish_reason)
            out += self._empty[delta.index] + b'},"logprobs":null,"finish_reason":' + reason + self._tail()
        return out

    def _tail(self, extra: str = "") -> bytes:
        """The end of a chunk, with the usage so far where it was asked for; `extra`: more members of the chunk."""
        if self._continuous and self._answer is not None:
            return b'}],"usage":' + orjson.dumps(self._answer.usage.as_json()) + extra.encode() + b"}\n\n"
        return self._end[:-3] + extra.encode() + b"}\n\n" if extra else self._end

    def closing(self, answer: Answer) -> bytes:
        if not self._include_usage:
            return b""
        return event({**self._base, "choices": [], "usage": answer.usage.as_json()})

    async def fold(self, answer: Answer) -> dict[str, Any]:
        """The answer as one object."""
        texts: list[list[str]] = [[self._echo] for _ in range(self._n)]
        notes: list[list[bytes]] = [[] for _ in range(self._n)]
        ids: list[list[int]] = [[] for _ in range(self._n)]
        async for batch in answer.deltas():
            for delta in batch:
                texts[delta.index].append(delta.text)
                ids[delta.index] += delta.token_ids
                if delta.logprobs:  # rendered as they come: a long answer must not stop the loop at its end
                    notes[delta.index].append(orjson.dumps(entries(delta.logprobs, self._tokenizer))[1:-1])
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": "".join(texts[i]), "refusal": None},
                "logprobs": {"content": joined(notes[i]), "refusal": None} if self._want_logprobs else None,
                "finish_reason": choice.finish_reason,
                **({"token_ids": ids[i]} if self._want_ids else {}),
            }
            for i, choice in enumerate(answer.choices)
        ]
        first = answer.choices[0]
        extras: dict[str, Any] = {"prompt_token_ids": prompt_ids(first)} if self._want_ids else {}
        if self._want_prompt:
            extras["prompt_logprobs"] = prompt_logprobs_json(first, self._tokenizer)
        return {**self._base, "object": "chat.completion", "choices": choices, "usage": answer.usage.as_json(), **extras}


def _compact(ids: list[int]) -> str:
    return orjson.dumps(ids).decode()


def _check_together(values: dict[str, Any]) -> str:
    """Fields that are fine alone and wrong together; -> the text that is echoed."""
    last = values["messages"][-1]
    if values["continue_final_message"]:
        if last["role"] != "assistant":
            raise bad("continue_final_message", "continue_final_message needs a last message of the assistant.", "invalid_value")
        if values["add_generation_prompt"]:
            message = "continue_final_message goes on with the last message; add_generation_prompt would begin another."
            raise bad("add_generation_prompt", message, "invalid_value")
    if not values["echo"]:
        return ""
    if last["role"] != "assistant":
        raise bad("echo", "echo needs a last message of the assistant, which the answer goes on from.", "invalid_value")
    return str(last["content"])


def _template_kwargs(values: dict[str, Any]) -> dict[str, Any] | None:
    """chat_template_kwargs, and LMDeploy's short way to the best known one."""
    thinking = values["enable_thinking"]
    if thinking is None:
        return values["chat_template_kwargs"]
    return {"enable_thinking": thinking, **(values["chat_template_kwargs"] or {})}


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
    service: Service,
    served: Served,
    messages: list[dict[str, str]],
    values: dict[str, Any] | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    param: str = "messages",
) -> list[int]:
    """The messages through the template, as ids; in a thread, because templates and long texts take their time."""
    template = served.template
    if template is None:
        message = "This model has no chat template; use /v1/completions, or set model.chat_template."
        raise ApiError(400, message, param=param, code="no_chat_template")
    service.check_chars(sum(len(message["content"]) for message in messages), served, param)

    def render() -> list[int]:
        return template.render(
            messages, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message, kwargs=values
        )

    try:
        return await service.in_thread(render)
    except TextError as error:
        raise from_text(error, param) from None


# -- fields with a shape of their own ----------------------------------------------------------------------


def messages_field(most: int) -> Field:
    def parse(name: str, value: Any) -> list[dict[str, str]]:
        messages = check_list(name, value, most)
        if not messages:
            raise bad(name, "messages is empty; send at least one message.", "invalid_value")
        return [_message(f"{name}[{i}]", message) for i, message in enumerate(messages)]

    message = {
        "type": "object",
        "properties": {
            "role": {"type": "string", "enum": list(ROLES), "description": "developer is read as system."},
            "content": PARTS.schema(),
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
    role = role_of(where, message, ROLES)
    out = {"role": "system" if role == "developer" else role, "content": PARTS.read(f"{where}.content", message.get("content"))}
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
