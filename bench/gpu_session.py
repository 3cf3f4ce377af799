"""All measurements of a card in one command: `python -m bench.gpu_session --out DIR --budget-s 560 --stages env,checkpoint,...`.

Stages are commands of this repository, each in a process group of its own with a time limit of its own; one that fails, hangs
or cannot run here is reported and the next one begins. Run in the order given; what the budget no longer holds is named. In
DIR, few and flat files: results.jsonl (the last line of each stage, for bench.report), rows.jsonl (single kernels and tuning
candidates, written as they are measured), log.txt (all output), summary.json, traces, report.html.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from engine.cards import cards
from engine.host import usable_cores

ROOT = Path(__file__).resolve().parent.parent
LEAST_S = 10.0  # a stage that has less left is not begun
KILL_S = 5.0
TAIL_LINES = 12


@dataclass(frozen=True, slots=True)
class Place:
    """Where a session works: `out` for what is kept, `work` for checkpoints and caches, `device` as engine.device."""

    out: Path
    work: Path
    device: str
    shape: str
    card: bool  # there is one

    @property
    def model(self) -> str:
        return str(self.work / f"{self.shape}-awq")


@dataclass(frozen=True, slots=True)
class Stage:
    """`commands(place)`: word lists to run, one after the other, or all together where `together`; `cannot(place)`: why not here."""

    about: str
    limit_s: float
    commands: Callable[[Place], list[list[str]]]
    cannot: Callable[[Place], str] = lambda place: "" if place.card else "there is no card"
    environment: dict[str, str] = field(default_factory=dict)
    together: bool = False


@dataclass(slots=True)
class Outcome:
    """`state`: ok, failed, timeout, skipped."""

    stage: str
    state: str
    seconds: float = 0.0
    words: str = ""
    results: int = 0


def python(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", module, *words]


def run(*lines: str) -> Callable[[Place], list[list[str]]]:
    """Commands from lines `module word word ..`, in which {model}, {device}, {shape} and {out} stand for the place's."""

    def commands(place: Place) -> list[list[str]]:
        known = {"model": place.model, "device": place.device, "shape": place.shape, "out": str(place.out)}
        return [python(*(word.format(**known) for word in line.split())) for line in lines]

    return commands


