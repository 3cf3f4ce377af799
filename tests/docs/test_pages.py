"""README.md, docs/cli.md and docs/workspace.md: what can be typed from them is typed here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from config.load import load_config
from config.qos import read_qos
from tests.api.harness import mock_config, serving
from tests.docs.pages import ROOT, Place, fences, generated, place

README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMED = "SmolLM2-135M-Instruct"  # what the README asks


def fenced(page: str, language: str = "") -> list[str]:
    return [text for name, text in fences(page) if name == language]


def test_the_readme_talks_to_a_server(commands: Path, tmp_path: Path, toy_model: Path) -> None:
    (curl,) = [block for block in fenced(README) if block.startswith("curl")]
    (openai,) = [block for block in fenced(README, "python") if "openai" in block]
    here = place(commands, tmp_path, toy_model)
    with serving(mock_config(model={"model_name": NAMED})) as server:
        here.ports["23333"] = int(server.url.rpartition(":")[2])
        assert here.shell(curl).endswith("data: [DONE]\n\n")
        before = generated(server.url)
        here.python(openai)
        assert generated(server.url) > before


def test_the_readmes_own_model(commands: Path, tmp_path: Path, toy_model: Path) -> None:
    here = place(commands, tmp_path, toy_model)

    def local(text: str) -> str:
        return text.replace("models/Qwen2.5-0.5B-Instruct", str(toy_model)).replace(".venv/bin/", "")

    (pipeline,) = [block for block in fenced(README, "python") if "pipeline" in block]
    assert here.python(local(pipeline))
    (chat,) = [block for block in fenced(README) if "numbatch chat" in block]
    assert "double enter" in here.shell(f"printf 'exit\\n\\n' | {local(chat)}")
    (toml,) = fenced(README, "toml")
    file = here.file("x.toml", local(toml))
    assert load_config(Path(file)).config.model.path == str(toy_model)
    (start,) = [block for block in fenced(README) if block.startswith("python server.py")]
    for flag in ("--check", "--print-effective", "--plan"):
        assert f"`{flag}`" in README
        here.shell(f"{start.strip().replace('x.toml', file)} {flag} --set engine.device=reference")


def test_the_example_of_the_flags_is_what_is_said(commands: Path, tmp_path: Path, toy_model: Path) -> None:
    """docs/cli.md shows a command and what it prints."""
    (block,) = [block for block in fenced((ROOT / "docs/cli.md").read_text(encoding="utf-8")) if block.startswith("$ ")]
    command, _, shown = block.removeprefix("$ ").partition("\n")
    here = place(commands, tmp_path, toy_model)
    said = here.shell(f"{command} --check 2>&1").replace(str(toy_model), "path/to/model")
    assert said == shown + "the configuration can be used\n"


def test_the_commands_of_the_workspace_page(commands: Path, tmp_path: Path, toy_model: Path) -> None:
    page = (ROOT / "docs/workspace.md").read_text(encoding="utf-8")
    convert, chat, serve = (shlex.split(line) for line in re.findall(r"^    (numbatch .*)$", page, re.MULTILINE))
    here = InFolder(commands, tmp_path, toy_model)
    here.run(*(str(toy_model) if word == "./internlm-chat-7b" else word for word in convert))
    assert (tmp_path / "workspace/triton_models/weights/config.ini").is_file()
    assert "double enter" in here.run("bash", "-c", f"printf 'exit\\n\\n' | {shlex.join(chat)} --device mock")
    here.run(*serve, "--device", "mock", "--check")


class InFolder(Place):
    """Commands run where their files shall lie."""

    def run(self, *words: str, code: int = 0) -> str:
        return super().run("bash", "-c", f"cd {shlex.quote(str(self.folder))} && {shlex.join(words)}", code=code)


def test_the_qos_file_of_the_api_page_is_read(tmp_path: Path) -> None:
    (block,) = [text for text in fenced((ROOT / "docs/api.md").read_text(encoding="utf-8"), "json") if "user_groups" in text]
    (tmp_path / "qos.json").write_text(block)
    found = read_qos(str(tmp_path / "qos.json"))
    assert found is not None and [group.name for group in found.groups] == ["Platinum", "Gold", "Silver", "Bronze"]
