"""`StepPlan` -> flat arrays: the index arithmetic of a step, in numpy only, so that it is tested without a model.

T tokens of this step, row after row; R rows; S sampled rows; B = widest block table among the rows

ids         int32 [T]       id of each token
positions   int32 [T]       its position in its sequence
kv_slots    int64 [T]       where its K/V goes: block * block_seq_len + offset
row_starts  int32 [R + 1]   tokens of row r are row_starts[r] .. row_starts[r + 1] - 1
contexts    int32 [R]       positions that exist after this step (start + count)
tables      int32 [R, B]    block tables; entries beyond a row's own blocks are -1 and must not be read
sampled     int32 [S]       token index of the last token of each sampled row
num_decode                  rows 0 .. num_decode - 1 have exactly one token and are sampled

For prompt logprobs, which a prompt id gets from the logits one position before it:
`Scored` says at which P token indices logits are wanted beside `sampled`, and for which prompt ids
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.step import Admit, StepPlan

NO_TOKENS = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One step as arrays; shapes as drawn above."""

    ids: np.ndarray
    positions: np.ndarray
    kv_slots: np.ndarray
    row_starts: np.ndarray
    contexts: np.ndarray
    tables: np.ndarray
    sampled: np.ndarray
    sampled_slots: tuple[int, ...]  # batch slot of each sampled row
    num_decode: int

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_rows(self) -> int:
        return len(self.contexts)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """The prompt ids that a step finds the logprobs of; all [P] but `top`."""

    tokens: np.ndarray  # token index of the position before it
    rows: np.ndarray  # row of the plan
    positions: np.ndarray  # of the prompt id itself
    ids: np.ndarray  # the prompt id
    top: list[int]  # how many of the most likely ids are wanted beside it

    def __len__(self) -> int:
        return len(self.tokens)


NOTHING_SCORED = Scored(NO_TOKENS, NO_TOKENS, NO_TOKENS, NO_TOKENS, [])


class PromptScores:
    """Which slots hold a sequence whose prompt logprobs are wanted, and for which of its ids."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[np.ndarray, int]] = {}  # slot -> (prompt ids int32, top)

    def admit(self, admit: Admit) -> None:
        self.release(admit.slot)
        if admit.params.prompt_logprobs >= 0:
            self._prompts[admit.slot] = (np.array(admit.token_ids[: admit.num_prompt], np.int32), admit.params.prompt_logprobs)

    def release(self, slot: int) -> None:
        self._prompts.pop(slot, None)

    def scored(self, plan: StepPlan) -> Scored:
        """The prompt ids whose logprobs the rows of an applied plan bring: those after a position they compute."""
        if not self._prompts or not any(slot in self._prompts for slot in plan.slots):
            return NOTHING_SCORED
        tokens, rows, positions, ids, top = [], [], [], [], []
        first = 0
        for row, (slot, start, count) in enumerate(zip(plan.slots, plan.starts, plan.counts, strict=True)):
            prompt, k = self._prompts.get(slot, (NO_TOKENS, 0))
            n = max(0, min(start + count, len(prompt) - 1) - start)
            tokens.append(np.arange(first, first + n, dtype=np.int32))
            rows.append(np.full(n, row, np.int32))
            positions.append(np.arange(start + 1, start + 1 + n, dtype=np.int32))
            ids.append(prompt[start + 1 : start + 1 + n])
            top += [k] * n
            first += count
        return Scored(np.concatenate(tokens), np.concatenate(rows), np.concatenate(positions), np.concatenate(ids), top)


class Slots:
    """The persistent batch on the runner's side: ids and block table of every slot."""

    def __init__(self, max_batch_size: int, session_len: int, block_seq_len: int) -> None:
        self.block_seq_len = block_seq_len
        self.ids = np.full((max_batch_size, session_len + 1), -1, np.int32)
        self.tables = np.full((max_batch_size, -(-(session_len + 1) // block_seq_len)), -1, np.int32)
        self.num_blocks = np.zeros(max_batch_size, np.int32)
        self._scores = PromptScores()

    def release(self, slot: int) -> None:
        self.tables[slot, : self.num_blocks[slot]] = -1
        self.num_blocks[slot] = 0
        self._scores.release(slot)

    def admit(self, admit: Admit) -> None:
        self.release(admit.slot)
        self.ids[admit.slot, : len(admit.token_ids)] = admit.token_ids
        self.tables[admit.slot, : len(admit.blocks)] = admit.blocks
        self.num_blocks[admit.slot] = len(admit.blocks)
        self._scores.admit(admit)

    def apply(self, plan: StepPlan) -> None:
        """Releases, admits, new blocks, in this order."""
        for slot in plan.releases:
            self.release(slot)
        for admit in plan.admits:
            self.admit(admit)
        for slot, block in zip(plan.block_slots, plan.block_ids, strict=True):
            self.tables[slot, self.num_blocks[slot]] = block
            self.num_blocks[slot] += 1

    def batch(self, plan: StepPlan) -> Batch:
        """The rows of a plan that was applied."""
        slots = np.asarray(plan.slots, np.int32)
        starts = np.asarray(plan.starts, np.int32)
        counts = np.asarray(plan.counts, np.int32)
        samples = np.asarray(plan.samples, bool)
        row_starts = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(counts, out=row_starts[1:])
        row_of = np.repeat(np.arange(len(slots), dtype=np.int32), counts)
        positions = np.arange(row_starts[-1], dtype=np.int32) - row_starts[row_of] + starts[row_of]
        slot_of = slots[row_of]
        blocks = self.tables[slot_of, positions // self.block_seq_len]
        widest = int(self.num_blocks[slots].max()) if len(slots) else 0
        others = np.flatnonzero(~((counts == 1) & samples))
        return Batch(
            ids=self.ids[slot_of, positions],
            positions=positions,
            kv_slots=blocks.astype(np.int64) * self.block_seq_len + positions % self.block_seq_len,
            row_starts=row_starts,
            contexts=starts + counts,
            tables=self.tables[slots, :widest],
            sampled=(row_starts[1:] - 1)[samples],
            sampled_slots=tuple(slots[samples].tolist()),
            num_decode=int(others[0]) if len(others) else len(slots),
        )

    def scored(self, plan: StepPlan) -> Scored:
        """What an applied plan brings of prompt logprobs."""
        return self._scores.scored(plan)
