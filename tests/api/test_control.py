"""Sessions, and what an operator may ask: abort, sleep and wake, reset the cache, server_info, endpoints that are not there."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from api.control import NO_ENDPOINT
from api.response_store import ResponseStore, Stored
from api.session_history import SessionHistory
from engine.errors import EngineDead
from tests.api.harness import Running, mock_config, post_bytes, receive_all, serving, until

CHAT, TURN = "/v1/chat/completions", "/v1/chat/interactive"
LONG: dict[str, Any] = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def slow() -> Iterator[Running]:
    """A step takes 10 ms, so that an answer of 400 tokens can be interrupted."""
    with serving(mock_config(engine={"mock_step_s": 0.01}, server={"api_keys": ["one", "two"]})) as running:
        yield running
        running.settled()


def bearer(key: str = "one") -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def call(server: Running, path: str, body: Any, key: str = "one", **headers: str) -> tuple[int, Any]:
    status, _, data = server.request("POST", path, body, {**bearer(key), **{k.replace("_", "-"): v for k, v in headers.items()}})
    return status, json.loads(data)


class Asked(threading.Thread):
    """A request in flight."""

    def __init__(self, server: Running, path: str, body: Any, **headers: str) -> None:
        super().__init__(daemon=True)
        self.answer: tuple[int, Any] = (0, None)
        self._call = lambda: call(server, path, body, **headers)
        self.start()
        until(lambda: bool(server.service.live), 5, "the request did not begin")
        until(lambda: any(a.choices[0].num_generated > 3 for a in list(server.service.live)), 5, "no token came")

    def run(self) -> None:
        self.answer = self._call()

    def done(self) -> tuple[int, Any]:
        self.join(10)
        return self.answer


@pytest.mark.parametrize(
    ("fields", "headers", "name"),
    [({"request_id": "mine"}, {}, "mine"), ({}, {"X_Request_Id": "yours"}, "yours")],
)
def test_abort_by_name_delivers_what_there_is(slow: Running, fields: dict[str, Any], headers: dict[str, str], name: str) -> None:
    asked = Asked(slow, "/v1/completions", {**LONG, **fields}, **headers)
    assert call(slow, "/abort_request", {"rid": name}, key="two") == (200, {"aborted": 0})
    assert call(slow, "/abort_request", {"rid": name}) == (200, {"aborted": 1})
    status, body = asked.done()
    assert status == 200 and body["choices"][0]["finish_reason"] == "abort"
    assert 3 < body["usage"]["completion_tokens"] < 400 and len(body["choices"][0]["text"]) > 3


def test_abort_all_and_nonsense(slow: Running) -> None:
    asked = Asked(slow, "/generate", {"text": "x", "max_tokens": 400, "ignore_eos": True})
    assert call(slow, "/abort_request", {"abort_all": True}, key="two")[1] == {"aborted": 0}
    assert call(slow, "/abort_request", {"abort_all": True})[1] == {"aborted": 1}
    assert asked.done()[1]["meta_info"]["finish_reason"] == {"type": "abort"}
    for body in ({}, {"rid": "x", "abort_all": True}, {"rid": "a b"}, {"session_id": 0}):
        assert call(slow, "/abort_request", body)[0] == 400


def test_sleep_waits_then_refuses_until_wakeup(slow: Running) -> None:
    prompt = {"prompt": "y" * 100, "max_tokens": 1}
    assert call(slow, "/v1/completions", prompt)[0] == 200
    assert slow.call(lambda: slow.engine.snapshot().cached) > 0
    asked = Asked(slow, "/v1/completions", {**LONG, "max_tokens": 50})
    assert call(slow, "/sleep?level=1", None) == (200, {"is_sleeping": True})
    assert asked.done()[1]["usage"]["completion_tokens"] == 50  # it could finish
    assert slow.call(lambda: slow.engine.snapshot().cached) == 0
    status, body = call(slow, "/v1/completions", prompt)
    assert (status, body["error"]["code"]) == (503, "sleeping")
    assert slow.request("GET", "/health")[0] == 503 and slow.request("GET", "/health/live")[0] == 200
    assert slow.request("GET", "/v2/health/ready")[0] == 503
    assert json.loads(slow.request("GET", "/is_sleeping", headers=bearer())[2]) == {"is_sleeping": True}
    assert json.loads(slow.request("GET", "/server_info", headers=bearer())[2])["is_sleeping"] is True
    assert call(slow, "/wakeup", None) == (200, {"is_sleeping": False})
    assert call(slow, "/v1/completions", prompt)[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    for query in ("?level=2", "?level=x", "?mode=now", "?more=1"):
        assert call(slow, "/sleep" + query, None)[0] == 400
    assert slow.request("GET", "/health")[0] == 200


def test_sleep_that_does_not_wait(slow: Running) -> None:
    asked = Asked(slow, "/v1/completions", LONG)
    assert call(slow, "/sleep?mode=abort&level=0", None)[0] == 200
    assert asked.done()[1]["choices"][0]["finish_reason"] == "abort"
    call(slow, "/wakeup", None)


def test_reset_prefix_cache_and_server_info(slow: Running) -> None:
    prompt = {"prompt": "z" * 100, "max_tokens": 1}
    for reset, cached in ((False, 0), (False, 96), (True, 0)):
        if reset:
            assert call(slow, "/reset_prefix_cache", None) == (200, {"success": True})
        assert call(slow, "/v1/completions", prompt)[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
    info = json.loads(slow.request("GET", "/server_info", headers=bearer())[2])
    assert info["model"] == "mock" and info["session_len"] == 512 and info["kv_blocks"]["total"] == 512
    assert "/" not in info["model_path"]


@pytest.mark.parametrize("path", NO_ENDPOINT)
def test_endpoints_that_are_not_there_say_so(server: Running, path: str) -> None:
    status, body = server.post(path, {"model": "mock", "input": "x"})
    assert (status, body["error"]["param"], body["error"]["code"]) == (400, NO_ENDPOINT[path][1], "unsupported_endpoint")


# -- sessions ----------------------------------------------------------------------------------------------


def turn(server: Running, prompt: Any, **fields: Any) -> Any:
    status, body = server.post(TURN, {"prompt": prompt, "request_output_len": 8, "seed": 2, "ignore_eos": True, **fields})
    assert status == 200, body
    return body


def test_a_session_is_the_conversation(server: Running) -> None:
    keep = {"session_id": 5, "interactive_mode": True}
    first = turn(server, "hi", **keep)
    assert (first["tokens"], first["history_tokens"], first["finish_reason"]) == (8, 0, "length")
    second = turn(server, "and?", **keep)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first["text"]}, {"role": "user", "content": "and?"}]
    sampling = {"max_tokens": 8, "seed": 2, "ignore_eos": True, "top_p": 0.8, "top_k": 40, "temperature": 0.8}
    stateless = server.post(CHAT, {"messages": messages, **sampling})[1]
    assert second["text"] == stateless["choices"][0]["message"]["content"]
    assert second["history_tokens"] + second["input_tokens"] == stateless["usage"]["prompt_tokens"]
    assert second["history_tokens"] == first["input_tokens"] + 8
    lines = server.request("POST", TURN, {"prompt": "more", "request_output_len": 8, "seed": 2, "stream": True, **keep})
    assert lines[1]["content-type"].startswith("application/x-ndjson")
    parts = [json.loads(line) for line in lines[2].decode().splitlines()]
    assert parts[-1]["finish_reason"] == "length" and parts[-1]["tokens"] == 8 and parts[0]["history_tokens"] > second["history_tokens"]
    assert turn(server, "", request_output_len=0, session_id=5)["history_tokens"] > 0
    assert turn(server, "hi", **keep)["text"] == first["text"]  # begun anew
    turn(server, "bye", session_id=5)  # interactive_mode = false ends it after this turn
    assert len(server.service.sessions) == 0


def test_turns_compute_only_what_is_new(server: Running) -> None:
    """The prompt of a turn begins with every id of the last one, so all whole blocks of it are found in the cache."""
    messages: list[dict[str, str]] = []
    known = 0
    for number in range(14):
        asked = f"turn {number}"
        answer = turn(server, asked, session_id=77, interactive_mode=True, request_output_len=5, seed=number)
        messages += [{"role": "user", "content": asked}]
        stateless = server.post("/tokenize", {"messages": messages})[1]["tokens"]
        assert (answer["history_tokens"], answer["input_tokens"]) == (known, len(stateless) - known)
        ids = server.service.sessions.get("", 77).ids  # type: ignore[union-attr]
        assert ids[:-5] == stateless and len(stateless) - known < 30  # the words of this turn and the marks around them
        messages += [{"role": "assistant", "content": answer["text"]}]
        known = len(ids)
    status, body = server.post(
        TURN, {"prompt": "x" * 600, "session_id": 77, "interactive_mode": True}
    )  # too long: the session stays as it was
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert turn(server, "y", session_id=77, interactive_mode=True, request_output_len=1)["history_tokens"] == known
    turn(server, "", request_output_len=0, session_id=77)
    assert server.post(TURN, {"prompt": "x" * 600, "session_id": 78, "interactive_mode": True})[0] == 400  # it never began


def test_turns_without_a_session(server: Running) -> None:
    assert turn(server, "hi")["history_tokens"] == 0
    assert turn(server, [{"role": "user", "content": "hi"}])["text"] == turn(server, "hi")["text"]
    assert len(server.service.sessions) == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"session_id": 0}, "session_id"), ({"interactive_mode": True}, "session_id"), ({"request_output_len": 0}, "request_output_len"),
        ({"prompt": "", "interactive_mode": True, "session_id": 3}, "prompt"), ({"adapter_name": "a"}, "adapter_name"),
        ({"image_url": "a"}, "image_url"), ({"prompt": None}, "prompt"), ({"top_p": 2}, "top_p"),
    ],
)  # fmt: skip
def test_turns_that_are_refused_leave_no_session(server: Running, fields: dict[str, Any], param: str) -> None:
    status, body = server.post(TURN, {"prompt": "hi", **fields})
    assert (status, body["error"]["param"]) == (400, param)
    assert len(server.service.sessions) == 0


def test_a_session_is_cancelled_and_keeps_its_history(slow: Running) -> None:
    keep = {"session_id": 9, "interactive_mode": True, "ignore_eos": True}
    asked = Asked(slow, TURN, {"prompt": "hi", "request_output_len": 400, **keep})
    status, body = call(slow, TURN, {"prompt": "again", **keep})
    assert (status, body["error"]["code"]) == (409, "session_busy")
    assert call(slow, TURN, {"prompt": "", "request_output_len": 0, "session_id": 9})[0] == 409
    assert call(slow, TURN, {"prompt": "", "session_id": 9, "cancel": True}, key="two")[1]["finish_reason"] == "stop"  # another's session 9
    assert call(slow, TURN, {"prompt": "", "session_id": 9, "cancel": True})[1]["finish_reason"] == "abort"
    broken_off = asked.done()[1]
    assert broken_off["finish_reason"] == "abort" and 0 < broken_off["tokens"] < 400
    after = call(slow, TURN, {"prompt": "go on", "request_output_len": 2, **keep})[1]
    assert after["history_tokens"] == broken_off["input_tokens"] + broken_off["tokens"]
    asked = Asked(slow, TURN, {"prompt": "hi", "request_output_len": 400, **keep})
    assert call(slow, "/abort_request", {"session_id": 9})[1] == {"aborted": 1}
    assert asked.done()[1]["finish_reason"] == "abort"
    call(slow, TURN, {"prompt": "", "request_output_len": 0, "session_id": 9})


# -- what is kept is bounded -------------------------------------------------------------------------------


def test_sessions_make_room_but_never_a_busy_one() -> None:
    history = SessionHistory(most=2, max_chars=100)
    busy = history.begin("", 1)
    for number in (2, 3, 4):
        history.finish(history.begin("", number), [{"role": "user", "content": "x" * 10}], [1] * 10)
    assert history.get("", 1) is busy and history.get("", 4) is not None and len(history) == 2
    history.finish(history.begin("", 5), [{"role": "user", "content": "x" * 101}], [1] * 10)
    assert history.get("", 5) is None and history.get("", 1) is busy
    assert history.end("", 1) and not history.end("", 1) and history.get("other", 4) is None


def test_responses_make_room_and_are_their_owners() -> None:
    store = ResponseStore(2)
    for number in range(3):
        store.put(f"r{number}", Stored("k", {"n": number}, [], [{"role": "user", "content": "x"}]))
    assert store.get("r0", "k") is None and len(store) == 2
    assert store.get("r2", "other") is None and not store.delete("r2", "other") and store.delete("r2", "k")
    store.put("big", Stored("k", {}, [], [{"role": "user", "content": "x" * (65 << 20)}]))
    assert len(store) == 0


# -- a stream that breaks says so in its protocol ----------------------------------------------------------

STREAMS: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/messages": ({"max_tokens": 400, "seed": 40, "messages": [{"role": "user", "content": "hi"}]}, "event: error\ndata: "),
    "/v1/responses": ({"input": "hi", "ignore_eos": True}, "event: response.failed\ndata: "),
    TURN: ({"prompt": "hi", "request_output_len": 400, "ignore_eos": True}, '{"text":"","tokens":'),
    "/generate": ({"text": "hi", "max_tokens": 400, "ignore_eos": True}, 'data: {"error":'),
    "/v2/models/mock/generate_stream": ({"text_input": "hi", "max_tokens": 400, "ignore_eos": True}, 'data: {"error":'),
}


def test_the_death_of_the_engine_in_every_protocol() -> None:
    with serving(mock_config(engine={"mock_step_s": 0.01})) as dying:
        open_streams = {}
        for path, (body, _) in STREAMS.items():
            raw = dying.connect()
            raw.sendall(post_bytes(path, json.dumps(body if path.startswith("/v2") else {**body, "stream": True}).encode()))
            open_streams[path] = raw
        until(lambda: len(dying.service.live) == len(STREAMS), 5, "not all streams began")
        until(lambda: all(a.choices[0].num_generated > 3 for a in list(dying.service.live)), 5, "no tokens")
        dying.call(lambda: dying.engine._die(EngineDead("The engine stopped for a test."), 5))
        for path, raw in open_streams.items():
            with raw:
                text = receive_all(raw).decode()
            assert STREAMS[path][1] in text and "The engine stopped for a test." in text, (path, text[-500:])
            assert "[DONE]" not in text and "message_stop" not in text and "response.completed" not in text


def test_pages_of_other_origins_cannot_put_the_server_to_sleep(server: Running) -> None:
    """A browser sends a POST without a JSON body before it asks whether it may."""
    infer = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["x"]}]}
    for path, body in (("/sleep", None), ("/wakeup", None), ("/reset_prefix_cache", None), ("/v2/models/mock/infer", infer)):
        for origin in ("http://evil.example", "null", f"http://127.0.0.1:{server.port + 1}"):
            assert server.request("POST", path, body, {"Origin": origin})[0] == 403, (path, origin)
    assert server.request("POST", "/reset_prefix_cache", None, {"Origin": server.url})[0] == 200
    assert json.loads(server.request("GET", "/is_sleeping")[2]) == {"is_sleeping": False}


@pytest.mark.parametrize("path", STREAMS)
def test_a_client_that_leaves_frees_everything(slow: Running, path: str) -> None:
    body = {**STREAMS[path][0], **({} if path.startswith("/v2") else {"stream": True})}
    body |= {"session_id": 31, "interactive_mode": True} if path == TURN else {}
    with slow.connect() as raw:
        raw.sendall(post_bytes(path, json.dumps(body).encode(), "Authorization: Bearer one\r\n"))
        until(lambda: any(a.choices[0].num_generated > 3 for a in list(slow.service.live)), 5, "no tokens came")
        (answer,) = slow.service.live
        name = next((name for name in answer.names if name.startswith("resp_")), "")
    slow.settled()
    if path == TURN:
        session = slow.service.sessions.get(answer.key, 31)
        assert session is not None and not session.busy and len(session.messages[-1]["content"]) > 0
    if name:
        stored = json.loads(slow.request("GET", f"/v1/responses/{name}", headers=bearer())[2])
        assert stored["status"] == "cancelled" and stored["output"][0]["content"][0]["text"]
