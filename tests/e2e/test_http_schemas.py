"""Every answer and every chunk, strictly against the models that OpenAI and Anthropic generate from their OpenAPI documents.

The `openai` and `anthropic` packages carry them as pydantic models. Strict: exact types, literals and enums as published,
nothing required missing; and beyond that no field that is not ours on purpose (`OURS`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import anthropic.types as claude
import pydantic
import pytest
from openai import types as openai
from openai.types import chat, responses

from tests.api.harness import Running, serving

OURS = {
    "prompt_logprobs", "prompt_token_ids", "token_ids",  # vLLM's, where asked for
    "root", "parent", "max_model_len",  # of /v1/models
    "store",  # of a response; OpenAI sends it, its document does not say so
}  # fmt: skip
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something."}]
BASE = {"seed": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running
        running.settled()


@cache
def adapter(model: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(model)


def strictly(model: Any, value: Any) -> Any:
    parsed = adapter(model).validate_json(json.dumps(value), strict=True)
    extras = set(_extras(parsed))
    assert extras <= OURS, f"fields that are not published: {extras - OURS}"
    return parsed


def _extras(value: Any) -> Iterator[str]:
    if isinstance(value, pydantic.BaseModel):
        yield from value.model_extra or ()
        for name in type(value).model_fields:
            yield from _extras(getattr(value, name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _extras(item)


def posted(server: Running, path: str, body: dict[str, Any]) -> Any:
    status, answer = server.post(path, body)
    assert status == 200, answer
    return answer


def streamed(server: Running, path: str, body: dict[str, Any]) -> list[Any]:
    """The data of all events but [DONE]; named events carry their name as type."""
    status, headers, data = server.request("POST", path, {**body, "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream"), data
    out = []
    for block in data.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines and lines["data"] != "[DONE]":
            out.append(json.loads(lines["data"]))
            assert lines.get("event", out[-1].get("type")) == out[-1].get("type")
    return out


CHAT = {
    "plain": {"max_tokens": 5},
    "stopped": {"max_completion_tokens": 40, "ignore_eos": False, "temperature": 0},
    "logprobs": {"max_tokens": 3, "logprobs": True, "top_logprobs": 3, "n": 2},
    "usage": {"max_tokens": 3, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "extras": {"max_tokens": 3, "return_token_ids": True},
}


@pytest.mark.parametrize("name", CHAT)
def test_chat_completions(server: Running, name: str) -> None:
    body = {"messages": MESSAGES, **BASE, **CHAT[name]}
    once = {k: v for k, v in body.items() if k != "stream_options"}
    answer = strictly(chat.ChatCompletion, posted(server, "/v1/chat/completions", once))
    chunks = [strictly(chat.ChatCompletionChunk, chunk) for chunk in streamed(server, "/v1/chat/completions", body)]
    for choice in answer.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
    if name == "usage":
        assert [chunk.usage.completion_tokens for chunk in chunks] == sorted(chunk.usage.completion_tokens for chunk in chunks)
        assert chunks[-1].usage == answer.usage.model_copy(update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details})


TEXT = {
    "plain": {"max_tokens": 5},
    "several": {"prompt": ["a", "bc"], "n": 2, "max_tokens": 4},
    "logprobs": {"max_tokens": 4, "logprobs": 2},
    "echo": {"max_tokens": 4, "echo": True},
    "extras": {"max_tokens": 4, "return_token_ids": True, "stream_options": {"include_usage": True}},
}


@pytest.mark.parametrize("name", TEXT)
def test_completions(server: Running, name: str) -> None:
    body = {"prompt": "Once upon", **BASE, **TEXT[name]}
    once = {k: v for k, v in body.items() if k != "stream_options"}
    answer = strictly(openai.Completion, posted(server, "/v1/completions", once))
    chunks = streamed(server, "/v1/completions", body)
    for chunk in chunks:  # OpenAI publishes one schema for both, in which a chunk's finish_reason may not be null, as its chunks' is
        for choice in chunk["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        strictly(openai.Completion, chunk)
    for choice in answer.choices:
        text = "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == choice.index)
        assert text == choice.text


def test_models(server: Running) -> None:
    listed = json.loads(server.request("GET", "/v1/models")[2])
    assert listed["object"] == "list"
    for item in listed["data"]:
        strictly(openai.Model, item)
    strictly(openai.Model, json.loads(server.request("GET", "/v1/models/mock")[2]))


RESPONSES = {
    "plain": {"max_output_tokens": 5},
    "ended": {"ignore_eos": False, "temperature": 0, "max_output_tokens": 300},
    "logprobs": {"max_output_tokens": 3, "include": ["message.output_text.logprobs"], "top_logprobs": 2},
    "all": {
        "max_output_tokens": 3, "instructions": "Be brief.", "metadata": {"a": "b"}, "user": "u", "safety_identifier": "s",
        "prompt_cache_key": "k", "prompt_cache_retention": "24h", "truncation": "disabled", "text": {"format": {"type": "text"}},
        "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "store": False, "temperature": 0.5, "top_p": 0.9,
        "service_tier": "auto", "background": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RESPONSES)
def test_responses(server: Running, name: str) -> None:
    body = {"input": "Say something.", **BASE, **RESPONSES[name]}
    answer = strictly(responses.Response, posted(server, "/v1/responses", body))
    events = [strictly(responses.ResponseStreamEvent, event) for event in streamed(server, "/v1/responses", body)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1].response
    assert (
        last.output[0].content[0].text == answer.output_text == "".join(e.delta for e in events if e.type == "response.output_text.delta")
    )
    assert (last.status, last.usage.output_tokens) == (answer.status, answer.usage.output_tokens)
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added", "response.output_text.delta",
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.completed" if answer.status == "completed" else "response.incomplete",
    ]  # fmt: skip
    assert answer.status == ("completed" if name == "ended" else "incomplete")
    if RESPONSES[name].get("store") is not False:
        kept = strictly(responses.Response, json.loads(server.request("GET", f"/v1/responses/{answer.id}")[2]))
        assert kept == answer
        items = json.loads(server.request("GET", f"/v1/responses/{answer.id}/input_items")[2])
        assert strictly(responses.ResponseItemList, items).data[0].content[0].text == "Say something."


def test_a_failed_response_event(server: Running) -> None:
    """The event that ends a stream which broke, as the frames write it."""
    from api.errors import ApiError
    from api.response_fields import response_fields
    from api.responses import ResponseFrames
    from api.schema import parse_object

    def make() -> bytes:
        service = server.service
        values = parse_object(service.tables(response_fields), {"input": "x"})
        return ResponseFrames(service.served(), values, service.wanted()).failed(ApiError(503, "The engine stopped."))

    data = server.call(make).decode().split("data: ")[1]
    event = strictly(responses.ResponseFailedEvent, json.loads(data))
    assert event.response.status == "failed" and event.response.error.message == "The engine stopped."


CLAUDE = {
    "plain": {},
    "stopped": {"stop_sequences": ["e", "a"], "max_tokens": 200},
    "ended": {"temperature": 0, "max_tokens": 300},
    "all": {"system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}], "top_k": 5, "top_p": 0.9,
            "metadata": {"user_id": "u"}, "service_tier": "auto", "thinking": {"type": "disabled"}, "tools": [],
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "content": "I think"}]},
}  # fmt: skip


@pytest.mark.parametrize("name", CLAUDE)
def test_messages(server: Running, name: str) -> None:
    body = {"model": "mock", "max_tokens": 6, "seed": 4, "messages": [{"role": "user", "content": "hi"}], **CLAUDE[name]}
    answer = strictly(claude.Message, posted(server, "/v1/messages", body))
    events = [strictly(claude.RawMessageStreamEvent, event) for event in streamed(server, "/v1/messages", body)]
    assert "".join(e.delta.text for e in events if e.type == "content_block_delta") == answer.content[0].text
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == ["message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop"]
    delta = events[-2]
    assert (delta.delta.stop_reason, delta.delta.stop_sequence) == (answer.stop_reason, answer.stop_sequence)
    assert answer.stop_reason == {"stopped": "stop_sequence", "ended": "end_turn"}.get(name, "max_tokens")
    assert answer.stop_sequence in (("e", "a") if name == "stopped" else (None,))
    counted = posted(server, "/v1/messages/count_tokens", {k: body[k] for k in ("model", "messages", "system") if k in body})
    total = answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    assert strictly(claude.MessageTokensCount, counted).input_tokens == total


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_errors(server: Running, path: str) -> None:
    status, answer = server.post(path, {"model": "another"})
    if path == "/v1/messages":
        assert status == 404 and strictly(claude.ErrorResponse, {**answer, "request_id": "r"}).error.type == "not_found_error"
    else:
        assert status in (400, 404) and set(answer["error"]) == {"message", "type", "param", "code"}
