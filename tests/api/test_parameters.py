"""Every field of chat and completions, at least once: seen in the answer, seen by the engine, refused by name, or said to do nothing.

The tables below must name every field that the server publishes; a field that is in none of them fails the first test.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from api.chat import chat_fields
from api.completions import completion_fields
from config.schema import Request
from engine.mock import mock_answer
from engine.sequence import SamplingParams
from tests.api.harness import Running, serving
from text.tokenizer import ByteTokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
BODY: dict[str, dict[str, Any]] = {CHAT: {"messages": HI, "max_tokens": 12, "seed": 3}, TEXT: {"prompt": "hi", "max_tokens": 12, "seed": 3}}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running
        running.settled()


# what the engine is given: field -> (value, the same field of SamplingParams)
ENGINE: dict[str, tuple[Any, str, Any]] = {
    "temperature": (0.25, "temperature", 0.25),
    "top_p": (0.5, "top_p", 0.5),
    "top_k": (7, "top_k", 7),
    "min_p": (0.125, "min_p", 0.125),
    "repetition_penalty": (1.5, "repetition_penalty", 1.5),
    "presence_penalty": (-1.5, "presence_penalty", -1.5),
    "frequency_penalty": (0.75, "frequency_penalty", 0.75),
    "logit_bias": ({"65": -100}, "logit_bias", ((65, -100.0),)),
    "min_tokens": (5, "min_tokens", 5),
    "min_new_tokens": (5, "min_tokens", 5),
    "stop_token_ids": ([65, 66], "stop_token_ids", (65, 66, ByteTokenizer.IM_END)),  # beside those of model and template
    "ignore_eos": (True, "ignore_eos", True),
    "seed": (99, "seed", 99),
    "allowed_token_ids": ([65, 66, 67], "allowed_token_ids", (65, 66, 67)),
    "bad_words": (["ab"], "bad_words", ((97, 98), (32, 97, 98))),
    "prompt_logprobs": (2, "prompt_logprobs", 2),
    "max_tokens": (9, "max_tokens", 9),
    "max_completion_tokens": (12, "max_tokens", 12),
}
ONLY_CHAT = {
    "messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs", "enable_thinking", "add_generation_prompt",
    "continue_final_message", "documents", "chat_template", "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call",
    "modalities", "audio", "prediction", "reasoning_effort", "verbosity", "web_search_options",
}  # fmt: skip
ONLY_TEXT = {"prompt", "best_of", "suffix"}
REFUSED: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required", "parallel_tool_calls": 1,
    "functions": [{"name": "f"}], "function_call": {"name": "f"}, "modalities": ["text", "audio"], "audio": {"voice": "a"},
    "prediction": {"type": "content"}, "reasoning_effort": "low", "verbosity": "low", "web_search_options": {},
    "documents": [{}], "chat_template": "{{ messages }}", "response_format": {"type": "json_object"}, "suffix": "x",
    "spaces_between_special_tokens": False, "structured_outputs": {"json": {}}, "guided_json": {}, "guided_regex": "a", "guided_choice": ["a"],
    "guided_grammar": "root ::= a", "grammar": "root ::= a", "json_schema": {}, "regex": "a", "ebnf": "a", "adapter_name": "a",
    "lora_path": "a", "use_beam_search": True, "length_penalty": 1.5, "logits_processors": ["a"], "prompt_embeds": "a",
    "kv_transfer_params": {}, "mm_processor_kwargs": {}, "media_io_kwargs": {}, "best_of": 3,
}  # fmt: skip
NOTHING: dict[str, Any] = {
    "user": "me", "safety_identifier": "me", "prompt_cache_key": "k", "prompt_cache_retention": "24h", "metadata": {"a": "b"},
    "store": True, "service_tier": "auto",
}  # fmt: skip


def answers(server: Running, path: str, **fields: Any) -> Any:
    status, body = server.post(path, {**BODY[path], **fields})
    assert status == 200, body
    return body


def text_of(body: Any) -> str:
    choice = body["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def given(server: Running, path: str, **fields: Any) -> SamplingParams:
    """What reached the engine."""
    seen: list[SamplingParams] = []
    submit = server.engine.submit

    def recording(prompt: list[int], params: SamplingParams, **rest: Any) -> Any:
        seen.append(params)
        return submit(prompt, params, **rest)

    server.engine.submit = recording  # type: ignore[method-assign]
    try:
        answers(server, path, **fields)
    finally:
        del server.engine.submit  # type: ignore[method-assign]
    return seen[0]


def expected(path: str, **params: Any) -> str:
    opened = [ByteTokenizer.IM_START, *b"user\nhi", ByteTokenizer.IM_END, *b"\n", ByteTokenizer.IM_START, *b"assistant\n"]
    ids = mock_answer(list(b"hi") if path == TEXT else opened, SamplingParams(**{"max_tokens": 12, "seed": 3, **params}))
    return bytes(token for token in ids if token < ByteTokenizer.BOS).decode()


def plain_stop(server: Running, path: str) -> str:
    return text_of(answers(server, path))[3:5]


# seen in the answer: field -> what must hold
def check_n(server: Running, path: str) -> None:
    assert [c["index"] for c in answers(server, path, n=3)["choices"]] == [0, 1, 2]


def check_stop(server: Running, path: str) -> None:
    stop, whole = plain_stop(server, path), text_of(answers(server, path))
    assert text_of(answers(server, path, stop=stop)) == whole[: whole.index(stop)]
    assert answers(server, path, stop=[stop])["choices"][0]["finish_reason"] == "stop"


def check_include_stop(server: Running, path: str) -> None:
    stop, whole = plain_stop(server, path), text_of(answers(server, path))
    assert text_of(answers(server, path, stop=stop, include_stop_str_in_output=True)) == whole[: whole.index(stop)] + stop


def check_skip_special(server: Running, path: str) -> None:
    forced = {"allowed_token_ids": [ByteTokenizer.BOS], "max_tokens": 2}
    assert text_of(answers(server, path, **forced)) == ""
    assert text_of(answers(server, path, skip_special_tokens=False, **forced)) != ""


def check_allowed(server: Running, path: str) -> None:
    assert set(text_of(answers(server, path, allowed_token_ids=[65, 66], ignore_eos=True))) == {"A", "B"}
    assert answers(server, path, allowed_token_ids=[65], bad_words=["AA"])["choices"][0] == answers(
        server, path, allowed_token_ids=[65], bad_words=["AA"], max_tokens=3
    )["choices"][0] | {"finish_reason": "stop"}


def check_bad_words(server: Running, path: str) -> None:
    word = text_of(answers(server, path))[4:6]
    assert word not in text_of(answers(server, path, bad_words=[word]))


def check_logprobs(server: Running, path: str) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    found = answers(server, path, **fields)["choices"][0]["logprobs"]
    tops = [entry["top_logprobs"] for entry in found["content"]] if path == CHAT else found["top_logprobs"]
    assert len(tops) == 12 and all(len(top) == 2 for top in tops)


def check_prompt_logprobs(server: Running, path: str) -> None:
    body = answers(server, path, prompt_logprobs=3, return_token_ids=True)
    holder = body if path == CHAT else body["choices"][0]
    ids, found = holder["prompt_token_ids"], holder["prompt_logprobs"]
    assert found[0] is None and len(found) == len(ids)
    for token, entry in zip(ids[1:], found[1:], strict=True):
        assert entry[str(token)]["logprob"] < 0 and 3 <= len(entry) <= 4
    assert len(body["choices"][0]["token_ids"]) == body["usage"]["completion_tokens"]
    status, refusal = server.post(path, {**BODY[path], "prompt_logprobs": 0, "stream": True})
    assert (status, refusal["error"]["param"]) == (400, "prompt_logprobs")


def check_truncate(server: Running, path: str) -> None:
    body = answers(server, path, truncate_prompt_tokens=1)
    assert body["usage"]["prompt_tokens"] == 1
    assert answers(server, path, truncate_prompt_tokens=-1) | VARYING == answers(server, path) | VARYING
    if path == TEXT:
        assert text_of(body) == text_of(answers(server, path, prompt="i"))
        long = answers(server, path, prompt="x" * 900, truncate_prompt_tokens=-1)
        assert long["usage"]["prompt_tokens"] == 512 - 12


VARYING = {"id": "", "created": 0, "usage": {}}


def check_stream(server: Running, path: str) -> None:
    whole = text_of(answers(server, path))
    chunks = server.events(path, {**BODY[path], "stream_options": {"include_usage": True, "continuous_usage_stats": True}})[:-1]
    pieces = [c["choices"][0] for c in chunks if c["choices"]]
    assert "".join(p["delta"].get("content", "") if path == CHAT else p["text"] for p in pieces) == whole
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == sorted(counts) and counts[-1] == 12 and chunks[-1]["choices"] == []


def check_stream_ids(server: Running, path: str) -> None:
    once = answers(server, path, return_token_ids=True)
    chunks = server.events(path, {**BODY[path], "return_token_ids": True})[:-1]
    ids = [token for c in chunks for choice in c["choices"] for token in choice.get("token_ids", [])]
    assert ids == once["choices"][0]["token_ids"] and len(ids) == 12


def check_echo(server: Running, path: str) -> None:
    if path == TEXT:
        assert text_of(answers(server, path, echo=True)) == "hi" + text_of(answers(server, path))
        return
    opened = [*HI, {"role": "assistant", "content": "Well"}]
    fields = {"messages": opened, "continue_final_message": True}
    assert text_of(answers(server, path, echo=True, **fields)) == "Well" + text_of(answers(server, path, **fields))
    status, refusal = server.post(path, {**BODY[path], "echo": True})
    assert (status, refusal["error"]["param"]) == (400, "echo")


def check_continue(server: Running, path: str) -> None:
    opened = [*HI, {"role": "assistant", "content": "Well"}]
    body = answers(server, path, messages=opened, continue_final_message=True, return_token_ids=True)
    assert bytes(i for i in body["prompt_token_ids"] if i < 256).endswith(b"assistant\nWell")
    for fields in ({"messages": HI}, {"messages": opened, "add_generation_prompt": True}):
        status, refusal = server.post(path, {**BODY[path], "continue_final_message": True, **fields})
        assert status == 400 and refusal["error"]["param"] in ("continue_final_message", "add_generation_prompt")


def check_generation_prompt(server: Running, path: str) -> None:
    long, short = (answers(server, path, add_generation_prompt=flag)["usage"]["prompt_tokens"] for flag in (True, False))
    assert long - short == 1 + len(b"assistant\n")


def check_template_values(server: Running, path: str) -> None:
    """The mock's template takes no variables and says so, by name: both ways to set one reach it."""
    for fields in ({"chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": True}):
        status, refusal = server.post(path, {**BODY[path], **fields})
        assert status == 200 or refusal["error"]["param"] == "chat_template_kwargs"


