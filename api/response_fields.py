"""The body of POST /v1/responses: its table, and input items as chat messages. Text only; what is not is refused by name."""

from __future__ import annotations

import re
from typing import Any

from api.errors import bad
from api.sampling import shared_fields
from api.schema import Field, Table, boolean, check_list, check_str, choice, integer, table, unsupported, wrong_type
from api.text_parts import NO_TOOLS, ONLY_TEXT, Parts, role_of
from config.schema import Request

ROLES = ("user", "assistant", "system", "developer")
PARTS = Parts(("input_text", "output_text", "text"), ("annotations", "logprobs", "prompt_cache_breakpoint"))  # extras: of what came back
ITEM_EXTRAS = ("id", "status", "phase", "type")
NO_REASONING: tuple[dict[str, None], ...] = ({}, {"effort": None}, {"effort": None, "summary": None})
LOGPROBS = "message.output_text.logprobs"
RESPONSE_ID = re.compile(r"resp_[0-9a-f]{32}")
SHARED = (
    "model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "stop",
    "stop_token_ids", "ignore_eos", "seed", "allowed_token_ids", "bad_words", "min_tokens", "skip_special_tokens",
    "include_stop_str_in_output", "truncate_prompt_tokens", "priority", "cache_salt", "request_id", "stream", "user", "safety_identifier",
    "user_id", "timeout", "prompt_cache_key", "prompt_cache_retention", "metadata", "service_tier",
)  # fmt: skip


def response_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    known = table(shared_fields(limits, model, session_len, vocab_size))
    formats = {"type": "object", "properties": {"format": _typed("text"), "verbosity": {"type": "null"}}, "additionalProperties": False}
    return table([
        _input(limits.max_messages),
        *(known[name] for name in SHARED),
        integer("max_output_tokens", 1, session_len - 1, "Most tokens to generate. Default: the rest of the context."),
        Field("instructions", "The system's text of this answer; not carried over to the next.", {"type": "string"}, _text),
        Field("previous_response_id", "Go on from this answer, which was stored.", {"type": "string", "maxLength": 64}, _response_id),
        boolean("store", "Keep the answer, so that others can go on from it: in memory, bounded, until a restart.", True),
        Field("include", f"Only {LOGPROBS!r}.", {"type": "array", "items": {"const": LOGPROBS}}, _include, ()),
        integer("top_logprobs", 0, limits.max_top_logprobs, "Likeliest tokens at each position; needs the logprobs of 'include'.", 0),
        Field("text", "Only plain text.", formats, _text_config),
        choice("truncation", ("disabled",), "A conversation that does not fit is refused.", "disabled"),
        Field("stream_options", "Nothing to set: chunks carry no padding.", _stream_options_schema(), _stream_options),
        unsupported("tools", NO_TOOLS, ([],), {"type": "array", "maxItems": 0}),
        unsupported("tool_choice", NO_TOOLS, ("none", "auto"), {"type": "string", "enum": ["none", "auto"]}),
        unsupported("parallel_tool_calls", NO_TOOLS, (True, False), {"type": "boolean"}),
        unsupported("max_tool_calls", NO_TOOLS),
        unsupported("background", "an answer lives as long as its request.", (False,), {"type": "boolean", "const": False}),
        unsupported("reasoning", "set it with the model's chat template.", NO_REASONING, _empty()),
        unsupported("conversation", "use previous_response_id."),
        unsupported("prompt", "prompts are not kept here; send the input."),
        unsupported("context_management", "send the input that shall count."),
        unsupported("moderation", "this server does not moderate."),
        unsupported("prompt_cache_options", "prefixes are cached by themselves."),
        unsupported("response_format", ONLY_TEXT),
    ])  # fmt: skip


def _typed(name: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"type": {"const": name}}, "required": ["type"], "additionalProperties": False}


def _empty() -> dict[str, Any]:
    nothing = {"effort": {"type": "null"}, "summary": {"type": "null"}}
    return {"type": "object", "properties": nothing, "additionalProperties": False, "maxProperties": 0}


