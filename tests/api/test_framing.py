"""Raw bytes on the socket: framing tricks, oversized headers and bodies, and clients that drip (cases A1, A2, A3, C5)."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator

import pytest

from tests.api.harness import Running, mock_config, post_bytes, receive_all, serving, until

BODY = b'{"prompt": "hi", "max_tokens": 1}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HEADER_S, GAP_S, IDLE_S = 0.5, 0.6, 0.7


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    limits = {
        "max_body_bytes": 100_000, "header_timeout_s": HEADER_S, "body_gap_timeout_s": GAP_S, "keepalive_s": IDLE_S,
        "max_connections": 60, "max_headers": 32,
    }  # fmt: skip
    with serving(mock_config(http=limits)) as running:
        yield running
        running.settled()


def exchange(server: Running, data: bytes, shut: bool = False) -> bytes:
    with server.connect() as raw:
        raw.sendall(data)
        if shut:
            raw.shutdown(1)
        return receive_all(raw)


SMUGGLED = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
MALFORMED: dict[str, bytes] = {
    "length and chunked": POST + b"Content-Length: 33\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "two lengths": POST + b"Content-Length: 33\r\nContent-Length: 5\r\n\r\n" + BODY + SMUGGLED,
    "plus sign": POST + b"Content-Length: +33\r\n\r\n" + BODY,
    "minus sign": POST + b"Content-Length: -1\r\n\r\n" + BODY,
    "not a number": POST + b"Content-Length: 3x\r\n\r\n" + BODY,
    "xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + BODY,
    "chunked, identity": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + BODY,
    "bad chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + BODY + b"\r\n0\r\n\r\n",
    "bare line feed": b"GET /version HTTP/1.1\nHost: localhost\n\n",
    "folded header": b"GET /version HTTP/1.1\r\nHost: localhost\r\nX-A: b\r\n c\r\n\r\n",
    "NUL in a header": b"GET /version HTTP/1.1\r\nHost: localhost\r\nX-A: b\x00c\r\n\r\n",
    "NUL in the path": b"GET /ver\x00sion HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "space before colon": b"GET /version HTTP/1.1\r\nHost : localhost\r\n\r\n",
    "no host": b"GET /version HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /version HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    "host with a path": b"GET /version HTTP/1.1\r\nHost: x/health?\r\n\r\n",
    "HTTP/0.9": b"GET /version\r\n\r\n",
    "HTTP/2.0": b"GET /version HTTP/2.0\r\nHost: localhost\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "absolute form": b"GET http://localhost/version HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "CONNECT": b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS on a plain port": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 100,
    "garbage": b"\xff" * 100 + b"\r\n\r\n",
    "9 kB header": b"GET /version HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 9000 + b"\r\n\r\n",
    "9 kB path": b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "200 headers": b"GET /version HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(200)) + b"\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_get_one_error_and_a_closed_connection(server: Running, name: str, caplog: pytest.LogCaptureFixture) -> None:
    before = server.call(lambda: server.engine.snapshot().steps)
    with caplog.at_level(logging.DEBUG):
        answer = exchange(server, MALFORMED[name])
    assert len(re.findall(rb"HTTP/\d\.\d \d{3} ", answer)) == 1, answer
    assert answer.split(b" ", 2)[1] in (b"400", b"421", b"431"), answer
    head, _, body = answer.partition(b"\r\n\r\n")
    assert set(json.loads(body)) == {"error"}, answer
    assert b"application/json" in head
    assert sum(len(record.getMessage()) for record in caplog.records if record.name != "asyncio") <= 300
    assert not any(record.exc_info for record in caplog.records)
    assert server.call(lambda: server.engine.snapshot().steps) == before


def test_trace_and_unknown_methods(server: Running) -> None:
    for method in (b"TRACE", b"FOO"):
        answer = exchange(server, method + b" /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert answer.split(b" ", 2)[1] in (b"400", b"405"), answer


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    one = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = exchange(server, one * 499 + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 500


def test_a_body_of_exactly_the_limit_and_one_byte_more(server: Running) -> None:
    limit = server.config.http.max_body_bytes
    body = BODY[:-1] + b" " * (limit - len(BODY)) + b"}"
    assert server.request("POST", "/v1/completions", body)[0] == 200
    status, _, data = server.request("POST", "/v1/completions", body + b" ")
    assert status == 413 and json.loads(data)["error"]["code"] == "body_too_large"


def test_oversized_bodies_are_refused_before_they_are_read(server: Running) -> None:
    answer = exchange(server, POST + b"Content-Length: 1000000000000\r\n\r\n" + BODY)
    assert answer.startswith(b"HTTP/1.1 413")
    answer = exchange(server, POST + b"Content-Length: 1000000000000\r\nExpect: 100-continue\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    chunks = b"Transfer-Encoding: chunked\r\n\r\n" + (b"4000\r\n" + b" " * 0x4000 + b"\r\n") * 8
    assert exchange(server, POST + chunks).startswith(b"HTTP/1.1 413")


def test_tiny_chunks_are_one_body(server: Running) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"1\r\n \r\n" * 3000 + b"0\r\n\r\n"
    with server.connect() as raw:
        raw.sendall(POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunks)
        assert receive_all(raw).startswith(b"HTTP/1.1 200")


def test_expectations(server: Running) -> None:
    with server.connect() as raw:
        raw.sendall(POST + b"Content-Length: %d\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n" % len(BODY))
        assert raw.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw.sendall(BODY)
        assert receive_all(raw).startswith(b"HTTP/1.1 200")
    answer = exchange(server, POST + b"Content-Length: %d\r\nExpect: a-pony\r\n\r\n" % len(BODY) + BODY)
    assert answer.startswith(b"HTTP/1.1 417") and set(json.loads(answer.partition(b"\r\n\r\n")[2])) == {"error"}
    answer = exchange(server, b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\nExpect: a-pony\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 417") and set(json.loads(answer.partition(b"\r\n\r\n")[2])) == {"error"}


def test_a_body_that_ends_early(server: Running) -> None:
    exchange(server, POST + b"Content-Length: 100\r\n\r\n" + BODY, shut=True)
    assert server.post("/v1/completions", {"prompt": "hi", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize(
    ("sent", "after_s"),
    [
        (b"", HEADER_S), (b"GET /ver", HEADER_S), (b"GET /version HTTP/1.1\r\nHost: localhost\r\n", HEADER_S),
        (SMUGGLED, IDLE_S), (SMUGGLED + b"GET /ver", HEADER_S), (SMUGGLED + SMUGGLED + b"G", HEADER_S),
    ],
    ids=["nothing", "half a line", "half the headers", "idle", "idle, then half a line", "pipelined, then one byte"],
)  # fmt: skip
def test_connections_that_wait_are_closed(server: Running, sent: bytes, after_s: float) -> None:
    with server.connect() as raw:
        start = time.monotonic()
        for part in (sent[: len(sent) // 2], sent[len(sent) // 2 :]):
            if part:
                raw.sendall(part)
                time.sleep(0.02)
        receive_all(raw)
        assert after_s * 0.9 <= time.monotonic() - start < after_s + 1.5


def test_a_dripping_header_does_not_extend_its_deadline(server: Running) -> None:
    with server.connect() as raw:
        start = time.monotonic()
        try:
            while time.monotonic() - start < 3:
                raw.sendall(b"G" if time.monotonic() - start < 0.01 else b"E")
                time.sleep(0.05)
        except OSError:
            pass
        assert time.monotonic() - start < HEADER_S + 1.0


def test_a_silent_body_is_answered_408(server: Running) -> None:
    start = time.monotonic()
    answer = exchange(server, POST + b"Content-Length: 33\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408") and b"body_timeout" in answer
    assert GAP_S * 0.9 <= time.monotonic() - start < GAP_S + 3.0


def test_connections_beyond_the_cap_are_closed_and_the_rest_served(server: Running) -> None:
    gate = server.listener.gate
    until(lambda: gate.num_open == 0, 5, "connections are left from before")
    held = [server.connect() for _ in range(60)]
    try:
        until(lambda: gate.num_open == 60, 2, "not all connections arrived")
        with server.connect() as raw:
            assert receive_all(raw) == b""
        held[0].sendall(post_bytes("/v1/completions", BODY, "Connection: close\r\n"))
        assert receive_all(held[0]).startswith(b"HTTP/1.1 200")
        assert gate.num_refused >= 1
    finally:
        for raw in held:
            raw.close()
    until(lambda: gate.num_open == 0, 5, "connections are left")


def test_request_ids(server: Running) -> None:
    for given in ("abc-1.2_3", "A" * 64):
        assert server.request("GET", "/version", headers={"X-Request-Id": given})[1]["x-request-id"] == given
    for given in ("a b", "A" * 65, "<script>", "a\u00e9"):
        answer = exchange(
            server, f"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Request-Id: {given}\r\n\r\n".encode()
        )
        assert given.encode() not in answer and b"X-Request-Id: " in answer
