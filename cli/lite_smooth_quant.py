"""`numbatch lite smooth_quant MODEL`: an 8-bit copy of a model. What it does is `quant/smooth_quant.py`'s business."""

from __future__ import annotations

from collections.abc import Sequence

from cli.arguments import Parser, UsageError
from cli.lite_flags import check_numbers, chosen_dtype, guarded, make_parser, open_model, run_job

PROG = "numbatch lite smooth_quant"
WHAT = """8-bit weights, with outliers of the activations moved into them so that 8-bit activations suffice too (W8A8).
fp8 products need a card of compute capability 8.9 to be quick; the copy is made anywhere. MODEL is only read."""
KINDS = {"int8": "int8", "fp8": "fp8", "float8_e4m3fn": "fp8"}


def parser() -> Parser:
    cli = make_parser("smooth_quant", WHAT, search=True)
    kinds = "int8, fp8 (float8_e4m3fn) (default: %(default)s)"
    cli.add_argument_group("weights").add_argument("--quant-dtype", default="int8", metavar="TYPE", help=kinds)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_numbers(args)
    if args.quant_dtype == "float8_e5m2":
        raise UsageError("--quant-dtype float8_e5m2: compressed-tensors, which others read, has no such type; use fp8 (float8_e4m3fn)")
    if args.quant_dtype not in KINDS:
        raise UsageError(f"--quant-dtype {args.quant_dtype}: there are {', '.join(KINDS)}")

    def run() -> int:
        from quant.smooth_quant import SmoothQuant

        source = open_model(args)
        method = SmoothQuant(source.spec, KINDS[args.quant_dtype], args.search_scale, dtype=chosen_dtype(args, source))
        run_job(args, PROG, source, method)
        return 0

    return guarded(PROG, run)
