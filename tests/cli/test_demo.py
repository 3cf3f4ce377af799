"""`make demo` without a model: the greeting comes when the server is ready, a signal stops both, and both agree how it ended."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.demo import greeting
from config.load import load_config

LIMIT_S = 60


@pytest.fixture
def port() -> Iterator[int]:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        number = listener.getsockname()[1]
    yield number


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cli.demo", "--config", str(root / "config/mock.toml"), *arguments]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_demo_greets_and_stops(root: Path, port: int, number: signal.Signals) -> None:
    demo = start(root, "--set", f"server.server_port={port}")
    try:
        assert demo.stdout is not None
        said = ""
        while "ready after" not in said:
            line = demo.stdout.readline()
            assert line, f"the demo ended: {demo.communicate(timeout=LIMIT_S)[1]}"
            said += line
        assert f"http://127.0.0.1:{port}/v1/chat/completions" in said
        demo.send_signal(number)
        if number is signal.SIGINT:  # a terminal sends it to the server as well; here nobody does
            demo.terminate()
        assert demo.wait(LIMIT_S) == 0
    finally:
        demo.kill()
        demo.communicate(timeout=LIMIT_S)
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", port)) != 0, "the server is still there"


def test_a_taken_port_is_said_before_anything_starts(root: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        number = other.getsockname()[1]
        done = start(root, "--set", f"server.server_port={number}")
        out, err = done.communicate(timeout=LIMIT_S)
    assert done.returncode == 2
    assert f"port {number} is taken by another program" in err
    assert out == ""


def test_a_bad_configuration_is_one_line(root: Path) -> None:
    done = start(root, "--set", "engine.tpp=2")
    _, err = done.communicate(timeout=LIMIT_S)
    assert done.returncode == 2
    assert err.splitlines() == ["demo: --set:engine.tpp: unknown key; did you mean engine.tp?"]


def test_the_curl_line_can_be_pasted() -> None:
    sets = ["model.path=m.gguf", "server.server_name=0.0.0.0", "server.api_keys=k"]
    text = greeting(load_config(None, sets=sets, environ={}).config)
    assert "http://127.0.0.1:23333/v1/chat/completions" in text
    assert '"model": "m.gguf"' in text
    assert "Authorization: Bearer YOUR_KEY" in text
