"""The scheduler, one rule at a time: how sequences end or are refused, and how it notices its own mistakes.

What steps hold is in test_scheduler.py.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.cache.blocks import IntegrityError
from engine.errors import BadParameter, ContextLengthExceeded, EngineError
from engine.sequence import FinishReason, SamplingParams, Sequence, Status
from engine.step import BAD_LOGITS, StepResult
from tests.engine.pure.world import LONG, World, feed, reference, roomy, rows

ROOT = Path(__file__).resolve().parents[3]


# -- ends -------------------------------------------------------------------------------------------------


def test_a_stop_learned_one_step_late_costs_one_discarded_id() -> None:
    world = roomy()
    seq = world.add([1, 2], max_tokens=9, eos=(3,))
    world.plan()
    world.plan()
    assert feed(world, 3) == [(0, 3, FinishReason.STOP)]
    assert feed(world, 4) == [] and seq.token_ids == [1, 2, 3]
    assert world.manager.num_active == 0


def test_no_id_is_planned_beyond_the_length() -> None:
    world = roomy()
    world.add([1, 2], max_tokens=2)
    assert rows(world) == [(0, 0, 2, 1)] and rows(world) == [(0, 2, 1, 1)] and rows(world) == []
    assert feed(world, 0) == [(0, 0, None)] and rows(world) == []
    assert feed(world, 0) == [(0, 0, FinishReason.LENGTH)]


def test_session_len_ends_a_sequence() -> None:
    world = roomy(session_len=6)
    seq = world.add([1] * 4, max_tokens=50)
    world.run()
    assert seq.finish_reason is FinishReason.LENGTH and seq.num_tokens == 6
    one = world.add([1] * 5, max_tokens=50)
    world.run()
    assert one.num_generated == 1
    world.check_answers()


@pytest.mark.parametrize(
    ("knobs", "sampled", "expected"),
    [
        ({"eos": (3,)}, (1, 3), [None, FinishReason.STOP]),
        ({"eos": (3,), "ignore_eos": True}, (3, 3, 3), [None, None, FinishReason.LENGTH]),
        ({"stop_token_ids": (3,), "ignore_eos": True}, (3,), [FinishReason.STOP]),
        ({"eos": (3,), "min_tokens": 2}, (3, 3), [None, FinishReason.STOP]),
        ({"stop_token_ids": (3,), "min_tokens": 3}, (3, 3, 3), [None, None, FinishReason.STOP]),
        ({"eos": (3,)}, (1, 1, 3), [None, None, FinishReason.STOP]),
        ({"eos": (3,)}, (1, 1, 1), [None, None, FinishReason.LENGTH]),
        ({"eos": (3,)}, (1, BAD_LOGITS), [None, FinishReason.ERROR]),
    ],
)
def test_stop_conditions(knobs: dict[str, int], sampled: tuple[int, ...], expected: list[FinishReason | None]) -> None:
    world = roomy(depth=1)
    seq = world.add([1, 2], max_tokens=3, **knobs)  # type: ignore[arg-type]
    found = []
    for token_id in sampled:
        world.plan()
        found += feed(world, token_id)
    assert found == [(0, token_id, reason) for token_id, reason in zip(sampled, expected, strict=True)]
    assert seq.finish_reason is expected[-1] and seq.token_ids[2:] == [t for t in sampled if t != BAD_LOGITS]


def test_bad_logits_leave_nothing_in_the_cache() -> None:
    world = roomy()
    world.add([1] * 9, max_tokens=9, bad_at=9)
    world.run()
    assert world.events[0][-1].finish_reason is FinishReason.ERROR
    assert world.manager.num_cached == 0 and world.manager.num_active == 0
    neighbour = world.add([1] * 9, max_tokens=3)
    world.run()
    assert neighbour.num_cached == 0
    world.check_answers()


@pytest.mark.parametrize("when", ["waiting", "prompt", "in flight", "decoding", "preempted"])
def test_an_abort_gives_one_event_and_all_blocks(when: str) -> None:
    world = roomy(max_step_tokens=4)
    seq = world.add([1] * 10, max_tokens=9)
    turns = {"waiting": 0, "prompt": 1, "in flight": 2, "decoding": 6, "preempted": 6}[when]
    for _ in range(turns):
        world.turn()
    if when == "preempted":
        world.scheduler._preempt(seq)
    event = world.abort(0)
    assert event is not None and (event.token_id, event.finish_reason) == (-1, FinishReason.ABORT)
    assert world.abort(0) is None and world.abort(77) is None
    assert seq.status is Status.FINISHED
    while world.in_flight:
        assert world.apply() == []
    assert world.manager.num_active == 0 and not world.scheduler.has_work and not world.scheduler._newcomers
    world.check()


def test_a_block_whose_last_id_never_came_back_is_not_cached() -> None:
    world = roomy()
    world.add([1, 2, 3], max_tokens=9)
    world.plan()
    world.plan()  # computes position 3, the last of the block, with an id that is still being sampled
    world.abort(0)
    world.apply()
    world.apply()
    assert world.manager.num_cached == 0 and len(world.manager.index) == 0


def test_a_stop_string_ends_a_sequence_with_its_reason() -> None:
    world = roomy()
    world.add([1], max_tokens=9)
    world.turn()
    event = world.abort(0, FinishReason.STOP)
    assert event is not None and event.finish_reason is FinishReason.STOP


def test_blocks_are_fenced_until_every_step_issued_before_the_abort_has_ended() -> None:
    world = roomy()
    seq = world.add([1] * 6, max_tokens=9)
    world.plan()
    world.plan()
    blocks = len(seq.blocks)
    world.abort(0)
    assert world.manager.num_active == blocks and world.manager.num_returning == blocks
    world.apply()
    assert world.manager.num_active == blocks
    world.apply()
    assert world.manager.num_active == 0


def test_deadlines_and_queue_age() -> None:
    world = roomy(max_batch_size=1, max_queue_age_s=10.0)
    running = world.add([1], max_tokens=500, deadline_s=30.0)
    waiting = world.add([2], max_tokens=5)
    patient = world.add([3], max_tokens=5, deadline_s=4.5)
    for _ in range(4):
        world.turn()
    assert world.scheduler.expire(world.now) == []
    gone = world.take(world.scheduler.expire(4.5))
    assert [(e.sequence_id, e.token_id, e.finish_reason) for e in gone] == [(patient.id, -1, FinishReason.ABORT)]
    assert world.scheduler.expire(9.99) == []
    assert [e.sequence_id for e in world.scheduler.expire(10.0)] == [waiting.id]
    assert running.status is Status.RUNNING  # it was scheduled: its age in line does not count
    assert [e.sequence_id for e in world.scheduler.expire(30.0)] == [running.id]
    assert world.scheduler.expire(math.inf) == [] and not world.scheduler.sequences


def test_times_are_recorded() -> None:
    world = roomy(max_step_tokens=2)
    seq = world.add([1, 2, 3], max_tokens=3)
    assert (seq.first_scheduled_s, seq.first_token_s) == (-1.0, -1.0)
    world.now = 10.0
    world.turn()
    assert (seq.first_scheduled_s, seq.first_token_s) == (11.0, -1.0)
    world.turn()
    assert seq.first_token_s == 12.0
    world.run()
    assert (seq.first_scheduled_s, seq.first_token_s) == (11.0, 12.0)


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error", "param", "says"),
    [
        (0, 1, BadParameter, "prompt", "at least 1 token"),
        (20, 1, ContextLengthExceeded, "prompt", "has 20 tokens, but with its answer a sequence holds at most 20"),
        (5, 9, ContextLengthExceeded, "max_tokens", "up to 14 tokens need 7 KV blocks, but there are 6"),
        (14, 1, ContextLengthExceeded, "max_tokens", "up to 15 tokens need 7 KV blocks, but there are 6"),
    ],
)
def test_what_can_never_run_is_refused(prompt: int, max_tokens: int, error: type[BadParameter], param: str, says: str) -> None:
    world = World(6, 2, session_len=20)
    with pytest.raises(error, match=says) as caught:
        world.add([1] * prompt, max_tokens=max_tokens)
    assert caught.value.param == param and not world.scheduler.sequences and not world.scheduler.waiting


def test_what_just_fits_runs() -> None:
    world = World(6, 2, session_len=20)
    world.add([1] * 5, max_tokens=8)
    world.add([1] * 12, max_tokens=1)
    world.run()
    world.check_answers()


def test_an_id_is_used_once() -> None:
    world = roomy()
    seq = world.add([1], max_tokens=1)
    with pytest.raises(BadParameter, match="id 0 is already here"):
        world.scheduler.add(Sequence(0, [1], 1, SamplingParams(max_tokens=1)))
    assert world.scheduler.waiting == [seq]


def test_results_come_back_in_order_and_complete() -> None:
    world = roomy()
    with pytest.raises(EngineError, match="no step is in flight"):
        world.scheduler.apply(StepResult(0), 0.0)
    world.add([1], max_tokens=9)
    world.plan()
    world.plan()
    with pytest.raises(EngineError, match="for step 1, but step 0 is the oldest"):
        world.scheduler.apply(StepResult(1, (1,)), 0.0)
    with pytest.raises(EngineError, match="sampled 1 ids, but 2 came back"):
        world.scheduler.apply(StepResult(0, (1, 2)), 0.0)
    assert world.scheduler.num_in_flight == 2  # a refused result changes nothing
    world.run()
    world.check_answers()


def test_logprobs_reach_their_events() -> None:
    from engine.step import Logprobs

    world = roomy()
    for i in range(3):
        world.add([i], max_tokens=2)
    world.plan()
    plan, _ = world.in_flight.popleft()
    wanted = Logprobs(-0.5, 0, (1,), (-0.5,))
    events = world.scheduler.apply(StepResult(plan.step, (1, 2, 3), ((1, wanted),)), 0.0)
    assert [e.logprobs for e in events] == [None, wanted, None]


# -- our own invariants -----------------------------------------------------------------------------------


def take_a_slot_twice(world: World) -> None:
    world.scheduler._free_slots.append(0)


def lose_a_runner(world: World) -> None:
    world.scheduler._running.popitem()


def lose_a_waiting_one(world: World) -> None:
    world.scheduler.sequences.pop(world.scheduler.waiting[0].id)


def miscount_pending(world: World) -> None:
    world.sequences[0].num_pending += 1


def miscount_computed(world: World) -> None:
    world.sequences[0].num_computed += 5


def miscount_classes(world: World) -> None:
    world.scheduler._classes[3] += 1


def miscount_growing(world: World) -> None:
    world.scheduler._growing[0] += 1


def forget_a_runner(world: World) -> None:
    world.scheduler._decoding.discard(world.sequences[0])


def give_a_waiting_one_a_slot(world: World) -> None:
    world.scheduler.waiting[0].slot = 1


def disorder(world: World) -> None:
    world.scheduler.waiting.reverse()


@pytest.mark.parametrize(
    ("corrupt", "says"),
    [
        (take_a_slot_twice, "slots .* are taken"),
        (lose_a_runner, "block . is ACTIVE but should be FREE"),
        (lose_a_waiting_one, "3 sequences, but 2 wait in line and 2 run"),
        (miscount_pending, "sequence 0 says"),
        (miscount_computed, "sequence 0: .* computed"),
        (miscount_classes, "wrong classes"),
        (miscount_growing, "may grow are counted wrongly"),
        (forget_a_runner, "sequence 0 runs in 0 places"),
        (give_a_waiting_one_a_slot, "is WAITING in line, with slot 1"),
        (disorder, "wait in line"),
    ],
)
def test_integrity(corrupt: Callable[[World], None], says: str) -> None:
    world = roomy(max_batch_size=2)
    for i in range(4):
        world.add([i], max_tokens=9)
    world.turn()
    world.turn()
    world.check()
    corrupt(world)
    with pytest.raises(IntegrityError, match=says):
        world.check()


def test_the_reference_is_not_the_scheduler() -> None:
    """The naive answer by hand, so that a mistake shared by both cannot hide."""
    answer, reason = reference([1], SamplingParams(max_tokens=3, seed=4), frozenset(), LONG)
    assert len(answer) == 3 and reason is FinishReason.LENGTH
    stopped, reason = reference([1], SamplingParams(max_tokens=3, seed=4), frozenset(answer[1:2]), LONG)
    assert stopped == answer[: answer.index(answer[1]) + 1] and reason is FinishReason.STOP
    assert reference([1], SamplingParams(max_tokens=3), frozenset(), LONG, bad_at=1) == ([-1], FinishReason.ERROR)


def test_the_pure_wing_imports_nothing_heavy() -> None:
    code = "import sys, engine.scheduler; print([m for m in ('torch', 'numpy', 'asyncio', 'logging', 'socket') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
