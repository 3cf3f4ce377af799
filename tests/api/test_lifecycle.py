"""The process: start, drain, death, and the exit code that says which (bar 10, contract 2.3, cases B3, B6, B7, B10, B13)."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.api.harness import post_bytes, receive_all, until
from tests.fixtures.toy import toy_checkpoint

SERVER = Path(__file__).resolve().parent.parent.parent / "server.py"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
QUICK = {"engine.device": "mock", "cache.num_blocks": 512, "engine.session_len": 4096, "server.log_stats_s": 0}


class Process:
    """`python server.py` with a free port."""

    def __init__(self, **knobs: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        values = {**QUICK, "server.server_port": self.port, **{key.replace("__", "."): value for key, value in knobs.items()}}
        sets = [f"--set={key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]
        self.process = subprocess.Popen([sys.executable, str(SERVER), *sets], stderr=subprocess.PIPE, text=True)

    def health(self, path: str = "/health") -> int:
        """The status, 0 when nobody listens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def ready(self) -> None:
        until(lambda: self.health() == 200, 30, "the server did not get ready")

    def stream(self, max_tokens: int = 400, **fields: Any) -> socket.socket:
        """An answer that has begun."""
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        body = {"prompt": "x", "seed": 1, "stream": True, "ignore_eos": True, "max_tokens": max_tokens, **fields}
        raw.sendall(post_bytes("/v1/completions", json.dumps(body).encode(), "Connection: close\r\n"))
        assert raw.recv(15, socket.MSG_WAITALL) == b"HTTP/1.1 200 OK"
        return raw

    def post(self) -> tuple[int, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("POST", "/v1/completions", b'{"prompt": "x", "max_tokens": 1}', {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, dict(response.getheaders())

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def end(self, timeout_s: float = 15) -> tuple[int, str]:
        """Exit code and everything that was logged."""
        _, log = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, log


@contextmanager
def started(**knobs: Any) -> Iterator[Process]:
    server = Process(**knobs)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        if server.process.stderr is not None and not server.process.stderr.closed:
            server.process.communicate()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def last_events(raw: socket.socket) -> list[str]:
    text = receive_all(raw).decode()
    return [block.partition("data: ")[2].partition("\r\n")[0] for block in text.split("\n\n") if "data: " in block]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_idle_server_stops_at_once(number: int) -> None:
    with started() as server:
        server.ready()
        start = time.monotonic()
        server.process.send_signal(number)
        assert server.end()[0] == 0
        assert time.monotonic() - start < 5


def test_running_streams_finish_and_new_requests_are_refused() -> None:
    with started(engine__mock_step_s=0.005, shutdown__drain_delay_s=1.0) as server:
        server.ready()
        streams = [server.stream(max_tokens=300, seed=i) for i in range(5)]
        server.process.terminate()
        until(lambda: server.health() == 503, 2, "readiness did not go red while the listener was open")
        assert server.health("/health/live") == 200
        status, headers = server.post()
        assert status == 503 and int(headers["Retry-After"]) >= 1 and headers["Connection"].lower() == "close"
        for raw in streams:
            assert last_events(raw)[-1] == "[DONE]"
        code, log = server.end()
        assert code == 0, log
        assert "Traceback" not in log


def test_a_drain_that_takes_too_long_ends_streams_with_an_error_event() -> None:
    with started(engine__mock_step_s=0.01, shutdown__drain_timeout_s=0.5) as server:
        server.ready()
        streams = [server.stream(max_tokens=3000, seed=i) for i in range(3)]
        start = time.monotonic()
        server.process.terminate()
        for raw in streams:
            events = last_events(raw)
            assert "[DONE]" not in events
            assert json.loads(events[-1])["error"]["code"] == "aborted"
        assert server.end()[0] == 0
        assert time.monotonic() - start < 5


def test_a_second_signal_skips_the_waiting() -> None:
    with started(engine__mock_step_s=0.01, shutdown__drain_delay_s=60, shutdown__drain_timeout_s=60) as server:
        server.ready()
        raw = server.stream(max_tokens=3000)
        server.process.terminate()
        until(lambda: server.health() == 503, 2, "no drain")
        server.process.terminate()
        assert "error" in json.loads(last_events(raw)[-1])
        assert server.end(5)[0] == 0


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_a_stop_while_starting(executor: str) -> None:
    with started(engine__executor=executor) as server:
        until(lambda: server.health("/health/live") == 200, 30, "nobody listens")
        if executor == "process":  # which takes seconds to load
            status, headers = server.post()
            assert status == 503 and int(headers["Retry-After"]) >= 1 and server.health() == 503
        server.process.terminate()
        start = time.monotonic()
        assert server.end()[0] == 0
        assert time.monotonic() - start < 5


def test_the_death_of_a_rank_is_loud() -> None:
    """kill -9: streams get an error event within 5 s, no fake [DONE], exit code 5, no orphan."""
    with started(engine__executor="process", engine__tp=2, engine__mock_step_s=0.01) as server:
        server.ready()
        ranks = [pid for pid in server.children() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        everybody = server.children()
        assert len(ranks) == 2
        raw = server.stream(max_tokens=4000)
        start = time.monotonic()
        os.kill(ranks[1], signal.SIGKILL)
        events = last_events(raw)
        assert time.monotonic() - start < 5
        assert "[DONE]" not in events and json.loads(events[-1])["error"]["code"] == "engine_dead"
        code, log = server.end()
        assert code == 5, log
        until(lambda: not any(alive(pid) for pid in everybody), 5, "orphans are left")


def test_a_hung_step_ends_the_process_with_code_6() -> None:
    with started(engine__mock_step_s=3, engine__step_timeout_s=0.5) as server:
        server.ready()
        raw = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        raw.sendall(post_bytes("/v1/completions", b'{"prompt": "x"}'))
        assert b"HTTP/1.1 503" in receive_all(raw)
        assert server.end()[0] == 6


def test_children_go_when_the_server_is_killed() -> None:
    with started(engine__executor="process", engine__tp=2) as server:
        server.ready()
        everybody = server.children()
        assert everybody
        server.process.kill()
        until(lambda: not any(alive(pid) for pid in everybody), 5, "children outlive the server")


def run(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, str(SERVER), *arguments], capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout, done.stderr


def test_wrong_configurations_exit_with_2_and_one_line(tmp_path: Path) -> None:
    config = tmp_path / "x.toml"
    config.write_text("[server]\nserver_prot = 1\n")
    for arguments in (["--config", str(config)], ["--config", str(tmp_path / "none.toml")], ["--set", "a.b=c"], []):
        code, out, err = run(*arguments)
        assert code == 2 and out == "" and err.count("\n") == 1, (arguments, err)


def test_a_public_bind_without_a_key_is_refused() -> None:
    code, _, err = run("--set", "engine.device=mock", "--set", "server.server_name=0.0.0.0")
    assert code == 2 and "api_keys" in err and "insecure" in err
    assert run("--set", "engine.device=mock", "--set", "server.server_name=0.0.0.0", "--insecure", "--check")[0] == 0


def test_a_port_in_use_is_said_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run("--set", "engine.device=mock", "--set", f"server.server_port={port}")
        assert code == 2 and str(port) in err and "Traceback" not in err


def test_a_broken_model_exits_with_3(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\xff" * 100)
    code, _, err = run("--set", f"model.path={broken}", "--set", "server.server_port=0")
    assert code == 3 and "broken.gguf" in err and "Traceback" not in err
    code, _, err = run("--set", f"model.path={tmp_path / 'nothing'}", "--set", "server.server_port=0")
    assert code == 3 and "nothing" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "this folder has no config.json; a Hugging Face model's folder has one."),
        ({"x.gguf": b"GGUF"}, "this folder has no config.json; did you mean "),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "pytorch_model.bin is a pickle, which numbatch does not open"),
        ({"config.json": b"{}", "model.safetensors": POINTER}, "is what Git LFS leaves in the file's place; run git lfs pull"),
    ],
)
def test_a_folder_that_is_plainly_no_model_says_why(files: dict[str, bytes], sentence: str, tmp_path: Path) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    code, _, err = run("--set", f"model.path={tmp_path}", "--set", "server.server_port=0")
    assert code == 3
    assert sentence in err


def test_ranks_that_the_model_has_no_heads_for_are_refused_before_they_start(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path / "x")
    code, _, err = run(
        "--set", f"model.path={path}", "--set", "engine.tp=64", "--set", "server.server_port=0", "--set", "engine.device=cpu"
    )
    assert code == 2
    assert "engine.tp = 64 does not fit 4 heads over 2 KV heads; use fewer ranks." in err


def test_a_model_that_is_nowhere_exits_with_3() -> None:
    """A hub name without a network (the tests' environment says HF_HUB_OFFLINE)."""
    code, _, err = run("--set", "model.path=nobody/nothing", "--set", "server.server_port=0")
    assert code == 3 and "nobody/nothing" in err and "Traceback" not in err


def test_the_memory_plan() -> None:
    code, out, err = run("--set", "engine.device=mock", "--plan")
    assert code == 2 and out == "" and err.count("\n") == 1


def test_a_log_that_is_gone_does_not_disturb_serving() -> None:
    with started() as server:
        server.ready()
        assert server.process.stderr is not None
        server.process.stderr.close()
        for _ in range(5):
            assert server.post()[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        connection.request("GET", "/metrics")
        lost = [line for line in connection.getresponse().read().decode().splitlines() if line.startswith("numbatch:lost_log_lines_total")]
        assert float(lost[0].split()[-1]) >= 1
        server.process.terminate()
        assert server.process.wait(10) == 0


def test_effective_configuration_hides_keys() -> None:
    code, out, _ = run("--set", "engine.device=mock", "--set", "server.api_keys=sk-secret", "--print-effective")
    assert code == 0 and "sk-secret" not in out and "session_len" in out


def test_few_file_descriptors_leave_room_for_health() -> None:
    with started(http__max_connections=5000) as server:
        server.ready()
    limit = ["sh", "-c", f"ulimit -n 128; exec {sys.executable} {SERVER} --set=engine.device=mock --set=server.server_port=0"]
    with subprocess.Popen(limit, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "ready" in line:
                break
        process.terminate()
    assert any("64 connections" in line for line in lines), lines


def test_the_step_trace_has_the_seeds_fields_and_no_text() -> None:
    with started(server__log_level="DEBUG") as server:
        server.ready()
        raw = server.stream(max_tokens=3, prompt="a secret text")
        receive_all(raw)
        server.process.terminate()
        _, log = server.end()
    assert "dc_bsz = 0, pf_bsz = 1, n_tok = 13, max_q = 13, max_k = 13" in log, log
    assert "dc_bsz = 1, pf_bsz = 0, n_tok = 1, max_q = 1, max_k = 14" in log
    assert "secret" not in log
