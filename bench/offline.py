"""The engine in process: `python -m bench.offline --model x.gguf --decode 1,8,16 --prefill 8x1024 --workload mixed512`.

Decode: N sequences with prompts of 128 tokens, all tokens that arrive between the first moment at which every sequence has
begun and the first at which one ends. Prefill NxL: N prompts of L tokens, all sent at once, until the last has its first
token. Mixed: 512 requests of mixed lengths, all sent at once, until the last one ends. Prompts are random ids, answers run to
their full length, prefix caching is off; everything includes scheduler, sampler and event loop, nothing HTTP or text.

Without a choice: one prompt of 512 tokens, and decoding of 1, 8 and 16. Prints a table; with `--json` the last line of stdout
is {"prompt_tok_s", "prefill_tok_s": {"8x1024": ...}, "decode_tok_s": {"1": ...}, "mixed": {...}, ...}, what was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import metrics, workload
from bench.machine import Neighbours, describe_machine
from bench.metrics import Answer, steady_rate
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
MIXED_BATCH = 512  # max_batch_size of a mixed run where nothing says otherwise: a large card's default
LONG_LISTS = ("input_lens", "output_lens", "ttfts", "latencies", "errors")


@dataclass(frozen=True, slots=True)
class Work:
    """What to measure. `prefills`: (prompts, tokens of each); `mixed`: requests, 0 for none."""

    prompt: bool
    batches: tuple[int, ...]
    prefills: tuple[tuple[int, int], ...]
    mixed: int
    scale: float
    num_tokens: int
    repeats: int

    @property
    def most_sequences(self) -> int:
        return max(64, *self.batches, *(n for n, _ in self.prefills), MIXED_BATCH if self.mixed > 64 else 0)


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


async def prefill_rate(engine: Engine, rng: random.Random, count: int, num_tokens: int) -> float:
    """Prompt tokens a second of `count` prompts together."""
    prompts = [random_ids(rng, num_tokens, engine.spec.vocab_size) for _ in range(count)]
    start = time.perf_counter()
    times = await asyncio.gather(*(stream(engine, prompt, 1) for prompt in prompts))
    return count * num_tokens / (max(t[0] for t in times) - start)


async def decode_rate(engine: Engine, rng: random.Random, num_sequences: int, num_tokens: int) -> float:
    prompts = [random_ids(rng, DECODE_PROMPT_TOKENS, engine.spec.vocab_size) for _ in range(num_sequences)]
    return steady_rate(await asyncio.gather(*(stream(engine, prompt, num_tokens) for prompt in prompts)))


async def mixed_run(engine: Engine, count: int, scale: float, seed: int = 0) -> dict[str, Any]:
    """The mixed workload once: output tokens a second from the first submit to the last token, and latencies."""
    requests = list(workload.mixed_prompts(count, scale, engine.spec.vocab_size, seed))
    start = time.perf_counter()

    async def one(prompt: list[int], input_len: int, output_len: int) -> Answer:
        times = [t - start for t in await stream(engine, prompt, output_len)]
        return Answer(0.0, 0.0, times[0], times[-1], times, input_len, output_len)

    answers = await asyncio.gather(*(one(*request) for request in requests))
    found = metrics.result(answers, max(a.end_s for a in answers), {}, detailed=False)
    steps = {"steps": engine.snapshot().steps, "preemptions": engine.snapshot().preemptions}
    return {key: value for key, value in found.items() if key not in LONG_LISTS} | steps


async def measure(config: Config, work: Work) -> dict[str, Any]:
    """Start, warm every shape once, measure `repeats` times in turn, stop. Medians, and all runs beside them."""
    started = time.perf_counter()
    engine = build_engine(config, resolve_spec(config))
    await engine.start()
    startup_s = time.perf_counter() - started
    try:
        rng = random.Random(0)
        if work.prompt:
            await prefill_rate(engine, rng, 1, PROMPT_TOKENS)
        for count, length in work.prefills:
            await prefill_rate(engine, rng, count, length)
        for n in work.batches:
            await asyncio.gather(*(stream(engine, random_ids(rng, DECODE_PROMPT_TOKENS, engine.spec.vocab_size), 8) for _ in range(n)))
        runs = await _runs(engine, rng, work)
    finally:
        await engine.stop()
    return _medians(runs) | {"startup_s": startup_s, "runs": runs}


async def _runs(engine: Engine, rng: random.Random, work: Work) -> dict[str, Any]:
    prompts: list[float] = []
    prefills: dict[str, list[float]] = {f"{count}x{length}": [] for count, length in work.prefills}
    decodes: dict[str, list[float]] = {str(n): [] for n in work.batches}
    mixed: list[dict[str, Any]] = []
    for repeat in range(work.repeats):
        prompts += [await prefill_rate(engine, rng, 1, PROMPT_TOKENS) for _ in range(3 if work.prompt else 0)]
        for count, length in work.prefills:
            prefills[f"{count}x{length}"].append(await prefill_rate(engine, rng, count, length))
        for n in work.batches:
            decodes[str(n)].append(await decode_rate(engine, rng, n, work.num_tokens))
        if work.mixed and repeat < 2:  # minutes on a small machine
            mixed.append(await mixed_run(engine, work.mixed, work.scale))
    return {"prompt": prompts, "prefill": prefills, "decode": decodes, "mixed": mixed}


def _medians(runs: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if runs["prompt"]:
        out["prompt_tok_s"] = statistics.median(runs["prompt"])
    if runs["prefill"]:
        out["prefill_tok_s"] = {name: statistics.median(rates) for name, rates in runs["prefill"].items()}
    if runs["decode"]:
        out["decode_tok_s"] = {n: statistics.median(rates) for n, rates in runs["decode"].items()}
    if runs["mixed"]:
        out["mixed"] = sorted(runs["mixed"], key=lambda run: run["output_throughput"])[len(runs["mixed"]) // 2]
    return out


def configure(args: argparse.Namespace, work: Work) -> Config:
    """The defaults with what the command line says, through the same checks as a server's configuration."""
    sets = [
        f"model.path={args.model}",
        f"model.dtype={args.dtype}",
        f"engine.num_threads={args.threads}",
        f"engine.device={args.device}",
        f"engine.max_batch_size={work.most_sequences}",
        "cache.enable_prefix_caching=false",
        f"admission.max_requests={max(512, work.mixed, work.most_sequences)}",
        f"admission.max_requests_per_key={max(512, work.mixed, work.most_sequences)}",
        "admission.max_queue_age_s=3600",
        f"admission.max_queue_tokens={1 << 40}",
        *args.set,
    ]
    return load_config(Path(args.config) if args.config else None, sets=sets).config


