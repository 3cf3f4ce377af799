"""`numbatch lite COMMAND`: quantization. `ladder` measures what it costs; what LMDeploy has and is not here is refused by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from cli.arguments import Parser, UsageError, choose

LOADS = "AWQ checkpoints (4 bits, groups, gemm layout) and GGUF files made elsewhere load as they are"
COMMANDS = {
    "auto_awq": f"4-bit AWQ quantization comes in a later version; {LOADS}.",
    "auto_gptq": "GPTQ quantization is not planned before AWQ, which comes in a later version.",
    "calibrate": "calibration comes with auto_awq in a later version.",
    "kv_qparams": "KV quantization needs no calibration here; it comes as cache.quant_policy in a later version.",
    "smooth_quant": "8-bit activations are not planned; 8-bit weights load from GGUF (Q8_0).",
    "get_small_sharded_hf": "shards of any size are read as they are; there is nothing to split.",
}

MODULES = {"ladder": ("cli.ladder", "one model in six precisions, measured on your own text: which one to serve.")}


def parser() -> Parser:
    listed = "\n".join(f"  {name:<22}{sentence}" for name, sentence in ({n: s for n, (_, s) in MODULES.items()} | COMMANDS).items())
    return Parser(prog="numbatch lite", usage="numbatch lite COMMAND ...", description=f"Quantization.\n\n{listed}")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(argv or [])
    if not words or words[0] in ("-h", "--help"):
        print(parser().format_help(), end="")
        return 0 if words else 2
    name = choose(words[0], [*MODULES, *COMMANDS], "command")
    if name in MODULES:
        return int(importlib.import_module(MODULES[name][0]).main(words[1:]))
    raise UsageError(f"{name}: {COMMANDS[name]}")
