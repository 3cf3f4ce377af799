"""The command line: its flags, and that they reach the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.cli import load, parser
from config.errors import ConfigError
from config.version import VERSION


def test_flags_reach_the_configuration(root: Path) -> None:
    args = parser().parse_args(
        ["--config", str(root / "config/demo.toml"), "--set", "engine.tp=2", "--set", "server.server_name=0.0.0.0", "--insecure"]
    )
    loaded = load(args, {})
    assert loaded.config.engine.tp == 2
    assert loaded.config.server.insecure is True
    assert loaded.config.model.model_name == "SmolLM2-135M-Instruct"


def test_a_public_bind_needs_the_flag(root: Path) -> None:
    args = parser().parse_args(["--config", str(root / "config/demo.toml"), "--set", "server.server_name=0.0.0.0"])
    with pytest.raises(ConfigError, match="--insecure"):
        load(args, {})


@pytest.mark.parametrize("argv", [["--conf", "x"], ["--check", "--plan"], ["stray"], ["--set"]])
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(argv)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["--version"])
    assert caught.value.code == 0
    assert VERSION in capsys.readouterr().out
