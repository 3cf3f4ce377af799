"""Pages whose examples are run: their blocks, and a place to run them in, with paths and ports replaced by what is there."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.support import free_port

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120.0
MOCK = {
    "NUMBATCH_ENGINE_DEVICE": "mock",
    "NUMBATCH_MODEL_DTYPE": "float32",
    "NUMBATCH_CACHE_CACHE_MAX_BYTES": "16000000",
    "PYTHONIOENCODING": "utf-8",
}


def blocks(page: str, language: str = "") -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of docs/PAGE.md, all or those in `language`."""
    found = fences((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))
    return [(name, block) for name, block in found if language in ("", name)]


def fences(text: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@dataclass
class Place:
    """Where a page's examples run. `ports`: a port of the page -> one that is free here."""

    commands: Path
    folder: Path
    model: Path
    ports: dict[str, int] = field(default_factory=dict)

    def text(self, block: str) -> str:
        """The block with the model's path and the ports that are here."""
        for port, here in self.ports.items():
            block = re.sub(rf"\b{port}\b", str(here), block)
        return block.replace("path/to/model", str(self.model))

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, **MOCK, "PATH": f"{self.commands}{os.pathsep}{os.environ['PATH']}"}

    def run(self, *words: str, code: int = 0) -> str:
        """What a command says; it must end with `code`."""
        done = subprocess.run(words, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=LIMIT_S, errors="replace")
        assert done.returncode == code, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def shell(self, block: str) -> str:
        return self.run("bash", "-e", "-o", "pipefail", "-c", self.text(block))

    def file(self, name: str, block: str) -> str:
        path = self.folder / name
        path.write_text(self.text(block), encoding="utf-8")
        return str(path)

    def python(self, block: str) -> str:
        return self.run(sys.executable, self.file("example.py", block))

    @contextmanager
    def started(self, *words: str, port: int) -> Iterator[None]:
        """A program, from when its port answers until Ctrl-C."""
        process = subprocess.Popen(
            words, cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            end = time.monotonic() + LIMIT_S
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < end
                time.sleep(0.05)
            yield
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def generated(url: str) -> float:
    """Tokens that a server has made. A text may be empty: an unseeded answer can end at once."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as metrics:
        (count,) = re.findall(rb"^vllm:generation_tokens_total\S* (\S+)$", metrics.read(), re.MULTILINE)
    return float(count)


def lines(block: str) -> list[str]:
    """Commands of a block, continued lines joined."""
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def place(commands: Path, folder: Path, model: Path, *ports: int) -> Place:
    return Place(commands, folder, model, {str(port): free_port() for port in ports})
