"""`numbatch lite kv_qparams`: static KV scales for LMDeploy 0.1, which read them beside a workspace's weights."""

from __future__ import annotations

from collections.abc import Sequence

from cli.arguments import Parser, UsageError
from cli.lite_flags import guarded

PROG = "numbatch lite kv_qparams"
WHAT = """layers.N.past_kv_scale.R.weight for LMDeploy 0.1 and its quant_policy = 4 (int8 then), from what calibrate saw.
numbatch needs none: its KV scales are found as keys and values come (--quant-policy 8 or 4)."""
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")


def parser() -> Parser:
    cli = Parser(prog=PROG, usage=f"{PROG} WORK_DIR TURBOMIND_DIR [flags]", description=WHAT)
    cli.add_argument("work_dir", nargs="?", help="folder that calibrate wrote (or --work-dir)")
    cli.add_argument("turbomind_dir", nargs="?", help="WORKSPACE/triton_models/weights (or --turbomind-dir)")
    cli.add_argument("--work-dir", dest="work_flag", metavar="DIR", help="the same as a flag")
    cli.add_argument("--turbomind-dir", dest="turbomind_flag", metavar="DIR", help="the same as a flag")
    cli.add_argument("--kv-bits", type=int, default=8, metavar="N", help="8 (default: %(default)s)")
    cli.add_argument("--kv-sym", nargs="?", const="true", default="false", metavar="BOOL", help="one scale and no minimum")
    cli.add_argument("--num-tp", type=int, default=1, metavar="N", help="ranks of the workspace (default: %(default)s)")
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    work, turbomind = args.work_flag or args.work_dir, args.turbomind_flag or args.turbomind_dir
    if args.work_flag and args.work_dir and not args.turbomind_dir and not args.turbomind_flag:
        turbomind = args.work_dir  # --work-dir W TURBOMIND_DIR
    if not work or not turbomind:
        raise UsageError("name two folders: what calibrate wrote, and WORKSPACE/triton_models/weights")
    if args.kv_bits != 8:
        raise UsageError(f"--kv-bits {args.kv_bits}: TurboMind's files are of 8 bits")
    if args.kv_sym.lower() not in TRUE + FALSE:
        raise UsageError(f"--kv-sym {args.kv_sym}: True or False")

    def run() -> int:
        from quant.calibrate import kv_qparams

        files = kv_qparams(work, turbomind, symmetric=args.kv_sym.lower() in TRUE, ranks=args.num_tp)
        print(f"{turbomind}: {files} files past_kv_scale, static int8 KV scales for LMDeploy 0.1; numbatch finds its own as it goes")
        return 0

    return guarded(PROG, run)
