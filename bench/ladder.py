"""The quantization ladder: the same model in several precisions, each measured on one's own text, and which rung to stand on.

    16-bit  ->  16-bit + KV8  ->  W4  ->  W4 + KV8  ->  W4 + KV4      and beside them W8A8

Seed 003's advice as a program: go down a step, evaluate on your own dataset, go back one step where it is bad. A rung is
loaded by the engine as it would be served, scored (`bench/quality.py`), timed (`bench/offline.py`), and left again; one that
cannot run here keeps its row, with the reason. Knows neither how checkpoints are made nor the command line.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from api.loading import Loaded, load
from bench.offline import decode_rate, stream
from bench.quality import Distance, Scores, Text, distance, quiet, score
from bench.workload import random_ids
from config.errors import ConfigError
from config.schema import Config
from engine.build import resolve_spec
from engine.errors import EngineError
from engine.load_backend import resolved
from engine.loop import Engine
from engine.plan import free_memory, plan_memory
from formats.errors import FormatError
from text.errors import TextError

BATCHES = (1, 32)
TTFT_TOKENS = 512
PROMPT_TOKENS = 128 + 8  # what decode_rate's sequences begin with, and room
WARM_TOKENS = 32  # of every sequence in the round that is not counted: fewer, and the first end before the last begins
NEAR = 0.03  # gains nearer than this are equal: the rung that changes the model less is taken
GOALS = {
    "balanced": ("decode 1", "decode 32", "KV tokens"),
    "latency": ("decode 1",),
    "throughput": ("decode 32",),
    "memory": ("KV tokens",),
}
COPY = "16-bit copy"  # the plan's line of 4-bit weights kept in 16 bits too, where there is memory to spare
REFUSALS = (ConfigError, EngineError, FormatError, TextError, ValueError, OSError, RuntimeError, MemoryError)

Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Rung:
    """`weights`: the form it needs, a key of what the command found or made; `kv`: cache.quant_policy."""

    name: str
    weights: str
    kv: int = 0


RUNGS = (
    Rung("16-bit", "16-bit"),
    Rung("16-bit + KV8", "16-bit", 8),
    Rung("W4", "W4"),
    Rung("W4 + KV8", "W4", 8),
    Rung("W4 + KV4", "W4", 4),
    Rung("W8A8", "W8A8"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint of one form, or why there is none. `made`: what to say of where it comes from."""

    path: str = ""
    reason: str = ""
    made: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """What is the same for all rungs. `memory_bytes` 0: what is free now; `sets`: `--set` words."""

    text: Text
    sets: tuple[str, ...] = ()
    memory_bytes: int = 0
    decode_tokens: int = 64
    repeats: int = 3


@dataclass(frozen=True, slots=True)
class Row:
    """A rung measured, or `reason` why not. Rates are tokens a second, all sequences together; `weight_bytes` are resident."""

    rung: Rung
    reason: str = ""
    path: str = ""
    tokens: int = 0  # scored
    perplexity: float = math.nan
    hits: float = math.nan
    apart: Distance | None = None  # from the reference rung; None: it is the reference
    weight_bytes: int = 0
    copy_bytes: int = 0
    kv_tokens: int = 0
    decode: dict[int, float] = dataclasses.field(default_factory=dict)
    ttft_s: float = math.nan
    startup_s: float = math.nan

    @property
    def ran(self) -> bool:
        return not self.reason

    def figures(self) -> dict[str, float]:
        """What a goal may ask for: more is better."""
        return {f"decode {n}": rate for n, rate in self.decode.items()} | {"KV tokens": float(self.kv_tokens)}


