"""The Deployment's container from start to drain, and to death: its probes, its arguments, its stop, and the seed's curl.

The entry point runs from the image's tree with the Deployment's own arguments, as the image's user where the tests may choose.
Only the model is not there: the engine is the mock, on a port of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.harness import until
from tests.deploy.image import ROOT, Image, only
from tests.deploy.test_kubernetes import container
from tests.e2e.support import Server, Stream, descendants, free_port, is_alive, ranks

LONG = {"model": "qwen", "prompt": "tell me", "max_tokens": 300, "ignore_eos": True, "stream": True}


class Pod(Server):
    """The image's entry point with the Deployment's arguments, asked as the kubelet asks."""

    def __init__(self, image: Image, *sets: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = open(os.memfd_create("pod-log"), "w+b", buffering=0)
        self._headers = {"Content-Type": "application/json"}
        own = (f"server.server_port={self.port}", "model.path=", "engine.device=mock", "engine.session_len=4096", *sets)
        arguments = [*container()["args"], *(word for knob in own for word in ("--set", knob))]
        self.process = image.start(self._log.fileno(), *arguments, NUMBATCH_SERVER_SERVER_NAME="127.0.0.1")

    def probe(self, name: str) -> int:
        """The status that a probe of the Deployment gets; 0 where nobody answers. 200 to 399 is green."""
        return self.get(container()[f"{name}Probe"]["httpGet"]["path"])[0]

    def wait_for(self, name: str, status: int, timeout_s: float = 60) -> float:
        """Seconds until the probe says so."""
        started = time.monotonic()
        while (seen := self.probe(name)) != status:
            assert self.process.poll() is None, self.log
            assert time.monotonic() - started < timeout_s, f"{name} says {seen}"
            time.sleep(0.02)
        return time.monotonic() - started


@pytest.fixture
def pod(image: Image) -> Iterator[Pod]:
    with Pod(image, "engine.mock_step_s=0.01", "shutdown.drain_delay_s=1") as started:
        yield started


def seeds_curl(port: int) -> list[str]:
    """The seed's command as docs/deploy.md has it, with this server's port."""
    page = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    found = re.search(r"^curl http://localhost:8000/v1/chat/completions (?:.*\\\n)*.*$", page, re.MULTILINE)
    assert found is not None
    return shlex.split(found[0].replace("localhost:8000", f"127.0.0.1:{port}").replace("\\\n", " "))


def test_start_serve_and_drain(pod: Pod) -> None:
    pod.wait_for("startup", 200)
    assert [pod.probe(name) for name in ("startup", "readiness", "liveness")] == [200, 200, 200]

    probes, events = asyncio.run(stream_through_a_drain(pod))
    assert probes == [(503, 200)]  # red for the Service, green for the kubelet
    assert events[-1].data == "[DONE]"
    assert pod.wait(15) == 0


async def stream_through_a_drain(pod: Pod) -> tuple[list[tuple[int, int]], list[Any]]:
    """(readiness, liveness) just after SIGTERM, and the events of a stream that was running then."""
    stream = await Stream.open(pod.port, LONG)
    assert stream.status == 200
    await stream.reader.readuntil(b"\n\n")
    pod.signal(signal.SIGTERM)
    await asyncio.to_thread(pod.wait_for, "readiness", 503, 5)
    seen = [(pod.probe("readiness"), pod.probe("liveness"))]
    refused, body = pod.post("/v1/completions", {**LONG, "stream": False})
    assert refused == 503 and "shut" in body["error"]["message"].lower()
    events = await stream.events()
    stream.close()
    return seen, events


def test_before_it_is_ready_it_lives(image: Image) -> None:
    """A model that takes long: red for the Service, green for the kubelet, and a stop is quick."""
    with Pod(image, "engine.executor=process") as pod:
        seen = set()
        while (now := (pod.probe("readiness"), pod.probe("liveness")))[0] != 200:
            seen.add(now)
            assert pod.process.poll() is None, pod.log
        assert (503, 200) in seen
        assert seen <= {(0, 0), (0, 200), (503, 200)}
        processes = descendants(pod.process.pid)
        os.kill(ranks(pod.process.pid)[0], signal.SIGKILL)  # the engine dies
        live = []
        while pod.process.poll() is None:
            live.append((pod.probe("readiness"), pod.probe("liveness")))
            time.sleep(0.02)
        assert (503, 503) in live
        assert pod.wait(5) == 5
        until(lambda: not any(map(is_alive, processes)), 5, "processes of the pod are left")


def test_the_seeds_curl(pod: Pod) -> None:
    """The shape that the guide shows: id, object, created, model, one choice with logprobs null, usage."""
    pod.wait_for("readiness", 200)
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    ended = subprocess.run([*seeds_curl(pod.port), "--silent"], capture_output=True, text=True, timeout=30, check=True)
    answer = json.loads(ended.stdout)
    assert {"id", "object", "created", "model", "choices", "usage"} <= set(answer)
    assert isinstance(answer["id"], str) and isinstance(answer["created"], int)
    assert (answer["object"], answer["model"]) == ("chat.completion", "qwen")
    (choice,) = answer["choices"]
    assert choice["index"] == 0 and choice["logprobs"] is None and choice["finish_reason"] in ("stop", "length")
    assert choice["message"]["role"] == "assistant" and isinstance(choice["message"]["content"], str)
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] and 0 < usage["completion_tokens"] <= 10
    again = subprocess.run([*seeds_curl(pod.port), "--silent"], capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(again.stdout)["choices"][0]["message"] == choice["message"]  # its seed is honoured


def test_the_images_own_health_check(pod: Pod, image: Image) -> None:
    pod.wait_for("readiness", 200)
    words = json.loads(only("HEALTHCHECK").partition("CMD")[2])
    command = [image.command()[0], *words[1:]]

    def healthy(port: int) -> bool:
        environ = image.environ(NUMBATCH_SERVER_SERVER_PORT=str(port))
        return subprocess.run(command, env=environ, cwd=image.app, capture_output=True, timeout=30, **image.user()).returncode == 0

    assert words[0] == "python"
    assert healthy(pod.port)
    assert not healthy(free_port())


def test_the_image_is_not_written_to(image: Image) -> None:
    """Everything that a run leaves lies in the one writable folder."""
    before = {path: path.stat().st_mtime_ns for path in Path(image.app).rglob("*")}
    with Pod(image, "shutdown.drain_delay_s=0") as pod:
        pod.wait_for("readiness", 200)
        pod.signal(signal.SIGTERM)
        assert pod.wait(15) == 0
    assert {path: path.stat().st_mtime_ns for path in Path(image.app).rglob("*")} == before
