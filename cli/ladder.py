"""`numbatch lite ladder MODEL --data FILE`: which precision to serve a model in, measured on one's own text.

Puts together what is given and what has to be made (a 16-bit copy, a 4-bit and an 8-bit checkpoint), lets `bench/ladder.py`
measure every rung, and prints table, advice and the command that serves the chosen one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.arguments import Parser, UsageError, say

if TYPE_CHECKING:
    from bench.ladder import Advice, Row, Rung, Task

EXIT_MODEL, EXIT_DISK, EXIT_NOTHING = 3, 1, 4
GIB = 2**30


def parser() -> Parser:
    cli = Parser(
        prog="numbatch lite ladder",
        usage="numbatch lite ladder MODEL --data FILE [flags]",
        description="Measure a model in six precisions on your own text, and say which to serve.\n"
        "16-bit, 16-bit + KV8, W4, W4 + KV8, W4 + KV4, W8A8: perplexity, KL and first choices against 16-bit, weights, KV tokens\n"
        "that fit, decoding of 1 and 32 sequences, time to the first token.",
    )
    cli.add_argument("model", help="Hugging Face folder or GGUF file; of one that holds 4 bits, a 16-bit copy is the first rung")
    cli.add_argument("--data", required=True, type=Path, metavar="FILE", help="text, or .jsonl: text, messages, or prompt with completion")
    cli.add_argument("--work-dir", type=Path, default=None, metavar="DIR", help="what is made, and the page (default: ./ladder-MODEL)")
    measured = cli.add_argument_group("what is measured")
    measured.add_argument("--rungs", default="", metavar="NAME,...", help="only these, by name (default: all)")
    measured.add_argument("--tokens", type=int, default=8192, metavar="N", help="most tokens that are scored (default: %(default)s)")
    measured.add_argument("--window", type=int, default=1024, metavar="N", help="tokens the model sees at once (default: %(default)s)")
    measured.add_argument("--stride", type=int, default=512, metavar="N", help="tokens a window scores (default: %(default)s)")
    measured.add_argument("--decode-tokens", type=int, default=96, metavar="N", help="each sequence decodes (default: %(default)s)")
    measured.add_argument("--repeats", type=int, default=3, metavar="N", help="of every speed; the median counts (default: %(default)s)")
    measured.add_argument("--memory-gib", type=float, default=0, metavar="GIB", help="memory to fill with KV (default: what is free now)")
    measured.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as for server.py, of every rung")
    choice = cli.add_argument_group("which rung")
    choice.add_argument(
        "--max-loss", type=float, default=3.0, metavar="PERCENT", help="of perplexity that may be lost (default: %(default)s)"
    )
    choice.add_argument(
        "--goal", default="balanced", choices=("balanced", "latency", "throughput", "memory"), help="what it is for (default: %(default)s)"
    )
    made = cli.add_argument_group("checkpoints")
    made.add_argument("--base", default="", metavar="PATH", help="the 16-bit checkpoint, where MODEL is a quantized one")
    made.add_argument(
        "--w4", default="", metavar="PATH", help="a 4-bit checkpoint (default: MODEL where it is one, else auto_awq makes it)"
    )
    made.add_argument("--w8a8", default="", metavar="PATH", help="an 8-bit checkpoint (default: smooth_quant makes it)")
    asked = "name or text file for making them (default: the part of --data that is not scored)"
    made.add_argument("--calib-dataset", default="", metavar="NAME|FILE", help=asked)
    made.add_argument("--calib-samples", type=int, default=64, metavar="N", help="sequences of it (default: %(default)s)")
    made.add_argument("--calib-seqlen", type=int, default=512, metavar="N", help="tokens of each (default: %(default)s)")
    made.add_argument("--w-group-size", type=int, default=0, metavar="N", help="128, 64 or 32 (default: the largest that fits)")
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from bench.ladder import REFUSALS, advise, climb
    from bench.machine import Neighbours
    from cli.ladder_sources import find_sources

    try:
        rungs, task = _rungs(args.rungs), _task(args)
        work_dir = args.work_dir or Path(f"ladder-{Path(args.model).name}")
        work_dir.mkdir(parents=True, exist_ok=True)
        sources = find_sources(args, work_dir, task.text, {rung.weights for rung in rungs})
        neighbours = Neighbours()
        rows = climb(rungs, sources, task, _told)
        advice = advise(rows, args.max_loss / 100, args.goal)
        _report(args, work_dir, rows, advice, task, neighbours.share())
    except UsageError:
        raise
    except OSError as error:
        say(f"numbatch lite ladder: {error.filename or args.model}: {error.strerror or error}")
        return EXIT_DISK
    except REFUSALS as error:
        say(f"numbatch lite ladder: {error}")
        return EXIT_MODEL
    return 0 if advice.row is not None else EXIT_NOTHING


def _rungs(names: str) -> list[Rung]:
    from bench.ladder import RUNGS

    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {rung.name: rung for rung in RUNGS}
    for name in wanted:
        if name not in known:
            raise UsageError(f"--rungs: there is no rung {name!r}; there are {', '.join(known)}")
    return [rung for rung in RUNGS if rung.name in wanted or not wanted]


def _task(args: argparse.Namespace) -> Task:
    """What every rung is measured with; UsageError where a number makes no sense."""
    from bench.ladder import Task
    from bench.quality import text_of

    if not 0 <= args.max_loss <= 1000 or not math.isfinite(args.max_loss):
        raise UsageError(f"--max-loss is in percent, 0 to 1000, not {args.max_loss:g}")
    if not 32 <= args.decode_tokens <= 100_000 or not 1 <= args.repeats <= 100:
        raise UsageError("--decode-tokens must be 32 .. 100000 and --repeats 1 .. 100")
    if not 0 <= args.memory_gib <= 1 << 16:
        raise UsageError(f"--memory-gib must be 0 .. {1 << 16}, not {args.memory_gib:g}")
    if not args.data.is_file():
        raise UsageError(f"--data {args.data}: no such file")
    try:
        text = text_of(args)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return Task(text, tuple(args.set), int(args.memory_gib * GIB), args.decode_tokens, args.repeats)


def _told(sentence: str) -> None:
    """A line that moves on a terminal; elsewhere only where something begins."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{sentence}", end="", file=sys.stderr, flush=True)
    elif " tokens scored" not in sentence:
        say(sentence)