def climb(rungs: Sequence[Rung], sources: dict[str, Source], task: Task, told: Told) -> list[Row]:
    """Every rung in turn. The first that runs is what the others are compared with."""
    rows: list[Row] = []
    reference: Scores | None = None
    paths = [sources[rung.weights].path for rung in rungs if rung.weights in sources and not sources[rung.weights].reason]
    if paths and not task.memory_bytes:  # asked once, so that rungs are compared and not moments
        task = dataclasses.replace(task, memory_bytes=_free(paths[0], task.sets))
    for rung in rungs:
        source = sources.get(rung.weights, Source(reason=f"no {rung.weights} checkpoint was given"))
        if source.reason:
            rows.append(Row(rung, source.reason))
            continue
        told(f"{rung.name}: loading {Path(source.path).name}")
        try:
            row, scores = asyncio.run(_measure(rung, source.path, task, told))
            apart = distance(reference, scores) if reference is not None else None
        except REFUSALS as error:
            rows.append(Row(rung, _sentence(error), source.path))
            continue
        finally:
            gc.collect()  # the tensors of this rung, before those of the next
        reference = scores if reference is None else reference
        rows.append(dataclasses.replace(row, apart=apart))
    return rows


def _free(path: str, sets: Sequence[str]) -> int:
    config = resolved(quiet(path, sets))
    return 0 if config.engine.device == "mock" else free_memory(config)


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


async def _measure(rung: Rung, path: str, task: Task, told: Told) -> tuple[Row, Scores]:
    config = quiet(path, [*task.sets, f"cache.quant_policy={rung.kv}"])
    loaded = await asyncio.to_thread(load, config)
    weights, copy, tokens = room(loaded.engine.config, task.memory_bytes)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await loaded.engine.start()
    startup_s = loop.time() - begun
    try:
        scores = await _scores(loaded, task.text, lambda text: told(f"{rung.name}: {text}"))
        told(f"{rung.name}: speed")
        ttft_s, rates = await speed(loaded.engine, task.decode_tokens, task.repeats)
    finally:
        await loaded.engine.stop()
        if loaded.template is not None:
            loaded.template.close()
    row = Row(rung, path=path, tokens=len(scores.ids), perplexity=scores.perplexity, hits=scores.hits, decode=rates, ttft_s=ttft_s)
    row = dataclasses.replace(row, weight_bytes=weights, copy_bytes=copy, kv_tokens=tokens, startup_s=startup_s)
    return row, scores


async def _scores(loaded: Loaded, text: Text, told: Told) -> Scores:
    work = await asyncio.to_thread(text.windows, loaded)
    total = sum(window.scored for window in work)
    return await score(loaded.engine, work, lambda done: told(f"{done:,} of {total:,} tokens scored"))


def room(config: Config, memory_bytes: int) -> tuple[int, int, int]:
    """(bytes of the weights, of a 16-bit copy beside them, positions whose K/V fits into the rest) of one rank with
    `memory_bytes` free. Bounds of convenience (cache_max_bytes, a pool no batch can fill) are left out."""
    cache = dataclasses.replace(config.cache, cache_max_bytes=0, num_blocks=0)
    config = dataclasses.replace(config, cache=cache)
    if config.engine.device == "mock":
        return 0, 0, 0
    plan = plan_memory(config, resolve_spec(config), config.model.path, memory_bytes)
    copy = plan.weights.get(COPY, 0)
    left = plan.free_bytes - plan.weight_bytes - plan.workspace_bytes - plan.spare_blocks * plan.block_bytes
    blocks = int(max(0, left) * cache.cache_max_entry_count) // plan.block_bytes
    return plan.weight_bytes - copy, copy, blocks * plan.block_seq_len


async def speed(engine: Engine, decode_tokens: int, repeats: int) -> tuple[float, dict[int, float]]:
    """(seconds to the first token of one prompt of TTFT_TOKENS, tokens a second of BATCHES sequences): medians, after one
    round that is not counted. ValueError where the context is too short for it."""
    rng, vocab, longest = random.Random(0), engine.spec.vocab_size, engine.session_len - 1
    if longest < PROMPT_TOKENS + decode_tokens:
        raise ValueError(
            f"Speed is measured with {PROMPT_TOKENS + decode_tokens} tokens a sequence; engine.session_len is {engine.session_len}."
        )

    async def first_token() -> float:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await stream(engine, random_ids(rng, min(TTFT_TOKENS, longest), vocab), 1)
        return loop.time() - begun

    await first_token()
    ttft_s = statistics.median([await first_token() for _ in range(repeats)])
    rates: dict[int, list[float]] = {n: [] for n in BATCHES}
    for n in BATCHES:
        await decode_rate(engine, rng, n, min(WARM_TOKENS, decode_tokens))
    for _ in range(repeats):
        for n in BATCHES:
            rates[n].append(await decode_rate(engine, rng, n, decode_tokens))
    return ttft_s, {n: statistics.median(found) for n, found in rates.items()}


