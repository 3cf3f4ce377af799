"""The scheduler, one rule at a time: what a step holds, who goes first, whose blocks are taken, what the cache saves.

How sequences come in and end is in test_scheduler_ends.py, any order of events in test_scheduler_model.py.
"""

from __future__ import annotations

import pytest

from engine.cache.manager import Match
from engine.sequence import FinishReason, Status
from tests.engine.pure.world import World, feed, roomy, rows

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
