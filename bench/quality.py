"""How well a model predicts a text, and how far it is from another: `numbatch bench quality --model M --data FILE [--against REF]`.

Perplexity with a sliding window; against a reference (the 16-bit model, or the same one with other knobs) also the change of
perplexity with its confidence interval, the KL divergence of the next-token distributions and how often both have the same
first choice. Everything comes from the engine's own prompt logprobs, so it is what would be served: its kernels, its KV cache.

KL(reference || model) is over the ids that both name among their 128 likeliest, with one bucket for all others: exact but for
what happens inside that bucket, so never too large (Cover & Thomas 2006, 2.7: data processing).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from api.loading import Loaded, load
from bench.machine import Neighbours, describe_machine
from bench.texts import Window, read_pieces, windows
from config.errors import ConfigError
from config.load import load_config
from config.schema import Config
from engine.errors import EngineError
from engine.loop import Engine
from engine.sequence import MAX_TOP_LOGPROBS, SamplingParams
from engine.step import Logprobs
from formats.errors import FormatError
from text.errors import TextError

WINDOW, STRIDE, TOKENS = 1024, 512, 8192
TOGETHER = 8  # windows in the engine at a time
BLOCK = 32  # neighbouring tokens are not independent: the interval takes them as blocks
NORMAL_95 = 1.96
FLOOR = 1e-10  # of the bucket's mass, which rounding may make negative


@dataclass(frozen=True, slots=True)
class Scores:
    """Of N scored ids, in the order of the text: their logprobs float64 [N], and the k likeliest ids [N, k] with theirs."""

    logprobs: np.ndarray
    top_ids: np.ndarray  # int32
    top_logprobs: np.ndarray  # float32
    ids: np.ndarray  # int32 [N]: the scored ids themselves

    @property
    def perplexity(self) -> float:
        return math.exp(min(700.0, -float(self.logprobs.mean())))

    @property
    def hits(self) -> float:
        """Part of the ids that were the first choice."""
        return float((self.top_ids[:, 0] == self.ids).mean())


@dataclass(frozen=True, slots=True)
class Distance:
    """Of a model from a reference on the same ids. Changes of perplexity are relative: 0.01 is one percent more."""

    perplexity_change: float
    change_low: float  # 95 % confidence interval
    change_high: float
    kl_mean: float  # nats
    kl_p99: float
    same_top1: float  # part of the positions with the same first choice
    mass: float  # mean probability (the reference's) of the ids that are compared one by one


def distance(reference: Scores, model: Scores) -> Distance:
    """How far `model` is. ValueError where they scored different ids."""
    if not np.array_equal(reference.ids, model.ids):
        raise ValueError("The two scored different texts; quality is compared on the same ids.")
    loss = reference.logprobs - model.logprobs
    mean, spread = float(loss.mean()), _half_interval(loss)
    kl, mass = divergence(reference, model)
    return Distance(
        perplexity_change=math.expm1(mean),
        change_low=math.expm1(mean - spread),
        change_high=math.expm1(mean + spread),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        same_top1=float((reference.top_ids[:, 0] == model.top_ids[:, 0]).mean()),
        mass=float(mass.mean()),
    )


def _half_interval(loss: np.ndarray) -> float:
    """Half of the 95 % interval of the mean of paired differences, taken in blocks."""
    blocks = [float(part.mean()) for part in np.array_split(loss, max(1, len(loss) // BLOCK))]
    return NORMAL_95 * float(np.std(blocks, ddof=1)) / math.sqrt(len(blocks)) if len(blocks) > 1 else math.inf


def divergence(reference: Scores, model: Scores) -> tuple[np.ndarray, np.ndarray]:
    """KL(reference || model) [N] in nats over the ids both name and one bucket of the rest, and the mass [N] of those ids."""
    kl, mass = np.zeros(len(reference.ids)), np.zeros(len(reference.ids))
    for i in range(len(kl)):
        _, ours, theirs = np.intersect1d(reference.top_ids[i], model.top_ids[i], assume_unique=True, return_indices=True)
        log_p = reference.top_logprobs[i, ours].astype(np.float64)
        log_q = model.top_logprobs[i, theirs].astype(np.float64)
        p = np.exp(log_p)
        mass[i] = min(1.0, float(p.sum()))
        rest_p, rest_q = max(FLOOR, 1 - float(p.sum())), max(FLOOR, 1 - float(np.exp(log_q).sum()))
        kl[i] = max(0.0, float(p @ (log_p - log_q)) + rest_p * math.log(rest_p / rest_q))
    return kl, mass


# --- from an engine ---------------------------------------------------------------------------------------


async def score(engine: Engine, work: Sequence[Window], told: Callable[[int], None] | None = None) -> Scores:
    """What the engine says of every window, a few at a time. `told` hears how many ids have been scored so far."""
    k = min(MAX_TOP_LOGPROBS, engine.spec.vocab_size)
    gate, done = asyncio.Semaphore(TOGETHER), 0

    async def one(window: Window) -> list[Logprobs]:
        nonlocal done
        async with gate:
            found = await _prompt_logprobs(engine, window, k)
        done += window.scored
        if told:
            told(done)
        return found

    parts = await asyncio.gather(*(one(window) for window in work))
    found = [item for part in parts for item in part]
    ids = np.array([i for window in work for i in window.ids[window.first :]], np.int32)
    bad = sum(not math.isfinite(item.logprob) for item in found)
    if bad:
        raise ValueError(f"The model's logits are not finite at {bad} of {len(found)} positions; there is no perplexity.")
    return Scores(
        np.array([item.logprob for item in found]),
        np.array([item.top_ids for item in found], np.int32),
        np.array([item.top_logprobs for item in found], np.float32),
        ids,
    )


async def _prompt_logprobs(engine: Engine, window: Window, k: int) -> list[Logprobs]:
    generation = engine.submit(window.ids, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=k))
    while (await generation.next())[-1].finish_reason is None:
        pass
    found = generation.sequence.prompt_logprobs
    if len(found) != len(window.ids) - 1:
        raise ValueError(f"The engine scored {len(found)} of {len(window.ids) - 1} ids of a window.")
    return [item for item in found[window.first - 1 :] if isinstance(item, Logprobs)]


@dataclass(frozen=True, slots=True)
class Text:
    """What is measured on. `window` is cut to what the model can take."""

    path: Path
    window: int = WINDOW
    stride: int = STRIDE
    tokens: int = TOKENS

    def windows(self, loaded: Loaded) -> list[Window]:
        """ValueError where the file gives nothing to predict."""
        template, tokenizer = loaded.template, loaded.tokenizer
        render = (lambda messages: template.render(messages, add_generation_prompt=False)) if template else None
        pieces = read_pieces(self.path, tokenizer, render, self.tokens)
        longest = min(self.window, loaded.engine.session_len - 1)
        found = windows(pieces, longest, min(self.stride, longest), self.tokens, tokenizer.bos_id if tokenizer.add_bos else None)
        if not found:
            raise ValueError(f"{self.path.name} holds nothing to predict: at least two tokens are needed.")
        return found


def quiet(path: str, sets: Sequence[str], config: Path | None = None) -> Config:
    """The defaults for measuring `path`, with what `--set` says, through the checks of a server's configuration."""
    own = ["cache.enable_prefix_caching=false", "admission.max_queue_age_s=3600", f"admission.max_queue_tokens={1 << 40}"]
    return load_config(config, sets=[f"model.path={path}", *own, *sets]).config