def check_salt(server: Running, path: str) -> None:
    key = "prompt" if path == TEXT else "messages"
    long = "x" * 200 if path == TEXT else [{"role": "user", "content": "x" * 200}]
    cached = [
        answers(server, path, cache_salt=salt, **{key: long})["usage"]["prompt_tokens_details"]["cached_tokens"] for salt in ("a", "a", "b")
    ]
    assert cached[0] == cached[2] == 0 < cached[1]


def check_special(server: Running, path: str) -> None:
    assert answers(server, path, add_special_tokens=False)["usage"]["prompt_tokens"] == 2
    status, refusal = server.post(CHAT, {**BODY[CHAT], "add_special_tokens": True})
    assert (status, refusal["error"]["param"]) == (400, "add_special_tokens")


def check_request_id(server: Running, path: str) -> None:
    """Its use is in test_control.py; a name that could not be one is refused."""
    answers(server, path, request_id="mine-1")
    status, refusal = server.post(path, {**BODY[path], "request_id": "a b"})
    assert (status, refusal["error"]["param"]) == (400, "request_id")


def check_model(server: Running, path: str) -> None:
    assert answers(server, path, model="mock")["model"] == "mock"
    assert server.post(path, {**BODY[path], "model": "x"})[0] == 404


def check_prompt(server: Running, path: str) -> None:
    assert text_of(answers(server, path)) == expected(path)
    assert text_of(answers(server, path, temperature=0)) == expected(path, temperature=0.0)