def _stream_options_schema() -> dict[str, Any]:
    return {"type": "object", "properties": {"include_obfuscation": {"type": "boolean", "const": False}}, "additionalProperties": False}


def _stream_options(name: str, value: Any) -> None:
    if value not in ({}, {"include_obfuscation": False}) or type(value) is not dict:
        raise bad(name, f"{name} may hold include_obfuscation = false, nothing else.", "unsupported_value")


def _text(name: str, value: Any) -> str:
    return check_str(name, value, 1 << 26)


def _response_id(name: str, value: Any) -> str:
    text = check_str(name, value, 64)
    if not RESPONSE_ID.fullmatch(text):
        raise bad(name, f"{name} is not the id of a response of this server.", "invalid_value")
    return text


def _include(name: str, value: Any) -> tuple[str, ...]:
    for item in check_list(name, value, 16):
        if item != LOGPROBS:
            raise bad(name, f"{name} may hold {LOGPROBS!r}; there is nothing else to include.", "unsupported_value")
    return tuple(value)


def _text_config(name: str, value: Any) -> None:
    if type(value) is not dict:
        raise wrong_type(name, "an object", value)
    for key, item in value.items():
        if key == "format" and item in (None, {"type": "text"}):
            continue
        if key == "verbosity" and item is None:
            continue
        why = ONLY_TEXT if key == "format" else "ask for it in the input."
        raise bad(f"{name}.{key[:64]}", f"{name}.{key[:64]} is not supported: {why}", "unsupported_parameter")


# -- input items -------------------------------------------------------------------------------------------


def _input(most: int) -> Field:
    def parse(name: str, value: Any) -> list[dict[str, str]]:
        if type(value) is str:
            return [{"role": "user", "content": value}]
        if type(value) is not list:
            raise wrong_type(name, "a string or an array of messages", value)
        items = check_list(name, value, most)
        if not items:
            raise bad(name, "input is empty; send at least one message.", "invalid_value")
        return [_message(f"{name}[{i}]", item) for i, item in enumerate(items)]

    properties = {
        "type": {"const": "message"},
        "role": {"type": "string", "enum": list(ROLES)},
        "content": PARTS.schema(),
        "id": {"type": ["string", "null"]},
        "status": {"type": ["string", "null"]},
        "phase": {"type": ["string", "null"]},
    }
    message = {"type": "object", "properties": properties, "required": ["role", "content"], "additionalProperties": False}
    items = {"type": "array", "items": message, "minItems": 1, "maxItems": most}
    doc = "A user's message, or the conversation as messages (answers may be put in as they came)."
    return Field("input", doc, {"anyOf": [{"type": "string"}, items]}, parse, required=True)


def _message(where: str, item: Any) -> dict[str, str]:
    if type(item) is not dict:
        raise wrong_type(where, "an object", item)
    form = item.get("type", "message")
    if form != "message":
        why = NO_TOOLS if "call" in str(form) else "only messages are."
        raise bad(f"{where}.type", f"{where}.type {str(form)[:32]!r} is not supported: {why}", "unsupported_value")
    for key, value in item.items():
        if key not in ("role", "content", *ITEM_EXTRAS):
            raise bad(f"{where}.{key[:64]}", f"There is no field {key[:64]!r} in a message.", "unknown_parameter")
        if key in ("id", "status", "phase") and value is not None and type(value) is not str:
            raise wrong_type(f"{where}.{key}", "a string", value)
    role = role_of(where, item, ROLES)
    return {"role": "system" if role == "developer" else role, "content": PARTS.read(f"{where}.content", item.get("content"))}


def input_items(messages: list[dict[str, str]], name: str) -> list[dict[str, Any]]:
    """The input of response `name` as items of GET /v1/responses/{id}/input_items."""
    return [
        {
            "id": f"msg_{name}_{i}",
            "type": "message",
            "status": "completed",
            "role": message["role"],
            "content": [_part(message)],
        }
        for i, message in enumerate(messages)
    ]


def _part(message: dict[str, str]) -> dict[str, Any]:
    if message["role"] == "assistant":
        return {"type": "output_text", "text": message["content"], "annotations": [], "logprobs": []}
    return {"type": "input_text", "text": message["content"]}