def _tests(place: Place) -> list[list[str]]:
    files = [path for path in sorted((ROOT / "tests/engine/cuda").glob("test_*.py")) if "emulator" not in path.name]
    return [python("pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(path.relative_to(ROOT))) for path in files]


def _no_tests(place: Place) -> str:
    if not place.card:
        return "there is no card"
    return "" if importlib.util.find_spec("pytest") else "pytest is not installed"


def _sanitizer(place: Place) -> list[list[str]]:
    tool = sanitizer() or "compute-sanitizer"
    toy = python("bench.kernels", "--device", "cuda", "--toy", "--no-peers")  # cuDNN's kernels have races of their own
    quiet = ("--report-api-errors", "no")  # the driver's bindings ask for functions that this driver lacks
    return [[tool, "--tool", kind, "--error-exitcode", "9", *quiet, *toy] for kind in ("memcheck", "racecheck")]


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or next(
        (str(path) for path in (Path("/usr/local/cuda/bin/compute-sanitizer"),) if path.exists()), None
    )


def _no_sanitizer(place: Place) -> str:
    if not place.card:
        return "there is no card"
    return "" if sanitizer() else "compute-sanitizer is not installed"


def _no_device(place: Place) -> str:
    return "" if place.card or place.device != "cuda" else "there is no card"


OFFLINE = "bench.offline --model {model} --device {device} --json "
SERVED = "bench.served --model {model} --device {device} --json "
PROFILE = "bench.profile --model {model} --device {device} --json --rows %d --trace {out}/trace-%d.json.gz"
KERNELS = "bench.kernels --device cuda --json "

STAGES: dict[str, Stage] = {
    "env": Stage("what is here, one kernel", 90, run("cli.check_env --set engine.device={device} --json"), _no_device),
    "checkpoint": Stage("random weights", 150, run("bench.checkpoint {shape} --format awq --out {model} --keep"), _no_device),
    "toy": Stage("every kernel once, small shapes, against the reference", 120, run(KERNELS + "--toy")),
    "kernels": Stage("every kernel, real shapes", 240, run(KERNELS + "--out {out}/rows.jsonl")),
    "tune": Stage("launch shapes", 280, run("bench.tune --budget-s 240 --json --out {out}/rows.jsonl")),
    "decode": Stage("engine, decoding", 240, run(OFFLINE + "--decode 1,8,16,32,64,128,256 --tokens 256 --repeats 2"), _no_device),
    "prefill": Stage("engine, prompts", 120, run(OFFLINE + "--prefill 8x1024,8x4096 --repeats 3"), _no_device),
    "mixed": Stage("engine, mixed workload", 150, run(OFFLINE + "--workload mixed512 --repeats 2"), _no_device),
    "served": Stage("ready with kernels cached, mixed workload over HTTP", 180, run(SERVED + "--workload mixed512"), _no_device),
    "cold": Stage("ready with no kernel cached", 150, run(SERVED + "--cold"), _no_device),
    "profile": Stage("share of time the card works", 240, run(*(PROFILE % (n, n) for n in (1, 32, 256))), _no_device),
    "memory": Stage("planned, allocated, a pool too small", 300, run("bench.memory --model {model} --device {device} --json"), _no_device),
    "check": Stage("kernel tests on the card", 300, _tests, _no_tests, {"KERNEL_TESTS": "card"}, together=True),
    "sanitizer": Stage("memcheck and racecheck of every kernel, small shapes", 240, _sanitizer, _no_sanitizer),
    "report": Stage("one page", 30, run("bench.report {out} --out {out}/report.html"), lambda place: ""),
}
ORDER = (
    "env", "checkpoint", "toy", "decode", "kernels", "mixed", "served", "prefill", "profile", "tune", "cold", "memory", "check",
    "sanitizer", "report",
)  # fmt: skip


class Session:
    """Runs stages until the budget is gone. `log` gets everything that they print."""

    def __init__(self, place: Place, budget_s: float, environment: dict[str, str], stages: dict[str, Stage] = STAGES) -> None:
        self.place, self.stages = place, stages
        self._end = time.monotonic() + budget_s
        self._environment = environment
        self.outcomes: list[Outcome] = []

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def run(self, names: Sequence[str]) -> list[Outcome]:
        with (self.place.out / "log.txt").open("a", encoding="utf-8") as log:
            for name in names:
                self.outcomes.append(self.one(name, log))
                self._write()
                o = self.outcomes[-1]
                print(f"{o.state:8} {name:12} {o.seconds:7.1f} s  {o.words}", flush=True)
        return self.outcomes

    def one(self, name: str, log: IO[str]) -> Outcome:
        """One stage, from the question whether it can run to its results."""
        stage, began = self.stages[name], time.monotonic()
        try:
            if reason := stage.cannot(self.place):
                return Outcome(name, "skipped", 0.0, reason)
            limit = min(stage.limit_s, self.left_s)
            if self.left_s < LEAST_S:
                return Outcome(name, "skipped", 0.0, f"{max(0.0, self.left_s):.0f} s are left")
            log.write(f"\n===== {name}: {stage.about}; at most {limit:.0f} s\n")
            log.flush()
            out = self._run_all(name, stage, stage.commands(self.place), time.monotonic() + limit, log)
        except Exception as error:  # a stage's own mistake is a failed stage
            out = Outcome(name, "failed", 0.0, f"{type(error).__name__}: {error}")
        out.seconds = time.monotonic() - began
        return out

    def _run_all(self, name: str, stage: Stage, commands: list[list[str]], end: float, log: IO[str]) -> Outcome:
        batches = [commands[i : i + max(1, usable_cores() // 2)] for i in range(0, len(commands), max(1, usable_cores() // 2))]
        states, words, results = [], "", 0
        for batch in batches if stage.together else [[command] for command in commands]:
            started = [self._start(command, stage, number) for number, command in enumerate(batch)]
            for command, (process, path) in zip(batch, started, strict=True):
                state = self._wait(process, end)
                text = path.read_text(encoding="utf-8", errors="replace")
                path.unlink()
                log.write(f"--- {' '.join(command[1:])}\n{text}\n--- {state}\n")
                log.flush()
                states.append(state)
                results += self._keep(name, text)
                if state != "ok":
                    words = words or f"{command[-1] if stage.together else ' '.join(command[1:4])}: {_last_words(text)}"
                    print("\n".join(text.splitlines()[-TAIL_LINES:]), flush=True)
            if "timeout" in states:
                break
        bad = [state for state in states if state != "ok"]
        return Outcome(name, bad[0] if bad else "ok", 0.0, words or f"{len(states)} of {len(commands)} commands", results)

    def _start(self, command: list[str], stage: Stage, number: int) -> tuple[subprocess.Popen[bytes], Path]:
        path = self.place.work / f"output-{os.getpid()}-{number}.txt"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self._environment, **stage.environment}
        with path.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
        return process, path

    @staticmethod
    def _wait(process: subprocess.Popen[bytes], end: float) -> str:
        """Until it ends or its time is up; then its whole group is ended."""
        try:
            code = process.wait(max(0.1, end - time.monotonic()))
            state = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "timeout"
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_S)
                if state != "timeout":
                    break
        return state

    def _keep(self, name: str, text: str) -> int:
        """The last line that is a JSON object goes to results.jsonl."""
        for found in _objects(text):
            with (self.place.out / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": name, **found}) + "\n")
            return 1
        return 0

    def _write(self) -> None:
        summary = {"stages": [asdict(o) for o in self.outcomes], "left_s": round(self.left_s, 1)}
        (self.place.out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects of the text's lines, last first."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("{")]
    return lines[-1][:160] if lines else "no output"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.gpu_session", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--out", type=Path, help="folder for results; made where it is not there")
    p.add_argument("--work", type=Path, default=ROOT / ".cache" / "bench", help="folder for checkpoints; several GB for the 8B shape")
    p.add_argument("--budget-s", type=float, default=560.0, help="seconds for all stages together")
    p.add_argument("--stages", default=",".join(ORDER), help=f"in this order; default: {','.join(ORDER)}")
    p.add_argument("--shape", default="llama-3.1-8b", help="of the checkpoint, as bench.checkpoint names it")
    p.add_argument("--device", default="cuda", help="as engine.device; cpu for the stages that need no card")
    p.add_argument("--list", action="store_true", help="name the stages and end")
    args = p.parse_args(argv)
    if args.list:
        print("\n".join(f"{name:12} {stage.limit_s:5.0f} s  {stage.about}" for name, stage in STAGES.items()))
        return 0
    names = [name for name in args.stages.split(",") if name]
    if unknown := [name for name in names if name not in STAGES]:
        p.error(f"--stages knows {', '.join(STAGES)}, not {', '.join(unknown)}")
    if args.out is None:
        p.error("--out is needed")
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    place = Place(args.out.resolve(), args.work.resolve(), args.device, args.shape, bool(cards()))
    outcomes = Session(place, args.budget_s, {}).run(names)
    return 1 if any(o.state in ("failed", "timeout") for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