def submitted(server: Running, path: str, name: str, **fields: Any) -> Any:
    """What `Engine.submit` was given under `name`."""
    seen: list[Any] = []
    submit = server.engine.submit
    server.engine.submit = lambda *a, **k: (seen.append(k[name]), submit(*a, **k))[1]  # type: ignore[method-assign]
    try:
        answers(server, path, **fields)
    finally:
        del server.engine.submit  # type: ignore[method-assign]
    return seen[0]


def check_priority(server: Running, path: str) -> None:
    assert submitted(server, path, "priority", priority=-5) == -5


def check_user_id(server: Running, path: str) -> None:
    assert submitted(server, path, "user_id", user_id="ada") == "ada"


def check_session_id(server: Running, path: str) -> None:
    assert submitted(server, path, "session", session_id=7) == "/7"
    assert server.request("DELETE", "/v1/sessions/7")[0] == 200
    assert submitted(server, path, "session", session_id=-1) == ""


def check_timeout(server: Running, path: str) -> None:
    left = submitted(server, path, "deadline_s", timeout=50) - time.monotonic()
    assert 40 < left < 50


SEEN: dict[str, Callable[[Running, str], None]] = {
    "n": check_n, "stop": check_stop, "include_stop_str_in_output": check_include_stop, "skip_special_tokens": check_skip_special,
    "allowed_token_ids": check_allowed, "bad_words": check_bad_words, "logprobs": check_logprobs, "top_logprobs": check_logprobs,
    "prompt_logprobs": check_prompt_logprobs, "return_token_ids": check_stream_ids, "truncate_prompt_tokens": check_truncate,
    "stream": check_stream, "stream_options": check_stream, "echo": check_echo, "continue_final_message": check_continue,
    "add_generation_prompt": check_generation_prompt, "chat_template_kwargs": check_template_values, "enable_thinking": check_template_values,
    "cache_salt": check_salt, "add_special_tokens": check_special, "request_id": check_request_id, "model": check_model,
    "prompt": check_prompt, "messages": check_prompt, "priority": check_priority,
    "user_id": check_user_id, "session_id": check_session_id, "timeout": check_timeout,
}  # fmt: skip


