"""The persistent batch on the card: ids and block table of every slot, and one dummy slot for padding rows.

    ids     int32 [slots + 1, session_len + 1]
    tables  int32 [slots + 1, blocks_per_slot]     entries beyond a slot's own blocks must not be read

The host knows only how many blocks each slot has. What `Slots` is for runners on the host; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.batch import PromptScores
from engine.step import Admit, StepPlan


class State:
    """`trash`: the block where padding rows put their K and V."""

    def __init__(self, device: Any, max_batch_size: int, session_len: int, block_seq_len: int, trash: int) -> None:
        self._device = device
        self.dummy = max_batch_size
        self.trash = trash
        self.blocks_per_slot = -(-(session_len + 1) // block_seq_len)
        place = {"dtype": torch.int32, "device": device.torch_device}
        self.ids = torch.zeros((max_batch_size + 1, session_len + 1), **place)
        self.tables = torch.full((max_batch_size + 1, self.blocks_per_slot), trash, **place)
        self._num_blocks = np.zeros(max_batch_size, np.int32)
        self.scores = PromptScores()

    def admit(self, admit: Admit) -> None:
        """Queue the copies of a sequence's ids and block table."""
        self._put(self.ids[admit.slot], admit.token_ids)
        self._put(self.tables[admit.slot], admit.blocks)
        self._num_blocks[admit.slot] = len(admit.blocks)
        self.scores.admit(admit)

    def release(self, slot: int) -> None:
        self.scores.release(slot)

    def updates(self, plan: StepPlan) -> np.ndarray:
        """int32 [U, 3] (slot, index, block): the entries that the plan adds to block tables."""
        out = np.empty((len(plan.block_slots), 3), np.int32)
        for row, (slot, block) in enumerate(zip(plan.block_slots, plan.block_ids, strict=True)):
            out[row] = slot, self._num_blocks[slot], block
            self._num_blocks[slot] += 1
        return out

    def _put(self, row: torch.Tensor, values: Sequence[int]) -> None:
        if values:
            staged = self._device.pinned((len(values),), torch.int32)
            staged.copy_(torch.tensor(values, dtype=torch.int32))
            row[: len(values)].copy_(staged, non_blocking=True)
