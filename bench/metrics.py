"""Numbers about answers: percentiles, goodput, the result block that vLLM's users know, and its JSON keys.

Definitions: TTFT = first content - send; TPOT = (E2E - TTFT) / (output tokens - 1); ITL = gaps between content chunks of
one answer; E2E = last event - send; goodput = answers a second that meet every objective. "Send" is the *intended* send
time where arrivals follow a schedule, so that a slow server cannot hide by slowing its clients (coordinated omission).
Nothing here does I/O.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

PERCENTILES = (50, 90, 95, 99)
OBJECTIVES = ("ttft", "tpot", "e2el")
TITLES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}


@dataclass(slots=True)
class Answer:
    """What became of one job; times are seconds after the start of the run, -1 where it never happened."""

    intended_s: float
    sent_s: float = -1.0
    first_s: float = -1.0  # first content
    end_s: float = -1.0
    chunk_s: list[float] = field(default_factory=list)  # arrival of each content chunk
    input_len: int = 0
    output_len: int = 0
    text: str = ""
    error: str = ""  # the reason, empty when it succeeded

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.intended_s

    @property
    def e2el_s(self) -> float:
        return self.end_s - self.intended_s

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of fewer than two tokens: it has no time between tokens."""
        return (self.end_s - self.first_s) / (self.output_len - 1) if self.output_len > 1 else None

    @property
    def itl_s(self) -> list[float]:
        return [b - a for a, b in zip(self.chunk_s, self.chunk_s[1:], strict=False)]


def percentile(values: Sequence[float], p: float) -> float:
    """The p-th percentile (0..100), linear between the two nearest ranks as in numpy's default; 0.0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    at = (len(ordered) - 1) * p / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def steady_rate(arrivals: Sequence[Sequence[float]]) -> float:
    """Tokens a second of several sequences together, while all of them run: from when the last one has its first token
    to when the first one has its last. `arrivals[i]`: times of sequence i's tokens, seconds, in order."""
    low, high = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    if high <= low:
        raise ValueError(f"{len(arrivals)} sequences never ran at the same time; let each decode more tokens.")
    return sum(sum(low < at <= high for at in times) for times in arrivals) / (high - low)


def summary(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """`mean_<name>_ms`, median, std and the percentiles."""
    ms = sorted(s * 1000 for s in seconds)
    out = {
        f"mean_{name}_ms": statistics.fmean(ms) if ms else 0.0,
        f"median_{name}_ms": percentile(ms, 50),
        f"std_{name}_ms": statistics.pstdev(ms) if ms else 0.0,
    }
    return out | {f"p{p}_{name}_ms": percentile(ms, p) for p in PERCENTILES}


def parse_goodput(words: Sequence[str]) -> dict[str, float]:
    """["ttft:200", "tpot:50"] -> seconds; `ValueError` with the reason otherwise."""
    out = {}
    for word in words:
        name, _, value = word.partition(":")
        if name not in OBJECTIVES:
            raise ValueError(f"--goodput knows {', '.join(OBJECTIVES)}, not {name!r}.")
        try:
            out[name] = float(value) / 1000
        except ValueError:
            raise ValueError(f"--goodput {word}: milliseconds must be a number, not {value!r}.") from None
    return out


def meets(answer: Answer, objectives: dict[str, float]) -> bool:
    measured = {"ttft": answer.ttft_s, "tpot": answer.tpot_s or 0.0, "e2el": answer.e2el_s}
    return answer.ok and all(measured[name] <= limit for name, limit in objectives.items())


def result(answers: Sequence[Answer], duration_s: float, objectives: dict[str, float], detailed: bool) -> dict:
    """The keys of `vllm bench serve`, plus `latencies`, `p50/p90/p95` and `error_counts`. Per-answer times are in seconds.

    The long lists (`itls`, `generated_texts`) come only with `detailed`.
    """
    good = [a for a in answers if a.ok]
    tokens_in, tokens_out = sum(a.input_len for a in good), sum(a.output_len for a in good)
    duration = max(duration_s, 1e-9)
    out: dict = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(good) / duration,
        "request_goodput": sum(meets(a, objectives) for a in good) / duration if objectives else None,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        "max_output_tokens_per_s": _peak_tokens(good),
        "max_concurrent_requests": _peak_concurrency(answers),
    }
    out |= summary("ttft", [a.ttft_s for a in good])
    out |= summary("tpot", [t for a in good if (t := a.tpot_s) is not None])
    out |= summary("itl", [gap for a in good for gap in a.itl_s])
    out |= summary("e2el", [a.e2el_s for a in good])
    out["error_counts"] = dict(Counter(a.error for a in answers if a.error))
    out["input_lens"] = [a.input_len for a in answers]
    out["output_lens"] = [a.output_len for a in answers]
    out["ttfts"] = [a.ttft_s if a.ok else 0.0 for a in answers]
    out["latencies"] = [a.e2el_s if a.ok else 0.0 for a in answers]
    out["errors"] = [a.error for a in answers]
    if detailed:
        out["itls"] = [a.itl_s for a in answers]
        out["start_times"] = [a.sent_s for a in answers]
        out["generated_texts"] = [a.text for a in answers]
    return out


