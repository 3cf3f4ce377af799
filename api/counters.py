"""What is counted while requests run: plain numbers and small histograms, so that counting costs an addition.

`api/metrics.py` turns them into Prometheus families when somebody asks. One event loop writes; nothing locks.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from engine.loop import StepRecord

if TYPE_CHECKING:
    from api.generate import Answer

FIRST_TOKEN_S = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)  # fmt: skip
REQUEST_S = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)  # fmt: skip
TOKEN_S = (.005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)  # fmt: skip
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
REQUEST_TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
CHOICES = (1, 2, 5, 10, 20)
RATIO = (.1, .2, .3, .4, .5, .6, .7, .8, .9, 1.0)  # fmt: skip
LAG_S = (.001, .0025, .005, .01, .02, .05, .1, .25, .5, 1, 5)  # fmt: skip
REASONS = ("stop", "length", "abort", "error")
REFUSALS = ("overloaded", "rate_limit_exceeded", "shutting_down", "not_ready")


class Histogram:
    """Counts per bucket; observing is a bisection and two additions."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        out: list[tuple[str, float]] = []
        sum_ = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            sum_ += count
            out.append(("+Inf" if bound == float("inf") else str(float(bound)), sum_))
        return out


class Metrics:
    """Everything that is counted while requests run. One event loop writes; a scrape reads."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.live_requests = 0  # admitted, not yet answered
        self.finished = dict.fromkeys(REASONS, 0)
        self.refused = dict.fromkeys(REFUSALS, 0)
        self.first_token_s = Histogram(FIRST_TOKEN_S)
        self.inter_token_s = Histogram(TOKEN_S)
        self.per_token_s = Histogram(TOKEN_S)
        self.step_s = Histogram(TOKEN_S)
        self.step_tokens = Histogram(STEP_TOKENS)
        self.request_s = Histogram(REQUEST_S)
        self.queue_s = Histogram(REQUEST_S)
        self.inference_s = Histogram(REQUEST_S)
        self.prefill_s = Histogram(REQUEST_S)
        self.decode_s = Histogram(REQUEST_S)
        self.request_prompt = Histogram(REQUEST_TOKENS)
        self.request_generation = Histogram(REQUEST_TOKENS)
        self.request_cached = Histogram(REQUEST_TOKENS)
        self.request_max_tokens = Histogram(REQUEST_TOKENS)
        self.request_n = Histogram(CHOICES)
        self.hit_ratio = Histogram(RATIO)
        self.loop_lag_s = Histogram(LAG_S)

    def first_token(self, seconds: float) -> None:
        self.first_token_s.observe(seconds)

    def prompt_computed(self, num_tokens: int, num_cached: int) -> None:
        """A prompt is through: its first token is there."""
        self.prompt_tokens += num_tokens
        self.cached_tokens += num_cached

    def inter_token(self, seconds: float, num_tokens: int) -> None:
        """`num_tokens` arrived `seconds` after the one before: the gap is shared among them."""
        self.inter_token_s.observe(seconds / num_tokens, num_tokens)

    def step(self, record: StepRecord) -> None:
        """An engine observer."""
        self.step_tokens.observe(record.n_tok)
        self.step_s.observe(record.elapsed_us * 1e-6)

    def request_done(self, answer: Answer, max_tokens: int, now: float) -> None:
        """A request has ended, in whatever way; every choice counts once in `request_success_total`."""
        usage = answer.usage
        self.request_prompt.observe(usage.prompt_tokens)
        self.request_generation.observe(usage.completion_tokens)
        self.request_cached.observe(usage.cached_tokens)
        self.hit_ratio.observe(usage.cached_tokens / max(usage.prompt_tokens, 1))
        self.request_n.observe(len(answer.choices))
        self.request_max_tokens.observe(max_tokens)
        self.request_s.observe(now - answer.started_s)
        for choice in answer.choices:
            self.finished[choice.finish_reason or "abort"] += 1
            sequence = choice.generation.sequence
            if sequence.first_scheduled_s >= 0:
                self.queue_s.observe(sequence.first_scheduled_s - sequence.arrival_s)
                self.inference_s.observe(now - sequence.first_scheduled_s)
                if sequence.first_token_s >= 0:
                    self.prefill_s.observe(sequence.first_token_s - sequence.first_scheduled_s)
                    self.decode_s.observe(now - sequence.first_token_s)
            if choice.num_generated > 1 and sequence.first_token_s >= 0:
                self.per_token_s.observe((choice.last_s - sequence.first_token_s) / (choice.num_generated - 1))
