"""Clients that leave or do not read: their sequences end, their neighbours notice nothing, nothing is left (bar 7, C4)."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from api.service import Service
from tests.api.harness import Running, mock_config, post_bytes, receive_all, serving, until

TEXT = "/v1/completions"
STALL_S = 0.6


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """Steps take 2 ms, so that a stream lasts long enough to be left."""
    config = mock_config(
        engine={"mock_step_s": 0.002, "max_batch_size": 128, "session_len": 8192},
        cache={"num_blocks": 4096},
        http={"write_stall_timeout_s": STALL_S, "stream_buffer_events": 64, "stream_buffer_bytes": 16384},
        admission={"max_requests": 4096, "max_requests_per_key": 4096},
    )
    with serving(config) as running:
        yield running
        running.settled()


def request(seed: int, **fields: Any) -> bytes:
    body = {"prompt": f"prompt {seed}", "seed": seed, "max_tokens": 400, "ignore_eos": True, "stream": True, **fields}
    return post_bytes(TEXT, json.dumps(body).encode())


def reset(raw: socket.socket) -> None:
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "leave", [socket.socket.close, reset, lambda raw: raw.shutdown(socket.SHUT_WR)], ids=["close", "reset", "half-close"]
)
def test_a_client_that_leaves_ends_its_sequence_within_a_step(server: Running, stream: bool, leave: Any) -> None:
    raw = server.connect()
    raw.sendall(request(1, stream=stream, max_tokens=8000, n=2))
    until(lambda: server.call(lambda: server.engine.snapshot().num_running) == 2, 5, "the sequences did not start")
    leave(raw)
    start = time.monotonic()
    until(lambda: server.call(lambda: server.engine.snapshot().num_running) == 0, 2, "the sequences go on")
    assert time.monotonic() - start < 0.5
    server.settled()
    raw.close()


def test_a_thousand_streams_dropped_at_random_leave_nothing(server: Running) -> None:
    """Bar 7 on a smaller clock: every block FREE or CACHED, no task, no descriptor left."""
    until(lambda: server.listener.gate.num_open == 0, 5, "connections from before")
    tasks = server.call(lambda: len(asyncio.all_tasks()))
    rng = random.Random(7)
    pending: list[tuple[float, socket.socket]] = []
    for i in range(1000):
        raw = server.connect()
        raw.sendall(request(i, n=rng.choice((1, 1, 1, 3)), stream=rng.random() < 0.8)[: rng.choice((40, None, None, None, None))])
        pending.append((time.monotonic() + rng.expovariate(5.0), raw))
        while len(pending) > 60:
            pending.sort(key=lambda item: item[0])
            leave = rng.choice((socket.socket.close, reset))
            leave(pending.pop(0)[1])
    for _, raw in pending:
        raw.close()
    server.settled()
    until(lambda: server.listener.gate.num_open == 0, 5, "connections are left")
    until(lambda: server.call(lambda: len(asyncio.all_tasks())) <= tasks, 5, "tasks are left")
    snapshot = server.call(lambda: server.engine.snapshot())
    assert snapshot.free + snapshot.cached == snapshot.num_blocks
    assert server.post(TEXT, {"prompt": "still there", "max_tokens": 3})[0] == 200


@pytest.mark.parametrize(
    "fields", [{"stream": True}, {"stream": False}, {"stream": True, "n": 3, "stop": "xyz"}], ids=["stream", "whole", "n = 3"]
)
def test_a_handler_cancelled_anywhere_leaves_nothing(server: Running, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Case C4: the handler's task is cancelled k turns of the event loop after its sequences were submitted, for many k."""
    complaints: list[dict[str, Any]] = []
    server.call(lambda: server.loop.set_exception_handler(lambda _, context: complaints.append(context)))
    original = Service.submit
    turns = 0

    def submit(self: Service, *arguments: Any, **options: Any) -> Any:
        answer = original(self, *arguments, **options)
        task = asyncio.current_task()
        assert task is not None

        def later(left: int) -> None:
            if left:
                server.loop.call_soon(later, left - 1)
            else:
                task.cancel()

        later(turns)
        return answer

    monkeypatch.setattr(Service, "submit", submit)
    for turns in [*range(30), *range(30, 300, 17)]:
        with server.connect() as raw:
            raw.sendall(request(turns, **{"max_tokens": 8000, **fields}))
            assert b"[DONE]" not in receive_all(raw)
        assert server.call(lambda: not server.service.live)
    server.settled()
    server.call(lambda: server.loop.set_exception_handler(None))
    assert not complaints


def test_streams_share_a_connection_one_after_the_other(server: Running) -> None:
    with server.connect() as raw:
        for seed in range(5):
            raw.sendall(request(seed, max_tokens=5))
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                data += raw.recv(65536)
            assert data.startswith(b"HTTP/1.1 200") and data.count(b"HTTP/1.1") == 1 and b"[DONE]" in data


