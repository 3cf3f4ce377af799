"""`numbatch bench WHAT ...`: the programs of `bench/`, each with its own flags (`numbatch bench WHAT --help`)."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Sequence

from cli.arguments import choose

BENCHES = {
    "offline": "throughput of the engine without a port: fixed lengths or a dataset",
    "load": "open-loop load on a server: latencies and throughput",
    "served": "start a server, load it, stop it",
    "delivery": "the way from the engine to the socket, with a mock model",
    "scheduler": "plan and apply, microseconds",
    "kernels": "each CPU kernel against the bandwidth of this machine",
    "quality": "perplexity on a text, and the distance from another model: KL, first choices",
    "checkpoint": "write a checkpoint of real shapes with random weights",
    "compare_llamacpp": "the same work beside llama.cpp",
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(argv or [])
    if not words or words[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:<18}{summary}" for name, summary in BENCHES.items())
        print(f"usage: numbatch bench WHAT ...\n\n{listed}\n\nWhat was measured so far, and why it was kept: bench/LOG.md.")
        return 0 if words else 2
    name = choose(words[0], list(BENCHES), "benchmark")
    module = importlib.import_module(f"bench.{name}")
    sys.argv = [f"numbatch bench {name}", *words[1:]]
    if inspect.signature(module.main).parameters:
        return int(module.main(words[1:]) or 0)
    return int(module.main() or 0)
