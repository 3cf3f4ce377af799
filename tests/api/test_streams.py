"""Streams and whole answers are two folds of one thing (case D5), and the bytes of a stream are OpenAI's."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.sampling import SEED_STRIDE
from tests.api.harness import Running, mock_config, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "seed": 3}
GOLDEN = Path(__file__).with_name("golden")

TRANSCRIPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {**HELLO, "max_tokens": 3}),
    "chat_usage": (CHAT, {**HELLO, "max_tokens": 2, "stream_options": {"include_usage": True}}),
    "chat_logprobs_n2": (CHAT, {**HELLO, "max_tokens": 1, "n": 2, "logprobs": True, "top_logprobs": 2}),
    "completion": (TEXT, {"prompt": "hi", "seed": 3, "max_tokens": 3}),
    "completion_echo_logprobs": (TEXT, {"prompt": [[104, 105], [104]], "seed": 3, "max_tokens": 2, "echo": True}),
    "completion_usage": (TEXT, {"prompt": "hi", "seed": 3, "max_tokens": 2, "logprobs": 1, "stream_options": {"include_usage": True}}),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(mock_config()) as running:
        yield running
        running.settled()


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_the_bytes_of_a_stream(server: Running, name: str) -> None:
    """Golden transcripts; what differs from run to run (ids, times) is replaced by a word."""
    path, body = TRANSCRIPTS[name]
    _, headers, data = server.request("POST", path, {**body, "stream": True, "cache_salt": name})
    text = re.sub(r'"id":"(chatcmpl|cmpl)-[0-9a-f]{32}"', r'"id":"\1-ID"', data.decode())
    text = re.sub(r'"created":\d+', '"created":0', text)
    text = re.sub(r'"fp_[0-9a-f]{12}"', '"fp"', text)
    assert text == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    assert headers["cache-control"] == "no-cache" and headers["transfer-encoding"] == "chunked"


def folded(events: list[Any], chat: bool) -> list[dict[str, Any]]:
    """The chunks of a stream, added up by choice; checks their order on the way."""
    assert events[-1] == "[DONE]" and events.count("[DONE]") == 1
    chunks = [e for e in events[:-1] if e["choices"]]
    assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"]) for c in chunks}) == 1
    out: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        mine = out.setdefault(choice["index"], {"text": "", "logprobs": [], "finish_reason": None, "chunks": 0})
        assert mine["finish_reason"] is None, "a chunk after the last one"
        if chat and mine["chunks"] == 0:
            assert choice["delta"]["role"] == "assistant" and choice["delta"]["content"] == ""
        mine["text"] += choice["delta"].get("content", "") if chat else choice["text"]
        if choice["logprobs"]:
            mine["logprobs"] += choice["logprobs"]["content"] if chat else zip(*choice["logprobs"].values(), strict=True)
        mine["finish_reason"] = choice["finish_reason"]
        mine["chunks"] += 1
    assert all(choice["finish_reason"] for choice in out.values())
    return [out[i] for i in sorted(out)]


def whole(answer: Any, chat: bool) -> list[dict[str, Any]]:
    out = []
    for choice in answer["choices"]:
        logprobs = choice["logprobs"]
        notes = [] if logprobs is None else logprobs["content"] if chat else list(zip(*logprobs.values(), strict=True))
        text = choice["message"]["content"] if chat else choice["text"]
        out.append({"text": text, "logprobs": [_plain(n) for n in notes], "finish_reason": choice["finish_reason"]})
    return out


def _plain(note: Any) -> Any:
    return json.loads(json.dumps(note))


bodies = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**64 - 1), "max_tokens": st.sampled_from([1, 2, 17, 90]), "n": st.integers(1, 3)},
    optional={
        "stop": st.lists(st.text("abcdefghijklmnopqrstuvwxyzABC 0123", min_size=1, max_size=3), min_size=1, max_size=16),
        "include_stop_str_in_output": st.booleans(),
        "temperature": st.sampled_from([0.0, 1.0]),
        "min_tokens": st.integers(0, 1),
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "stop_token_ids": st.lists(st.integers(32, 126), max_size=3),
    },
)


@settings(max_examples=60, deadline=None)
@given(body=bodies, chat=st.booleans(), logprobs=st.booleans())
def test_a_stream_adds_up_to_the_whole_answer(body: dict[str, Any], chat: bool, logprobs: bool) -> None:
    server = shared_server()
    path, body = (CHAT, {**HELLO, **body}) if chat else (TEXT, {"prompt": ["hi", "ho"], **body})
    if logprobs:
        body = {**body, "logprobs": True, "top_logprobs": 2} if chat else {**body, "logprobs": 2}
    status, answer = server.post(path, body)
    assert status == 200, answer
    events = server.events(path, {**body, "stream_options": {"include_usage": True}})
    parts = folded(events, chat)
    assert [{**p, "logprobs": [_plain(n) for n in p["logprobs"]]} for p in _without_chunks(parts)] == whole(answer, chat)
    assert events[-2]["choices"] == []
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert events[-2]["usage"][key] == answer["usage"][key]
    assert all(e["usage"] is None for e in events[:-2])


def _without_chunks(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in part.items() if key != "chunks"} for part in parts]


_shared: list[Running] = []


def shared_server() -> Running:
    return _shared[0]


@pytest.fixture(autouse=True)
def _share(server: Running) -> Iterator[None]:
    _shared[:] = [server]
    yield
    _shared.clear()


def free_text(server: Running, **fields: Any) -> str:
    body = {"prompt": "hi", "seed": 5, "max_tokens": 60, "ignore_eos": True, **fields}
    return server.post(TEXT, body)[1]["choices"][0]["text"]


def test_stop_strings_of_any_length_end_the_answer_before_them(server: Running) -> None:
    text = free_text(server)
    for start, end in ((0, 1), (0, 5), (7, 8), (7, 11), (20, 59), (59, 60)):
        stop = text[start:end]
        at = text.index(stop)
        answer = server.post(TEXT, {"prompt": "hi", "seed": 5, "max_tokens": 60, "ignore_eos": True, "stop": stop})[1]
        assert answer["choices"][0] == {"index": 0, "text": text[:at], "logprobs": None, "finish_reason": "stop"}
        assert answer["usage"]["completion_tokens"] == at + len(stop)
        kept = server.post(
            TEXT, {"prompt": "hi", "seed": 5, "max_tokens": 60, "ignore_eos": True, "stop": stop, "include_stop_str_in_output": True}
        )[1]
        assert kept["choices"][0]["text"] == text[: at + len(stop)]


def test_held_back_text_comes_out_when_the_answer_ends(server: Running) -> None:
    text = free_text(server)
    events = server.events(TEXT, {"prompt": "hi", "seed": 5, "max_tokens": 60, "ignore_eos": True, "stop": text[-3:] + "never"})
    assert folded(events, chat=False)[0]["text"] == text


def test_min_tokens_puts_off_stop_strings(server: Running) -> None:
    text = free_text(server)
    answer = server.post(TEXT, {"prompt": "hi", "seed": 5, "max_tokens": 60, "ignore_eos": True, "stop": text[3], "min_tokens": 10})[1]
    assert len(answer["choices"][0]["text"]) >= 10


def test_a_stop_token_is_not_part_of_the_text(server: Running) -> None:
    text = free_text(server)
    at = next(i for i in range(5, 60) if text[i] not in text[:i])
    body = {"prompt": "hi", "seed": 5, "max_tokens": 60, "ignore_eos": True, "stop_token_ids": [ord(text[at])]}
    answer = server.post(TEXT, body)[1]
    assert answer["choices"][0]["text"] == text[:at] and answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == at + 1
    kept = server.post(TEXT, {**body, "include_stop_str_in_output": True})[1]
    assert kept["choices"][0]["text"] == text[: at + 1]


def test_choices_are_sampled_with_documented_seeds(server: Running) -> None:
    four = server.post(TEXT, {"prompt": "hi", "seed": 9, "n": 4, "max_tokens": 20, "ignore_eos": True})[1]["choices"]
    for i in range(4):
        seed = (9 + i * SEED_STRIDE) % 2**64
        assert free_text(server, seed=seed, max_tokens=20) == four[i]["text"]
    assert len({choice["text"] for choice in four}) == 4


def test_without_a_seed_answers_differ(server: Running) -> None:
    texts = {server.post(TEXT, {"prompt": "hi", "max_tokens": 20, "ignore_eos": True})[1]["choices"][0]["text"] for _ in range(4)}
    assert len(texts) == 4


def test_several_prompts_are_several_answers(server: Running) -> None:
    together = server.post(TEXT, {"prompt": ["a", "b", "c"], "n": 2, "seed": 1, "max_tokens": 9})[1]
    for p, prompt in enumerate(("a", "b", [99])):
        alone = server.post(TEXT, {"prompt": prompt, "n": 2, "seed": 1, "max_tokens": 9})[1]
        got = together["choices"][2 * p : 2 * p + 2]
        assert [c["text"] for c in got] == [c["text"] for c in alone["choices"]]
        assert [c["index"] for c in got] == [2 * p, 2 * p + 1]
    assert together["usage"]["prompt_tokens"] == 3


def test_echo(server: Running) -> None:
    plain = server.post(TEXT, {"prompt": "hi", "seed": 1, "max_tokens": 9})[1]["choices"][0]["text"]
    assert server.post(TEXT, {"prompt": "hi", "seed": 1, "max_tokens": 9, "echo": True})[1]["choices"][0]["text"] == "hi" + plain
    assert folded(server.events(TEXT, {"prompt": [104, 105], "seed": 1, "max_tokens": 9, "echo": True}), False)[0]["text"] == "hi" + plain


def test_logprobs_cover_the_text(server: Running) -> None:
    answer = server.post(
        TEXT, {"prompt": "hi", "seed": 1, "max_tokens": 9, "logprobs": 2, "ignore_eos": True, "skip_special_tokens": False}
    )[1]["choices"][0]
    notes = answer["logprobs"]
    assert "".join(notes["tokens"]) == answer["text"]
    assert notes["text_offset"] == list(itertools.accumulate((len(t) for t in notes["tokens"][:-1]), initial=0))
    assert all(len(top) == 2 for top in notes["top_logprobs"]) and all(p <= 0 for p in notes["token_logprobs"])
    none = server.post(TEXT, {"prompt": "hi", "seed": 1, "max_tokens": 9, "logprobs": 2})[1]["choices"][0]
    assert none["text"] == "" and none["logprobs"] == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    chat = server.post(CHAT, {**HELLO, "max_tokens": 9, "logprobs": True})[1]["choices"][0]
    content = chat["logprobs"]["content"]
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == chat["message"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in content)


def test_usage_counts_cached_prompt_tokens(server: Running) -> None:
    prompt = "a long prompt that fills several blocks of sixteen positions and is sent a second time"
    first, second = (server.post(TEXT, {"prompt": prompt, "max_tokens": 1})[1]["usage"] for _ in range(2))
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert second["prompt_tokens_details"]["cached_tokens"] >= 64
    assert second["total_tokens"] == second["prompt_tokens"] + second["completion_tokens"]


def test_http_1_0_streams_without_chunks(server: Running) -> None:
    body = json.dumps({"prompt": "hi", "seed": 1, "max_tokens": 5, "stream": True}).encode()
    with server.connect() as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body
        )
        data = b""
        while chunk := raw.recv(65536):
            data += chunk
    head, _, text = data.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower() and text.startswith(b"data: {") and text.endswith(b"data: [DONE]\n\n")


def test_many_streams_at_once_equal_their_answers_alone(server: Running) -> None:
    bodies = [{"prompt": f"stream {i}", "seed": i, "max_tokens": 30 + i % 7} for i in range(96)]
    alone = [whole(server.post(TEXT, body)[1], False)[0] for body in bodies]
    with ThreadPoolExecutor(48) as pool:
        streams = list(pool.map(lambda body: folded(server.events(TEXT, body), False)[0], bodies))
    assert [{k: s[k] for k in ("text", "logprobs", "finish_reason")} for s in streams] == alone


@pytest.mark.parametrize("text", ["a\x00b", "\u202eabc\u202c", "e\u0301", "\ufffe", "漢字", "👩\u200d👩\u200d👧", "\u2028\u2029"])
def test_unusual_characters_survive(server: Running, text: str) -> None:
    body = {"prompt": text, "echo": True, "max_tokens": 1, "stop": text, "user": text, "metadata": {text: text}}
    assert server.post(TEXT, body)[1]["choices"][0]["text"].startswith(text)
    assert folded(server.events(TEXT, body), False)[0]["text"].startswith(text)
    assert server.post(CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": 1})[0] == 200
