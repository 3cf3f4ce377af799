"""The session of stages: what fails, hangs or cannot run does not stop the others, and everything is written down."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import gpu_session
from bench.gpu_session import Place, Session, Stage
from cli.arguments import Parser


def stage(code: str, limit_s: float = 30, **more: object) -> Stage:
    return Stage("a test", limit_s, lambda place: [[sys.executable, "-c", code]], lambda place: "", **more)  # type: ignore[arg-type]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    return Place(tmp_path / "out", tmp_path / "work", "cpu", "toy", card=False)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_stages_that_go_wrong_do_not_stop_the_others(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    grandchild = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(p.pid, flush=True); time.sleep(60)"
    stages = {
        "good": stage('print(\'words\'); print(\'{"bench": "x", "n": 1}\')'),
        "bad": stage('print(\'{"bench": "x", "n": 2}\'); print(\'it broke\'); raise SystemExit(3)'),
        "hangs": stage(grandchild, 1.5),
        "mistaken": Stage("a test", 9, lambda place: 1 / 0, lambda place: ""),  # type: ignore[arg-type, return-value]
        "absent": Stage("a test", 9, lambda place: [], lambda place: "there is no card"),
        "last": stage("import os; print(os.environ['MARK'])", environment={"MARK": "seen"}),
    }
    began = time.monotonic()
    outcomes = Session(place, 200, {}, stages).run(list(stages))
    assert [o.state for o in outcomes] == ["ok", "failed", "timeout", "failed", "skipped", "ok"]
    assert time.monotonic() - began < 30
    assert (
        outcomes[1].words.endswith("it broke")
        and outcomes[3].words.startswith("ZeroDivisionError")
        and outcomes[4].words == "there is no card"
    )
    results = [json.loads(line) for line in (place.out / "results.jsonl").read_text().splitlines()]
    assert results == [{"stage": "good", "bench": "x", "n": 1}, {"stage": "bad", "bench": "x", "n": 2}]  # kept although it failed after it
    log = (place.out / "log.txt").read_text()
    assert "===== hangs" in log and "seen" in log
    pid = int(next(line for line in log.split("===== hangs")[1].splitlines() if line.isdecimal()))
    assert not alive(pid)  # the whole group was ended
    summary = json.loads((place.out / "summary.json").read_text())
    assert [s["state"] for s in summary["stages"]] == [o.state for o in outcomes] and summary["left_s"] < 200
    assert not list(place.work.glob("output-*"))


def test_the_budget_is_for_all_stages(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_session, "LEAST_S", 1.0)
    stages = {"a": stage("import time; time.sleep(30)"), "b": stage("print(1)")}
    outcomes = Session(place, gpu_session.LEAST_S + 1, {}, stages).run(["a", "b"])
    assert [o.state for o in outcomes] == ["timeout", "skipped"] and outcomes[0].seconds < gpu_session.LEAST_S + 8
    assert outcomes[1].words.endswith("s are left")


def test_commands_of_a_stage_may_run_together(place: Place) -> None:
    commands = [[sys.executable, "-c", f"import time; time.sleep(1); raise SystemExit({code})"] for code in (0, 1, 0, 0)]
    stages = {"all": Stage("a test", 60, lambda place: commands, lambda place: "", together=True)}
    (outcome,) = Session(place, 100, {}, stages).run(["all"])
    assert outcome.state == "failed" and (place.out / "log.txt").read_text().count("--- ok") == 3


def test_every_stage_names_commands_that_exist(place: Place, root: Path) -> None:
    """Each module can be started, and takes the words it is given."""
    import importlib

    asked = []

    class Stop(Exception):
        pass

    def stopped(original: Callable[..., argparse.Namespace]) -> Callable[..., argparse.Namespace]:
        def parse(self: argparse.ArgumentParser, args: list[str] | None = None, namespace: object = None) -> argparse.Namespace:
            original(self, args)
            asked.append(self.prog)
            raise Stop

        return parse

    with pytest.MonkeyPatch.context() as patch:
        for parser in (argparse.ArgumentParser, Parser):
            patch.setattr(parser, "parse_args", stopped(parser.parse_args))
        for each in gpu_session.STAGES.values():
            for command in each.commands(place):
                words = command[command.index("-m") + 1 :]
                if words[0] == "pytest":
                    assert (root / words[-1]).exists()
                    continue
                with pytest.raises(Stop):
                    importlib.import_module(words[0]).main(words[1:])
    assert len(asked) >= len(gpu_session.STAGES) and set(gpu_session.ORDER) == set(gpu_session.STAGES)


def test_the_command_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_session.main(["--list"]) == 0
    assert "mixed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu_session.main(["--out", str(place.out), "--stages", "none"])
    words = [
        "--out",
        str(place.out),
        "--work",
        str(place.work),
        "--device",
        "cpu",
        "--shape",
        "toy",
        "--stages",
        "checkpoint,kernels,report",
    ]
    assert gpu_session.main([*words, "--budget-s", "120"]) == 0
    printed = capsys.readouterr().out
    assert "ok       checkpoint" in printed and "skipped  kernels" in printed and "there is no card" in printed
    assert (place.work / "toy-awq" / "config.json").exists() and os.listdir(place.out)
