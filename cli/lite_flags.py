"""What the commands of `numbatch lite` that run a model over text have in common: LMDeploy's flags, progress, exit codes."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.arguments import Parser, UsageError, say

if TYPE_CHECKING:
    import torch

    from quant.corpus import Windows
    from quant.job import Made, Method
    from quant.source import Source

EXIT_DISK, EXIT_MODEL, EXIT_DEVICE = 1, 3, 4
REFUSED = {"--trust-remote-code": "numbatch never runs code that comes with a checkpoint; leave it out."}
TELL_EVERY_S = 30.0  # where there is no terminal
BAR = 24


def make_parser(name: str, what: str, *, search: bool = False) -> Parser:
    """Parser of `numbatch lite NAME MODEL`, with the flags of calibration."""
    cli = Parser(
        prog=f"numbatch lite {name}", usage=f"numbatch lite {name} MODEL [flags]", description=what, refused=REFUSED
    )  # fmt: skip
    cli.add_argument("model", help="folder, GGUF file or hub name; never written to")
    cli.add_argument("--work-dir", default="./work_dir", metavar="DIR", help="where the result goes (default: %(default)s)")
    _add_text_flags(cli.add_argument_group("calibration text"), search)
    where = cli.add_argument_group("model")
    kinds, devices = ("auto", "float16", "bfloat16"), ("auto", "cpu", "cuda")
    where.add_argument("--dtype", default="auto", choices=kinds, help="of what stays dense; auto: bfloat16 of such a model, else float16")
    where.add_argument("--device", default="auto", choices=devices, help="where it is computed; auto: cuda where there is one")
    where.add_argument("--revision", default="", metavar="REV", help="hub revision")
    where.add_argument("--download-dir", default="", metavar="DIR", help="where hub models and datasets are kept")
    return cli


def _add_text_flags(text: Any, search: bool) -> None:
    known = "wikitext2, c4, ptb, pileval (from .corpora, --download-dir or the hub), or a text or JSONL file"
    text.add_argument("--calib-dataset", default="wikitext2", metavar="NAME|FILE", help=f"{known} (default: %(default)s)")
    text.add_argument("--calib-samples", type=int, default=128, metavar="N", help="sequences; 0: no text at all (default: %(default)s)")
    text.add_argument("--calib-seqlen", type=int, default=2048, metavar="N", help="tokens of each (default: %(default)s)")
    text.add_argument("--batch-size", type=int, default=1, metavar="N", help="sequences computed at a time (default: %(default)s)")
    text.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the sequences (default: %(default)s)")
    if search:
        ratios = "try many ratios of the scales for the smallest error; --no-search-scale: 0.5 only, as LMDeploy without the flag"
        text.add_argument("--search-scale", action=argparse.BooleanOptionalAction, default=True, help=ratios)


def check_numbers(args: Any) -> None:
    """UsageError of a number that makes no sense."""
    for flag, least in (("calib_samples", 0), ("calib_seqlen", 2), ("batch_size", 1)):
        if getattr(args, flag) < least:
            raise UsageError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: at least {least}")


def guarded(prog: str, run: Callable[[], int]) -> int:
    """`run`, whatever goes wrong in it told in one line."""
    from engine.errors import ConfigError, DeviceError, EngineError
    from formats.errors import FormatError

    try:
        return run()
    except ConfigError as error:
        raise UsageError(str(error).rstrip(".")) from None
    except DeviceError as error:
        say(f"{prog}: {error}")
        return EXIT_DEVICE
    except (EngineError, FormatError) as error:
        say(f"{prog}: {error}")
        return EXIT_MODEL
    except OSError as error:
        say(f"{prog}: {error.filename or 'the disk'}: {error.strerror or error}")
        return EXIT_DISK
    except MemoryError:
        say(f"{prog}: not enough memory; lower --batch-size or --calib-seqlen")
        return EXIT_DEVICE


def open_model(args: Any) -> Source:
    """The source that `args` name, fetched from the hub if that is where it is."""
    from api.loading import with_local_files
    from config.given import configured
    from config.schema import Config
    from quant.source import open_source

    kept = "" if Path(args.model).exists() else args.download_dir  # of a model on disk it is for the dataset alone
    loaded: Config = configured(args.model, revision=args.revision, download_dir=kept).config
    return open_source(Path(with_local_files(loaded).model.path))


def open_windows(args: Any, source: Source) -> Windows | None:
    """Calibration text in the source's own tokens; None where no samples are wanted."""
    from engine.errors import ConfigError
    from quant.corpus import load_windows
    from text.tokenizer import load_tokenizer

    if args.calib_samples == 0:
        return None
    spec = source.spec
    if args.calib_seqlen > spec.longest:
        raise ConfigError(f"--calib-seqlen {args.calib_seqlen}: the model's sequences end at {spec.longest}; lower it.")
    tokenizer = load_tokenizer(source.path)
    windows = load_windows(args.calib_dataset, tokenizer, args.calib_samples, args.calib_seqlen, args.seed, args.download_dir or None)
    if int(windows.ids.max()) >= spec.vocab_size:
        raise ConfigError(f"{source.path.name}: token {int(windows.ids.max())} of the tokenizer, {spec.vocab_size} rows of the embedding.")
    return windows


def chosen_dtype(args: Any, source: Source) -> str:
    if args.dtype != "auto":
        return str(args.dtype)
    return "bfloat16" if source.spec.dtype == "bfloat16" else "float16"


def chosen_device(args: Any) -> torch.device:
    import torch

    from engine.errors import DeviceError

    available = torch.cuda.is_available()
    if args.device == "cuda" and not available:
        raise DeviceError("--device cuda: this torch sees no card; use --device cpu.")
    if args.device == "cpu" or not available:
        return torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda")


def run_job(args: Any, prog: str, source: Source, method: Method) -> Made:
    """Make the copy and say what came of it."""
    from quant.job import Job

    windows, bar = open_windows(args, source), Bar()
    job = Job(
        source, method, args.work_dir, windows, dtype=chosen_dtype(args, source), batch_size=args.batch_size, device=chosen_device(args),
        progress=bar,
    )  # fmt: skip
    try:
        made = job.run()
    except KeyboardInterrupt:
        bar.end()
        say(f"{prog}: stopped; the same command goes on where it was")
        raise
    finally:
        bar.end()
    for sentence in made.sentences:
        say(f"{prog}: {sentence}")
    kept = f", {made.resumed_at} layers of an earlier start kept" if made.resumed_at else ""
    size = f"{made.nbytes / 1e6:.1f} MB of {made.source_nbytes / 1e6:.1f}"
    print(f"{args.work_dir}: {made.layers} layers, {size}, {clock(made.seconds)}{kept}")
    print(f"numbatch chat {args.work_dir}    numbatch serve api_server {args.work_dir}")
    return made


class Bar:
    """One line that moves on a terminal; a line now and then elsewhere."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._drawn = False

    def end(self) -> None:
        """What is said next has a line of its own."""
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._drawn = False

    def __call__(self, share: float, label: str, seconds_left: float) -> None:
        left = "" if math.isnan(seconds_left) else f", {clock(seconds_left)} left"
        if sys.stderr.isatty():
            self._drawn, filled = True, "#" * round(BAR * share)
            print(f"\r\x1b[K[{filled:<{BAR}}] {100 * share:3.0f} %  {label}{left}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last >= TELL_EVERY_S:
            self._last = time.monotonic()
            say(f"{100 * share:.0f} %  {label}{left}")


def clock(seconds: float) -> str:
    """1:05:09, 5:09 or 0:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
