"""`numbatch lite auto_gptq MODEL`: a 4-bit copy of a model by GPTQ. What it does is `quant/gptq.py`'s business."""

from __future__ import annotations

from collections.abc import Sequence

from cli.arguments import Parser, UsageError
from cli.lite_flags import check_numbers, guarded, make_parser, open_model, run_job

PROG = "numbatch lite auto_gptq"
WHAT = """4-bit weights by GPTQ: what rounding an input channel changes is made up for by those after it. Symmetric, without act-order.
Killed, or out of disk: the same command goes on where it stopped. MODEL is only read."""


def parser() -> Parser:
    cli = make_parser("auto_gptq", WHAT)
    weights = cli.add_argument_group("weights")
    weights.add_argument("--w-bits", type=int, default=4, metavar="N", help="4 (default: %(default)s)")
    group = "input channels sharing a scale: 32, 64 or 128 (default: %(default)s)"
    weights.add_argument("--w-group-size", type=int, default=128, metavar="N", help=group)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_numbers(args)
    if args.w_bits != 4:
        raise UsageError(f"--w-bits {args.w_bits}: only 4 are made; for 8 bits there is numbatch lite smooth_quant")

    def run() -> int:
        from quant.gptq import AutoGptq

        run_job(args, PROG, open_model(args), AutoGptq(args.w_group_size))
        return 0

    return guarded(PROG, run)
