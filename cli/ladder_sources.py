"""The checkpoints a ladder stands on: what the command line names, what the model's files are already, and what is made.

Made ones are kept in the work folder, whole or not at all, and taken again by the next run. A form that cannot be had is a
`Source` with the reason; only what the first rung stands on must be there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from api.loading import with_local_files
from bench.ladder import REFUSALS, Source
from bench.quality import Text, quiet
from bench.texts import unused_part
from cli.arguments import UsageError, say
from engine.models.spec import ModelSpec, load_spec
from engine.w4 import GROUP_SIZES
from engine.weight_files import take_stock
from quant.dense import is_dense, write_dense
from text.tokenizer import load_tokenizer

STAMP = "made-from.json"  # which model a work folder belongs to
FOUR_BITS, EIGHT_BITS = {"AWQ", "GPTQ", "PACKED"}, {"INT8", "FP8"}  # forms of a folder's linears (`engine/weight_files.py`)
ROOT = Path(__file__).resolve().parent.parent
STDERR = 2  # stdout is for the table
LEAST_REST = 0.1  # of the data that must be left to calibrate on
DENSE_DIR, W4_DIR, W8A8_DIR = "16-bit", "w4", "w8a8"


def find_sources(args: argparse.Namespace, work_dir: Path, text: Text, forms: set[str]) -> dict[str, Source]:
    """A `Source` for each of `forms`. Raises what loading the model raises."""
    model = Path(with_local_files(quiet(args.model, args.set)).model.path)
    _stamp(work_dir, model)
    dense = Source(args.base) if args.base else _dense(model, work_dir)
    makers: dict[str, Callable[[], Source]] = {
        "16-bit": lambda: dense,
        "W4": lambda: Source(args.w4) if args.w4 else _w4(model, dense, work_dir, text, args),
        "W8A8": lambda: Source(args.w8a8) if args.w8a8 else _w8a8(model, dense, work_dir, text, args),
    }
    return {form: _or_reason(makers[form]) for form in makers if form in forms}


def _or_reason(make: Callable[[], Source]) -> Source:
    try:
        return make()
    except REFUSALS as error:
        return Source(reason=" ".join(str(error).split()) or type(error).__name__)


def _stamp(work_dir: Path, model: Path) -> None:
    """UsageError where the folder holds another model's checkpoints."""
    size = model.stat().st_size if model.is_file() else sum(path.stat().st_size for path in model.glob("*.safetensors"))
    mine = {"model": str(model.resolve()), "bytes": size}
    stamp = work_dir / STAMP
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) != mine:
        raise UsageError(f"--work-dir {work_dir} holds the ladder of another model; name another folder, or remove it.")
    stamp.write_text(json.dumps(mine), encoding="utf-8")


def _dense(model: Path, work_dir: Path) -> Source:
    if is_dense(model):
        return Source(str(model))
    place = work_dir / DENSE_DIR
    if not (place / "config.json").is_file():
        say(f"{model.name} is quantized already: its dequantized weights, in {place}, stand for 16-bit")
        write_dense(model, place)
    return Source(str(place), made="dequantized")


def _w4(model: Path, dense: Source, work_dir: Path, text: Text, args: argparse.Namespace) -> Source:
    if model.is_dir() and _stored_types(model) & FOUR_BITS:
        return Source(str(model))
    group = args.w_group_size or fitting_group(load_spec(dense.path))
    return _made("auto_awq", dense, work_dir / W4_DIR, [*_calibration(dense, work_dir, text, args), "--w-group-size", str(group)])


def _w8a8(model: Path, dense: Source, work_dir: Path, text: Text, args: argparse.Namespace) -> Source:
    if model.is_dir() and _stored_types(model) & EIGHT_BITS:
        return Source(str(model))
    return _made("smooth_quant", dense, work_dir / W8A8_DIR, _calibration(dense, work_dir, text, args))


def fitting_group(spec: ModelSpec) -> int:
    """The largest group size that divides the input channels of every linear; auto_awq's own default where none does."""
    inputs = (spec.hidden_size, spec.num_heads * spec.head_dim, spec.intermediate_size)
    return next((group for group in sorted(GROUP_SIZES, reverse=True) if not any(n % group for n in inputs)), max(GROUP_SIZES))


def _made(command: str, dense: Source, place: Path, words: list[str]) -> Source:
    """What `numbatch lite COMMAND` makes of the 16-bit checkpoint, now or in an earlier run."""
    if (place / "config.json").is_file():
        say(f"{place} was made before, and is taken (remove it to make it anew)")
        return Source(str(place))
    words = ["lite", command, dense.path, "--work-dir", str(place), *words]
    say(f"numbatch {' '.join(words)}")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    # a process of its own: its memory and threads are gone when rungs are timed
    code = subprocess.run([sys.executable, "-m", "cli", *words], stdout=STDERR, env=env, check=False).returncode
    return Source(str(place)) if code == 0 else Source(reason=f"numbatch lite {command} ended with exit code {code}; its reason is above")


def _calibration(dense: Source, work_dir: Path, text: Text, args: argparse.Namespace) -> list[str]:
    """Flags of the calibration text: what was asked for, else the part of the data that is not scored."""
    words = ["--calib-samples", str(args.calib_samples), "--calib-seqlen", str(args.calib_seqlen)]
    if args.calib_dataset:
        return ["--calib-dataset", args.calib_dataset, *words]
    tokenizer = load_tokenizer(Path(dense.path))
    rest = unused_part(text.path, tokenizer, lambda messages: tokenizer.encode("".join(m["content"] for m in messages)), text.tokens)
    if len(rest) < LEAST_REST * text.path.stat().st_size:
        say(f"{text.path.name} is calibrated on as well as measured on, as little of it is left beside what is scored; see --calib-dataset")
        return ["--calib-dataset", str(text.path), *words]
    place = work_dir / f"calibration{text.path.suffix or '.txt'}"
    place.write_text(rest, encoding="utf-8")
    return ["--calib-dataset", str(place), *words]


def _stored_types(model: Path) -> set[str]:
    return {stored.type for stored in take_stock(model, load_spec(model)).values()}
