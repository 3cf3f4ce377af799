"""Models that commands are run on: a toy that speaks bytes, and its 4-bit form."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import byte_tokenizer
from tests.fixtures.awq import awq_checkpoint
from tests.fixtures.toy import toy_checkpoint


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = toy_checkpoint(tmp_path_factory.mktemp("cli") / "toy")
    byte_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def toy_awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, _ = awq_checkpoint(tmp_path_factory.mktemp("cli-awq"), hidden=128, layers=1)
    byte_tokenizer(path)
    return path
