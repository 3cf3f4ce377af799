"""The Python of the migration pages runs; their command lines and tables are in tests/cli/test_theirs.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import blocks, place


@pytest.mark.parametrize("page", ["from-lmdeploy", "from-vllm"])
def test_python(page: str, commands: Path, tmp_path: Path, toy_model: Path) -> None:
    ((language, block),) = blocks(page)
    assert language == "python"
    assert place(commands, tmp_path, toy_model).python(block)  # one line an answer