def has(path: str, name: str) -> bool:
    return name not in (ONLY_TEXT if path == CHAT else ONLY_CHAT)


def cases(names: Any) -> list[tuple[str, str]]:
    return [(path, name) for path in (CHAT, TEXT) for name in names if has(path, name)]


@pytest.mark.parametrize(("path", "build"), [(CHAT, chat_fields), (TEXT, completion_fields)])
def test_no_field_is_left_out(path: str, build: Any) -> None:
    published = set(build(Request(), "mock", 512, 260))
    tried = {name for names in (ENGINE, SEEN, REFUSED, NOTHING) for name in names if has(path, name)}
    assert tried == published


@pytest.mark.parametrize(("path", "name"), cases(ENGINE))
def test_the_engine_is_given_what_was_asked(server: Running, path: str, name: str) -> None:
    value, field, wanted = ENGINE[name]
    assert getattr(given(server, path, **{name: value}), field) == wanted


@pytest.mark.parametrize(("path", "name"), cases(SEEN))
def test_the_answer_shows_it(server: Running, path: str, name: str) -> None:
    SEEN[name](server, TEXT if name == "add_special_tokens" else path)


@pytest.mark.parametrize(("path", "name"), cases(REFUSED))
def test_what_is_not_there_is_refused_with_a_sentence(server: Running, path: str, name: str) -> None:
    status, body = server.post(path, {**BODY[path], name: REFUSED[name]})
    assert (status, body["error"]["param"]) == (400, name), body
    assert body["error"]["message"].endswith(".") and name in body["error"]["message"]


@pytest.mark.parametrize(("path", "name"), cases(NOTHING))
def test_what_does_nothing_says_so(server: Running, path: str, name: str) -> None:
    assert answers(server, path, **{name: NOTHING[name]}) | VARYING == answers(server, path) | VARYING
    document = json.loads(server.request("GET", "/openapi.json")[2])
    fields = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert fields[name]["description"].startswith("Accepted")


def test_echo_with_logprobs(server: Running) -> None:
    """As evaluation harnesses ask: nothing generated, the prompt's logprobs; and the same lists in a stream."""
    body = answers(server, TEXT, prompt="hello there", echo=True, logprobs=1, max_tokens=0)
    choice = body["choices"][0]
    lists = choice["logprobs"]
    assert (choice["text"], choice["finish_reason"], body["usage"]["completion_tokens"]) == ("hello there", "length", 0)
    assert lists["tokens"] == list("hello there") and lists["text_offset"] == list(range(11))
    assert lists["token_logprobs"][0] is None and all(value < 0 for value in lists["token_logprobs"][1:])
    both = answers(server, TEXT, prompt=["hello there", "x"], n=2, echo=True, logprobs=1, max_tokens=3)["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in both] == [14, 14, 4, 4]
    chunks = server.events(TEXT, {**BODY[TEXT], "prompt": ["hello there", "x"], "n": 2, "echo": True, "logprobs": 1, "max_tokens": 3})[:-1]
    for whole in both:
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == whole["index"]]
        assert "".join(p["text"] for p in parts) == whole["text"]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for p in parts if p["logprobs"] for value in p["logprobs"][key]] == whole["logprobs"][key]
