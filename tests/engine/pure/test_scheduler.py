"""The scheduler, one rule at a time; any order of events is in test_scheduler_model.py."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.cache.blocks import IntegrityError
from engine.cache.manager import Match
from engine.errors import BadParameter, ContextLengthExceeded, EngineError
from engine.sequence import FinishReason, SamplingParams, Sequence, Status
from engine.step import BAD_LOGITS, StepResult
from tests.engine.pure.world import World, reference

LONG = 1 << 10
ROOT = Path(__file__).resolve().parents[3]


def roomy(**knobs: int | float) -> World:
    """A pool that never runs out."""
    return World(400, 4, **({"max_batch_size": 8, "max_step_tokens": 64, "session_len": LONG} | knobs))  # type: ignore[arg-type]


def feed(world: World, *token_ids: int) -> list[tuple[int, int, FinishReason | None]]:
    """Apply the oldest step in flight with made-up ids."""
    plan, _ = world.in_flight.popleft()
    events = world.scheduler.apply(StepResult(plan.step, token_ids), world.now)
    return [(e.sequence_id, e.token_id, e.finish_reason) for e in events]


def rows(world: World) -> list[tuple[int, int, int, int]]:
    """Rows of the next plan: (slot, start, count, sampled)."""
    plan = world.plan()
    return [] if plan is None else list(zip(plan.slots, plan.starts, plan.counts, plan.samples, strict=True))


# -- what a plan says -------------------------------------------------------------------------------------


def test_a_plan_is_a_delta_and_one_step_may_be_in_flight() -> None:
    world = roomy()
    seq = world.add([5, 6, 7], max_tokens=9)
    assert world.plan() is not None and world.plan() is not None
    first, second = world.plans
    (admit,) = first.admits
    assert (admit.slot, admit.token_ids, admit.num_prompt, admit.params) == (0, (5, 6, 7), 3, seq.params)
    assert admit.blocks == tuple(seq.blocks[:1])
    assert (first.slots, first.starts, first.counts, first.samples) == ((0,), (0,), (3,), (1,))
    assert not second.admits and (second.slots, second.starts, second.counts, second.samples) == ((0,), (3,), (1,), (1,))
    assert (seq.num_pending, seq.num_tokens, seq.num_computed, world.scheduler.num_in_flight) == (2, 5, 4, 2)
    assert feed(world, 1) == [(0, 1, None)] and feed(world, 2) == [(0, 2, None)]
    third = world.plan()
    assert third is not None and third.starts == (4,)
    assert (third.block_slots, third.block_ids) == ((0,), (seq.blocks[1],))  # position 4 begins the second block
    assert seq.token_ids == [5, 6, 7, 1, 2]


def test_identical_steps_reuse_their_tuples() -> None:
    world = roomy()
    for _ in range(3):
        world.add([1, 2], max_tokens=9)
    world.turn()
    world.turn()
    a, b = world.plans[-2:]
    assert a.slots == (0, 1, 2) and a.slots is b.slots and a.counts is b.counts and a.samples is b.samples


def test_the_budget_is_split_and_fused() -> None:
    world = roomy(max_step_tokens=6)
    world.add([1, 2], max_tokens=9)
    assert rows(world) == [(0, 0, 2, 1)]
    world.add([3] * 12, max_tokens=2)
    world.add([4] * 3, max_tokens=2)
    assert rows(world) == [(0, 2, 1, 1), (1, 0, 5, 0)]  # the decode row first, what it leaves goes to the prompt
    feed(world, 1)
    assert rows(world) == [(0, 3, 1, 1), (1, 5, 5, 0)]
    feed(world, 1)
    assert rows(world) == [(0, 4, 1, 1), (1, 10, 2, 1), (2, 0, 3, 1)]
    feed(world, 1)
    assert rows(world) == [(0, 5, 1, 1), (1, 12, 1, 1), (2, 3, 1, 1)]


def test_a_prompt_part_that_leaves_one_id_decodes_next() -> None:
    world = roomy(max_step_tokens=2)
    world.add([1, 2, 3], max_tokens=2)
    assert rows(world) == [(0, 0, 2, 0)]
    assert rows(world) == [(0, 2, 1, 1)]
    world.run()
    world.check_answers()


def test_more_decode_than_the_budget_rotates_fairly() -> None:
    world = roomy(max_step_tokens=2, max_batch_size=5)
    for _ in range(5):
        world.add([1], max_tokens=100)
    while len(world.scheduler.running) < 5 or world.scheduler._prompting:
        world.turn()
    world.turn()
    before = [len(events) for events in world.events.values()]
    for _ in range(50):
        world.turn()
    gained = [len(events) - b for events, b in zip(world.events.values(), before, strict=True)]
    assert gained == [20] * 5


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_prompts_go_on_when_decoding_alone_fills_the_budget(budget: int) -> None:
    world = roomy(max_step_tokens=budget, max_batch_size=4)
    for _ in range(budget):
        world.add([1], max_tokens=500)
    late = world.add([2] * 7, max_tokens=1)
    for _ in range(60):
        world.turn()
    assert late.status is Status.FINISHED


def test_long_prompts_never_hold_decoding_up() -> None:
    """C6: a stream of prompts longer than the budget; each step still decodes everybody, and every prompt ends."""
    world = roomy(max_batch_size=12, max_step_tokens=16)
    decoding = [world.add([i], max_tokens=200, seed=i) for i in range(8)]
    for _ in range(3):
        world.turn()
    for turn in range(100):
        if turn % 10 == 0:
            world.add([turn, *range(40)], max_tokens=1)
        before = [len(world.events[seq.id]) for seq in decoding]
        world.turn()
        assert [len(world.events[seq.id]) for seq in decoding] == [n + 1 for n in before]
        assert world.plans[-1].num_tokens <= 16
    late = [seq for seq in world.sequences.values() if seq not in decoding]
    assert [seq.status for seq in late] == [Status.FINISHED] * 10
    assert [seq.first_token_s for seq in late] == sorted(seq.first_token_s for seq in late)


def test_a_long_prompt_does_not_hold_decoding_up_even_with_a_budget_of_one() -> None:
    world = roomy(max_step_tokens=1)
    decoding = world.add([1], max_tokens=500)
    world.turn()
    late = world.add([2] * 20, max_tokens=1)
    world.turn()
    for _ in range(9):
        before = (len(world.events[0]), late.num_computed)
        for _ in range(4):
            world.turn()
        assert (len(world.events[0]) - before[0], late.num_computed - before[1]) == (2, 2)
    assert decoding.status is Status.RUNNING


def test_slots_are_released_and_reused_in_one_plan() -> None:
    world = roomy(max_batch_size=1)
    world.add([1], max_tokens=1)
    world.add([2], max_tokens=1)
    assert rows(world) == [(0, 0, 1, 1)]
    assert world.plan() is None  # the only slot is taken, its last id is on its way
    world.apply()
    plan = world.plan()
    assert plan is not None and plan.releases == (0,) and plan.admits[0].slot == 0
    world.run()
    world.check_answers()


def test_nothing_to_do() -> None:
    world = roomy()
    assert world.plan() is None and not world.scheduler.has_work
    world.add([1], max_tokens=1)
    assert world.scheduler.has_work
    world.plan()
    world.abort(0)
    assert world.plan() is None and world.scheduler.has_work  # a step is still in flight
    world.apply()
    assert not world.scheduler.has_work


# -- who goes first ---------------------------------------------------------------------------------------


def test_first_come_first_served_and_nobody_overtakes() -> None:
    world = World(6, 2, max_batch_size=4, max_step_tokens=64)
    world.add([1] * 6, max_tokens=4)
    big = world.add([2] * 8, max_tokens=2)
    small = world.add([3], max_tokens=1)
    world.turn()
    assert big.status is small.status is Status.WAITING and world.scheduler.waiting == [big, small]
    world.run()
    assert big.first_scheduled_s <= small.first_scheduled_s
    world.check_answers()


def test_classes_are_strict() -> None:
    world = roomy(max_batch_size=1)
    world.add([1], max_tokens=20, priority=0)
    low = world.add([2], max_tokens=1, priority=5)
    high = world.add([3], max_tokens=1, priority=1)
    world.run()
    assert high.first_scheduled_s < low.first_scheduled_s
    assert world.scheduler.num_preemptions == 0


def test_a_better_class_takes_a_slot() -> None:
    world = roomy(max_batch_size=2)
    equal = world.add([1], max_tokens=30, priority=1)
    early, late = world.add([1, 2], max_tokens=30, priority=3), world.add([1, 3], max_tokens=30, priority=3)
    for _ in range(4):
        world.turn()
    assert (equal.status, early.status, late.status) == (Status.RUNNING, Status.RUNNING, Status.WAITING)
    high = world.add([9], max_tokens=2, priority=1)
    world.turn()
    assert high.status is Status.RUNNING and early.num_preemptions == 1 and equal.num_preemptions == 0
    world.run()
    assert early.finish_reason is FinishReason.LENGTH and early.first_scheduled_s < high.first_scheduled_s
    world.check_answers()


def test_a_block_given_to_one_that_is_preempted_in_the_same_plan_is_not_announced() -> None:
    world = roomy(max_batch_size=1)
    low = world.add([1] * 4, max_tokens=9, priority=1)
    world.plan()  # low now needs its second block
    world.add([2], max_tokens=1)
    plan = world.plan()
    assert plan is not None and low.num_preemptions == 1
    assert (plan.releases, plan.admits[0].slot, plan.block_slots) == ((0,), 0, ())
    world.run()
    world.check_answers()


def test_a_better_class_takes_blocks_only_if_that_lets_it_in() -> None:
    world = World(10, 1, max_batch_size=4, max_step_tokens=64)
    world.add([1] * 5, max_tokens=3, priority=0)
    low = world.add([2, 2], max_tokens=2, priority=1)
    world.turn()
    assert low.status is Status.RUNNING
    high = world.add([3] * 8, max_tokens=2, priority=0)
    for _ in range(2):
        world.turn()
        assert low.num_preemptions == 0  # even all of its blocks would not do
    world.run()
    assert high.finish_reason is FinishReason.LENGTH
    world.check_answers()

    world = World(10, 1, max_batch_size=4, max_step_tokens=64)
    first, second = (world.add([i] * 4, max_tokens=2, priority=1) for i in (1, 2))
    world.turn()
    world.add([3] * 4, max_tokens=1, priority=0)
    world.turn()
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)  # the later one, and no more than needed
    world.run()
    world.check_answers()


# -- blocks run out ---------------------------------------------------------------------------------------


def test_the_latest_arrival_is_preempted_and_loses_no_id() -> None:
    world = World(6, 1, max_batch_size=3, max_step_tokens=64)
    first = world.add([1], max_tokens=6)
    second = world.add([2], max_tokens=6)
    while not second.num_preemptions:
        world.turn()
    assert first.num_preemptions == 0 and second.status is Status.WAITING
    seen = len(second.token_ids)
    world.run()
    assert second.finish_reason is FinishReason.LENGTH and len(second.token_ids) == 7 > seen
    assert first.num_preemptions == 0
    world.check_answers()
    world.check_quiet()


def starve(world: World, left: int = 0) -> None:
    """Somebody else takes all blocks but `left`."""
    manager = world.manager
    assert manager.reserve(Match([], manager.num_available - left, manager.num_available - left)) is not None


def at_a_boundary(prompts: tuple[int, ...]) -> World:
    """Sequences of these prompt lengths, one step in flight; those of a multiple of 4 ids now need a block."""
    world = roomy()
    for length in prompts:
        world.add([length] * length, max_tokens=50)
    world.plan()
    return world


def test_the_better_rank_gets_the_last_block() -> None:
    world = at_a_boundary((4, 4, 5))
    starve(world, left=1)
    plan = world.plan()
    assert plan is not None and (plan.block_slots, plan.slots) == ((0,), (0,))  # 1 stalls, and 2 makes room for it
    assert [seq.num_preemptions for seq in world.sequences.values()] == [0, 0, 1]
    world.apply()
    plan = world.plan()
    assert plan is not None and (plan.block_slots, plan.slots, plan.releases) == ((1,), (0, 1), ())


def test_a_block_that_comes_back_is_promised_once() -> None:
    world = at_a_boundary((4, 4, 3, 3))
    starve(world)
    assert world.plan() is None
    assert [seq.num_preemptions for seq in world.sequences.values()] == [0, 0, 1, 1]
    world.apply()
    plan = world.plan()
    assert plan is not None and plan.block_slots == (0, 1) and sorted(plan.releases) == [2, 3]


def test_nobody_is_let_in_to_be_preempted_at_once() -> None:
    world = World(6, 2, max_batch_size=2, max_step_tokens=2)
    world.add([1, 2], max_tokens=7)  # holds 2 blocks now and 4 in the end
    world.turn()
    assert world.manager.num_available == 4
    late = world.add([3] * 7, max_tokens=1)  # would fit now, but not for long
    world.run()
    assert world.scheduler.num_preemptions == 0 and late.finish_reason is FinishReason.LENGTH

    world = World(6, 2, max_batch_size=2, max_step_tokens=64)
    world.add([1] * 5, max_tokens=2)  # 3 blocks to its end
    late = world.add([2] * 6, max_tokens=3)  # the other 3 hold its prompt, not its first id
    world.turn()
    assert late.status is Status.WAITING
    world.run()
    assert world.scheduler.num_preemptions == 0
    assert world.scheduler._blocked == (None, 0)
    world.check_answers()


def test_a_preempted_sequence_waits_for_its_id_in_flight() -> None:
    world = roomy()
    seq = world.add([1, 2], max_tokens=9)
    world.turn()
    world.turn()
    assert seq.num_pending == 1
    world.scheduler._preempt(seq)
    known = list(seq.token_ids)
    assert world.plan() is None and seq.status is Status.WAITING
    world.apply()
    assert seq.num_pending == 0 and len(seq.token_ids) == len(known) + 1
    plan = world.plan()
    assert plan is not None and plan.admits[0].token_ids == tuple(seq.token_ids) and plan.releases == (0,)
    world.run()
    world.check_answers()


def test_a_preempted_sequence_can_end_by_the_id_in_flight() -> None:
    world = roomy()
    seq = world.add([1, 2], max_tokens=2)
    world.plan()
    world.plan()
    world.apply()
    world.scheduler._preempt(seq)
    world.apply()
    assert (seq.status, seq.finish_reason) == (Status.FINISHED, FinishReason.LENGTH)
    assert not world.scheduler.has_work
    world.check_answers()


def test_cached_blocks_go_before_anybody_is_preempted() -> None:
    world = World(8, 1, max_batch_size=2, max_step_tokens=64)
    world.add([1, 2, 3, 4], max_tokens=1)
    world.run()
    assert world.manager.num_cached == 4
    world.add([5], max_tokens=4)
    world.add([6], max_tokens=4)
    world.run()
    assert world.scheduler.num_preemptions == 0 and world.manager.num_evictions > 0


def test_two_that_do_not_fit_together_both_finish() -> None:
    world = World(5, 2, max_batch_size=2, max_step_tokens=3)
    for i in range(2):
        world.add([i] * 2, max_tokens=9)
    world.run(200)
    assert max(seq.num_preemptions for seq in world.sequences.values()) <= 3
    world.check_answers()


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_a_preemption_storm_ends_and_changes_no_answer(budget: int) -> None:
    """C7: the pool holds 30 % of what runs at once; n > 1, shared prefixes."""
    world = World(30, 2, max_batch_size=10, max_step_tokens=budget)
    for i in range(20):
        world.add([i % 3] * 5 + [i // 4], max_tokens=14, seed=i)
    idle = 0
    while world.scheduler.has_work:
        streamed = sum(len(events) for events in world.events.values())
        world.turn()
        world.check()
        idle = 0 if sum(len(events) for events in world.events.values()) > streamed else idle + 1
        assert idle < 60, "nothing advances"
    assert world.scheduler.num_preemptions > 0
    assert max(seq.num_preemptions for seq in world.sequences.values()) < 20
    world.check_answers()


@pytest.mark.parametrize("every", [1, 3, 7])
def test_forced_preemption_every_few_steps(every: int) -> None:
    """D2: identical answers, nothing streamed twice."""
    world = World(40, 2, max_batch_size=4, max_step_tokens=9)
    for i in range(4):
        world.add([1, 2, 3], max_tokens=20, seed=i, eos=(4,), min_tokens=5)
    turns = 0
    while world.scheduler.has_work:
        turns += 1
        if turns % every == 0 and world.scheduler.running and turns < 400:
            running = list(world.scheduler.running)
            world.scheduler._preempt(running[turns % len(running)])
        world.turn()
        world.check()
    world.check_answers()


# -- the prefix cache -------------------------------------------------------------------------------------


def test_prompts_and_answers_are_found_again() -> None:
    world = roomy()
    first = world.add(list(range(10)), max_tokens=6)
    world.run()
    assert first.num_cached == 0
    again = world.add(list(range(10)), max_tokens=6)
    longer = world.add([*first.token_ids, 1], max_tokens=1)
    other = world.add(list(range(10)), max_tokens=1, salt=b"x")
    exact = world.add(list(range(8)), max_tokens=1)
    world.run()
    # 10 + 6 ids, the last of which was never computed: 15 positions are 3 full blocks of 4
    assert (again.num_cached, longer.num_cached, other.num_cached, exact.num_cached) == (8, 12, 0, 4)
    assert world.manager.prefix_queries == 10 + 10 + 17 + 10 + 8 and world.manager.prefix_hits == 8 + 12 + 4
    world.check_answers()


def test_num_cached_is_that_of_the_first_admission() -> None:
    world = roomy()
    seq = world.add([1] * 9, max_tokens=9)
    for _ in range(4):
        world.turn()
    world.scheduler._preempt(seq)
    world.run()
    assert seq.num_cached == 0 and world.manager.prefix_queries == 9


def test_a_block_is_not_found_before_its_step_has_ended() -> None:
    world = roomy()
    world.add([1] * 8, max_tokens=2)
    world.plan()
    early = world.add([1] * 8, max_tokens=1)
    world.plan()
    assert early.num_cached == 0
    world.apply()
    late = world.add([1] * 9, max_tokens=1)
    world.plan()
    assert late.num_cached == 8
    world.run()
    world.check_answers()


def test_a_burst_with_one_prompt_computes_it_once() -> None:
    """n > 1, or many clients with one system prompt: the others wait until the first one's blocks can be matched."""
    world = roomy()
    burst = [world.add([7] * 41, max_tokens=3, seed=i) for i in range(6)]
    world.plan()
    assert [seq.status for seq in burst] == [Status.RUNNING] + [Status.WAITING] * 5
    world.run()
    assert [seq.num_cached for seq in burst] == [0] + [40] * 5
    world.check_answers()


