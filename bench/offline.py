"""The engine in process: `python -m bench.offline --model x.gguf --threads 2`.

Prompt speed: one prompt of 512 tokens, from submit to its first token. Decode speed: N sequences with prompts of 128
tokens, all tokens that arrive between the first moment at which every sequence has begun and the first at which one
ends. Both include scheduler, sampler and event loop; nothing includes HTTP or text. Prefix caching is off.

Prints a table; with `--json` the last line of stdout is {"prompt_tok_s", "decode_tok_s": {"1": ..., ...}, ...}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench.machine import Neighbours, describe_machine
from bench.metrics import steady_rate
from bench.workload import random_ids
from config.load import load_config
from config.schema import Config
from engine.build import build_engine, resolve_spec
from engine.errors import EngineError
from engine.loop import Engine
from engine.sequence import SamplingParams

PROMPT_TOKENS = 512
DECODE_PROMPT_TOKENS = 128
DECODE_TOKENS = 128
BATCHES = (1, 8, 16)


async def stream(engine: Engine, prompt: list[int], num_tokens: int) -> list[float]:
    """Run one greedy sequence to its full length; the arrival time of each of its tokens, seconds."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    generation = engine.submit(prompt, params)
    times: list[float] = []
    while len(times) < num_tokens:
        events = await generation.next()
        now = time.perf_counter()
        times += [now] * sum(event.token_id >= 0 for event in events)
        if events[-1].finish_reason is not None and len(times) < num_tokens:
            raise RuntimeError(f"a sequence ended after {len(times)} of {num_tokens} tokens: {events[-1].finish_reason.name}")
    return times


async def prompt_rate(engine: Engine, rng: random.Random, num_tokens: int) -> float:
    prompt = random_ids(rng, num_tokens, engine.spec.vocab_size)
    start = time.perf_counter()
    times = await stream(engine, prompt, 1)
    return num_tokens / (times[0] - start)


async def decode_rate(engine: Engine, rng: random.Random, num_sequences: int, num_tokens: int) -> float:
    prompts = [random_ids(rng, DECODE_PROMPT_TOKENS, engine.spec.vocab_size) for _ in range(num_sequences)]
    return steady_rate(await asyncio.gather(*(stream(engine, prompt, num_tokens) for prompt in prompts)))


async def measure(config: Config, batches: list[int], num_tokens: int, repeats: int) -> dict[str, Any]:
    """Start, warm every shape once, measure `repeats` times in turn, stop. Medians, and all runs beside them."""
    started = time.perf_counter()
    engine = build_engine(config, resolve_spec(config))
    await engine.start()
    startup_s = time.perf_counter() - started
    try:
        rng = random.Random(0)
        await prompt_rate(engine, rng, PROMPT_TOKENS)
        for n in batches:
            await decode_rate(engine, rng, n, 8)
        prompts: list[float] = []
        decodes: dict[str, list[float]] = {str(n): [] for n in batches}
        for _ in range(repeats):
            prompts += [await prompt_rate(engine, rng, PROMPT_TOKENS) for _ in range(3)]
            for n in batches:
                decodes[str(n)].append(await decode_rate(engine, rng, n, num_tokens))
    finally:
        await engine.stop()
    return {
        "prompt_tok_s": statistics.median(prompts),
        "decode_tok_s": {n: statistics.median(runs) for n, runs in decodes.items()},
        "startup_s": startup_s,
        "runs": {"prompt": prompts, "decode": decodes},
    }


def configure(args: argparse.Namespace) -> Config:
    """The defaults with what the command line says, through the same checks as a server's configuration."""
    sets = [
        f"model.path={args.model}",
        f"model.dtype={args.dtype}",
        f"engine.num_threads={args.threads}",
        f"engine.device={args.device}",
        f"engine.max_batch_size={max(64, *args.batch)}",
        "cache.enable_prefix_caching=false",
        *args.set,
    ]
    return load_config(Path(args.config) if args.config else None, sets=sets).config


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.offline", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--model", required=True, help="checkpoint directory or .gguf file")
    p.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    p.add_argument("--device", default="auto", help="as engine.device")
    p.add_argument("--threads", type=int, default=0, help="as engine.num_threads; 0: the cores this process may use")
    p.add_argument("--batch", type=_batches, default=list(BATCHES), metavar="N,N,...", help="sequences to decode together; default 1,8,16")
    p.add_argument("--tokens", type=int, default=DECODE_TOKENS, help="tokens each sequence decodes")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--config", default="", help="TOML file to begin with")
    p.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as for server.py")
    p.add_argument("--json", action="store_true")
    args = p.parse_args(argv)
    if not (2 <= args.tokens <= 100_000 and 1 <= args.repeats <= 100):
        p.error("--tokens must be 2..100000 and --repeats 1..100")
    try:
        config, neighbours = configure(args), Neighbours()
        out = asyncio.run(measure(config, args.batch, args.tokens, args.repeats))
    except (EngineError, ValueError, OSError) as error:
        print(f"bench.offline: {error}", file=sys.stderr)
        return 2
    out |= {"model": Path(args.model).name, "dtype": args.dtype, "threads": args.threads, "machine": describe_machine()}
    out["others_cpu_share"] = neighbours.share()
    print(f"{out['model']}, dtype {args.dtype}, {args.threads or 'all'} threads; ready in {out['startup_s']:.1f} s")
    print(f"prompt of {PROMPT_TOKENS:<5} {out['prompt_tok_s']:>10,.0f} tok/s")
    for n, rate in out["decode_tok_s"].items():
        print(f"decode x {n:<6} {rate:>10,.1f} tok/s")
    if args.json:
        print(json.dumps(out))
    return 0


def _batches(word: str) -> list[int]:
    out = [int(part) for part in word.split(",")]
    if not out or not all(1 <= n <= 4096 for n in out):
        raise argparse.ArgumentTypeError("numbers from 1 to 4096, separated by commas")
    return out


if __name__ == "__main__":
    sys.exit(main())
