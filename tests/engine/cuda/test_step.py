"""The inputs of a step on the card, against the host's own arithmetic (`engine.batch.Slots`)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.batch import Slots
from engine.cuda.graphs import buckets, decode_shape
from engine.cuda.state import State
from engine.cuda.step import Shape, fill, views
from engine.sequence import SamplingParams
from engine.step import Admit, StepPlan
from tests.ptx.device import EmulatedDevice

SLOTS, SESSION_LEN, BLOCK, TRASH = 6, 100, 8, 99
PARAMS = SamplingParams(max_tokens=4)


def filled(plan: StepPlan, shape: Shape, updates: np.ndarray) -> torch.Tensor:
    out = np.full(shape.size, -7, np.int32)
    fill(out, shape, plan, updates, SLOTS, TRASH)
    return torch.from_numpy(out)


def state_and_slots() -> tuple[State, Slots]:
    return State(EmulatedDevice(), SLOTS, SESSION_LEN, BLOCK, TRASH), Slots(SLOTS, SESSION_LEN, BLOCK)


def test_a_mixed_step_means_the_same_on_the_card_and_on_the_host() -> None:
    state, slots = state_and_slots()
    admits = (Admit(3, tuple(range(20)), 20, (5, 6, 7), PARAMS), Admit(1, tuple(range(50, 59)), 9, (2, 4), PARAMS))
    first = StepPlan(0, admits=admits, slots=(3, 1), starts=(0, 0), counts=(20, 9), samples=(1, 1))
    plan = StepPlan(1, block_slots=(1, 3), block_ids=(11, 12), slots=(1, 3), starts=(9, 15), counts=(1, 5), samples=(1, 0))
    for step in (first, plan):
        slots.apply(step)
        for admit in step.admits:
            state.admit(admit)
        updates = state.updates(step)
        for slot, index, block in updates:  # what the first kernel of a step does
            state.tables[slot, index] = block
        batch = slots.batch(step)
        shape = Shape(step.num_tokens, len(step.slots), sum(step.samples), len(updates))
        on_card = views(filled(step, shape, updates), shape, batch.num_decode)
        token_slots, positions = on_card.token_slots.long(), on_card.positions.long()
        assert positions.tolist() == batch.positions.tolist()
        assert on_card.row_starts.tolist() == batch.row_starts.tolist()
        assert on_card.contexts.tolist() == batch.contexts.tolist()
        assert on_card.sampled.tolist() == batch.sampled.tolist()
        assert on_card.sample_slots.tolist() == list(batch.sampled_slots)
        blocks = state.tables[token_slots, positions // BLOCK].long()
        assert (blocks * BLOCK + positions % BLOCK).tolist() == batch.kv_slots.tolist()
        known = positions < torch.tensor([0, 9, 0, 20, 0, 0])[token_slots]  # the id sampled by the first step is not known here
        assert torch.where(known, state.ids[token_slots, positions], 0).tolist() == np.where(known, batch.ids, 0).tolist()


def test_padding_rows_are_one_token_of_the_dummy_slot_and_touch_only_the_trash_block() -> None:
    state, _ = state_and_slots()
    state.admit(Admit(2, (1, 2, 3), 3, (8,), PARAMS))
    plan = StepPlan(5, slots=(2,), starts=(3,), counts=(1,), samples=(1,))
    shape = decode_shape(4)
    step = views(filled(plan, shape, state.updates(plan)), shape, 4)
    assert step.token_slots.tolist() == step.row_slots.tolist() == step.sample_slots.tolist() == [2, 6, 6, 6]
    assert (step.positions.tolist(), step.contexts.tolist()) == ([3, 0, 0, 0], [4, 1, 1, 1])
    assert (step.row_starts.tolist(), step.sampled.tolist()) == ([0, 1, 2, 3, 4], [0, 1, 2, 3])
    assert step.updates.tolist() == [[6, 0, TRASH]] * 4
    assert state.tables[6].tolist() == [TRASH] * state.blocks_per_slot and (state.dummy, state.trash) == (6, TRASH)


def test_a_step_with_a_prompt_part_is_never_padded() -> None:
    plan = StepPlan(0, slots=(0, 1), starts=(4, 0), counts=(1, 3), samples=(1, 1))
    with pytest.raises(ValueError, match="2 rows, 4 tokens cannot be padded"):
        filled(plan, Shape(4, 3, 3, 3), np.empty((0, 3), np.int32))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 256, 300, 4096])
def test_every_batch_size_has_a_graph_and_padding_is_bounded(size: int) -> None:
    counts = buckets(size)
    assert counts == sorted(set(counts)) and counts[-1] == size
    for rows in range(1, size + 1):
        bucket = next(b for b in counts if b >= rows)
        assert bucket - rows <= max(8, rows // 3, 63 if rows > 256 else 0)