def test_a_long_prompt_is_followed_part_by_part() -> None:
    world = roomy(max_step_tokens=16)
    first, second = world.add([7] * 41, max_tokens=1), world.add([7] * 41, max_tokens=1)
    world.run()
    assert (first.num_cached, second.num_cached) == (0, 40)
    world.check_answers()


@pytest.mark.parametrize("other", [{"salt": b"other"}, {"prompt": [7] * 3 + [8] * 38}, {"prompt": [7] * 4}])
def test_who_shares_no_full_block_waits_for_nobody(other: dict[str, object]) -> None:
    world = roomy()
    world.add([7] * 41, max_tokens=3)
    second = world.add(**{"prompt": [7] * 41, "max_tokens": 3, **other})  # type: ignore[arg-type]
    world.plan()
    assert second.status is Status.RUNNING


@pytest.mark.parametrize("when", ["before its step has ended", "in mid-prompt"])
def test_the_one_waited_for_may_be_aborted(when: str) -> None:
    world = roomy(max_step_tokens=16)
    first, second = world.add([7] * 41, max_tokens=3), world.add([7] * 41, max_tokens=3)
    world.plan()
    if when == "in mid-prompt":
        world.apply()
        world.plan()
    world.scheduler.abort(first.id)
    world.run()
    assert second.finish_reason is FinishReason.LENGTH
    world.check_answers()


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
