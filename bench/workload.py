"""What is sent and when: requests from random ids, a corpus, a JSONL file or a trace, and their arrival times.

Everything here is fixed before the first request leaves: the same arguments and seed give the same requests at the
same offsets. Nothing here knows HTTP, the server or the clock.

Trace formats: Azure LLM inference 2023 (CSV: TIMESTAMP, ContextTokens, GeneratedTokens) and Mooncake (JSON lines:
timestamp in ms, input_length, output_length, hash_ids; equal hash ids mean equal blocks of 512 prompt tokens).
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

MAX_REQUESTS = 1_000_000
MAX_TOKENS = 1 << 20  # of one prompt or one answer
MAX_LINE_BYTES = 16 << 20
MOONCAKE_BLOCK = 512  # prompt tokens that one hash id stands for
MIXED = 512  # requests of the mixed workload
MIN_ID = 256  # random prompts avoid the low ids, where control tokens and single bytes live

# Common one-token words: chat endpoints take text, so "n random tokens" becomes n random words.
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one "
    "you were all her she there would their we him been has when who will no more if out so what up said about other into "
    "than its time only could new them man some these then two first may any like now my such make over our even most"
).split()  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send. `at_s`: intended send time after the start of the run, seconds; `input_len` 0: unknown until answered."""

    at_s: float
    prompt: str | list[int] | list[dict[str, str]]  # text, ids, or chat messages
    input_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """One line of a trace: when, how long, and which shared blocks the prompt is made of."""

    at_s: float
    input_len: int
    output_len: int
    blocks: tuple[int, ...] = ()


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """`count` offsets in seconds: gaps are gamma with mean 1/rate; burstiness 1 is a Poisson process, less is burstier.

    An infinite rate puts every arrival at 0.
    """
    if math.isinf(rate):
        return [0.0] * count
    rng = random.Random(f"arrivals {seed}")
    gaps = (rng.gammavariate(burstiness, 1.0 / (rate * burstiness)) for _ in range(count))
    return list(itertools.accumulate(gaps))


def random_prompts(
    count: int, input_len: int, output_len: int, range_ratio: float, vocab_size: int, seed: int, words: bool
) -> Iterator[tuple]:
    """`count` times (prompt, input_len, output_len): random ids, or as many random words; lengths vary by +-range_ratio."""
    rng = random.Random(f"random {seed}")
    for _ in range(count):
        n, m = _vary(rng, input_len, range_ratio), _vary(rng, output_len, range_ratio)
        if words:
            yield " ".join(rng.choices(WORDS, k=n)), 0, m
        else:
            yield random_ids(rng, n, vocab_size), n, m