async def measure(config: Config, text: Text, told: Callable[[int], None] | None = None) -> Scores:
    """Start an engine, score the text, stop it."""
    loaded = await asyncio.to_thread(load, config)
    await loaded.engine.start()
    try:
        return await score(loaded.engine, await asyncio.to_thread(text.windows, loaded), told)
    finally:
        await loaded.engine.stop()
        if loaded.template is not None:
            loaded.template.close()


# --- the command ------------------------------------------------------------------------------------------


def add_text_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", required=True, type=Path, metavar="FILE", help="text file, or .jsonl: text, messages, or prompt + completion")
    p.add_argument("--window", type=int, default=WINDOW, metavar="N", help="tokens the model sees at once, at most what it can take")
    p.add_argument("--stride", type=int, default=STRIDE, metavar="N", help="tokens a window scores before the next one begins")
    p.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help="most tokens that are scored")


def text_of(args: argparse.Namespace) -> Text:
    """ValueError where the numbers do not fit together."""
    if not 2 <= args.window <= 1 << 20 or not 1 <= args.stride <= args.window:
        raise ValueError(f"--window must be 2 .. {1 << 20} and --stride 1 .. --window; they are {args.window} and {args.stride}.")
    if not 1 <= args.tokens <= 10_000_000:
        raise ValueError(f"--tokens must be 1 .. 10,000,000, not {args.tokens}.")
    return Text(args.data, args.window, args.stride, args.tokens)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.quality", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--model", required=True, help="checkpoint directory or .gguf file")
    add_text_arguments(p)
    p.add_argument("--against", default="", metavar="REF", help="the model to compare with, usually the 16-bit one")
    p.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as for server.py, of both")
    p.add_argument("--model-set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of --model alone: cache.quant_policy=8")
    p.add_argument("--against-set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of --against alone")
    p.add_argument("--json", action="store_true", help="the last line is JSON")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        text, neighbours = text_of(args), Neighbours()
        model = asyncio.run(measure(quiet(args.model, [*args.set, *args.model_set]), text))
        apart = None
        if args.against:
            apart = distance(asyncio.run(measure(quiet(args.against, [*args.set, *args.against_set]), text)), model)
    except (ConfigError, EngineError, FormatError, TextError, ValueError, OSError, RuntimeError) as error:
        print(f"bench.quality: {error}", file=sys.stderr)
        return 2
    print("\n".join(report(args, model, apart)))
    if args.json:
        print(json.dumps(record(args, model, apart) | {"machine": describe_machine(), "others_cpu_share": neighbours.share()}))
    return 0