def test_a_reader_that_stalls_is_cut_off_and_its_neighbour_is_not(server: Running) -> None:
    stalled_before = server.listener.gate.num_stalled
    lazy = server.connect(receive_buffer=4096)
    lazy.sendall(request(1, max_tokens=8000, logprobs=20))
    neighbour: list[bytes] = []
    thread = threading.Thread(
        target=lambda: neighbour.append(server.request("POST", TEXT, {"prompt": "x", "stream": True, "max_tokens": 300})[2])
    )
    thread.start()
    until(lambda: server.listener.gate.num_stalled == stalled_before + 1, 10, "the stalled reader was not cut off")
    thread.join(20)
    assert neighbour[0].endswith(b"data: [DONE]\n\n")
    server.settled()
    left = receive_all(lazy)
    assert b"[DONE]" not in left and left.startswith(b"HTTP/1.1 200")
    lazy.close()


def test_a_slow_reader_that_catches_up_gets_everything(server: Running) -> None:
    body = {"prompt": "slow", "seed": 5, "max_tokens": 600, "ignore_eos": True}
    text = server.post(TEXT, body)[1]["choices"][0]["text"]
    with server.connect(receive_buffer=4096) as raw:
        raw.sendall(request(5, prompt="slow", max_tokens=600))
        data = b""
        while b"[DONE]" not in data:
            data += raw.recv(8192)
            time.sleep(0.005)
    chunks = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


def test_a_whole_answer_that_nobody_reads_is_cut_off_too(server: Running) -> None:
    """Megabytes of logprobs into a closed window: the write stalls, the connection goes, no handler is left behind."""
    stalled_before = server.listener.gate.num_stalled
    with server.connect(receive_buffer=4096) as raw:
        raw.sendall(request(1, stream=False, max_tokens=1300, n=8, logprobs=20))
        until(lambda: server.listener.gate.num_stalled == stalled_before + 1, 30, "the stalled reader was not cut off")
    server.settled()


def test_silence_is_filled_with_comments() -> None:
    config = mock_config(engine={"mock_step_s": 0.25}, http={"sse_ping_s": 0.1})
    with serving(config) as slow:
        with slow.connect() as raw:
            raw.sendall(request(1, max_tokens=3))
            data = b""
            while b"[DONE]" not in data:
                data += raw.recv(65536)
        assert data.count(b": ping\n\n") >= 3
        assert data.index(b": ping\n\n") < data.index(b"data: {")
        chunks = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
        assert len(chunks) == 3 and chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_a_full_queue_is_503_with_a_time_to_come_back() -> None:
    config = mock_config(engine={"mock_step_s": 0.05}, admission={"max_requests": 16, "max_requests_per_key": 16})
    with serving(config) as small:
        held = [small.connect() for _ in range(16)]
        for i, raw in enumerate(held):
            raw.sendall(request(i))
        until(lambda: len(small.service.live) == 16, 5, "the sequences did not start")
        for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}, {"prompt": "x", "n": 3}):
            start = time.monotonic()
            status, headers, data = small.request("POST", TEXT, body)
            assert status == 503 and json.loads(data)["error"]["code"] == "overloaded"
            assert 1 <= int(headers["retry-after"]) <= 75
            assert time.monotonic() - start < 0.5
        assert small.request("GET", "/health")[0] == 200
        metrics = small.request("GET", "/metrics")[2].decode()
        assert 'vllm:admission_rejections_total{engine="0",model_name="mock",reason="overloaded"} 3.0' in metrics
        for raw in held:
            raw.close()
        small.settled()


def test_one_key_cannot_take_everything() -> None:
    config = mock_config(
        engine={"mock_step_s": 0.05}, admission={"max_requests": 64, "max_requests_per_key": 16}, server={"api_keys": ("one", "two")}
    )
    with serving(config) as small:
        held = [small.connect() for _ in range(16)]
        for i, raw in enumerate(held):
            raw.sendall(request(i).replace(b"Host:", b"Authorization: Bearer one\r\nHost:"))
        until(lambda: len(small.service.live) == 16, 5, "the sequences did not start")
        status, headers, data = small.request("POST", TEXT, {"prompt": "x", "max_tokens": 1}, {"Authorization": "Bearer one"})
        assert status == 429 and int(headers["retry-after"]) >= 1 and json.loads(data)["error"]["type"] == "rate_limit_error"
        assert small.request("POST", TEXT, {"prompt": "x", "max_tokens": 1}, {"Authorization": "Bearer two"})[0] == 200
        for raw in held:
            raw.close()
        small.settled()


def test_a_request_that_waits_too_long_is_503() -> None:
    config = mock_config(engine={"mock_step_s": 0.05, "max_batch_size": 1}, admission={"max_queue_age_s": 0.3})
    with serving(config) as small:
        with small.connect() as first:
            first.sendall(request(1, max_tokens=400))
            until(lambda: small.call(lambda: small.engine.snapshot().num_running) == 1, 5, "the first did not start")
            for stream in (True, False):
                status, headers, data = small.request("POST", TEXT, {"prompt": "x", "stream": stream})
                assert status == 503 and json.loads(data)["error"]["code"] == "overloaded" and "retry-after" in headers, data
        small.settled()
