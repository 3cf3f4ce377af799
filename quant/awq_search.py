"""AWQ (Lin et al. 2024): scales that protect the input channels that matter, then ranges that are worth clipping. torch.

A linear's weight is multiplied, and what makes its input divided, by a scale s of each input channel. In floating point
nothing changes; rounded, channels with a large s lose less and their neighbours in a group more. s comes from

    s = a^r                or       s = a^r / w^(1 - r)         a: mean |x|,   w: mean of |W| / largest of its group

and r of 1/20, 2/20 ... 1 is the one whose rounded linears change their output least (`quant/groups.py`): every second r is
tried, then those beside the best. Then, for each row and group, the range of the weights is narrowed step by step to where the
group's own part of the error is smallest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quant.groups import CACHED, LEVELS, Rounded, nearest, range_grid, round_groups, total_error
from quant.threads import SERIAL, Pool

RATIOS = 20  # ratios from 1 / 20 to 1,
COARSE = 2  # every second of them first, then the two beside the best
FORMS = ("activation", "activation/weight")
FIXED_RATIO = 0.5  # without a search, as SmoothQuant and LMDeploy have it
SHRINKS = tuple(1 - step / 20 for step in range(11))  # of a range: 1.0 to 0.5
SMALLEST = 1e-4
MOST = 256.0


Candidate = tuple[float, str, torch.Tensor]  # ratio, form, scales [K]


@dataclass(slots=True, eq=False)
class Inputs:
    """What was seen at one input of a layer: Gram matrix [K, K], mean and largest |x| [K], all float32; tokens seen."""

    gram: torch.Tensor
    mean: torch.Tensor
    largest: torch.Tensor
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Scales:
    """`values` [K]; `ratio` and `form` that won; errors relative to the output: rounded plainly, and with the scales."""

    values: torch.Tensor
    ratio: float
    form: str
    plain: float
    scaled: float


def find_scales(
    weight: torch.Tensor,
    inputs: Inputs,
    group: int,
    symmetric: bool,
    *,
    search: bool = True,
    owner: torch.Tensor | None = None,
    pool: Pool = SERIAL,
) -> Scales:
    """The scales of the linears `weight` [N, K] that read `inputs`. `owner` [K]: input channels with one number there have one
    scale, as they come from one channel of the neighbour that it is folded into (query heads that share a KV head)."""
    total = total_error(weight, inputs.gram)
    if total == 0:
        return Scales(torch.ones_like(inputs.mean), 0.0, "none", 0.0, 0.0)

    def error(candidate: Candidate) -> float:
        scales = candidate[2]
        return total_error(weight, inputs.gram, lambda rows: nearest(rows * scales, group, symmetric).div_(scales)) / total

    make = _Forms(weight, inputs, group, owner)
    first: list[Candidate] = [(0.0, "none", torch.ones_like(inputs.mean))]
    if search:
        first += [make(step / RATIOS, form) for step in range(COARSE, RATIOS + 1, COARSE) for form in FORMS]
    else:
        first.append(make(FIXED_RATIO, FORMS[1]))
    errors = pool.map(error, first)
    tried = list(zip(errors, first, strict=True))
    best = min(range(len(errors)), key=errors.__getitem__)
    if search and best:
        ratio, form, _ = first[best]
        step = round(ratio * RATIOS)
        nearby = [make(near / RATIOS, form) for near in (step - 1, step + 1) if near <= RATIOS]
        tried += zip(pool.map(error, nearby), nearby, strict=True)
    least, (ratio, form, scales) = min(tried, key=lambda found: found[0])
    return Scales(scales, ratio, form, errors[0], least)


class _Forms:
    """Candidates of a linear by ratio and form."""

    def __init__(self, weight: torch.Tensor, inputs: Inputs, group: int, owner: torch.Tensor | None) -> None:
        self._activation = together(inputs.mean, owner)
        self._relative = together(_relative_size(weight, group), owner)

    def __call__(self, ratio: float, form: str) -> Candidate:
        scales = self._activation.pow(ratio)
        return ratio, form, bounded(scales if form == FORMS[0] else scales / self._relative.pow(1 - ratio))


def _relative_size(weight: torch.Tensor, group: int) -> torch.Tensor:
    """[K]: mean over output channels of |w| / the largest of its group."""
    size = weight.abs().view(len(weight), -1, group)
    return (size / size.amax(-1, keepdim=True).clamp(min=1e-12)).mean(0).reshape(-1)


def together(values: torch.Tensor, owner: torch.Tensor | None) -> torch.Tensor:
    """Each channel's value, or the mean over the channels with its owner; never 0."""
    if owner is not None:
        sums = torch.zeros_like(values).index_add_(0, owner, values)
        values = (sums / torch.bincount(owner, minlength=len(values)).clamp(min=1))[owner]
    return values.clamp(min=SMALLEST)


def bounded(scales: torch.Tensor) -> torch.Tensor:
    """The smallest and the largest as far from 1, and neither so far that 16-bit norms and activations would suffer."""
    scales = scales.clamp(min=SMALLEST)
    return (scales / (scales.max() * scales.min()).sqrt()).clamp(1 / MOST, MOST)


def clipped(weight: torch.Tensor, gram: torch.Tensor, group: int, symmetric: bool, pool: Pool = SERIAL) -> Rounded:
    """`weight` [N, K] rounded, each group within the range that changes its own part of the output least."""
    blocks = _own_blocks(gram, group)
    parts = pool.map(lambda rows: _clipped_rows(rows, blocks, group, symmetric), weight.split(max(1, CACHED // weight.shape[1])))
    return Rounded(*(torch.cat([getattr(part, name) for part in parts]) for name in ("q", "zero", "scale")))


def _clipped_rows(weight: torch.Tensor, blocks: torch.Tensor, group: int, symmetric: bool) -> Rounded:
    grouped = weight.view(len(weight), -1, group)
    low, high = torch.aminmax(grouped, dim=-1)
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    best, least = torch.ones_like(low), torch.full_like(low, float("inf"))
    for shrink in SHRINKS:
        scale, zero = (x[..., None] for x in range_grid(low * shrink, high * shrink, symmetric))
        change = (grouped / scale).round_().add_(zero).clamp_(0, LEVELS).sub_(zero).mul_(scale).sub_(grouped).transpose(0, 1)
        error = (change @ blocks).mul_(change).sum(-1).T
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, shrink, best)
    return round_groups(weight, group, symmetric=symmetric, low=low * best, high=high * best)


def _own_blocks(gram: torch.Tensor, group: int) -> torch.Tensor:
    """[K / g, g, g]: each group's own part of the Gram matrix."""
    groups = len(gram) // group
    return gram.view(groups, group, groups, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
