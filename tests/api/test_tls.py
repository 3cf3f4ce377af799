"""The same over TLS: streams, clients that leave, old protocol versions, plain text on the port (C4, E4)."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.protocol import tls_context
from tests.api.harness import Running, mock_config, post_bytes, receive_all, serving, until

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which makes the test certificate, is not installed")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.fixture(scope="module")
def server(certificate: tuple[str, str]) -> Iterator[Running]:
    knobs = {"ssl_certfile": certificate[0], "ssl_keyfile": certificate[1]}
    config = mock_config(server=knobs, engine={"mock_step_s": 0.002, "session_len": 8192}, http={"header_timeout_s": 0.5})
    with serving(config) as running:
        yield running
        running.settled()


def connect(server: Running, certificate: tuple[str, str], newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=certificate[0])
    context.minimum_version, context.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, newest
    return context.wrap_socket(server.connect(), server_hostname="localhost")


def request(max_tokens: int) -> bytes:
    body = {"prompt": "x", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    return post_bytes("/v1/completions", json.dumps(body).encode(), "Connection: close\r\n")


def test_a_stream(server: Running, certificate: tuple[str, str]) -> None:
    with connect(server, certificate) as raw:
        raw.sendall(request(50))
        answer = receive_all(raw)
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"data: {") > 40 and b"data: [DONE]" in answer


def test_a_client_that_leaves(server: Running, certificate: tuple[str, str]) -> None:
    raw = connect(server, certificate)
    raw.sendall(request(8000))
    until(lambda: server.call(lambda: server.engine.snapshot().num_running) == 1, 5, "the sequence did not start")
    raw.close()
    until(lambda: server.call(lambda: server.engine.snapshot().num_running) == 0, 2, "the sequence goes on")
    server.settled()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the old version that is tried
def test_old_versions_are_refused(server: Running, certificate: tuple[str, str]) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        connect(server, certificate, ssl.TLSVersion.TLSv1_1)
    with connect(server, certificate, ssl.TLSVersion.TLSv1_2) as raw:
        assert raw.version() == "TLSv1.2"


def test_plain_text_on_the_port(server: Running) -> None:
    with server.connect() as raw:
        raw.sendall(request(1))
        assert b"200" not in receive_all(raw)


def test_a_handshake_that_does_not_come_is_cut_off(server: Running) -> None:
    with server.connect() as raw:
        start = time.monotonic()
        assert receive_all(raw) == b""
        assert time.monotonic() - start < 3


def test_a_certificate_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        tls_context(str(tmp_path / "none.pem"), str(tmp_path / "none.key"))
    assert tls_context("", "") is None


def test_sockets_are_closed(server: Running) -> None:
    until(lambda: server.listener.gate.num_open == 0, 3, "connections are left")
