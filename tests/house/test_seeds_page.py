"""docs/seeds.md: every test it names exists, every row has one, and nothing of the founding documents is missing."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from cli.flags import FLAGS, REFUSED
from formats.workspace import KEYS
from tests.cli.test_seeds import SEEDS, TEMPLATE
from tests.house.tree import ROOT, files, parsed

PAGE = (ROOT / "docs/seeds.md").read_text(encoding="utf-8")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
FIRST_SEED = (
    "--server-name", "--server-port", "--allow-origins", "--allow-credentials", "--allow-methods", "--allow-headers", "--qos-config-path",
    "--backend", "--log-level", "--api-keys", "--ssl", "--meta-instruction", "--cap", "--chat-template", "--adapters", "--tp",
    "--model-name", "--session-len", "--max-batch-size", "--cache-max-entry-count", "--cache-block-seq-len", "--model-format",
    "--quant-policy", "--rope-scaling-factor",
)  # fmt: skip


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}")[2].partition("\n## ")[0]


def rows(text: str) -> list[str]:
    """Rows of the tables, without their heads."""
    lines = text.splitlines()
    rules = {i for i, line in enumerate(lines) if line.startswith("|---")}
    return [line for i, line in enumerate(lines) if line.startswith("|") and i not in rules and i + 1 not in rules]


@cache
def names_in(file: str) -> set[str]:
    return {node.name for node in parsed(file).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("file", "name"), sorted(set(TEST.findall(PAGE))))
def test_every_named_test_exists(file: str, name: str) -> None:
    assert file in files()
    assert name in names_in(file)


def test_every_row_has_a_test() -> None:
    assert not [row for row in rows(PAGE) if not TEST.search(row)]


@pytest.mark.parametrize("test", SEEDS)
def test_every_command_is_there_with_the_test_that_runs_it(test: str) -> None:
    found = [row for row in rows(section("The fifteen commands")) if f"| `{SEEDS[test]}` |" in row]
    assert len(found) == 1 and f"`tests/cli/test_seeds.py::{test}`" in found[0]


def test_there_are_fifteen_commands() -> None:
    assert len(rows(section("The fifteen commands"))) == len(SEEDS) == 15


def test_every_flag_is_there() -> None:
    listed = set(re.findall(r"`(--[a-z-]+)`", " ".join(row.split("|")[1] for row in rows(section("Flags of")))))
    assert listed == set(FIRST_SEED)
    assert listed <= {flag.name for flag in FLAGS} | set(REFUSED)


def test_every_key_of_config_ini_is_there() -> None:
    listed = re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows(section("The workspace").partition("All 28 keys")[2])))
    assert sorted(listed) == sorted(KEYS)


def test_every_key_of_the_chat_template_is_there() -> None:
    listed = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows(section("The chat template")))))
    assert listed == TEMPLATE.keys()


def test_there_is_nothing_to_compile() -> None:
    """Seed 001 chooses a wheel by CUDA and Python version; here one serves everybody."""
    assert not [name for name in files() if name.endswith((".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".pyx", ".rs", ".so", ".o"))]
    assert not re.search(r"ext.modules|cython|cmake", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.IGNORECASE)