def add_model_arguments(p: argparse.ArgumentParser) -> None:
    """What `configure` reads; shared with bench.profile."""
    p.add_argument("--model", required=True, help="checkpoint directory or .gguf file")
    p.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    p.add_argument("--device", default="auto", help="as engine.device")
    p.add_argument("--threads", type=int, default=0, help="as engine.num_threads; 0: the cores this process may use")
    p.add_argument("--config", default="", help="TOML file to begin with")
    p.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as for server.py")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.offline", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    add_model_arguments(p)
    p.add_argument("--batch", type=batches, default=(), metavar="N,N,...", help="one prompt of 512, and these sequences to decode together")
    p.add_argument("--decode", type=batches, default=(), metavar="N,N,...", help="sequences to decode together, without that prompt")
    p.add_argument("--prefill", type=_prefills, default=(), metavar="NxL,...", help="prompts together x tokens of each")
    p.add_argument("--workload", choices=("mixed512",), default=None, help="512 requests of mixed lengths")
    p.add_argument("--requests", type=int, default=workload.MIXED, help="of the workload: only the first so many")
    p.add_argument("--length-scale", type=float, default=1.0, help="of the workload: multiply lengths by this")
    p.add_argument("--tokens", type=int, default=DECODE_TOKENS, help="tokens each sequence decodes")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--json", action="store_true")
    return p


def work_of(args: argparse.Namespace) -> Work:
    chosen = args.batch or args.decode or args.prefill or args.workload
    sizes = (args.batch + args.decode) if chosen else BATCHES
    mixed = args.requests if args.workload else 0
    return Work(bool(args.batch) or not chosen, sizes, args.prefill, mixed, args.length_scale, args.tokens, args.repeats)


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if not (2 <= args.tokens <= 100_000 and 1 <= args.repeats <= 100):
        p.error("--tokens must be 2..100000 and --repeats 1..100")
    if not (1 <= args.requests <= workload.MAX_REQUESTS and 0 < args.length_scale <= 100 and math.isfinite(args.length_scale)):
        p.error(f"--requests must be 1..{workload.MAX_REQUESTS} and --length-scale above 0, at most 100")
    work = work_of(args)
    try:
        config, neighbours = configure(args, work), Neighbours()
        out = asyncio.run(measure(config, work))
    except (EngineError, ValueError, OSError, RuntimeError) as error:
        print(f"bench.offline: {error}", file=sys.stderr)
        return 2
    out |= {"bench": "offline", "model": Path(args.model).name, "dtype": args.dtype, "threads": args.threads, "set": args.set}
    out |= {"machine": describe_machine(), "others_cpu_share": neighbours.share()}
    print_table(out, args)
    if args.json:
        print(json.dumps(out))
    return 0


def print_table(out: dict[str, Any], args: argparse.Namespace) -> None:
    print(f"{out['model']}, dtype {args.dtype}, {args.threads or 'all'} threads; ready in {out['startup_s']:.1f} s")
    if "prompt_tok_s" in out:
        print(f"prompt of {PROMPT_TOKENS:<5} {out['prompt_tok_s']:>10,.0f} tok/s")
    for name, rate in out.get("prefill_tok_s", {}).items():
        print(f"prefill {name:<8} {rate:>9,.0f} tok/s")
    for n, rate in out.get("decode_tok_s", {}).items():
        print(f"decode x {n:<6} {rate:>10,.1f} tok/s")
    if "mixed" in out:
        m = out["mixed"]
        amount = f"{m['total_output_tokens']:,} in {m['duration']:.1f} s"
        print(f"mixed x {m['completed']:<6} {m['output_throughput']:>11,.1f} output tok/s ({amount})")


def batches(word: str) -> tuple[int, ...]:
    out = tuple(int(part) for part in word.split(","))
    if not out or not all(1 <= n <= 4096 for n in out):
        raise argparse.ArgumentTypeError("numbers from 1 to 4096, separated by commas")
    return out


def _prefills(word: str) -> tuple[tuple[int, int], ...]:
    out = []
    for part in word.split(","):
        count, _, length = part.partition("x")
        if not (count.isdecimal() and length.isdecimal() and 1 <= int(count) <= 4096 and 1 <= int(length) <= workload.MAX_TOKENS):
            raise argparse.ArgumentTypeError("like 8x1024,1x8192: prompts together x tokens of each")
        out.append((int(count), int(length)))
    return tuple(out)


if __name__ == "__main__":
    sys.exit(main())