def _report(args: argparse.Namespace, work_dir: Path, rows: Sequence[Row], advice: Advice, task: Task, others: float) -> None:
    from bench.ladder_report import machine, page, record, table
    from bench.machine import describe_machine

    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    scored = next((row.tokens for row in rows if row.ran), 0)
    about: dict[str, Any] = {
        "model": Path(args.model).name, "data": args.data.name, "tokens": scored, "window": task.text.window, "stride": task.text.stride,
        "max_loss_percent": args.max_loss, "goal": args.goal, "set": list(task.sets), "machine": describe_machine(),
        "others_cpu_share": others,
    }  # fmt: skip
    (work_dir / "ladder.json").write_text(json.dumps(record(rows, advice, about), indent=1) + "\n", encoding="utf-8")
    (work_dir / "ladder.html").write_text(page(rows, advice, about, args.max_loss / 100), encoding="utf-8")
    print(f"{about['model']} on {about['data']}: {scored:,} tokens, windows of {task.text.window}, stride {task.text.stride}")
    print(table(rows))
    print(f"on {machine(about)}\n")
    for number, sentence in enumerate(advice.sentences):
        print(f"Recommended: {sentence}" if number == 0 and advice.row else f"  {sentence}")
    if advice.row is not None:
        policy = f" --quant-policy {advice.row.rung.kv}" if advice.row.rung.kv else ""
        print(f"Serve it: numbatch serve api_server {advice.row.path}{policy}")
    print(f"Plots: {work_dir / 'ladder.html'}")
