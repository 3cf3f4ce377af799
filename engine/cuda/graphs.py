"""Decode steps as CUDA graphs: one a bucket of rows, captured before the first request, largest first.

A graph holds the whole pass from block-table updates to logits. Its inputs lie at fixed addresses (`step.views` into a
buffer of its own); a step of fewer rows is padded with rows of the dummy slot. All graphs share one memory pool: they never
run at the same time. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine.cuda.step import Shape, Step, views

SMALL = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64)  # then every 16 up to 256, then every 64


def buckets(max_batch_size: int) -> list[int]:
    """Row counts that get a graph, rising; the last is `max_batch_size`. Padding costs at most a few rows of 8."""
    counts = [*SMALL, *range(80, 257, 16), *range(320, 4097, 64)]
    return [n for n in counts if n < max_batch_size] + [max_batch_size]


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """One captured decode step of `shape.rows` rows."""

    shape: Shape
    inputs: torch.Tensor  # int32 [shape.size]: copied to before a replay
    logits: torch.Tensor  # float32 [rows, vocab], overwritten by each replay
    replay: Callable[[], None]


class DecodeGraphs:
    """`forward(step)` is the pass to capture: it returns logits [rows, vocab]."""

    def __init__(self, device: Any, max_batch_size: int) -> None:
        self._device = device
        self._buckets = buckets(max_batch_size)
        self._graphs: dict[int, Graph] = {}

    def capture(self, forward: Callable[[Step], torch.Tensor], fill: Callable[[torch.Tensor, Shape], None]) -> None:
        """Capture every bucket. `fill` writes a harmless step of a shape (padding only) into an input buffer."""
        pool = self._device.graph_pool()
        for rows in reversed(self._buckets):
            shape = decode_shape(rows)
            inputs = torch.empty(shape.size, dtype=torch.int32, device=self._device.torch_device)
            fill(inputs, shape)
            step = views(inputs, shape, rows)
            logits, replay = self._device.capture(lambda step=step: forward(step), pool)
            self._graphs[rows] = Graph(shape, inputs, logits, replay)

    def find(self, rows: int, updates: int) -> Graph | None:
        """The smallest graph that takes a decode step of so many rows and new blocks."""
        for bucket in self._buckets:
            if bucket >= max(rows, updates):
                return self._graphs.get(bucket)
        return None


def decode_shape(rows: int) -> Shape:
    """A decode step gains at most one block a row."""
    return Shape(tokens=rows, rows=rows, sampled=rows, updates=rows)
