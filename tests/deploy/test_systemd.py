"""The systemd unit: systemd finds no fault in it, it is shut in, and it agrees with the server's exit codes and deadlines."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from config.cli import parser
from config.schema import Config

FOLDER = Path(__file__).resolve().parents[2] / "deploy/systemd"
UNIT = (FOLDER / "numbatch.service").read_text(encoding="utf-8")
PYTHON = "/usr/local/lib/numbatch/.venv/bin/python"


def setting(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("no systemd-analyze on this machine")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit with a python that exists here, and the drop-in beside it."""
    unit = tmp_path / "numbatch.service"
    unit.write_text(UNIT.replace(PYTHON, sys.executable), encoding="utf-8")
    (tmp_path / "numbatch.service.d").mkdir()
    shutil.copy(FOLDER / "cuda.conf", tmp_path / "numbatch.service.d")
    return unit


def test_systemd_finds_no_fault(installed: Path) -> None:
    ended = analyze("verify", "--man=no", str(installed))
    own = [line for line in ended.stderr.splitlines() if "numbatch" in line]
    assert not own and ended.returncode == 0


def test_it_is_shut_in(installed: Path) -> None:
    shutil.rmtree(installed.parent / "numbatch.service.d")
    ended = analyze("security", "--offline=yes", "--threshold=20", str(installed))  # 0 to 100: exposure
    assert ended.returncode == 0, ended.stdout


def test_what_would_stop_it_is_not_asked_for() -> None:
    """Kernels are compiled into memory, and the memory plan reads /proc/meminfo."""
    assert not setting("MemoryDenyWriteExecute") and not setting("ProcSubset")
    assert setting("LimitCORE") == ["0"]


def test_the_command_exists() -> None:
    (command,) = setting("ExecStart")
    python, program, *arguments = command.split()
    assert python == PYTHON and (FOLDER.parents[1] / program).is_file()
    assert parser().parse_args(arguments).config == Path("/etc/numbatch/numbatch.toml")
    assert setting("WorkingDirectory") == [PYTHON.removesuffix("/.venv/bin/python")]


def test_restarts_follow_the_exit_codes() -> None:
    """docs/operating.md: a supervisor should restart on any code but 0, 2 and 3."""
    assert setting("Restart") == ["on-failure"] and setting("RestartPreventExitStatus") == ["2 3"]


def test_the_drain_fits_into_the_stop() -> None:
    knobs = Config().shutdown
    assert int(setting("TimeoutStopSec")[0]) >= knobs.drain_delay_s + knobs.drain_timeout_s + 15
    assert setting("KillMode") == ["mixed"]  # the ranks are the server's to end


def test_it_does_not_claim_to_notify() -> None:
    """Type=notify would wait for a word that the server never sends."""
    assert setting("Type") == ["exec"]
