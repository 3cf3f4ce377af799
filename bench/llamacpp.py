"""The peer: llama.cpp in a process of its own, through the `xllamacpp` package.

`python -m bench.llamacpp MODEL --threads 2` measures in process and prints one JSON line; with `--serve SLOTS` it
starts llama-server, prints {"url": ...} and serves until its standard input closes.

Both as fast as llama.cpp can be made here: measured with flash attention on and off (off wins at decoding, on at
prompts), the better one counts; prompt caching off as for numbatch; continuous batching on; one slot a sequence.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from bench.metrics import steady_rate
from bench.workload import random_ids

VOCAB = 32000  # random prompt ids are below this
SLOT_TOKENS = 512  # context of one slot


def start(model: str, threads: int, slots: int, flash: bool, slot_tokens: int = SLOT_TOKENS) -> Any:
    """A llama.cpp server in this process (it listens on 127.0.0.1 and also answers direct calls)."""
    import xllamacpp as x  # type: ignore[import-untyped]

    params = x.CommonParams()
    params.model.path = model
    params.n_gpu_layers = 0
    params.n_parallel, params.n_ctx = slots, slots * slot_tokens
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    kinds = x.llama_flash_attn_type
    params.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_prompt, params.cache_ram_mib = False, 0
    params.cont_batching, params.fit_params = True, False
    params.verbosity = 0
    with _quiet():
        return x.Server(params)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """llama.cpp writes its start-up to standard output and error by file descriptor; ours must stay one JSON line."""
    saved = os.dup(1), os.dup(2)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            for fd, old in zip((1, 2), saved, strict=True):
                os.dup2(old, fd)
                os.close(old)


def complete(server: Any, prompt: list[int], num_tokens: int) -> list[float]:
    """One greedy completion of exactly `num_tokens` tokens; the arrival time of each.

    A token that ends inside a UTF-8 character brings no message of its own; it arrived, at the latest, with the next one.
    """
    times: list[float] = []
    usage: dict[str, int] = {}

    def arrived(message: dict[str, Any]) -> None:
        times.append(time.perf_counter())
        usage.update(message.get("usage", message.get("error", {})))

    request = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True, "cache_prompt": False}
    server.handle_completions(request, arrived)
    if usage.get("completion_tokens") != num_tokens:
        raise RuntimeError(f"llama.cpp ended with {usage}, not after {num_tokens} tokens")
    return spread(times[:-1] or times, num_tokens)


def spread(times: list[float], num_tokens: int) -> list[float]:
    """`num_tokens` arrivals from fewer messages: the missing ones lie evenly between the first and the last."""
    missing = num_tokens - len(times)
    step = (times[-1] - times[0]) / (missing + 1)
    return sorted([*times, *(times[0] + step * (i + 1) for i in range(missing))])[:num_tokens]


def prompt_rate(server: Any, rng: random.Random, num_tokens: int) -> float:
    prompt = random_ids(rng, num_tokens, VOCAB)
    started = time.perf_counter()
    return num_tokens / (complete(server, prompt, 1)[0] - started)


def decode_rate(server: Any, rng: random.Random, num_sequences: int, num_prompt: int, num_tokens: int) -> float:
    arrivals: list[list[float]] = [[] for _ in range(num_sequences)]
    prompts = [random_ids(rng, num_prompt, VOCAB) for _ in range(num_sequences)]

    def one(i: int) -> None:
        arrivals[i] = complete(server, prompts[i], num_tokens)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(num_sequences)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not all(arrivals):
        raise RuntimeError("a llama.cpp completion failed")
    return steady_rate(arrivals)


def measure(model: str, threads: int, batches: list[int], num_prompt: int, num_tokens: int, repeats: int, flash: bool) -> dict[str, Any]:
    """{"prompt": tok/s, "decode": {"1": tok/s, ...}} with one flash attention setting: medians of `repeats`."""
    rng = random.Random(0)
    server = start(model, threads, 1, flash, 1024)
    prompt_rate(server, rng, 512)
    prompts = [prompt_rate(server, rng, 512) for _ in range(3 * repeats)]
    del server
    decodes = {}
    for n in batches:
        server = start(model, threads, n, flash)
        decode_rate(server, rng, n, num_prompt, 8)
        decodes[str(n)] = statistics.median(decode_rate(server, rng, n, num_prompt, num_tokens) for _ in range(repeats))
        del server
    return {"prompt": statistics.median(prompts), "decode": decodes}


def serve(model: str, threads: int, slots: int, flash: bool) -> None:
    server = start(model, threads, slots, flash)
    print(json.dumps({"url": server.listening_address}), flush=True)
    sys.stdin.read()


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m bench.llamacpp", allow_abbrev=False)
    p.add_argument("model")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--serve", type=int, default=0, metavar="SLOTS")
    p.add_argument("--batch", default="1,8,16")
    p.add_argument("--prompt-tokens", type=int, default=128)
    p.add_argument("--tokens", type=int, default=128)
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--flash", choices=("on", "off"), default="off")
    args = p.parse_args()
    if args.serve:
        serve(args.model, args.threads, args.serve, args.flash == "on")
        return 0
    batches = [int(n) for n in args.batch.split(",")]
    out = measure(args.model, args.threads, batches, args.prompt_tokens, args.tokens, args.repeats, args.flash == "on")
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
