"""Rows for the tuning tables: `python -m bench.tune --budget-s 240 --out rows.jsonl [--only w4,decode_int8,...]`.

Measures the launch shapes that engine/cuda/tuning.py and tuning_attention.py allow, the likeliest first, as far as the budget goes:
several processes compile, this one checks each candidate against the reference and times it. Every measurement is a JSON line
in --out at once, so that a killed run loses nothing; what is there already is not measured again. The measuring runs in a child
process: a candidate that takes the card's context with it costs that candidate. Rows are printed ready to paste; a person
commits them. `--print FILE` prints the rows of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.host import usable_cores

LEAST_S = 15.0  # not worth a new child
CHILDREN = 6
CACHE = Path(".cache/kernels")
W4_ROWS = {"w4": '("w4_matmul", {cc}, "{case}"): W4Launch', "w4 few": '({cc}, "{case}"): FewLaunch', "w4 hopper": '"{case}": HopperLaunch'}
ATTENTION = {  # kind -> table, what its rows are
    "decode": ("DECODE", "DecodeShape"), "decode_int8": ("DECODE_QUANTIZED[8]", "DecodeShape"),
    "decode_int4": ("DECODE_QUANTIZED[4]", "DecodeShape"), "prompt": ("PROMPT", "PromptShape"),
    "prompt_int8": ("PROMPT_QUANTIZED[8]", "PromptShape"), "prompt_int4": ("PROMPT_QUANTIZED[4]", "PromptShape"),
}  # fmt: skip
KINDS = ("w4", *ATTENTION)


def read(path: Path) -> list[dict[str, Any]]:
    """The tuning lines of a file; other lines and a cut last one are passed over."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("bench") == "tune":
            found.append(row)
    return found


def identity(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["kind"], row["case"], json.dumps(row["launch"])


def times(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """(kind, case) -> launch as text -> microseconds, the last and most careful measurement of each; wrong ones are left out."""
    out: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        kind, case, launch = identity(row)
        if "us" in row and row["right"]:
            out.setdefault((kind, case), {})[launch] = row["us"]
    return out


def pasted(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines for the tables: of the 4-bit product one a shape and bucket, of attention the shape that is best over all its cases."""
    measured, lines = times(rows), []
    where = next((row["where"] for row in reversed(rows) if "where" in row), {"card": "no card", "cc": [0, 0], "date": ""})
    cc, note = tuple(where["cc"]), f"{where['date']}, {where['card']}"
    for (kind, case), found in sorted(measured.items()):
        if kind in W4_ROWS:
            launch, us = min(found.items(), key=lambda item: item[1])
            row = W4_ROWS[kind].format(cc=cc, case=case)
            lines.append(f"    {row}({_arguments(launch)}),  # {note}: {us:.2f} us, of {len(found)}")
    for kind, (table, name) in ATTENTION.items():
        for head_dim in sorted({case.split()[0] for k, case in measured if k == kind}, key=int):
            cases = [found for (k, case), found in measured.items() if k == kind and case.split()[0] == head_dim]
            common = set.intersection(*(set(found) for found in cases))
            if common:
                best = min(common, key=lambda launch: sum(math.log(found[launch] / min(found.values())) for found in cases))
                lost = math.exp(sum(math.log(found[best] / min(found.values())) for found in cases) / len(cases)) - 1
                words = f"{note}: {100 * lost:.1f} % above the best of each of {len(cases)} cases, of {len(common)}"
                lines.append(f"    {table}[{cc}][{head_dim}] = {name}({_arguments(best)})  # {words}")
    return lines


def _arguments(launch: str) -> str:
    return ", ".join(str(value) for value in json.loads(launch))


def child(args: argparse.Namespace) -> int:
    """Measure until nothing is left or the time is up."""
    from bench.gpu_time import GraphTimer
    from bench.kernels_cuda import Shapes
    from bench.tune_card import Tuner
    from engine.cuda.device import CudaDevice

    device = CudaDevice(args.card)
    tuner = Tuner(device, CACHE.absolute(), GraphTimer(device, 5), GraphTimer(device, 21), Shapes(), args.dtype, args.out)
    tuner.run(tuner.jobs(args.only), time.monotonic() + args.budget_s, args.processes or usable_cores())
    return 0


def parent(args: argparse.Namespace) -> int:
    """Children until the work is done or the budget is gone; 1 where nothing was measured."""
    end, code = time.monotonic() + args.budget_s, 1
    for _ in range(CHILDREN):
        left = end - time.monotonic()
        if left < LEAST_S:
            break
        command = [sys.executable, "-m", "bench.tune", "--child", "--budget-s", f"{left - 5:.0f}", "--out", str(args.out)]
        command += ["--only", ",".join(args.only), "--dtype", args.dtype, "--card", str(args.card), "--processes", str(args.processes)]
        try:
            code = subprocess.run(command, timeout=left).returncode
        except subprocess.TimeoutExpired:
            print("a candidate did not come back; its process was ended", flush=True)
            break
        if code in (0, 2):
            break
        print(f"the measuring process ended with code {code}; going on without the candidate it was at", flush=True)
    return code


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--budget-s", type=float, default=240.0, help="seconds for everything")
    p.add_argument("--out", type=Path, default=Path("tune.jsonl"), help="a JSON line a measurement; what is in it is not measured again")
    p.add_argument("--only", default=",".join(KINDS), type=_kinds, help=", ".join(KINDS))
    p.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    p.add_argument("--card", type=int, default=0)
    p.add_argument("--processes", type=int, default=0, help="that compile; 0: as many as cores")
    p.add_argument("--print", type=Path, default=None, metavar="FILE", help="print the rows of an earlier run's lines and end")
    p.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.child:
        from engine.errors import EngineError

        try:
            return child(args)
        except EngineError as error:
            print(f"bench.tune: {error}", file=sys.stderr)
            return 2
    code = parent(args) if args.print is None else 0
    rows = read(args.print or args.out)
    lines = pasted(rows)
    print("\n".join(lines) or "nothing was measured")
    if args.json:
        print(json.dumps({"bench": "tuned", "measured": sum("us" in row for row in rows), "rows": lines}))
    return 0 if lines else code or 1


def _kinds(word: str) -> set[str]:
    found = set(filter(None, word.split(",")))
    if unknown := found - set(KINDS):
        raise argparse.ArgumentTypeError(f"knows {', '.join(KINDS)}, not {', '.join(sorted(unknown))}")
    return found


if __name__ == "__main__":
    sys.exit(main())
