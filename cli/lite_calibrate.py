"""`numbatch lite calibrate MODEL`: statistics of a model on a text. What they are is `quant/calibrate.py`'s business."""

from __future__ import annotations

from collections.abc import Sequence

from cli.arguments import Parser, UsageError, say
from cli.lite_flags import Bar, check_numbers, chosen_device, guarded, make_parser, open_model, open_windows

PROG = "numbatch lite calibrate"
WHAT = """Sizes of what linears read, and ranges of keys and values, on a text: calibration.safetensors in --work-dir.
auto_awq and smooth_quant need no such step: they look for themselves."""


def parser() -> Parser:
    return make_parser("calibrate", WHAT)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_numbers(args)
    if args.calib_samples == 0:
        raise UsageError("--calib-samples 0: there is nothing to look at without text")

    def run() -> int:
        from quant.calibrate import TENSORS, calibrate

        source = open_model(args)
        windows = open_windows(args, source)
        assert windows is not None
        for sentence in windows.sentences:
            say(f"{PROG}: {sentence}")
        bar = Bar()
        try:
            calibrate(source, windows, args.work_dir, batch_size=args.batch_size, device=chosen_device(args), progress=bar)
        finally:
            bar.end()
        print(f"{args.work_dir}/{TENSORS}: {source.spec.num_layers} layers, {windows.tokens} tokens")
        return 0

    return guarded(PROG, run)
