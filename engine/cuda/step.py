"""The inputs of one step on the card: views into one int32 buffer that is filled on the host and copied once.

T tokens, R rows, S sampled rows, U new block-table entries, P attention tiles; `dummy` is the batch slot of padding rows.

token_slots  [T]      batch slot of each token
positions    [T]      its position in its sequence
row_starts   [R + 1]  tokens of row r are row_starts[r] .. row_starts[r + 1] - 1
row_slots    [R]      batch slot of each row
contexts     [R]      positions that exist after this step
sampled      [S]      token index of the last token of each sampled row, then of positions whose logits are wanted besides
sample_slots [S]      its batch slot (the dummy, for the latter)
updates      [U, 3]   (slot, index, block): entries the block tables gain before anything is computed
tiles        [P, 4]   pieces of prompt parts for the attention kernel (`engine/cuda/attention_tiles.py`)

Ids and block tables themselves stay on the card (`engine/cuda/state.py`), where sampling writes the next id: a step never
waits for the host to learn what the last one sampled. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from engine.step import StepPlan

NO_TOKENS = np.empty(0, np.int32)
NO_TILES = np.empty((0, 4), np.int32)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the buffer's layout depends on."""

    tokens: int
    rows: int
    sampled: int
    updates: int
    tiles: int = 0

    @property
    def size(self) -> int:
        """int32 elements, each array on a 16-byte boundary."""
        return sum(_padded(n) for n in self.lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.tokens, self.tokens, self.rows + 1, self.rows, self.rows, self.sampled, self.sampled, 3 * self.updates, 4 * self.tiles)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step's inputs on the card; arrays as drawn above."""

    token_slots: torch.Tensor
    positions: torch.Tensor
    row_starts: torch.Tensor
    row_slots: torch.Tensor
    contexts: torch.Tensor
    sampled: torch.Tensor
    sample_slots: torch.Tensor
    updates: torch.Tensor
    tiles: torch.Tensor
    num_decode: int  # rows 0 .. num_decode - 1 have one token each
    max_tile: int  # no tile has more tokens
    whole: tuple[tuple[int, int, int], ...] = ()  # prompts that are in no tile (`engine/cuda/whole_prompts.py`)

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    @property
    def num_rows(self) -> int:
        return len(self.contexts)


class Tiles(NamedTuple):
    """How the attention of a step's prompt parts is cut: tiles int32 [P, 4], tokens of the largest, and `Step.whole`."""

    pieces: np.ndarray = NO_TILES
    most: int = 0
    whole: tuple[tuple[int, int, int], ...] = ()


def views(buffer: torch.Tensor, shape: Shape, num_decode: int, tiles: Tiles = Tiles()) -> Step:  # noqa: B008 (immutable)
    """The arrays of a step of this shape inside an int32 buffer of at least `shape.size` elements."""
    at, arrays = 0, []
    for length in shape.lengths:
        arrays.append(buffer[at : at + length])
        at += _padded(length)
    *arrays, updates, pieces = arrays
    return Step(
        *arrays, updates=updates.view(-1, 3), tiles=pieces.view(-1, 4), num_decode=num_decode, max_tile=tiles.most, whole=tiles.whole
    )


def fill(
    out: np.ndarray,
    shape: Shape,
    plan: StepPlan,
    updates: np.ndarray,
    dummy: int,
    trash: int,
    tiles: np.ndarray = NO_TILES,
    scored: np.ndarray = NO_TOKENS,
) -> None:
    """Write a plan's rows into `out`, int32 [shape.size]; updates int32 [U', 3], U' <= shape.updates; tiles int32 [P, 4];
    scored int32: token indices that follow the sampled ones.

    Rows, tokens and samples beyond the plan's become padding: one token at position 0 of the `dummy` slot. Updates beyond
    those given set the dummy's first table entry to the `trash` block.
    A padded shape has only decode rows: tokens, rows and samples grow together.
    """
    rows, tokens = len(plan.slots), plan.num_tokens
    padding = shape.rows - rows
    if padding and not shape.tokens - tokens == padding == shape.sampled - sum(plan.samples):
        raise ValueError(f"a step of {rows} rows, {tokens} tokens cannot be padded to {shape}")
    counts = np.ones(shape.rows, np.int32)
    counts[:rows] = plan.counts
    slots = np.full(shape.rows, dummy, np.int32)
    slots[:rows] = plan.slots
    starts = np.zeros(shape.rows, np.int32)
    starts[:rows] = plan.starts
    samples = np.ones(shape.rows, bool)
    samples[:rows] = plan.samples
    row_starts = np.zeros(shape.rows + 1, np.int32)
    np.cumsum(counts, out=row_starts[1:])
    if shape.tokens == shape.rows:
        token_slots, positions = slots, starts
    else:
        row_of = np.repeat(np.arange(shape.rows, dtype=np.int32), counts)
        token_slots = slots[row_of]
        positions = np.arange(shape.tokens, dtype=np.int32) - row_starts[row_of] + starts[row_of]
    entries = np.full((shape.updates, 3), (dummy, 0, trash), np.int32)
    entries[: len(updates)] = updates
    at = 0
    arrays = (
        token_slots, positions, row_starts, slots, starts + counts,
        np.concatenate(((row_starts[1:] - 1)[samples], scored)),
        np.concatenate((slots[samples], np.full(len(scored), dummy, np.int32))),
        entries.ravel(), tiles.ravel(),
    )  # fmt: skip
    for array in arrays:
        out[at : at + len(array)] = array
        at += _padded(len(array))


def _padded(length: int) -> int:
    return (length + 3) // 4 * 4
