"""Sessions over HTTP: what a turn computes, whose they are, how they end; QoS, and answers that are late."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from api.session_history import SessionHistory
from engine.mock import mock_answer
from engine.sequence import SamplingParams
from tests.api.harness import Running, mock_config, serving, until

CHAT, TEXT, TURN, SESSIONS = "/v1/chat/completions", "/v1/completions", "/v1/chat/interactive", "/v1/sessions"
KEYS = {"api_keys": ["one", "two"]}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    config = mock_config(
        engine={"session_len": 4096}, cache={"num_blocks": 512, "cache_block_seq_len": 64}, server=KEYS, sessions={"lease_s": 60.0}
    )
    with serving(config) as running:
        yield running
        running.settled()


def call(server: Running, method: str, path: str, body: Any = None, key: str = "one") -> tuple[int, Any]:
    status, _, data = server.request(method, path, body, {"Authorization": f"Bearer {key}"})
    return status, json.loads(data)


def good(server: Running, method: str, path: str, body: Any = None, key: str = "one") -> Any:
    status, answer = call(server, method, path, body, key)
    assert status == 200, answer
    return answer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# -- what is computed -----------------------------------------------------------------------------------------


def test_twenty_interactive_turns_compute_what_is_new(server: Running) -> None:
    """`cached_tokens` is the whole history but its last id, which was never computed: the answer was cut at its length.

    Seeds are chosen so that no answer has an end-of-sequence id within: it is no text, so the same words would be other ids.
    """
    messages: list[dict[str, str]] = []
    known = 0
    sampling = {"ignore_eos": True, "top_p": 0.8, "top_k": 40, "temperature": 0.8}
    for number in range(20):
        messages.append(user(f"turn {number}"))
        for seed in range(50):
            alone = good(server, "POST", CHAT, {"messages": messages, "cache_salt": f"{number}", "max_tokens": 9, "seed": seed, **sampling})
            text = alone["choices"][0]["message"]["content"]
            if len(text) == 9:
                break
        body = {"prompt": f"turn {number}", "session_id": 20, "interactive_mode": True, "request_output_len": 9, "seed": seed}
        answer = good(server, "POST", TURN, {**body, **sampling})
        assert answer["text"] == text and answer["history_tokens"] + answer["input_tokens"] == alone["usage"]["prompt_tokens"]
        assert answer["history_tokens"] == known
        assert answer["cached_tokens"] == max(0, known - 1)
        messages.append({"role": "assistant", "content": text})
        known = answer["history_tokens"] + answer["input_tokens"] + answer["tokens"]
    assert good(server, "DELETE", f"{SESSIONS}/20")["deleted"]


def test_openai_requests_with_a_session_id_keep_their_place(server: Running) -> None:
    """The request carries the whole conversation as always; what the last one left is used to the last id."""
    messages = [user("a question")]
    cached = 0
    for number in range(6):
        body = {"messages": messages, "session_id": 5, "max_tokens": 7, "ignore_eos": True, "seed": number}
        answer = good(server, "POST", CHAT, body)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
        cached = answer["usage"]["total_tokens"] - 1
        messages += [{"role": "assistant", "content": answer["choices"][0]["message"]["content"]}, user(f"and {number}?")]
    ids = list(b"once upon a time")
    first = good(
        server,
        "POST",
        TEXT,
        {"prompt": ids, "session_id": 6, "max_tokens": 5, "temperature": 0, "ignore_eos": True, "return_token_ids": True},
    )
    ids += [*first["choices"][0]["token_ids"], 65]
    second = good(server, "POST", TEXT, {"prompt": ids, "session_id": 6, "max_tokens": 5, "ignore_eos": True, "temperature": 0})
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 16 + 5 - 1
    assert second["choices"][0]["text"].encode() == bytes(mock_answer(ids, SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)))
    for number in (5, 6):
        good(server, "DELETE", f"{SESSIONS}/{number}")


@pytest.mark.parametrize(
    "body",
    [{"session_id": 0}, {"session_id": -2}, {"session_id": "5"}, {"session_id": 5, "n": 2}, {"session_id": 5, "prompt": ["a", "b"]}],
)
def test_one_answer_to_one_prompt(server: Running, body: dict[str, Any]) -> None:
    status, answer = call(server, "POST", TEXT, {"prompt": "x", "max_tokens": 2, **body})
    assert (status, answer["error"]["param"]) == (400, "session_id")
    assert good(server, "GET", SESSIONS)["data"] == []


def test_a_thousand_sessions_on_a_pool_for_a_hundred() -> None:
    """Two rounds of turns, 50 at a time: every history goes on, nothing is refused, most is computed again."""
    config = mock_config(cache={"num_blocks": 400, "cache_block_seq_len": 16}, sessions={"max_pool_share": 1.0})
    known = dict.fromkeys(range(1, 1001), 0)

    async def turn(client: aiohttp.ClientSession, running: Running, number: int, at_a_time: asyncio.Semaphore) -> None:
        body = {"prompt": f"session {number}", "session_id": number, "interactive_mode": True, "request_output_len": 6, "seed": number}
        async with at_a_time, client.post(running.url + TURN, json={**body, "ignore_eos": True}) as response:
            answer = await response.json()
        assert response.status == 200, answer
        assert answer["history_tokens"] == known[number] and answer["tokens"] == 6
        known[number] += answer["input_tokens"] + 6

    async def main(running: Running) -> None:
        at_a_time = asyncio.Semaphore(50)
        async with aiohttp.ClientSession() as client:
            for _ in range(2):
                await asyncio.gather(*(turn(client, running, number, at_a_time) for number in known))

    with serving(config) as running:
        asyncio.run(main(running))
        seen = running.engine.snapshot()
        assert seen.leases_broken > 1500 and 50 < seen.leases < 200 and seen.pinned <= 400
        running.settled()
        assert sum(sample.value for sample in samples(running, "numbatch:session_leases_broken_total")) == seen.leases_broken
        assert sum(sample.value for sample in samples(running, "numbatch:session_blocks")) == seen.pinned


def samples(server: Running, name: str) -> list[Any]:
    text = server.request("GET", "/metrics")[2].decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples if sample.name == name]


# -- whose they are, and their end --------------------------------------------------------------------------------


def test_sessions_belong_to_their_key(server: Running) -> None:
    turn = {"prompt": "hi", "session_id": 3, "interactive_mode": True, "request_output_len": 4, "ignore_eos": True}
    mine = good(server, "POST", TURN, turn)
    assert good(server, "GET", SESSIONS, key="two")["data"] == []
    for method in ("GET", "DELETE"):
        assert call(server, method, f"{SESSIONS}/3", key="two")[0] == 404
    theirs = good(server, "POST", TURN, turn, key="two")
    assert (theirs["history_tokens"], theirs["cached_tokens"]) == (0, 0), "another key's session 3 is another session"
    (found,) = good(server, "GET", SESSIONS)["data"]
    assert found == good(server, "GET", f"{SESSIONS}/3") | {"expires_in_s": found["expires_in_s"]}
    tokens = mine["input_tokens"] + 4
    expected = {"id": 3, "object": "session", "busy": False, "history_tokens": tokens, "leased_tokens": tokens - 1}
    assert found | expected == found and 50 < found["expires_in_s"] <= 60
    assert good(server, "DELETE", f"{SESSIONS}/3") == {"id": 3, "object": "session", "deleted": True}
    assert call(server, "DELETE", f"{SESSIONS}/3")[0] == 404
    assert good(server, "GET", f"{SESSIONS}/3", key="two")["history_tokens"] == tokens
    good(server, "DELETE", f"{SESSIONS}/3", key="two")
    assert server.engine.snapshot().pinned == 0


@pytest.mark.parametrize("number", ["0", "-1", "x", "9" * 19, "9" * 40, "03"])
def test_what_is_no_session_is_not_found(server: Running, number: str) -> None:
    status, body = call(server, "GET", f"{SESSIONS}/{number}")
    assert (status, body["error"]["code"]) == (404, "session_not_found")


def test_ending_a_session_gives_its_blocks_back(server: Running) -> None:
    turn = {"session_id": 8, "request_output_len": 4, "ignore_eos": True}
    good(server, "POST", TURN, {**turn, "prompt": "hi", "interactive_mode": True})
    assert server.engine.snapshot().leases == 1
    good(server, "POST", TURN, {"prompt": "", "request_output_len": 0, "session_id": 8})
    assert server.engine.snapshot().leases == server.engine.snapshot().pinned == 0
    good(server, "POST", TURN, {**turn, "prompt": "hi", "interactive_mode": True})
    last = good(server, "POST", TURN, {**turn, "prompt": "bye"})
    assert last["cached_tokens"] > 0, "the turn that ends a session still uses it"
    assert server.engine.snapshot().pinned == 0 and good(server, "GET", SESSIONS)["data"] == []
    good(server, "POST", CHAT, {"messages": [user("x")], "session_id": 9, "max_tokens": 3})
    good(server, "POST", "/reset_prefix_cache", {})
    assert server.engine.snapshot().leases == 0


def test_deleting_a_session_cancels_its_answer() -> None:
    config = mock_config(engine={"mock_step_s": 0.01})
    with serving(config) as slow:
        turn = {"prompt": "hi", "session_id": 4, "interactive_mode": True, "request_output_len": 400, "ignore_eos": True, "stream": True}
        body = json.dumps(turn).encode()
        with slow.connect() as raw:
            raw.sendall(b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                        % (TURN.encode(), len(body), body))  # fmt: skip
            until(lambda: any(a.choices[0].num_generated > 3 for a in list(slow.service.live)), 5, "no token came")
            _, _, data = slow.request("GET", f"{SESSIONS}/4")
            assert json.loads(data)["busy"]
            assert slow.request("DELETE", f"{SESSIONS}/4")[0] == 200
            slow.settled()
        until(lambda: slow.engine.snapshot().leases == 0, 5, "a lease was left")
        assert slow.request("GET", f"{SESSIONS}/4")[0] == 404


def test_a_lease_that_expired_costs_time_and_not_the_history() -> None:
    with serving(mock_config(sessions={"lease_s": 0.2}, cache={"cache_block_seq_len": 128})) as running:
        turn = {"session_id": 2, "interactive_mode": True, "request_output_len": 4, "ignore_eos": True}
        running.post(TURN, {**turn, "prompt": "hi"})
        time.sleep(0.3)
        found = json.loads(running.request("GET", f"{SESSIONS}/2")[2])
        assert (found["leased_tokens"], found["expires_in_s"]) == (0, None) and found["history_tokens"] > 4
        status, answer = running.post(TURN, {**turn, "prompt": "again"})
        assert status == 200 and answer["history_tokens"] == found["history_tokens"] and answer["cached_tokens"] == 0


def test_one_keys_sessions_do_not_push_out_anothers() -> None:
    history = SessionHistory(most=4)
    history.finish(history.begin("quiet", 1), [user("x")], [1])
    for number in range(1, 9):
        history.finish(history.begin("busy", number), [user("x")], [1])
    assert history.ids("quiet") == [1] and history.ids("busy") == [6, 7, 8]


# -- who goes first, and until when -------------------------------------------------------------------------------


def test_user_id_reaches_its_group(tmp_path: Path) -> None:
    file = tmp_path / "qos.json"
    groups = {"Gold": [{"id": "ada", "quota_pct": 100}], "Rest": [{"id": "default", "quota_pct": 1}]}
    file.write_text(json.dumps({"enable_user_qos": True, "user_groups": ["Gold", "Rest"], "user_group_map": groups}))
    with serving(mock_config(admission={"qos_config_path": str(file)})) as running:
        seen: list[tuple[str, int]] = []
        add = running.engine.scheduler.add

        def recording(sequence: Any) -> None:
            seen.append((request[0], sequence.group))
            add(sequence)

        running.engine.scheduler.add = recording  # type: ignore[method-assign]
        hello = {"messages": [user("hi")], "max_tokens": 2}
        requests = [
            (CHAT, {**hello, "user_id": "ada"}), (CHAT, hello), (f"{CHAT}_qos", {**hello, "user_id": "ada"}),
            (f"{TEXT}_qos", {"prompt": "x", "max_tokens": 2, "user_id": "eve"}),
            (f"{TURN}_qos", {"prompt": "x", "request_output_len": 2, "user_id": "ada"}),
            ("/v1/responses", {"input": "x", "max_output_tokens": 2, "user_id": "ada"}),
            ("/v1/messages", {**hello, "metadata": {"user_id": "ada"}}),
        ]  # fmt: skip
        for request in requests:
            status, body = running.post(*request)
            assert status == 200, body
        assert [group for _, group in seen] == [0, 1, 0, 1, 0, 0, 0]
        status, body = running.post(CHAT, {**hello, "priority": -1})
        assert (status, body["error"]["param"]) == (400, "priority")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_late_is_given_up(stream: bool) -> None:
    with serving(mock_config(engine={"mock_step_s": 0.02})) as slow:
        body = {"prompt": "hi", "max_tokens": 300, "ignore_eos": True, "timeout": 0.3, "stream": stream}
        begin = time.monotonic()
        status, _, data = slow.request("POST", TEXT, body)
        assert time.monotonic() - begin < 3
        assert status == (200 if stream else 504)
        error = json.loads(data) if not stream else next(json.loads(e[6:]) for e in data.decode().split("\n\n") if '"error"' in e)
        assert (error["error"]["code"], error["error"]["param"]) == ("deadline_exceeded", "timeout")
        slow.settled()
        assert slow.post(TEXT, {**body, "max_tokens": 2, "timeout": 20, "stream": False})[0] == 200
