"""Every `numbatch COMMAND ...` that a page writes: the command is there, and so is each of its flags."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest

from cli.arguments import RENAMED, Parser
from cli.bench import BENCHES
from cli.lite import COMMANDS as LITE
from cli.main import COMMANDS
from tests.docs.pages import fences
from tests.house.tree import ROOT, files

PAGES = [name for name in files() if name.endswith(".md") and not name.startswith(("tests/", "bench/", "CHANGES"))]
COMMAND = re.compile(r"(?:\$ |.*\| )?(?:\.venv/bin/)?(numbatch [a-z].*)")


def written(page: str) -> set[str]:
    """In blocks, in indented lines and between backquotes."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = [line for _, block in fences(text) for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(\S.*)$", prose, re.MULTILINE)
    quoted = re.findall(r"`((?:\.venv/bin/)?numbatch [^`\n]+)`", prose)
    return {found[1] for line in (*blocks, *indented, *quoted) if (found := COMMAND.fullmatch(line.strip()))}


def parser_of(words: list[str]) -> Parser | None:
    """Of the command that `words` begin with; None for those that read their words themselves. KeyError where there is none."""
    command = COMMANDS[words[0]]
    module = command.module
    if command.below and len(words) > 1:
        module = command.below[words[1]].module
    elif words[0] == "lite" and len(words) > 1 and words[1] != "--help":
        module = LITE[words[1]][0]
    elif words[0] == "bench" and len(words) > 1:
        assert words[1].strip(",`") in BENCHES
        return None
    make = getattr(importlib.import_module(module), "parser", None) if module else None
    return make() if make else None


def flags(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--") and not word.startswith("--help")]


@pytest.mark.parametrize("page", [page for page in PAGES if written(page)])
def test_commands_and_flags_are_there(page: str) -> None:
    for command in written(page):
        words = shlex.split(re.sub(r"\s(?:\||#|&&|;).*$", "", command))[1:]
        words = [word for word in words if not re.fullmatch(r"[A-Z|]+|\.\.\.|COMMAND", word)]
        if not words or words[0].startswith("-"):
            continue
        made = parser_of(words)
        if made is not None:
            known = {option for action in made._actions for option in action.option_strings} | RENAMED.keys()
            missing = [flag for flag in flags(words) if flag not in known and flag.replace("_", "-") not in known]
            assert not missing, f"{page}: {command}"


def test_the_pages_have_commands() -> None:
    assert sum(len(written(page)) for page in PAGES) > 30
