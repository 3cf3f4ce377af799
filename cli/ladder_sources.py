"""The checkpoints a ladder stands on: what the command line names, what the model's files are already, and what is made.

Made ones are kept in the work folder, whole or not at all, and taken again by the next run. A form that cannot be had is a
`Source` with the reason; only what the first rung stands on must be there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from api.loading import with_local_files
from bench.ladder import REFUSALS, Source
from bench.quality import Text, quiet
from cli.arguments import UsageError, say
from engine.models.spec import load_spec
from engine.weight_files import take_stock
from quant.dense import is_dense, write_dense

STAMP = "made-from.json"  # which model a work folder belongs to
FOUR_BITS, EIGHT_BITS = {"AWQ", "GPTQ", "PACKED"}, {"INT8", "FP8"}  # forms of a folder's linears (`engine/weight_files.py`)
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
    if _stored_types(model) & FOUR_BITS and model.is_dir():
        return Source(str(model))
    return Source(reason="no 4-bit checkpoint is here: name one with --w4")


def _w8a8(model: Path, dense: Source, work_dir: Path, text: Text, args: argparse.Namespace) -> Source:
    if _stored_types(model) & EIGHT_BITS and model.is_dir():
        return Source(str(model))
    return Source(reason="no 8-bit checkpoint is here: name one with --w8a8")


def _stored_types(model: Path) -> set[str]:
    return {stored.type for stored in take_stock(model, load_spec(model)).values()}
