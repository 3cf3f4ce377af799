"""How long something takes on a card: graph replays, so that launches from Python are not in the figure, and medians.

A work is a list of calls that do the same to different memory; they are captured one after the other, as often as it needs for
a replay of a millisecond, so that what one call reads is long out of the cache when its turn comes again. Knows no kernel.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

PAST_L2 = 200 << 20  # bytes that a rotation must go through: three times an H200's L2 cache
MOST_COPIES = 64
REPLAY_S = 1e-3
MOST_CALLS = 4000  # in one graph
REPLAYS = 15
WARM_UP = 3

Call = Callable[[], Any]


def copies(num_bytes: float, least: int = 1) -> int:
    """How many sets of `num_bytes` make a rotation that the cache cannot hold."""
    return max(least, min(MOST_COPIES, -(-PAST_L2 // max(1, int(num_bytes)))))


class GraphTimer:
    """Of one CUDA device (`engine.cuda.device.CudaDevice`)."""

    emulated = False

    def __init__(self, device: Any, replays: int = REPLAYS) -> None:
        self._device, self._replays = device, replays

    def seconds(self, calls: Sequence[Call]) -> float:
        """Of one call, median over replays. The calls must not allocate what a graph cannot hold and must not wait."""
        for call in calls:  # compiles, loads, and lets libraries choose
            call()
        self._device.synchronize()
        pool = self._device.graph_pool()
        _, once = self._device.capture(lambda: [call() for call in calls], pool)  # a pool lives as long as a graph that uses it
        rounds = max(1, min(MOST_CALLS // len(calls), round(REPLAY_S / max(self._median(once, 3), 1e-7))))
        _, replay = self._device.capture(lambda: [call() for _ in range(rounds) for call in calls], pool)
        return self._median(replay) / (rounds * len(calls))

    def _median(self, replay: Call, replays: int = 0) -> float:
        times = []
        for number in range(WARM_UP + (replays or self._replays)):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            end.synchronize()
            if number >= WARM_UP:
                times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)


class WallTimer:
    """One call of each by the host's clock, for toy shapes: its figures are no speed of a card and are marked so."""

    emulated = True

    def __init__(self, device: Any) -> None:
        self._device = device

    def seconds(self, calls: Sequence[Call]) -> float:
        began = time.perf_counter()
        calls[0]()
        self._device.synchronize()
        return time.perf_counter() - began


def relative_error(got: torch.Tensor, true: Any) -> float:
    """‖got - true‖ / ‖true‖ in float64; NaN where any element of `got` is."""
    reference = torch.as_tensor(true, dtype=torch.float64)
    return float(torch.linalg.vector_norm(got.double().cpu() - reference) / torch.linalg.vector_norm(reference))