def report(args: argparse.Namespace, model: Scores, apart: Distance | None) -> list[str]:
    """For people."""
    out = [
        f"{Path(args.model).name} on {args.data.name}: {len(model.ids):,} tokens, windows of {args.window}, stride {args.stride}",
        f"perplexity         {model.perplexity:10.4f}",
        f"first choice right {100 * model.hits:10.2f} %",
    ]
    if apart is None:
        return out
    change, low, high = (100 * value for value in (apart.perplexity_change, apart.change_low, apart.change_high))
    below, named = f"99 of 100 below {apart.kl_p99:.4f}", f"id by id over {100 * apart.mass:.1f} % of the mass"
    return [
        *out,
        f"against {Path(args.against).name}:",
        f"perplexity change  {change:+10.3f} % (95 %: {low:+.3f} .. {high:+.3f})",
        f"KL, mean           {apart.kl_mean:10.5f} nats ({below}; {named})",
        f"same first choice  {100 * apart.same_top1:10.2f} %",
    ]


def record(args: argparse.Namespace, model: Scores, apart: Distance | None) -> dict[str, Any]:
    """For programs."""
    out: dict[str, Any] = {"bench": "quality", "model": Path(args.model).name, "data": args.data.name, "set": [*args.set, *args.model_set]}
    out |= {"tokens": len(model.ids), "window": args.window, "stride": args.stride}
    out |= {"perplexity": model.perplexity, "hits": model.hits}
    if apart is not None:
        out |= {"against": Path(args.against).name, "against_set": [*args.set, *args.against_set]} | dataclasses.asdict(apart)
    return out


if __name__ == "__main__":
    sys.exit(main())