def block(r: dict) -> str:
    """The "Serving Benchmark Result" block, in the words that people's parsers look for."""
    lines = [f"{' Serving Benchmark Result ':=^50}"]
    rows = [
        ("Successful requests:", r["completed"]),
        ("Failed requests:", r["failed"]),
        ("Benchmark duration (s):", r["duration"]),
        ("Total input tokens:", r["total_input_tokens"]),
        ("Total generated tokens:", r["total_output_tokens"]),
        ("Request throughput (req/s):", r["request_throughput"]),
        ("Request goodput (req/s):", r["request_goodput"]),
        ("Output token throughput (tok/s):", r["output_throughput"]),
        ("Peak output token throughput (tok/s):", float(r["max_output_tokens_per_s"])),
        ("Peak concurrent requests:", float(r["max_concurrent_requests"])),
        ("Total token throughput (tok/s):", r["total_token_throughput"]),
    ]
    lines += [_row(name, value) for name, value in rows if value is not None]
    for key, (short, title) in TITLES.items():
        lines.append(f"{title:-^50}")
        lines += [_row(f"{word} {short} (ms):", r[f"{word.lower()}_{key}_ms"]) for word in ("Mean", "Median")]
        lines += [_row(f"P{p} {short} (ms):", r[f"p{p}_{key}_ms"]) for p in PERCENTILES[1:]]
    lines.append("=" * 50)
    lines += [f"{count} failed: {reason}" for reason, count in r["error_counts"].items()]
    return "\n".join(lines)


def _row(name: str, value: float | int) -> str:
    return f"{name:<40} {value:<10}" if isinstance(value, int) else f"{name:<40} {value:<10.2f}"


def _peak_tokens(answers: Sequence[Answer]) -> int:
    """Most tokens in one second of the run. A chunk counts as its share of the answer's tokens."""
    seconds: Counter[int] = Counter()
    for answer in answers:
        for at in answer.chunk_s:
            seconds[int(at)] += answer.output_len / len(answer.chunk_s)  # type: ignore[assignment]
    return round(max(seconds.values(), default=0))


def _peak_concurrency(answers: Sequence[Answer]) -> int:
    edges = sorted(edge for a in answers if a.sent_s >= 0 for edge in ((a.sent_s, 1), (max(a.end_s, a.sent_s), -1)))
    now = peak = 0
    for _, change in edges:
        now += change
        peak = max(peak, now)
    return peak


COMPARED = {"ttft": "ttfts", "e2el": "latencies"}


def compare(a: dict, b: dict, rounds: int = 1000, seed: int = 0) -> list[dict]:
    """Median and p99 of two results, b relative to a, with a 95 % bootstrap interval of the ratio (Efron 1979)."""
    rows = []
    for name, key in COMPARED.items():
        left, right = _succeeded(a, key), _succeeded(b, key)
        if not left or not right:
            continue
        for p in (50, 99):
            rng = random.Random(seed)
            ratios = [_ratio(rng.choices(left, k=len(left)), rng.choices(right, k=len(right)), p) for _ in range(rounds)]
            before, after = percentile(left, p) * 1000, percentile(right, p) * 1000
            low, high = percentile(ratios, 2.5), percentile(ratios, 97.5)
            rows.append({"metric": f"p{p}_{name}_ms", "a": before, "b": after, "ratio": _ratio(left, right, p), "low": low, "high": high})
    return rows


def _ratio(left: Sequence[float], right: Sequence[float], p: float) -> float:
    return percentile(right, p) / max(percentile(left, p), 1e-12)


def _succeeded(r: dict, key: str) -> list[float]:
    return [value for value, error in zip(r[key], r["errors"], strict=True) if not error]
