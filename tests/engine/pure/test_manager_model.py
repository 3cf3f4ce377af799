"""The block manager against a shadow store: reliability.md 5.2, rule for rule.

The shadow says, for each slot of the KV store, which ids (and salt) produced what is written there. A step in
flight writes twice, when it is issued and again when it ends: a block that was given away in between is clobbered,
and the invariant "shadow == true prefix" finds out. Two symbols only, so that prefixes collide all the time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.cache.blocks import BlockState
from engine.cache.manager import Match
from tests.engine.pure.world import FlakyManager

SALTS = st.sampled_from((b"", b"a", b"b"))
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=12)


@dataclass(eq=False)
class Held:
    """A sequence as this model's scheduler sees it."""

    ids: list[int]
    salt: bytes
    table: list[int]
    computed: int

    def truth(self, position: int) -> tuple[bytes, tuple[int, ...]]:
        return self.salt, tuple(self.ids[: position + 1])


@dataclass
class Flight:
    """A step in flight: its writes, and the blocks it completes."""

    number: int
    writes: list[tuple[int, tuple[bytes, tuple[int, ...]]]] = field(default_factory=list)
    filled: list[tuple[Held, list[int], int, int]] = field(default_factory=list)


class ManagerModel(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(3, 12), size=st.integers(1, 4), caching=st.sampled_from((True, True, True, False)))
    def start(self, num_blocks: int, size: int, caching: bool) -> None:
        self.manager = FlakyManager(num_blocks, size, enable_prefix_caching=caching)
        self.size = size
        self.held: list[Held] = []
        self.waiting: list[tuple[list[int], bytes]] = []
        self.flights: deque[Flight] = deque()
        self.steps = 0
        self.shadow: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self.ended: dict[int, tuple[bytes, tuple[int, ...]]] = {}  # as of the steps that have ended

    # -- what a scheduler does ----------------------------------------------------------------------------

    def _fence(self) -> int | None:
        return self.flights[-1].number if self.flights else None

    def _touched(self) -> set[int]:
        """Blocks that a step in flight may write."""
        return {slot // self.size for flight in self.flights for slot, _ in flight.writes}

    def _state(self) -> tuple[object, ...]:
        blocks = [(b.state, b.refs, b.fences, b.entry) for b in self.manager._pool.blocks]
        pool = self.manager._pool
        return blocks, list(pool._free), pool.cached_ids(), dict(self.manager.index._entries), pool.num_evictions

    def _reserve(self, ids: list[int], salt: bytes) -> Held | None:
        before = self._state()
        match = self.manager.match(ids, salt)
        assert self._state() == before, "a match changed something"
        assert len(match.hits) * self.size < len(ids), "a full hit must leave an id to compute"
        assert match.num_new + len(match.hits) == self.manager.blocks_for(len(ids))
        available, failing = self.manager.num_available, self.manager.failures
        table = self.manager.reserve(match)
        if table is None:
            assert failing or match.num_taken > available
            assert self._state() == before, "a failed reservation changed something"
            return None
        assert available - self.manager.num_available == match.num_taken
        assert not self._touched() & set(table[len(match.hits) :]), "a block was given away under a step in flight"
        held = Held(list(ids), salt, table, len(match.hits) * self.size)
        self.held.append(held)
        return held

    @rule(prompt=prompts, salt=SALTS)
    def admit(self, prompt: list[int], salt: bytes) -> None:
        self._reserve(prompt, salt)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        ids, salt = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        if self._reserve(ids, salt) is None:
            self.waiting.append((ids, salt))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), n=st.integers(1, 3))
    def fork(self, data: st.DataObject, n: int) -> None:
        original = data.draw(st.sampled_from(self.held))
        for _ in range(n):
            self._reserve(original.ids, original.salt)

    def _compute(self, held: Held, count: int) -> None:
        flight, start, stop = self.flights[-1], held.computed, held.computed + count
        for position in range(start, stop):
            slot = held.table[position // self.size] * self.size + position % self.size
            flight.writes.append((slot, held.truth(position)))
            self.shadow[slot] = held.truth(position)
            self.ended.pop(slot, None)
        held.computed = stop
        if stop // self.size > start // self.size:
            flight.filled.append((held, held.table, start // self.size, stop // self.size))

    @precondition(lambda self: self.flights and self.held)
    @rule(data=st.data(), chunk=st.integers(1, 8))
    def prefill(self, data: st.DataObject, chunk: int) -> None:
        held = data.draw(st.sampled_from(self.held))
        self._compute(held, min(chunk, len(held.ids) - held.computed))

    @precondition(lambda self: self.flights and self.held)
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data: st.DataObject, token: int) -> None:
        held = data.draw(st.sampled_from(self.held))
        self._compute(held, len(held.ids) - held.computed)
        if len(held.ids) == len(held.table) * self.size:
            before, failing, available = self._state(), self.manager.failures, self.manager.num_available
            if not self.manager.grow(held.table):
                assert failing or not available
                assert self._state() == before, "a failed growth changed something"
                return
            assert held.table[-1] not in self._touched(), "a block was given away under a step in flight"
        held.ids.append(token)
        self._compute(held, 1)

    def _release(self, held: Held) -> None:
        self.held.remove(held)
        sole = self.manager.num_sole(held.table)
        returning, available = self.manager.num_returning, self.manager.num_available
        self.manager.release(held.table, self._fence())
        if self.flights:
            assert self.manager.num_returning >= returning + sole and self.manager.num_available == available
        else:
            assert self.manager.num_available == available + sole

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish_or_abort(self, data: st.DataObject) -> None:
        self._release(data.draw(st.sampled_from(self.held)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.held))
        self._release(held)
        self.waiting.append((held.ids, held.salt))

    @precondition(lambda self: len(self.flights) < 2)
    @rule()
    def begin_step(self) -> None:
        self.flights.append(Flight(self.steps))
        self.steps += 1

    @precondition(lambda self: self.flights)
    @rule()
    def end_step(self) -> None:
        flight = self.flights.popleft()
        for slot, truth in flight.writes:
            self.shadow[slot] = truth
            self.ended[slot] = truth
        for held, table, first, last in flight.filled:
            self.manager.commit(table, held.ids, held.salt, first, last)
        self.manager.step_ended(flight.number)

    @rule()
    def evict_all(self) -> None:
        failing, available = self.manager.failures, self.manager.num_available
        table = self.manager.reserve(Match([], available, available))
        if not failing:
            assert table is not None and not self._touched() & set(table)
            assert self.manager.num_free == self.manager.num_cached == 0
            self.manager.release(table, None)
            assert self.manager.num_free == available

    @rule()
    def reset_cache(self) -> None:
        self.manager.reset_cache()
        assert self.manager.num_cached == len(self.manager.index) == 0

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def distrust(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.held))
        self.manager.distrust(held.ids, held.salt)
        assert self.manager.match(held.ids, held.salt).hits == []

    @rule(k=st.integers(1, 3))
    def alloc_fails_next(self, k: int) -> None:
        self.manager.failures = k

    @rule(on=st.booleans())
    def collide_hash(self, on: bool) -> None:
        self.manager.weak_hash(on)

    # -- what must hold after each of these ---------------------------------------------------------------

    @invariant()
    def books_balance(self) -> None:
        self.manager.check_integrity([held.table for held in self.held])
        manager = self.manager
        assert manager.num_free + manager.num_active + manager.num_cached == manager.num_blocks

    @invariant()
    def written_blocks_have_one_holder(self) -> None:
        for held in self.held:
            self.manager.check_writable(held.table, held.computed // self.size)

    @invariant()
    def every_position_holds_its_own_prefix(self) -> None:
        for held in self.held:
            for position in range(held.computed):
                slot = held.table[position // self.size] * self.size + position % self.size
                assert self.shadow[slot] == held.truth(position)

    @invariant()
    def only_ended_steps_can_be_matched(self) -> None:
        for block_id, entry in self.manager.index.check_integrity().items():
            block = self.manager._pool.blocks[block_id]
            assert block.state is not BlockState.FREE and block.entry is entry
            for offset in range(self.size):
                slot = block_id * self.size + offset
                assert slot in self.ended, "a block can be matched before the step that writes it has ended"
                assert self.ended[slot] == self.shadow[slot]

    def teardown(self) -> None:
        """Liveness with an oracle: whatever fits an empty pool runs, one after the other; then nothing is left."""
        if not hasattr(self, "manager"):
            return
        self.manager.failures = 0
        waiting = self.waiting + [(held.ids, held.salt) for held in self.held]
        while self.held:
            self._release(self.held[0])
        while self.flights:
            self.end_step()
        assert self.manager.num_active == self.manager.num_returning == 0
        for ids, salt in waiting:
            if self.manager.blocks_for(len(ids)) > self.manager.num_blocks:
                continue
            held = self._reserve(ids, salt)
            assert held is not None
            self.begin_step()
            self._compute(held, len(ids) - held.computed)
            self._release(held)
            self.end_step()
            self.books_balance()
        self.reset_cache()
        assert self.manager.num_free == self.manager.num_blocks


TestManagerModel = ManagerModel.TestCase
TestManagerModel.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
