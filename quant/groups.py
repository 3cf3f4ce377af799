"""Rounding to a few bits in groups of input channels, and how much a linear's output changes by it. torch, float32.

    q = clip(round(w / scale) + zero, 0, 15)      w' = scale (q - zero)      of each output channel and group of g inputs

The error of a linear y = W x over the calibration tokens needs only the Gram matrix G = sum of x x^T of its inputs:

    sum over tokens |(W - W') x|^2  =  trace(D G D^T),   D = W - W'

so that every candidate is judged on all tokens without going through them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

LEVELS = 15  # of 4 bits
SYMMETRIC_ZERO = 8
SMALLEST_SCALE = 2.0**-24  # of float16
CACHED = 1 << 17  # elements of a weight worked on at a time


@dataclass(slots=True, eq=False)
class Rounded:
    """q and zero uint8 [N, K] and [N, K / g], scale float32 [N, K / g] with values that float16 has."""

    q: torch.Tensor
    zero: torch.Tensor
    scale: torch.Tensor

    def values(self) -> torch.Tensor:
        """float32 [N, K]."""
        n, groups = self.scale.shape
        q = self.q.view(n, groups, -1).to(torch.float32) - self.zero.to(torch.float32)[..., None]
        return (q * self.scale[..., None]).view(n, -1)


def round_groups(
    weight: torch.Tensor, group: int, *, symmetric: bool = False, low: torch.Tensor | None = None, high: torch.Tensor | None = None
) -> Rounded:
    """To nearest. `low` <= 0 <= `high` [N, K / g]: the ends of each group's range, else those of its weights; what lies
    beyond is clipped. Scales are rounded to float16 before anything is divided by them."""
    grouped = weight.view(len(weight), -1, group)
    low = grouped.amin(-1).clamp(max=0) if low is None else low
    high = grouped.amax(-1).clamp(min=0) if high is None else high
    scale, zero = range_grid(low, high, symmetric)
    q = (torch.round(grouped / scale[..., None]) + zero[..., None]).clamp_(0, LEVELS)
    return Rounded(q.to(torch.uint8).view(weight.shape), zero.to(torch.uint8), scale)


def range_grid(low: torch.Tensor, high: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero), both float32, of the grid from `low` to `high`."""
    if symmetric:
        scale = torch.maximum(-low / SYMMETRIC_ZERO, high / (LEVELS - SYMMETRIC_ZERO))
    else:
        scale = (high - low) / LEVELS
    scale = scale.clamp(min=SMALLEST_SCALE).to(torch.float16).to(torch.float32)
    zero = torch.full_like(scale, SYMMETRIC_ZERO) if symmetric else torch.round(-low / scale).clamp_(0, LEVELS)
    return scale, zero


def nearest(weight: torch.Tensor, group: int, symmetric: bool) -> torch.Tensor:
    """float32 [N, K]: the weight rounded to nearest; the same numbers as `round_groups`, in fewer passes."""
    grouped = weight.view(len(weight), -1, group)
    low, high = torch.aminmax(grouped, dim=-1)
    scale, zero = (x[..., None] for x in range_grid(low.clamp_(max=0), high.clamp_(min=0), symmetric))
    return (grouped / scale).round_().add_(zero).clamp_(0, LEVELS).sub_(zero).mul_(scale).view(weight.shape)


def output_error(difference: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """trace(D G D^T) of each row, [N]."""
    return ((difference @ gram) * difference).sum(-1)


def total_error(weight: torch.Tensor, gram: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> float:
    """Sum of `output_error` over the rows of `change(weight) - weight` (None: of the weight itself), some rows at a time so that
    the passes over them stay in a core's cache."""
    total = 0.0
    for rows in weight.split(max(1, CACHED // weight.shape[1])):
        total += float(output_error(rows if change is None else change(rows).sub_(rows), gram).sum())
    return total
