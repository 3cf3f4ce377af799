"""Every operation of every backend: time, share of the measured ceiling, error against the reference.

    python -m bench.kernels --device cpu [--only products,small,pass] [--threads N] [--json]
    python -m bench.kernels --device cuda [--only products,decode_attention,...] [--dtype float16] [--out rows.jsonl] [--json]
    python -m bench.kernels --compile-only [--sm 80,90] [--match w4] [--json]                  needs no GPU

`--device auto` takes a card where there is one. What is measured, and how: bench/kernels_cpu.py, bench/kernels_cuda.py. With
`--json` the last line of stdout is one object; with `--compile-only` it is {"kernels": [{"kernel", "sm", "registers", "stack_bytes",
"spill_bytes"}, ...]}, and the exit code is 1 where a kernel does not compile, has a stack frame or spills.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from bench.machine import describe_machine
from engine.cards import cards
from engine.errors import EngineError
from engine.host import usable_cores

CACHE = Path(".cache/kernels")
ARCHITECTURES = (75, 80, 86, 89, 90)


def measure_cpu(args: argparse.Namespace) -> dict[str, Any]:
    from bench import kernels_cpu  # here: numba must find its cache directory in the environment first

    return kernels_cpu.run(args.threads or usable_cores(), args.context, args.repeats, args.only)


def measure_cuda(args: argparse.Namespace) -> dict[str, Any]:
    from bench.gpu_time import GraphTimer, WallTimer
    from bench.kernels_cuda import TOYS, CudaBench, Shapes
    from engine.cuda.device import CudaDevice
    from engine.cuda.launch import Library

    device = CudaDevice(args.card)
    library = Library(device, CACHE.absolute(), processes=usable_cores())
    timer = WallTimer(device) if args.toy else GraphTimer(device, args.repeats)
    chosen = TOYS if args.toy else (Shapes(),)
    benches = [CudaBench(device, library, timer, shapes, args.dtype, args.out, not args.no_peers) for shapes in chosen]
    if unknown := args.only - benches[0].parts().keys():
        raise ValueError(f"--only knows {', '.join(benches[0].parts())}, not {', '.join(sorted(unknown))}.")
    library.load(_all_variants(library, device, args.dtype, [bench.shapes for bench in benches]))  # together: in several processes
    for bench in benches:
        bench.run(args.only)
    out = benches[0].result()
    for bench in benches[1:]:
        out["rows"] += bench.rows
        out["failed"] += bench.failed
    return out


def _all_variants(library: Any, device: Any, dtype: str, all_shapes: list[Any]) -> list[Any]:
    """What the operations of these shapes will load, as far as it can be told beforehand; the rest is compiled when it is met."""
    from bench.compile_only import Model, operations

    found: list[Any] = []
    for s in all_shapes:
        sizes = s.hidden, s.inner, s.heads, s.kv_heads, s.head_dim, s.vocab
        model = Model("", *sizes, block_seq_len=s.block_seq_len, group=s.group)
        found += [variant for operation in operations(library, device, model, dtype) for variant in operation.variants]
    return found


def compile_only(args: argparse.Namespace) -> int:
    from bench import compile_only

    found, failed = compile_only.run(args.sm, args.match, args.processes or usable_cores())
    for words in failed:
        print(f"failed: {words}", file=sys.stderr)
    if args.json:
        print(json.dumps({"kernels": found} | ({"failed": failed} if failed else {})))
    return 1 if failed or any(compile_only.spills(row) and not compile_only.exception(row) for row in found) else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.kernels", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--only", type=_names, default=set(), metavar="PART,...", help="some parts; an unknown one names those there are")
    p.add_argument("--repeats", type=int, default=0, help="measurements of each; default 30 on the CPU, 15 graph replays on a card")
    p.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    cpu = p.add_argument_group("cpu")
    cpu.add_argument("--threads", type=int, default=0, help="0: the cores this process may use")
    cpu.add_argument("--context", type=int, default=128, help="positions of each decode row")
    card = p.add_argument_group("cuda")
    card.add_argument("--card", type=int, default=0)
    card.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    card.add_argument("--toy", action="store_true", help="small awkward shapes, each call once: is everything right? no speed")
    card.add_argument("--no-peers", action="store_true", help="leave out the attention kernels of torch")
    card.add_argument("--out", type=Path, default=None, metavar="FILE", help="append each row as a JSON line when it is measured")
    alone = p.add_argument_group("compile only")
    alone.add_argument("--compile-only", action="store_true", help="registers, stack frames and spills; no GPU needed")
    alone.add_argument("--sm", type=_architectures, default=ARCHITECTURES, metavar="NN,...", help="default: 75,80,86,89,90")
    alone.add_argument("--match", default="", help="only kernels whose name holds this")
    alone.add_argument("--processes", type=int, default=0, help="0: as many as cores")
    return p


def _names(word: str) -> set[str]:
    return set(filter(None, word.split(",")))


def _architectures(word: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in word.split(","))
    if not all(70 <= sm <= 129 for sm in found):
        raise argparse.ArgumentTypeError("like 80,90: compute capability without its dot")
    return found


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.repeats < 0 or args.threads < 0 or args.processes < 0 or args.context < 1:
        p.error("--repeats, --threads and --processes must not be below 0, --context not below 1")
    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ.setdefault("NUMBA_CACHE_DIR", str(CACHE.absolute()))
    if args.compile_only:
        return compile_only(args)
    device = args.device if args.device != "auto" else "cuda" if cards() else "cpu"
    args.repeats = args.repeats or (30 if device == "cpu" else 15)
    try:
        out = measure_cpu(args) if device == "cpu" else measure_cuda(args)
    except (EngineError, ValueError) as error:
        print(f"bench.kernels: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"bench": "kernels", "device": device, "machine": describe_machine(), **out}))
    return 1 if out.get("failed") else 0


if __name__ == "__main__":
    raise SystemExit(main())
