"""`numbatch lite COMMAND ...`: which command of quantization is meant, and nothing else.

Each is a `main(argv) -> int` in a module of its own, imported when it is called. What LMDeploy had and nobody needs here is
refused by name.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

from cli.arguments import Parser, UsageError, choose

COMMANDS = {
    "auto_awq": ("cli.lite_auto_awq", "4 bits: AWQ, in the layout that transformers, vLLM, SGLang and LMDeploy read"),
    "auto_gptq": ("cli.lite_auto_gptq", "4 bits: GPTQ"),
    "smooth_quant": ("cli.lite_smooth_quant", "8 bits, activations too: int8 or fp8 (compressed-tensors)"),
    "calibrate": ("cli.lite_calibrate", "statistics of activations, keys and values on a text"),
    "kv_qparams": ("cli.lite_kv_qparams", "LMDeploy 0.1's files of static KV scales, from what calibrate saw"),
    "ladder": ("cli.ladder", "one model in six precisions, measured on your own text: which one to serve"),
}
REFUSED = {"get_small_sharded_hf": "shards of any size are read as they are; there is nothing to split."}


def there() -> dict[str, tuple[str, str]]:
    """The commands whose modules exist."""
    return {name: command for name, command in COMMANDS.items() if importlib.util.find_spec(command[0]) is not None}


def parser() -> Parser:
    listed = "\n".join(f"  {name:<22}{summary}" for name, (_, summary) in there().items())
    more = "numbatch lite COMMAND --help says more."
    return Parser(prog="numbatch lite", usage="numbatch lite COMMAND ...", description=f"Quantization.\n\n{listed}\n\n{more}")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(argv or [])
    if not words or words[0] in ("-h", "--help"):
        print(parser().format_help(), end="")
        return 0 if words else 2
    name = choose(words.pop(0), [*there(), *REFUSED], "command")
    if name in REFUSED:
        raise UsageError(f"{name}: {REFUSED[name]}")
    return int(importlib.import_module(COMMANDS[name][0]).main(words))