# --- which rung ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Advice:
    """`row` None: nothing ran. `sentences`: why this one, and why not the others."""

    row: Row | None
    sentences: tuple[str, ...]


def gain(row: Row, base: Row, goal: str) -> float:
    """Geometric mean of what the goal's figures gain over those of `base`."""
    ours, theirs = row.figures(), base.figures()
    ratios = [ours[name] / theirs[name] for name in GOALS[goal] if ours.get(name) and theirs.get(name)]
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else 1.0


def keeps_quality(row: Row, max_loss: float) -> bool:
    """Whether the whole confidence interval of its loss is within `max_loss` (0.03: three percent of perplexity)."""
    return row.apart is None or row.apart.change_high <= max_loss


def advise(rows: Sequence[Row], max_loss: float, goal: str) -> Advice:
    """Of the rungs that keep the quality, the one that gains most; among near equals the first, which changes the model least."""
    ran = [row for row in rows if row.ran]
    if not ran:
        return Advice(None, ("No rung could be run here; the reasons are in the table.",))
    base = ran[0]
    kept = [row for row in ran if keeps_quality(row, max_loss)]
    best = max(gain(row, base, goal) for row in kept)
    chosen = next(row for row in kept if gain(row, base, goal) >= best * (1 - NEAR))
    return Advice(chosen, (_why(chosen, base, len(kept), max_loss, goal), *_why_not(chosen, ran, base, max_loss, goal)))


def _why(chosen: Row, base: Row, kept: int, max_loss: float, goal: str) -> str:
    allowed = f"the {100 * max_loss:g} % of perplexity that may be lost"
    if chosen is base:
        others = f"no other rung stays within {allowed}" if kept == 1 else f"what else stays within {allowed} gains nothing"
        return f"{base.rung.name}: {others} (goal: {goal})."
    gains = f"{_gains(chosen, base)} (goal {goal}: x {gain(chosen, base, goal):.2f})"
    within = f"{_loss(chosen)} against {base.rung.name}, within {allowed}"
    return f"{chosen.rung.name}: {within}; of the {kept} rungs that are, it gains most: {gains}."


def _why_not(chosen: Row, ran: Sequence[Row], base: Row, max_loss: float, goal: str) -> list[str]:
    out = []
    for row in ran:
        if row is chosen or row is base:
            continue
        ratio = gain(row, base, goal)
        if keeps_quality(row, max_loss):
            near = ratio >= gain(chosen, base, goal)
            less = "hardly more" if near else "less"
            out.append(f"{row.rung.name} keeps the quality too ({_loss(row)}) and gains {less} (x {ratio:.2f}).")
        elif row.apart is not None and row.apart.perplexity_change <= max_loss:
            out.append(
                f"{row.rung.name} may keep it ({_loss(row)}): the interval is wider than the allowance; score more --tokens to know."
            )
        else:
            out.append(f"{row.rung.name} loses too much: {_loss(row)}.")
    return out


def _loss(row: Row) -> str:
    if row.apart is None:
        return "no loss"
    low, mid, high = (100 * v for v in (row.apart.change_low, row.apart.perplexity_change, row.apart.change_high))
    return f"perplexity {mid:+.2f} % (95 %: {low:+.2f} .. {high:+.2f})"


def _gains(row: Row, base: Row) -> str:
    ours, theirs = row.figures(), base.figures()
    return ", ".join(f"{name} x {ours[name] / theirs[name]:.2f}" for name in GOALS["balanced"] if ours.get(name) and theirs.get(name))
