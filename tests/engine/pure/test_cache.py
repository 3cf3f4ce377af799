"""Blocks, prefix index and manager, one rule at a time; the random walks are in test_manager_model.py."""

from __future__ import annotations

import hashlib
from array import array

import pytest

from engine.cache.blocks import BlockPool, BlockState, IntegrityError
from engine.cache.manager import CacheManager, Match
from engine.cache.prefix import PrefixIndex, pack, root


def fill(manager: CacheManager, ids: list[int], salt: bytes = b"") -> list[int]:
    """A table for these ids, computed and committed."""
    match = manager.match(ids, salt)
    table = manager.reserve(match)
    assert table is not None
    manager.commit(table, ids, salt, len(match.hits), len(ids) // manager.block_seq_len)
    return table


def states(manager: CacheManager) -> list[BlockState]:
    return [block.state for block in manager._pool.blocks]


# -- the pool ---------------------------------------------------------------------------------------------


def test_the_three_states() -> None:
    evicted = []
    pool = BlockPool(2, lambda block: evicted.append(block.id), lambda: None)
    block = pool.take()
    assert (block.id, block.state, pool.num_free, pool.num_active, pool.num_cached) == (0, BlockState.ACTIVE, 1, 1, 0)
    pool.share(block)
    pool.drop(block, keep=True)
    assert block.state is BlockState.ACTIVE and block.refs == 1
    pool.drop(block, keep=True)
    assert block.state is BlockState.CACHED and pool.cached_ids() == [0] and pool.num_available == 2
    pool.share(block)
    assert block.state is BlockState.ACTIVE and pool.num_cached == 0
    pool.drop(block, keep=True)
    assert pool.take().id == 1 and not evicted  # FREE ones first
    assert pool.take().id == 0 and evicted == [0] and pool.num_evictions == 1
    pool.drop(block, keep=False)
    assert block.state is BlockState.FREE


def test_misuse_of_a_block_raises() -> None:
    pool = BlockPool(1, lambda block: None, lambda: None)
    with pytest.raises(IntegrityError, match="block 0 is FREE and cannot be shared"):
        pool.share(pool.blocks[0])
    with pytest.raises(IntegrityError, match="nobody holds it"):
        pool.drop(pool.blocks[0], keep=False)


def test_least_recently_used_goes_first() -> None:
    pool = BlockPool(3, lambda block: None, lambda: None)
    blocks = [pool.take() for _ in range(3)]
    for block in blocks:
        pool.drop(block, keep=True)
    pool.touch(blocks[0])
    assert pool.cached_ids() == [1, 2, 0]
    pool.discard(blocks[2])
    assert pool.cached_ids() == [1, 0] and pool.num_free == 1
    pool.touch(blocks[2])  # not CACHED: nothing to do
    pool.discard(blocks[2])
    assert pool.cached_ids() == [1, 0] and pool.num_free == 1


# -- the index --------------------------------------------------------------------------------------------


def test_the_key_is_a_chain_of_sha256() -> None:
    index = PrefixIndex(2)
    first = index.insert(root(b"salt"), pack([5, 6], 0, 2), 0)
    assert first is not None
    second = index.insert(first, pack([5, 6, 7, 8], 2, 4), 1)
    assert second is not None
    assert first.key == hashlib.sha256(b"salt" + array("i", (5, 6)).tobytes()).digest()
    assert second.key == hashlib.sha256(first.key + array("i", (7, 8)).tobytes()).digest()
    assert index.longest(b"salt", [5, 6, 7, 8, 9], 2) == [0, 1]
    assert index.longest(b"salt", [5, 6, 7, 8, 9], 1) == [0]
    assert index.longest(b"salt", [5, 6, 7, 7, 9], 2) == [0]
    assert index.longest(b"", [5, 6, 7, 8], 2) == index.longest(b"salt", [6, 6, 7, 8], 2) == []


def test_a_collision_is_never_believed() -> None:
    index = PrefixIndex(1, digest=lambda data: b"same")
    first = index.insert(root(b""), pack([1], 0, 1), 0)
    assert first is not None and index.longest(b"", [1], 1) == [0]
    assert index.longest(b"", [2], 1) == [] and index.longest(b"x", [1], 1) == []
    assert index.insert(root(b""), pack([2], 0, 1), 1) is None
    assert index.insert(first, pack([1], 0, 1), 1) is None  # same ids, other ancestors
    assert index.insert(root(b""), pack([1], 0, 1), 1) is first
    assert index.longest(b"", [1, 1], 2) == [0]


def test_equal_ids_under_a_salt_that_spells_a_key_are_not_a_prefix() -> None:
    index = PrefixIndex(1)
    first = index.insert(root(b""), pack([1], 0, 1), 0)
    assert first is not None and index.insert(first, pack([2], 0, 1), 1) is not None
    assert index.longest(first.key, [2], 1) == []  # the key is that of block 1, the ancestors are not


def test_ancestors_that_were_computed_again_are_recognised() -> None:
    index = PrefixIndex(1)
    old = index.insert(root(b""), pack([1], 0, 1), 0)
    assert old is not None
    child = index.insert(old, pack([2], 0, 1), 1)
    index.remove(old)
    assert index.longest(b"", [1, 2], 2) == [] and len(index) == 1
    new = index.insert(root(b""), pack([1], 0, 1), 2)
    assert index.longest(b"", [1, 2], 2) == [2, 1]
    assert child is not None and child.parent is new


# -- the manager ------------------------------------------------------------------------------------------


def test_a_full_hit_leaves_one_id_to_compute() -> None:
    manager = CacheManager(8, 2)
    manager.release(fill(manager, [1, 2, 3, 4]), None)
    assert manager.num_cached == 2
    assert manager.match([1, 2, 3, 4]) == Match([0], 1, 2, 2)
    assert manager.match([1, 2, 3, 4, 5]) == Match([0, 1], 1, 3, 4)
    assert manager.match([1, 2]) == Match([], 1, 1)
    assert manager.match([1, 2, 3, 4], b"other") == Match([], 2, 2)


def test_without_prefix_caching_nothing_is_kept() -> None:
    manager = CacheManager(4, 2, enable_prefix_caching=False)
    manager.release(fill(manager, [1, 2, 3, 4]), None)
    assert manager.num_free == 4 and manager.match([1, 2, 3]).hits == []


def test_shared_blocks_are_counted_once_and_given_back_last() -> None:
    manager = CacheManager(4, 2)
    one = fill(manager, [1, 2, 3])
    two = fill(manager, [1, 2, 4])
    assert one[0] == two[0] and one[1] != two[1] and manager.num_active == 3
    assert (manager.num_sole(one), manager.num_sole(two)) == (1, 1)
    manager.check_integrity([one, two])
    manager.release(one, None)
    assert manager.num_active == 2 and manager.num_cached == 0
    manager.release(two, None)
    assert manager.num_active == 0 and manager.num_cached == 1 and manager.num_free == 3


def test_the_tail_of_a_chain_is_evicted_before_its_head() -> None:
    manager = CacheManager(4, 1)
    manager.release(fill(manager, [1, 2, 3, 4]), None)
    held: list[int] = []
    for left in (3, 2, 1, 0):
        assert manager.grow(held)
        assert len(manager.match([1, 2, 3, 4, 5]).hits) == left
        manager.check_integrity([held])


def test_hits_are_not_evicted_for_the_new_blocks_of_the_same_table() -> None:
    manager = CacheManager(3, 1)
    manager.release(fill(manager, [1, 2, 3]), None)
    match = manager.match([1, 2, 9])
    assert (len(match.hits), match.num_taken) == (2, 3)
    table = manager.reserve(match)
    assert table is not None and table[:2] == match.hits and len(set(table)) == 3
    assert manager.num_evictions == 1


def test_a_reservation_that_fails_changes_nothing() -> None:
    manager = CacheManager(3, 1)
    manager.release(fill(manager, [1, 2]), None)
    match = manager.match([1, 2, 3, 4])
    assert manager.reserve(match) is None
    assert manager.num_cached == 2 and manager.num_free == 1 and manager.num_evictions == 0
    held = manager.reserve(Match([], 3, 3))
    assert held is not None and not manager.grow(held) and len(held) == 3


def test_two_that_computed_the_same_share_one_entry() -> None:
    manager = CacheManager(6, 1)
    first, second = manager.reserve(Match([], 3, 3)), manager.reserve(Match([], 3, 3))
    assert first is not None and second is not None
    manager.commit(first, [1, 2], b"", 0, 2)
    manager.commit(second, [1, 2, 3], b"", 0, 3)
    assert len(manager.index) == 3  # the twin goes on where the first one ended
    manager.release(first, None)
    assert manager.num_cached == 2
    manager.release(second, None)
    assert (manager.num_cached, manager.num_free) == (3, 3)
    assert manager.match([1, 2, 3, 4]).hits == [first[0], first[1], second[2]]
    # second[2] follows first[0], first[1]: it must be evicted before them although they were released earlier
    assert manager._pool.cached_ids() == [second[2], first[1], first[0]]


def test_a_reset_forgets_twins() -> None:
    manager = CacheManager(4, 1)
    first, second = manager.reserve(Match([], 1, 1)), manager.reserve(Match([], 1, 1))
    assert first is not None and second is not None
    manager.commit(first, [1], b"", 0, 1)
    manager.commit(second, [1], b"", 0, 1)
    manager.reset_cache()
    manager.release(first, None)
    manager.release(second, None)
    assert manager.num_free == 4 and len(manager.index) == 0


def test_a_twin_of_an_evicted_block_is_free_when_dropped() -> None:
    manager = CacheManager(3, 1)
    first, second = manager.reserve(Match([], 1, 1)), manager.reserve(Match([], 1, 1))
    assert first is not None and second is not None
    manager.commit(first, [1], b"", 0, 1)
    manager.commit(second, [1], b"", 0, 1)
    manager.release(first, None)
    other = manager.reserve(Match([], 2, 2))  # takes the FREE one, then evicts first
    assert other is not None and len(manager.index) == 0
    manager.commit(other, [8, 9], b"", 0, 2)
    manager.release(other, None)
    order = manager._pool.cached_ids()
    manager.release(second, None)
    assert manager.num_free == 1 and manager._pool.cached_ids() == order  # the block that took its place is not touched
    manager.check_integrity([])


def test_a_broken_chain_stays_out_of_the_index() -> None:
    manager = CacheManager(8, 1)
    manager.index.digest = lambda data: b"same"
    one = fill(manager, [1])
    two = fill(manager, [2, 3])
    assert len(manager.index) == 1
    manager.commit(two, [2, 3, 4], b"", 1, 2)
    assert len(manager.index) == 1
    manager.check_integrity([one, two])


def test_the_fence_keeps_blocks_until_the_step_has_ended() -> None:
    manager = CacheManager(4, 2)
    table = fill(manager, [1, 2, 3])
    manager.release(table, 5)
    assert (manager.num_active, manager.num_returning, manager.num_available) == (2, 2, 2)
    manager.check_integrity([])
    manager.step_ended(4)
    assert manager.num_active == 2
    manager.step_ended(5)
    assert (manager.num_active, manager.num_returning, manager.num_cached, manager.num_free) == (0, 0, 1, 3)


def test_fenced_blocks_can_be_matched_and_then_do_not_return() -> None:
    manager = CacheManager(4, 2)
    manager.release(fill(manager, [1, 2, 3]), 5)
    again = fill(manager, [1, 2, 4])
    assert again[0] == 0 and manager.num_returning == 1
    manager.check_integrity([again])
    manager.release(again, 6)
    assert manager.num_returning == 3
    manager.check_integrity([])
    manager.step_ended(5)
    assert manager.num_returning == 2 and manager.num_active == 2
    manager.check_integrity([])
    manager.step_ended(6)
    assert manager.num_returning == manager.num_active == 0


def test_distrusted_content_is_not_found_again() -> None:
    manager = CacheManager(8, 1)
    bad, neighbour = fill(manager, [1, 2, 3]), fill(manager, [1, 9])
    manager.distrust([1, 2, 3], b"")
    assert manager.match([1, 2, 3, 4]).hits == [] and manager.match([1, 9, 5]).hits == []
    manager.check_integrity([bad, neighbour])
    manager.release(bad, None)
    manager.release(neighbour, None)
    assert manager.num_cached == 1  # [9], whose beginning is gone
    manager.release(fill(manager, [7, 8]), None)
    manager.distrust([7, 8], b"")
    assert manager.num_free == 7


def test_reset_forgets_everything_but_what_runs() -> None:
    manager = CacheManager(8, 1)
    running = fill(manager, [1, 2])
    manager.release(fill(manager, [3, 4]), None)
    manager.reset_cache()
    assert (manager.num_cached, manager.num_active, len(manager.index)) == (0, 2, 0)
    manager.commit([*running, 5], [1, 2, 3], b"", 2, 3)  # its chain is broken: nothing more of it is indexed
    assert len(manager.index) == 0
    manager.release(running, None)
    assert manager.num_free == 8


# -- the integrity check finds what it is there for ---------------------------------------------------------


def corrupt_free_twice(m: CacheManager) -> None:
    m._pool._free.append(m._pool._free[0])


def corrupt_state(m: CacheManager) -> None:
    m._pool.blocks[0].state = BlockState.FREE


def corrupt_refs(m: CacheManager) -> None:
    m._pool.blocks[0].refs = 2


def corrupt_fences(m: CacheManager) -> None:
    m._pool.blocks[0].fences = 1


def corrupt_lost(m: CacheManager) -> None:
    m._pool._free.pop()


def corrupt_returning(m: CacheManager) -> None:
    m.num_returning = 1


def corrupt_index_key(m: CacheManager) -> None:
    m.index._entries[b"x"] = m.index._entries.popitem()[1]


def corrupt_index_block(m: CacheManager) -> None:
    m._pool.blocks[0].entry = None


def corrupt_cached(m: CacheManager) -> None:
    m.index._entries.clear()
    m._pool.blocks[0].entry = None


def corrupt_entry(m: CacheManager) -> None:
    m._pool.blocks[7].entry = m._pool.blocks[0].entry


@pytest.mark.parametrize(
    ("corrupt", "says"),
    [
        (corrupt_free_twice, "free list twice"),
        (corrupt_state, "block 0 is FREE but should be ACTIVE"),
        (corrupt_refs, "block 0 counts 2 holders and 0 fences, but has 1"),
        (corrupt_fences, "block 0 counts 1 holders and 1 fences"),
        (corrupt_lost, "but the lists say otherwise"),
        (corrupt_returning, "0 blocks are held by fences alone, but 1 were counted"),
        (corrupt_index_key, "names block . wrongly or twice"),
        (corrupt_index_block, "names block 0, which does not know it"),
        (corrupt_cached, "block 3 is CACHED but nothing can find it"),
        (corrupt_entry, "block 7 is FREE but claims to hold something"),
    ],
)
def test_integrity(corrupt, says: str) -> None:  # type: ignore[no-untyped-def]
    manager = CacheManager(8, 1)
    table = fill(manager, [1, 2, 3])
    manager.release(fill(manager, [9]), None)
    manager.check_integrity([table])
    corrupt(manager)
    with pytest.raises(IntegrityError, match=says):
        manager.check_integrity([table])


def test_integrity_of_tables() -> None:
    manager = CacheManager(4, 1)
    table = fill(manager, [1, 2])
    with pytest.raises(IntegrityError, match="names a block twice"):
        manager.check_integrity([[0, 0]])
    with pytest.raises(IntegrityError, match="block 0 is ACTIVE but should be FREE"):
        manager.check_integrity([])
    with pytest.raises(IntegrityError, match="block 1 is written while 1 hold it, a lease pins it or the index knows it"):
        manager.check_writable(table, 1)
    manager.check_writable(table, 2)
    assert set(states(manager)) == {BlockState.ACTIVE, BlockState.FREE}
