"""A model for the commands of the pages, and a folder in which `numbatch` is a command."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import toy_model

__all__ = ["toy_model"]  # a fixture


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be put before PATH: `numbatch` and `python` are those of this checkout."""
    folder = tmp_path_factory.mktemp("bin")
    for name, words in (("numbatch", [sys.executable, "-m", "cli"]), ("python", [sys.executable])):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        script.chmod(0o755)
    return folder
