"""Every example of the four routes of seed 003, run as it stands: only paths and ports are replaced."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import tomllib
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from config.load import load_config
from tests.api.harness import mock_config, serving
from tests.docs.pages import ROOT, Place, blocks, generated, lines, place


def is_server(command: str) -> bool:
    return command.startswith(("numbatch serve api_server", "numbatch serve gradio")) and "--check" not in command


def test_http(commands: Path, tmp_path: Path, toy_model: Path) -> None:
    here = place(commands, tmp_path, toy_model, 23333)
    said = []
    with ExitStack() as servers:
        for language, block in blocks("routes-http"):
            if language == "toml":
                config = load_config(Path(here.file("x.toml", block))).config
                assert (config.model.model_name, config.server.server_port) == ("qwen", here.ports["23333"])
            elif language == "python":
                said.append(here.python(block))
            else:
                assert language == "sh"
                for command in lines(here.text(block)):
                    if is_server(command):
                        servers.enter_context(here.started(*shlex.split(command), port=here.ports["23333"]))
                    else:
                        said.append(here.shell(command))
    assert any('"object":"chat.completion"' in text for text in said)
    assert any(text.endswith("data: [DONE]\n\n") for text in said)
    (first, second) = [json.loads(text) for text in said if '"history_tokens"' in text]
    assert first["history_tokens"] == 0 < second["history_tokens"]
    assert any("vllm:num_requests_running" in text for text in said)


def test_demo(commands: Path, tmp_path: Path, toy_model: Path) -> None:
    here = place(commands, tmp_path, toy_model, 6006)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    with_gradio = importlib.util.find_spec("gradio") is not None
    with serving(mock_config()) as server:
        here.ports["23333"] = int(server.url.rpartition(":")[2])
        for language, block in blocks("routes-demo"):
            assert language == "sh"
            for command in lines(block):
                if command.startswith("pip install"):
                    assert command == "pip install 'numbatch[web]'" and "web" in extras
                elif not is_server(command):
                    assert "double enter to end input" in here.shell(command)
                elif with_gradio:
                    port = here.ports["6006"]
                    with (
                        here.started(*shlex.split(here.text(command)), port=port),
                        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page,
                    ):
                        assert b"gradio" in page.read().lower()


def test_python(commands: Path, tmp_path: Path, toy_model: Path) -> None:
    here = place(commands, tmp_path, toy_model, 8080)
    (job, application, client) = [block for _, block in blocks("routes-python")]
    assert [json.loads(line)["review"] for line in here.python(job).splitlines()][1] == "Never again."
    port = here.ports["8080"]
    with here.started("python", here.file("application.py", application), port=port):
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/talk", b"Hello")
        with urllib.request.urlopen(asked, timeout=30) as answer:
            assert answer.read().endswith(b"data: [DONE]\n\n")
    with serving(mock_config()) as server:
        here.ports["23333"] = int(server.url.rpartition(":")[2])
        here.python(client)
        assert generated(server.url) > 0


LANGUAGES: dict[str, tuple[str, Callable[[Place, str], str]]] = {
    "sh": ("curl", lambda here, block: here.shell(block)),
    "js": ("node", lambda here, block: here.run("node", here.file("chat.mjs", block))),
    "java": ("java", lambda here, block: here.run("java", "-XX:TieredStopAtLevel=1", here.file("Chat.java", block))),
    "go": ("go", lambda here, block: here.run("go", "run", here.file("chat.go", block))),
    "cpp": ("g++", lambda here, block: _cpp(here, block)),
}


def _cpp(here: Place, block: str) -> str:
    program = str(here.folder / "chat")
    here.run("g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-o", program, here.file("chat.cpp", block))
    return here.run(program)


def test_every_language_is_run() -> None:
    assert [language for language, _ in blocks("routes-languages")] == list(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_languages(language: str, commands: Path, tmp_path: Path, toy_model: Path) -> None:
    tool, run = LANGUAGES[language]
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not on this machine")
    here = place(commands, tmp_path, toy_model)
    ((_, block),) = blocks("routes-languages", language)
    with serving(mock_config()) as server:
        here.ports["23333"] = int(server.url.rpartition(":")[2])
        run(here, block)
        assert generated(server.url) > 0
