"""`numbatch.serve` and `numbatch.client`: a server in a child process, and what its client says of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from numbatch import client, serve
from tests.e2e.support import is_alive

if TYPE_CHECKING:
    from api.remote import RunningServer

KEY = "a-key-of-the-test"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serve(device="mock", model_name="m", server_port=0, api_keys=KEY, num_blocks=256) as running:
        yield running


def test_the_client_asks_and_answers(server: RunningServer) -> None:
    assert server.available_models == server.get_model_list() == ["m"]
    (answer,) = server.chat_completions_v1("m", "hello", max_tokens=5, temperature=0)
    text = answer["choices"][0]["message"]["content"]
    chunks = list(server.chat_completions_v1("m", [{"role": "user", "content": "hello"}], stream=True, max_tokens=5, temperature=0))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    assert "".join(server.chat([{"role": "user", "content": "hello"}], max_tokens=5, temperature=0)) == text
    (continued,) = server.completions_v1("m", "hello", max_tokens=4)
    assert continued["usage"]["completion_tokens"] <= 4


def test_a_session_that_the_server_keeps(server: RunningServer) -> None:
    first, *_ = server.chat_interactive_v1("one", session_id=3, interactive_mode=True, request_output_len=5, ignore_eos=True)
    assert first["tokens"] == 5
    pieces = list(server.chat_interactive_v1("two", 3, True, stream=True, request_output_len=5, ignore_eos=True))
    assert pieces[-1]["finish_reason"] == "length"
    assert pieces[-1]["history_tokens"] > 5
    list(server.chat_interactive_v1("", 3, False, request_output_len=0))


def test_ids_and_perplexity(server: RunningServer) -> None:
    assert server.encode("hi") == ([104, 105], 2)
    assert server.encode(["hi", "a"]) == ([[104, 105], [97]], [2, 1])
    assert len(server.get_ppl("some text")) == 1
    assert len(server.get_ppl(["some text", "more"])) == 2


def test_errors_are_pythons_with_the_servers_sentence(server: RunningServer) -> None:
    with pytest.raises(ValueError, match="max_tokens must be between"):
        list(server.chat_completions_v1("m", "x", max_tokens=-1))
    with pytest.raises(ValueError, match="There is no model"):
        list(server.chat_completions_v1("other", "x", stream=True))
    with client(server.url) as stranger, pytest.raises(ValueError, match="API key"):
        stranger.get_model_list()
    with client(server.url, KEY) as friend:
        assert friend.is_ready()
    with client("http://127.0.0.1:9") as nobody:
        assert not nobody.is_ready()
        with pytest.raises(ConnectionError, match="Nobody answers at http://127.0.0.1:9"):
            nobody.get_model_list()


def test_a_key_is_on_no_command_line(server: RunningServer) -> None:
    command = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
    assert b"server.py" in command
    assert KEY.encode() not in command


def test_leaving_a_stream_frees_the_server(server: RunningServer) -> None:
    stream = server.chat([{"role": "user", "content": "long"}], max_tokens=4000, ignore_eos=True)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    end = time.monotonic() + 10
    while running_on(server):
        assert time.monotonic() < end, "the server still writes the answer that nobody reads"
        time.sleep(0.05)


def running_on(server: RunningServer) -> float:
    (line,) = (line for line in metrics_of(server) if line.startswith("vllm:num_requests_running{"))
    return float(line.rpartition(" ")[2])


def metrics_of(server: RunningServer) -> list[str]:
    with urllib.request.urlopen(urllib.request.Request(server.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"})) as answer:
        return str(answer.read().decode()).splitlines()


def test_a_wildcard_address_is_reached_over_loopback() -> None:
    with client("http://0.0.0.0:23333/") as one, client("localhost:8000") as two, client("http://[::]:1") as three:
        assert (one.url, two.url, three.url) == ("http://127.0.0.1:23333", "http://localhost:8000", "http://[::1]:1")


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(RuntimeError, match="exit code 3 before it was ready: the model cannot be read"):
        serve("nowhere/at-all.gguf", server_port=0)
    with pytest.raises(ValueError, match="there is no api key"):
        serve(device="mock", server_name="0.0.0.0", server_port=0)


def test_a_taken_port_is_refused(server: RunningServer) -> None:
    with pytest.raises(RuntimeError, match="is taken"):
        serve(device="mock", server_port=int(server.url.rpartition(":")[2]))


def test_a_script_that_ends_with_serve_serves_until_it_is_interrupted(root: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from numbatch import serve\nserve(device='mock', server_port=0)\n")
    running = subprocess.Popen([sys.executable, str(script)], cwd=root, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    try:
        said = running.stderr.readline()
        url = said.split(" on ")[1].split(" ")[0]
        with client(url) as reached:
            assert reached.is_ready()
            os.kill(running.pid, signal.SIGINT)
            assert running.wait(30) == 0
            assert not reached.is_ready()
    finally:
        running.kill()
        running.stderr.close()  # reading to its end would wait for the script's server
        running.wait()


def test_a_script_that_is_killed_takes_its_server_along(root: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\nfrom numbatch import serve\ns = serve(device='mock', server_port=0)\nprint(s.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=root, capture_output=True, text=True, timeout=60
    )  # until the server closes stderr
    assert done.returncode == -signal.SIGKILL
    end = time.monotonic() + 10
    while is_alive(int(done.stdout)):
        assert time.monotonic() < end, "the server outlives the script"
        time.sleep(0.05)


def test_a_server_told_to_watch_its_input_needs_a_pipe(root: Path) -> None:
    command = [sys.executable, "server.py", "--config", "config/mock.toml", "--set", "server.server_port=0", "--stop-with-stdin"]
    done = subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "standard input is no pipe" in done.stderr
    typed = subprocess.run(command, cwd=root, input="what is written there is not read\n", capture_output=True, text=True, timeout=60)
    assert typed.returncode == 0, typed.stderr


def test_a_script_that_fails_takes_its_server_along(root: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from numbatch import serve\ns = serve(device='mock', server_port=0)\nprint(s.process.pid, flush=True)\nraise SystemError\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert not Path(f"/proc/{done.stdout.strip()}").exists()
