"""`numbatch lite auto_awq MODEL`: a 4-bit copy of a model by AWQ. What it does is `quant/auto_awq.py`'s business."""

from __future__ import annotations

from collections.abc import Sequence

from cli.arguments import Parser, UsageError
from cli.lite_flags import check_numbers, chosen_dtype, guarded, make_parser, open_model, run_job

PROG = "numbatch lite auto_awq"
WHAT = """4-bit weights by AWQ: channels that matter are scaled up before rounding, ranges are clipped where that helps.
Killed, or out of disk: the same command goes on where it stopped. MODEL is only read."""


def parser() -> Parser:
    cli = make_parser("auto_awq", WHAT, search=True)
    weights = cli.add_argument_group("weights")
    weights.add_argument("--w-bits", type=int, default=4, metavar="N", help="4 (default: %(default)s)")
    weights.add_argument("--w-sym", action="store_true", help="one zero point, 8, for all groups")
    group = "input channels sharing a scale: 32, 64 or 128 (default: %(default)s)"
    weights.add_argument("--w-group-size", type=int, default=128, metavar="N", help=group)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_numbers(args)
    if args.w_bits != 4:
        raise UsageError(f"--w-bits {args.w_bits}: AWQ's layout holds 4; for 8 bits there is numbatch lite smooth_quant")

    def run() -> int:
        from quant.auto_awq import AutoAwq

        source = open_model(args)
        dtype = chosen_dtype(args, source)
        run_job(args, PROG, source, AutoAwq(source.spec, args.w_group_size, args.w_sym, args.search_scale, dtype=dtype))
        return 0

    return guarded(PROG, run)
