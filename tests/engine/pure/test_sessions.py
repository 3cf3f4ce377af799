"""Leases: a turn computes what is new, memory that is short breaks them, and no answer ever changes."""

from __future__ import annotations

import pytest

from engine.cache.blocks import BlockPool, BlockState, IntegrityError
from engine.cache.manager import CacheManager, Match
from engine.cache.sessions import Lease, LeaseLimits, Leases
from engine.sequence import FinishReason, Sequence, Status
from tests.engine.pure.world import ALL_PINNED, VOCAB, World, reference


def prefilled(world: World, seq: Sequence) -> int:
    """Positions of `seq` that were computed before its first id was sampled; it must not have been preempted."""
    assert seq.num_preemptions == 0
    return seq.num_prompt - seq.num_cached


def turn(world: World, history: list[int], words: list[int], session: str = "s", **params: object) -> Sequence:
    seq = world.add(history + words, session=session, **params)  # type: ignore[arg-type]
    world.run()
    world.check()
    return seq


def leased(world: World, session: str = "s") -> Lease:
    lease = world.manager.leases.get(session)
    assert lease is not None
    return lease


# -- turns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_twenty_turns_compute_what_is_new(size: int, caching: bool) -> None:
    """The last id of an answer that was as long as allowed has no K/V yet: it is computed with the new ones."""
    world = World(512 // size, size, caching=caching, max_step_tokens=16)
    history: list[int] = []
    for number in range(20):
        words = [(number + i) % VOCAB for i in range(1 + number % 3)]
        seq = turn(world, history, words, max_tokens=3 + number % 5, seed=number)
        assert prefilled(world, seq) == len(words) + (number > 0), f"turn {number}"
        history = seq.token_ids
    world.check_answers()
    world.check_quiet()


def test_an_answer_that_ended_by_itself_leaves_nothing_to_compute_again() -> None:
    """The step that was in flight when the end was sampled has written its K/V."""
    world = World(64, 4)
    first = turn(world, [], [1, 2, 3, 4, 0], max_tokens=30, eos=(0, 1, 2, 3))
    assert first.finish_reason is FinishReason.STOP and leased(world).num_tokens == len(first.token_ids)
    second = turn(world, first.token_ids, [1, 1], max_tokens=2)
    assert prefilled(world, second) == 2
    world.check_answers()


def test_a_history_that_is_all_there_leaves_its_last_id_to_compute() -> None:
    """Nothing new is said, and every position has its K/V: the id to go on from is computed once more."""
    world = World(64, 4)
    first = turn(world, [], [1, 2, 3, 4, 0], max_tokens=30, eos=(0, 1, 2, 3))
    assert leased(world).num_tokens == len(first.token_ids)
    assert prefilled(world, turn(world, first.token_ids, [], max_tokens=2)) == 1
    world.check_answers()


def test_a_turn_that_is_sampled_alone_needs_no_step_of_its_prompt() -> None:
    """Steps of one token: a turn of one new word is one decode row, as if the answer had gone on."""
    world = World(64, 4, depth=1)
    first = turn(world, [], [1, 2, 3], max_tokens=4)
    before = len(world.plans)
    turn(world, first.token_ids[:-1], [first.token_ids[-1]], max_tokens=1)
    assert [plan.counts for plan in world.plans[before:]] == [(1,)]


def test_the_partly_filled_block_is_taken_over() -> None:
    world = World(8, 4)
    first = turn(world, [], [1, 2, 3, 4, 0], max_tokens=2)
    lease = leased(world)
    assert len(lease.table) == 2 and lease.num_tokens == 6 and world.manager.num_pinned == 2
    block = world.manager.blocks[lease.table[1]]
    assert (block.state, block.refs, block.pins, block.entry) == (BlockState.CACHED, 0, 1, None)
    table = list(lease.table)
    seq = world.add(first.token_ids + [1], session="s", max_tokens=3)
    world.plan()
    assert seq.blocks[:2] == table and lease.table == [] and world.manager.num_pinned == 0
    world.run()
    world.check_answers()


def test_a_branch_keeps_what_is_common() -> None:
    """The user edits their last message: whole blocks before the edit are used, the one it lies in is computed again."""
    world = World(16, 4)
    first = turn(world, [], list(range(5)) * 2, max_tokens=4)
    ids = first.token_ids[:10]
    second = turn(world, ids[:9], [(ids[9] + 1) % VOCAB, 0], max_tokens=2)
    assert second.num_cached == 8, "position 8 lies in a block that others may find: it is not written over"
    third = turn(world, [4, 4], [4], max_tokens=2)
    assert third.num_cached == 0
    world.check_answers()


def test_a_branch_within_the_partly_filled_block_goes_on_in_it() -> None:
    world = World(16, 8)
    first = turn(world, [], [1, 2, 3, 4], max_tokens=3)
    second = turn(world, first.token_ids[:3], [0, 0], max_tokens=3)
    assert second.num_cached == 3
    world.check_answers()


def test_what_others_computed_is_found_where_it_is_longer() -> None:
    world = World(32, 2)
    ids = [1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    turn(world, [], ids[:4], max_tokens=1)
    turn(world, [], ids, session="", max_tokens=1)
    seq = turn(world, [], ids, max_tokens=1)
    assert seq.num_cached == 8 and leased(world).num_tokens == 10


def test_another_salt_finds_nothing() -> None:
    world = World(32, 2)
    first = turn(world, [], [1, 2, 3, 4], max_tokens=2, salt=b"a")
    assert turn(world, first.token_ids, [1], max_tokens=2, salt=b"b").num_cached == 0
    world.check_answers()


def test_a_turn_waits_for_the_step_that_may_still_write() -> None:
    world = World(16, 4)
    first = world.add([1, 2, 3], session="s", max_tokens=30, eos=(0, 1, 2, 3))
    while first.status is not Status.FINISHED:
        world.turn()
    assert world.in_flight, "this test needs a step in flight"
    second = world.add(first.token_ids + [1], session="s", max_tokens=2)
    assert world.plan() is None
    world.run()
    assert prefilled(world, second) == 1
    world.check_answers()


def test_cancelled_turns_leave_what_they_have() -> None:
    world = World(32, 4)
    seq = world.add([1, 2, 3, 4, 0, 1], session="s", max_tokens=20)
    for _ in range(6):
        world.turn()
    assert world.abort(seq.id) is not None
    world.run()
    held = leased(world).num_tokens
    assert held == len(seq.token_ids) > 8
    assert prefilled(world, turn(world, seq.token_ids, [2], max_tokens=2)) == 1
    world.check_answers()


def test_a_turn_that_never_ran_changes_nothing() -> None:
    world = World(32, 4)
    first = turn(world, [], [1, 2, 3], max_tokens=2)
    waiting = world.add(first.token_ids + [1], session="s")
    world.abort(waiting.id)
    assert leased(world).num_tokens == 4 and leased(world).users == 0
    fresh = world.add([1], session="new")
    world.abort(fresh.id)
    assert world.manager.leases.get("new") is None
    world.check()


def test_two_turns_at_a_time() -> None:
    """Nobody is refused: one takes the table over, the other finds what is cached; the last one to end is kept."""
    world = World(32, 2)
    first = turn(world, [], [1, 2, 3, 4], max_tokens=3)
    longer = world.add(first.token_ids + [1], session="s", max_tokens=9)
    shorter = world.add(first.token_ids + [2], session="s", max_tokens=2)
    world.run()
    assert (longer.num_cached, shorter.num_cached) == (6, 6)
    assert leased(world).ids is longer.token_ids
    world.check()
    world.check_answers()


# -- ends -----------------------------------------------------------------------------------------------------


def test_an_ended_session_is_plain_cache() -> None:
    world = World(32, 4)
    first = turn(world, [], [1, 2, 3, 4, 0, 1], max_tokens=2)
    assert world.manager.leases.end("s") and not world.manager.leases.end("s")
    assert (world.manager.num_pinned, world.manager.num_cached) == (0, 1), "the full block is found, the other one is FREE"
    assert turn(world, first.token_ids, [1], max_tokens=2).num_cached == 4


def test_a_session_that_ends_while_it_answers_leaves_nothing() -> None:
    world = World(32, 4)
    world.add([1, 2, 3], session="s", max_tokens=9)
    world.turn()
    assert world.manager.leases.end("s")
    world.run()
    assert len(world.manager.leases) == world.manager.num_pinned == 0


def test_a_lease_expires() -> None:
    world = World(32, 4, limits=LeaseLimits(lease_s=50.0, max_pool_share=1.0))
    first = turn(world, [], [1, 2, 3], max_tokens=2)
    world.now += 40
    world.add(first.token_ids + [1], session="s", max_tokens=1)  # a turn renews it
    world.run()
    world.scheduler.expire(world.now + 40)
    assert world.manager.leases.num_pinned == 1
    world.scheduler.expire(world.now + 100)
    assert (len(world.manager.leases), world.manager.leases.num_expired, world.manager.num_pinned) == (0, 1, 0)
    world.check()


def test_a_turn_in_line_when_its_lease_expires_computes_again() -> None:
    world = World(4, 4, max_batch_size=1, limits=LeaseLimits(lease_s=20.0, max_pool_share=1.0))
    first = turn(world, [], [1, 2, 3, 4, 0], max_tokens=2)
    world.add([1], max_tokens=6)
    world.turn()
    seq = world.add(first.token_ids + [1], session="s", max_tokens=2)
    world.scheduler.expire(world.now + 30)
    assert leased(world).users == 1 and not leased(world).table
    world.run()
    assert seq.num_cached == 4, "its full block is still cached"
    world.check_answers()


def test_a_reset_ends_all_leases() -> None:
    world = World(32, 4)
    turn(world, [], [1, 2, 3, 4, 0], max_tokens=2)
    world.add([1, 2], session="busy", max_tokens=9)
    world.turn()
    world.manager.reset_cache()
    world.run()
    assert len(world.manager.leases) == world.manager.num_pinned == 0


def test_numbers_that_are_not_finite_are_not_kept() -> None:
    world = World(32, 2)
    shared = [1, 2, 3, 4]
    turn(world, [], shared, session="other", max_tokens=3)
    seq = turn(world, [], [*shared, 1, 1], bad_at=7, max_tokens=9)
    assert seq.finish_reason is FinishReason.ERROR
    assert len(world.manager.leases) == 0, "the other session's lease holds blocks that this one read"
    assert turn(world, [], shared, session="other", max_tokens=3).num_cached == 0


def test_numbers_that_are_not_finite_are_not_kept_in_a_block_that_nobody_else_finds_either() -> None:
    world = World(8, 16)
    seq = turn(world, [], [1, 1, 1], bad_at=4, max_tokens=9)
    assert seq.finish_reason is FinishReason.ERROR and len(world.manager.leases) == 0


# -- memory is short --------------------------------------------------------------------------------------------


def test_what_is_not_pinned_goes_first_then_the_lease_that_expires_soonest() -> None:
    world = World(8, 2)
    for name, word in (("a", 1), ("b", 2), ("c", 3)):
        turn(world, [], [word, word, word], session=name, max_tokens=2)
        world.now += 1
    turn(world, [], [4, 4, 4], session="", max_tokens=1)  # CACHED, not pinned
    world.add([1, 1, 1, 1], session="a", max_tokens=1)  # renewed: b expires soonest now
    world.run()
    assert world.manager.leases.num_broken == 0
    turn(world, [], [0, 1, 0, 1, 0, 1, 0], session="", max_tokens=1)
    assert world.manager.leases.num_broken == 1
    assert sorted(world.manager.leases.names()) == ["a", "c"]
    world.check_answers()


def test_running_sequences_break_every_lease_before_one_waits() -> None:
    world = World(8, 2)
    for name in "abc":
        turn(world, [], [ord(name) % VOCAB] * 3, session=name, max_tokens=2)
    seqs = [world.add([i, i, i], max_tokens=12 if i else 6) for i in range(2)]
    world.run()
    assert len(world.manager.leases) == 0 and sum(seq.num_preemptions for seq in seqs) <= 1
    world.check_answers()


def test_leases_keep_to_their_share() -> None:
    world = World(40, 1, limits=LeaseLimits(max_pool_share=0.25))
    for name in "abcd":
        turn(world, [], [ord(name) % VOCAB, 1, 2], session=name, max_tokens=2)
        assert world.manager.num_pinned <= 10
    assert sorted(world.manager.leases.names()) == ["c", "d"]
    turn(world, [], [1] * 12, session="large", max_tokens=2)
    assert sorted(world.manager.leases.names()) == ["c", "d"], "what is larger than the whole share breaks nobody: it is not pinned"
    assert world.manager.num_cached > 13, "but cached"


def test_only_so_many_sessions_are_kept() -> None:
    world = World(64, 1, limits=LeaseLimits(max_leases=3, max_pool_share=1.0))
    for name in "abcd":
        turn(world, [], [ord(name) % VOCAB, 1, 2], session=name, max_tokens=2)
    assert world.manager.leases.names() == ["b", "c", "d"]
    busy = [world.add([i, 1], session=f"busy {i}", max_tokens=4) for i in range(4)]
    assert len(world.manager.leases) == 4, "those in use are not forgotten"
    world.run()
    assert all(seq.finish_reason is FinishReason.LENGTH for seq in busy)
    world.check()


def test_a_preempted_turn_is_computed_again() -> None:
    world = World(6, 2, limits=ALL_PINNED)
    first = turn(world, [], [1, 2, 3], max_tokens=2)
    second = world.add(first.token_ids + [1], session="s", priority=1, max_tokens=2)
    world.turn()
    world.add([3] * 8, priority=0, max_tokens=3)
    world.run()
    assert second.num_preemptions == 1
    world.check_answers()
    assert turn(world, second.token_ids, [1], max_tokens=2).finish_reason is FinishReason.LENGTH


def test_a_thousand_sessions_on_a_pool_for_a_hundred() -> None:
    """Two rounds of turns; each session needs 4 blocks. What was broken is computed again, all answers are right."""
    world = World(400, 4, max_batch_size=16, max_step_tokens=64, limits=LeaseLimits(max_leases=4096, lease_s=1e9, max_pool_share=1.0))
    histories: dict[int, list[int]] = {i: [] for i in range(1000)}
    found = []
    for _ in range(2):
        for first in range(0, 1000, 50):
            batch = {}
            for i in range(first, first + 50):
                words = [(i // VOCAB**j) % VOCAB for j in range(5)]
                batch[i] = world.add(histories[i] + words, session=f"s{i}", max_tokens=2)
            world.run()
            histories |= {i: seq.token_ids for i, seq in batch.items()}
            found += [seq.num_cached for seq in batch.values()]
        world.check()
    assert {events[-1].finish_reason for events in world.events.values()} == {FinishReason.LENGTH}
    assert world.manager.leases.num_broken > 1500 and world.manager.num_pinned <= 400
    world.check_answers()
    recent = [i for i in range(950, 1000) if leased_tokens(world, i)]
    assert len(recent) == 50, "the last ones to speak are still there"
    for i in recent[:20]:
        seq = turn(world, histories[i], [0], session=f"s{i}", max_tokens=1)
        assert prefilled(world, seq) == 2


def leased_tokens(world: World, i: int) -> int:
    lease = world.manager.leases.get(f"s{i}")
    return lease.num_tokens if lease is not None else 0


def test_long_histories_equal_one_run_of_their_ids() -> None:
    """Each turn's answer is that of the same ids without a session."""
    world = World(64, 4, max_step_tokens=5)
    history: list[int] = []
    for number in range(20):
        seq = turn(world, history, [number % VOCAB, 1], seed=3, max_tokens=4)
        expected, _ = reference(history + [number % VOCAB, 1], seq.params, frozenset(), 1 << 20)
        assert seq.token_ids[seq.num_prompt :] == expected
        history = seq.token_ids


# -- our own invariants -------------------------------------------------------------------------------------------


def test_misuse_of_pins_raises() -> None:
    pool = BlockPool(1, lambda block: None, lambda: None)
    with pytest.raises(IntegrityError, match="block 0 is FREE, nobody holds it, and a lease pins it"):
        pool.pin(pool.blocks[0])
    with pytest.raises(IntegrityError, match="no lease pins it, and it was unpinned"):
        pool.unpin(pool.take(), keep=False)
    leases = Leases(pool, lambda table: None, LeaseLimits())
    with pytest.raises(IntegrityError, match="no lease is left to break"):
        leases.break_soonest()


def pinned_manager() -> CacheManager:
    manager = CacheManager(4, 2, limits=ALL_PINNED)
    table = manager.reserve(Match([], 2, 2))
    assert table is not None
    lease = manager.leases.open("s", b"", 0.0)
    manager.keep(lease, table, [1, 2, 3], 3, b"", None)
    manager.release(table, None)
    manager.leases.close(lease)
    manager.check_integrity([])
    return manager


@pytest.mark.parametrize("by", ["a sequence", "a lease"])
def test_a_block_that_others_hold_is_not_written_on(by: str) -> None:
    manager = pinned_manager()
    lease = manager.leases.get("s")
    assert lease is not None and manager.match([1, 2, 3, 4], b"", lease).num_cached == 3
    block = manager.blocks[lease.table[1]]
    manager._pool.share(block)
    if by == "a lease":
        manager._pool.pin(block)
        manager._pool.drop(block, keep=False)
    assert manager.match([1, 2, 3, 4], b"", lease).num_cached == 2


def corrupt_pins(manager: CacheManager) -> None:
    manager.blocks[0].pins += 1


def corrupt_idle(manager: CacheManager) -> None:
    manager._pool._num_idle += 1


def corrupt_lists(manager: CacheManager) -> None:
    manager._pool._cached[0] = None


def corrupt_lease(manager: CacheManager) -> None:
    manager.leases._leases["s"].num_tokens = 9


def corrupt_order(manager: CacheManager) -> None:
    manager.leases._pinned["t"] = manager.leases._pinned["s"]


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (corrupt_pins, "block 0 counts 2 pins, but 1 leases pin it"),
        (corrupt_idle, "2 idle blocks are pinned, but 3 of 2"),
        (corrupt_lists, "block 0 is CACHED but the lists say otherwise"),
        (corrupt_lease, "a lease of 2 blocks and 0 users is kept wrongly"),
        (corrupt_order, "2 leases are pinned, but"),
    ],
)
def test_corrupted_leases_are_found(corrupt, message: str) -> None:  # type: ignore[no-untyped-def]
    manager = pinned_manager()
    corrupt(manager)
    with pytest.raises(IntegrityError, match=message):
        manager.check_integrity([])


def test_a_written_block_is_pinned_by_nobody() -> None:
    manager = pinned_manager()
    lease = manager.leases.get("s")
    assert lease is not None
    manager._pool.share(manager.blocks[lease.table[1]])
    with pytest.raises(IntegrityError, match="a lease pins it"):
        manager.check_writable(lease.table, 1)
