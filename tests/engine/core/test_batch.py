"""The index arithmetic of a step, against a loop that does it one token at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Slots
from engine.sequence import SamplingParams
from engine.step import Admit, StepPlan

PARAMS = SamplingParams(max_tokens=8)


def admit(slot: int, ids: list[int], blocks: list[int]) -> Admit:
    return Admit(slot, tuple(ids), len(ids), tuple(blocks), PARAMS)


def test_decode_rows_and_a_prompt_part_in_one_step() -> None:
    slots = Slots(max_batch_size=4, session_len=16, block_seq_len=4)
    slots.apply(StepPlan(0, admits=(admit(2, [10, 11, 12, 13, 14], [7, 3]), admit(0, [20, 21, 22, 23, 24, 25], [5, 1]))))
    batch = slots.batch(StepPlan(0, slots=(2, 0), starts=(4, 1), counts=(1, 4), samples=(1, 0)))
    assert batch.ids.tolist() == [14, 21, 22, 23, 24]
    assert batch.positions.tolist() == [4, 1, 2, 3, 4]
    assert batch.kv_slots.tolist() == [3 * 4, 5 * 4 + 1, 5 * 4 + 2, 5 * 4 + 3, 1 * 4]
    assert batch.row_starts.tolist() == [0, 1, 5]
    assert batch.contexts.tolist() == [5, 5]
    assert batch.sampled.tolist() == [0]
    assert batch.sampled_slots == (2,)
    assert batch.num_decode == 1
    assert batch.tables.tolist() == [[7, 3], [5, 1]]


def test_a_released_slot_forgets_its_table() -> None:
    slots = Slots(max_batch_size=1, session_len=8, block_seq_len=2)
    slots.apply(StepPlan(0, admits=(admit(0, [1, 2, 3], [4, 5]),)))
    slots.apply(StepPlan(1, block_slots=(0,), block_ids=(6,)))
    assert slots.tables[0, :3].tolist() == [4, 5, 6]
    slots.apply(StepPlan(2, releases=(0,), admits=(admit(0, [9], [1]),)))
    assert slots.tables[0, :3].tolist() == [1, -1, -1]
    assert slots.num_blocks.tolist() == [1]


@pytest.mark.parametrize("block_seq_len", [1, 2, 16])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_token_goes_where_a_plain_loop_puts_it(block_seq_len: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    slots = Slots(max_batch_size=8, session_len=64, block_seq_len=block_seq_len)
    free = data.draw(st.permutations(range(8 * 66)))
    rows, sequences, taken = [], {}, 0
    for slot, length in enumerate(lengths):
        ids = [slot * 1000 + i for i in range(length)]
        need = -(-length // block_seq_len)
        blocks, taken = list(free[taken : taken + need]), taken + need
        slots.apply(StepPlan(0, admits=(admit(slot, ids, blocks),)))
        start = data.draw(st.integers(0, length - 1))
        count = data.draw(st.integers(1, length - start))
        rows.append((slot, start, count, int(start + count == length)))
        sequences[slot] = (ids, blocks)
    batch = slots.batch(StepPlan(1, (), (), (), (), *(tuple(r[i] for r in rows) for i in range(4))))
    token = 0
    for row, (slot, start, count, _) in enumerate(rows):
        ids, blocks = sequences[slot]
        assert batch.row_starts[row] == token
        for position in range(start, start + count):
            assert batch.ids[token] == ids[position]
            assert batch.positions[token] == position
            assert batch.kv_slots[token] == blocks[position // block_seq_len] * block_seq_len + position % block_seq_len
            token += 1
        assert batch.contexts[row] == start + count
        assert batch.tables[row, : len(blocks)].tolist() == blocks
        assert (batch.tables[row, len(blocks) :] == -1).all()
    assert batch.sampled.tolist() == [int(batch.row_starts[i + 1]) - 1 for i, r in enumerate(rows) if r[3]]
    leading = 0
    while leading < len(rows) and rows[leading][2:] == (1, 1):
        leading += 1
    assert batch.num_decode == leading
    assert batch.kv_slots.dtype == np.int64


def test_a_prompt_id_is_scored_at_the_position_before_it_and_answers_are_not() -> None:
    slots = Slots(max_batch_size=4, session_len=16, block_seq_len=4)
    scoring = dataclasses.replace(PARAMS, prompt_logprobs=3)
    slots.apply(
        StepPlan(0, admits=(admit(2, [10, 11], [7]), Admit(0, (20, 21, 22, 23, 24, 25), 5, (5, 1), scoring)))  # 25: of its answer
    )
    scored = slots.scored(StepPlan(0, slots=(2, 0), starts=(0, 1), counts=(2, 5), samples=(1, 1)))
    assert scored.tokens.tolist() == [2, 3, 4] and scored.ids.tolist() == [22, 23, 24]
    assert (scored.rows.tolist(), scored.positions.tolist(), scored.top) == ([1, 1, 1], [2, 3, 4], [3, 3, 3])
    assert len(slots.scored(StepPlan(1, slots=(2,), starts=(0,), counts=(2,), samples=(1,)))) == 0
    slots.apply(StepPlan(2, releases=(0,)))
    assert len(slots.scored(StepPlan(3, slots=(0,), starts=(0,), counts=(1,), samples=(0,)))) == 0
