"""The flags of LMDeploy and vLLM: each has an answer, what is named in it is there, and the pages show all of it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from cli.arguments import RENAMED
from cli.flags import BY_NAME, REFUSED
from cli.main import main
from cli.theirs import LMDEPLOY, VLLM, Theirs, table
from config.load import KNOBS

FILE = Path(__file__).resolve().parents[1] / "fixtures" / "their_flags.json"
SERVERS = {"lmdeploy 0.18.0": LMDEPLOY, "vllm 0.33.0": VLLM}


@pytest.mark.parametrize("server", SERVERS)
def test_every_flag_has_one_answer(server: str) -> None:
    """The lists were read from the argument parsers in these releases' wheels."""
    theirs = json.loads(FILE.read_text(encoding="utf-8"))[server]
    answered = [name for row in SERVERS[server] for name in row.names]
    assert sorted(answered) == sorted(theirs)


@pytest.mark.parametrize("row", [*LMDEPLOY, *VLLM], ids=lambda row: row.names[0])
def test_what_an_answer_names_is_there(row: Theirs) -> None:
    for ours in row.ours.split():
        section, _, name = ours.partition(".")
        assert ours in BY_NAME or ours in ("--config", "MODEL") or name in KNOBS.get(section, {}), ours
    for word in row.why.replace("=", " ").replace(",", " ").replace(";", " ").split():
        assert not word.startswith("--") or word.rstrip(".") in {*BY_NAME, "--set", "--plan"}, word


@pytest.mark.parametrize("row", [*LMDEPLOY, *VLLM], ids=lambda row: row.names[0])
def test_a_flag_is_ours_or_read_as_ours_or_refused(row: Theirs) -> None:
    for name in row.names:
        ways = [name in BY_NAME or name == "--config", RENAMED.get(name) in BY_NAME, name in REFUSED]
        assert sum(ways) == 1, name
        if "read as such" in row.why:
            assert RENAMED[name] in row.ours.split()


@pytest.mark.parametrize("page", ["lmdeploy", "vllm"])
def test_the_page_has_the_table(root: Path, page: str) -> None:
    rows = LMDEPLOY if page == "lmdeploy" else VLLM
    text = (root / "docs" / f"from-{page}.md").read_text(encoding="utf-8")
    assert f"equal to cli/theirs.py -->\n{table(rows)}\n<!-- end -->" in text


@pytest.mark.parametrize("page", ["lmdeploy", "vllm"])
def test_command_lines_of_the_page_are_understood(root: Path, page: str, toy_awq: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second column of "Command lines": with the model's path replaced, the configuration can be used."""
    text = (root / "docs" / f"from-{page}.md").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith("    numbatch serve api_server ")]
    assert commands
    for command in commands:
        words = shlex.split(command.replace("path/to/model", str(toy_awq)))[1:]
        assert main([*words, "--device", "mock", "--check"]) == 0, capsys.readouterr().err
