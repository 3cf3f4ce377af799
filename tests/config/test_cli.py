"""The command line: its flags, and that they reach the configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from config.cli import load, parser, verdict
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


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--conf", "x"], "--conf: there is no such flag; knobs are --set section.key=VALUE (docs/config.md)"),
        (["--port", "8000"], "--port: there is no such flag; write --set server.server_port=VALUE"),
        (["--tp=2"], "--tp=2: there is no such flag; write --set engine.tp=VALUE"),
        (["x.toml"], "x.toml: there is no place for this word; write --config FILE, or --set model.path=PATH for a model"),
        (["--check", "--plan"], "--plan: not allowed with argument --check"),
        (["--set"], "--set: expected one argument"),
    ],
)
def test_wrong_usage_exits_with_2_and_one_sentence(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(argv)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"server.py: {sentence}\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["--version"])
    assert caught.value.code == 0
    assert VERSION in capsys.readouterr().out


def server(root: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "server.py", *arguments]
    return subprocess.run(command, cwd=root, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("path", "ending"), [("nowhere/at/all", "; nothing is at model.path = nowhere/at/all yet"), ("owner/name", "")])
def test_check_says_that_a_model_is_not_there_yet(path: str, ending: str) -> None:
    loaded = load(parser().parse_args(["--set", f"model.path={path}"]), {})
    assert verdict(loaded.config) == "the configuration can be used" + ending


def test_check_says_yes_with_exit_code_0(root: Path) -> None:
    done = server(root, "--config", "config/demo.toml", "--check")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[engine]\ntpp = 1\n", "x.toml:engine.tpp: unknown key; did you mean engine.tp?"),
        ("[engine]\ntp = " + "9" * 5000, "x.toml:engine.tp: the number has too many digits."),
        ("[engine]\ntp = " + "[" * 5000, "x.toml: is nested too deeply; values here are at most a list of strings."),
        ("[cache]\ncache_max_entry_count = nan", "x.toml:cache.cache_max_entry_count: must be a finite number, not nan."),
    ],
)
def test_a_bad_file_is_exit_code_2_and_one_line(root: Path, tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    for what in ("--check", "--print-effective", "--plan"):
        done = server(root, "--config", str(tmp_path / "x.toml"), what)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.replace(f"{tmp_path}{os.sep}", "") == line + "\n"


def test_the_effective_configuration_shows_origins_and_no_secret(root: Path) -> None:
    done = server(root, "--config", "config/demo.toml", "--set", "engine.tp=2", "--print-effective", NUMBATCH_API_KEYS="hunter2")
    assert done.returncode == 0
    lines = {line.split(" = ")[0]: line for line in done.stdout.splitlines() if " = " in line}
    assert lines["tp"].endswith("# --set")
    assert lines["server_port"].endswith("# file config/demo.toml")
    assert lines["api_keys"].endswith("# environment NUMBATCH_API_KEYS")
    assert "hunter2" not in done.stdout + done.stderr