def random_ids(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    low = MIN_ID if vocab_size > 2 * MIN_ID else 3
    if vocab_size <= low:
        raise ValueError(f"a vocabulary of {vocab_size} ids is too small to draw prompts from; --vocab-size must be above {low}.")
    span = vocab_size - low
    return [low + int(u * span) for u in (rng.random() for _ in range(count))]


def corpus_prompts(
    path: Path, count: int, input_len: int, output_len: int, encode: Callable[[str], list[int]] | None, seed: int
) -> Iterator[tuple]:
    """Slices of a text file from random word starts: exactly `input_len` ids with a tokenizer, else 4 characters a token."""
    text = path.read_text(encoding="utf-8", errors="replace")
    rng = random.Random(f"corpus {seed}")
    chars = input_len * (8 if encode else 4)
    if len(text) <= chars + 64:
        raise ValueError(f"{path} has {len(text)} characters; prompts of {input_len} tokens need more than {chars + 64}.")
    for _ in range(count):
        start = text.find(" ", rng.randrange(len(text) - chars - 64)) + 1
        part = text[start : start + chars]
        if encode is None:
            yield part, 0, output_len
            continue
        ids = encode(part)[:input_len]
        if len(ids) < input_len:
            raise ValueError(f"{chars} characters of {path} gave only {len(ids)} ids; choose another corpus for {input_len}-token prompts.")
        yield ids, input_len, output_len


def jsonl_prompts(path: Path, count: int, output_len: int) -> Iterator[tuple]:
    """Lines {"prompt": text or ids} or {"messages": [...]}, optionally "output_tokens"; the file is repeated to reach `count`."""
    rows = [_jsonl_row(path, number, row, output_len) for number, row in _json_lines(path)]
    if not rows:
        raise ValueError(f"{path} holds no prompt.")
    yield from itertools.islice(itertools.cycle(rows), count)


def _jsonl_row(path: Path, number: int, row: dict, output_len: int) -> tuple:
    prompt = row.get("messages", row.get("prompt"))
    wanted = row.get("output_tokens", output_len)
    if not isinstance(prompt, (str, list)) or not prompt:
        raise ValueError(f"{path}, line {number}: needs a non-empty 'prompt' or 'messages'.")
    ids = isinstance(prompt, list) and all(type(x) is int for x in prompt)
    return prompt, len(prompt) if ids else 0, _length(path, number, "output_tokens", wanted)


def read_azure(path: Path) -> Iterator[Arrival]:
    """Arrivals of an Azure CSV, the first at 0. Timestamps have 7 digits after the second; the last is dropped."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        wanted = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}
        if not wanted <= set(rows.fieldnames or ()):
            raise ValueError(f"{path} is no Azure trace: its first line must name {', '.join(sorted(wanted))}.")
        start = None
        for number, row in enumerate(rows, 2):
            try:
                when = datetime.fromisoformat(row["TIMESTAMP"][:26])
                lengths = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {error}.") from None
            start = start or when
            yield Arrival(
                (when - start).total_seconds(),
                _length(path, number, "ContextTokens", lengths[0]),
                _length(path, number, "GeneratedTokens", lengths[1]),
            )


def read_mooncake(path: Path) -> Iterator[Arrival]:
    """Arrivals of a Mooncake JSONL trace, the first at 0."""
    start = None
    for number, row in _json_lines(path):
        try:
            at_s, blocks = row["timestamp"] / 1000, tuple(int(h) for h in row["hash_ids"])
            lengths = row["input_length"], row["output_length"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: no Mooncake arrival ({type(error).__name__}: {error}).") from None
        start = at_s if start is None else start
        n = _length(path, number, "input_length", lengths[0])
        if len(blocks) * MOONCAKE_BLOCK < n:
            raise ValueError(f"{path}, line {number}: {len(blocks)} hash ids cannot cover {n} tokens ({MOONCAKE_BLOCK} each).")
        yield Arrival(at_s - start, n, _length(path, number, "output_length", lengths[1]), blocks)


def read_trace(path: Path) -> Iterator[Arrival]:
    """By content, not by name: a first line that is a JSON object is Mooncake's, anything else Azure's."""
    with path.open("rb") as file:
        first = file.read(1)
    return read_mooncake(path) if first == b"{" else read_azure(path)


@dataclass(frozen=True, slots=True)
class Playback:
    """How a trace is played: `speed` times faster, lengths times `scale`, cut to the maxima (0: uncut), as ids or as words."""

    speed: float = 1.0
    scale: float = 1.0
    max_input: int = 0
    max_output: int = 0
    vocab_size: int = 32000
    seed: int = 0
    words: bool = False


def trace_jobs(arrivals: Iterator[Arrival], count: int, play: Playback) -> Iterator[Job]:
    """The first `count` arrivals as jobs.

    A prompt is the concatenation of its blocks, each made from (seed, hash id) alone, so that equal hash ids give equal
    prefixes whatever else is sent; scaling shrinks the blocks and keeps what is shared shared. Arrivals without hash ids
    get a prompt of their own.
    """
    block = max(1, round(MOONCAKE_BLOCK * play.scale))
    for index, arrival in enumerate(itertools.islice(arrivals, count)):
        n = _cut(round(arrival.input_len * play.scale), play.max_input)
        m = _cut(round(arrival.output_len * play.scale), play.max_output)
        names = [f"block {play.seed} {h}" for h in arrival.blocks] or [f"prompt {play.seed} {index}"]
        size = block if arrival.blocks else n
        prompt: list = []
        for name in names:
            rng = random.Random(name)
            prompt += rng.choices(WORDS, k=size) if play.words else random_ids(rng, size, play.vocab_size)
            if len(prompt) >= n:
                break
        prompt = prompt[:n]
        at_s = arrival.at_s / play.speed
        yield Job(at_s, " ".join(prompt), 0, m) if play.words else Job(at_s, prompt, len(prompt), m)


def _cut(length: int, maximum: int) -> int:
    return max(1, min(length, maximum) if maximum else length)


def _vary(rng: random.Random, length: int, ratio: float) -> int:
    return rng.randint(max(1, round(length * (1 - ratio))), max(1, round(length * (1 + ratio))))


def _length(path: Path, number: int, name: str, value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_TOKENS:
        raise ValueError(f"{path}, line {number}: {name} must be an integer from 0 to {MAX_TOKENS}, not {str(value)[:24]}.")
    return value


def mixed_lengths(count: int = MIXED, seed: int = 0) -> list[tuple[int, int]]:
    """(prompt, answer) lengths of the mixed workload: log-normal, drawn in turn from one generator, so that the first 512 are
    always the same: 202,806 prompt and 94,221 answer tokens with seed 0."""
    rng = random.Random(seed)
    return [(_drawn(rng, 5.6, 0.9, 16, 2048), _drawn(rng, 5.0, 0.7, 8, 512)) for _ in range(count)]


def _drawn(rng: random.Random, mu: float, sigma: float, low: int, high: int) -> int:
    return int(min(high, max(low, rng.lognormvariate(mu, sigma))))


def mixed_prompts(count: int, scale: float, vocab_size: int, seed: int, words: bool = False) -> Iterator[tuple]:
    """`count` times (prompt, input_len, output_len) of the mixed workload; `scale` shortens every length for small machines."""
    rng = random.Random(f"mixed {seed}")
    for n, m in mixed_lengths(count, seed):
        n, m = max(1, round(n * scale)), max(1, round(m * scale))
        yield (" ".join(rng.choices(WORDS, k=n)), 0, m) if words else (random_ids(rng, n, vocab_size), n, m)


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes.")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}).") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object.")
            yield number, row
