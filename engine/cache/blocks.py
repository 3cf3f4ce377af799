"""KV blocks as bookkeeping: who holds each, which are free, and in which order kept ones are given away.

    FREE    nobody uses it, it holds nothing of value
    ACTIVE  `refs` block tables (and fences, see manager.py) hold it
    CACHED  nobody holds it, but the prefix index knows what is in it, or a session's lease pins it (sessions.py)

        take               drop, indexed or pinned
    FREE ----> ACTIVE <=========================> CACHED ----> FREE
      ^           |              share                 evict (inside take)
      +-----------+ drop, neither

Given away inside `take`: the least recently used CACHED block without a pin; where there is none, a lease is broken.

Must not know sequences, ids or tensors. Pure wing: standard library only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING

from engine.errors import EngineError

if TYPE_CHECKING:
    from engine.cache.prefix import Entry


class IntegrityError(EngineError):
    """The bookkeeping contradicts itself (our bug); the message names the block or sequence."""


class BlockState(IntEnum):
    FREE = 0
    ACTIVE = 1
    CACHED = 2


class Block:
    """One KV block. `entry` is what the prefix index says it holds; several blocks may hold the same content."""

    __slots__ = ("entry", "fences", "id", "pins", "refs", "since_s", "state")

    def __init__(self, block_id: int) -> None:
        self.id = block_id
        self.state = BlockState.FREE
        self.refs = 0  # block tables + fences that hold it
        self.fences = 0  # of these, fences
        self.pins = 0  # leases that keep it from being evicted
        self.entry: Entry | None = None
        self.since_s = 0.0  # `BlockPool.now_s` when it became ACTIVE or CACHED


class BlockPool:
    """All blocks of a rank group.

    `on_evict(block)` must make the block unfindable before it is reused; `on_short()` must break a lease.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[Block], None], on_short: Callable[[], None]) -> None:
        self.blocks = [Block(i) for i in range(num_blocks)]
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._on_evict = on_evict
        self._on_short = on_short
        self._num_idle = 0  # CACHED blocks that are pinned; they are not among `_cached`
        self.num_pinned = 0  # CACHED or ACTIVE
        self.num_evictions = 0
        self.now_s = 0.0  # what the caller says the time is

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached) + self._num_idle

    @property
    def num_active(self) -> int:
        return len(self.blocks) - self.num_available

    @property
    def num_available(self) -> int:
        """Blocks that `take` can give: FREE ones, then CACHED ones, then those that leases pin."""
        return len(self._free) + len(self._cached) + self._num_idle

    def take(self) -> Block:
        """A block for one holder; the caller has looked at `num_available`."""
        while not self._free:
            if self._cached:
                self._evict()
            else:
                self._on_short()
        block = self.blocks[self._free.pop()]
        block.state, block.refs, block.since_s = BlockState.ACTIVE, 1, self.now_s
        return block

    def share(self, block: Block) -> None:
        """One holder more for a block that is ACTIVE or CACHED."""
        if block.state is BlockState.FREE:
            raise IntegrityError(f"block {block.id} is FREE and cannot be shared.")
        if block.state is BlockState.CACHED:
            if block.pins:
                self._num_idle -= 1
            else:
                del self._cached[block.id]
            block.state, block.since_s = BlockState.ACTIVE, self.now_s
        block.refs += 1

    def drop(self, block: Block, keep: bool) -> None:
        """One holder less; the last one leaves the block CACHED (`keep`, or a pin) or FREE."""
        if block.refs <= 0:
            raise IntegrityError(f"block {block.id} is {block.state.name}, nobody holds it, and it was dropped again.")
        block.refs -= 1
        if block.refs:
            return
        if block.pins:
            block.state, block.since_s = BlockState.CACHED, self.now_s
            self._num_idle += 1
        else:
            self._leave(block, keep)

    def pin(self, block: Block) -> None:
        """One lease more for a block that somebody holds."""
        if not block.refs:
            raise IntegrityError(f"block {block.id} is {block.state.name}, nobody holds it, and a lease pins it.")
        self.num_pinned += not block.pins
        block.pins += 1

    def unpin(self, block: Block, keep: bool) -> None:
        """One lease less; the last one leaves a block that nobody holds CACHED (`keep`) or FREE."""
        if not block.pins:
            raise IntegrityError(f"block {block.id} is {block.state.name}, no lease pins it, and it was unpinned.")
        block.pins -= 1
        if block.pins:
            return
        self.num_pinned -= 1
        if not block.refs:
            self._num_idle -= 1
            self._leave(block, keep)

    def touch(self, block: Block) -> None:
        """Count a CACHED block as used just now."""
        if block.id in self._cached:
            self._cached.move_to_end(block.id)

    def discard(self, block: Block) -> None:
        """A CACHED block that is worth nothing any more becomes FREE; one that is held or pinned stays so."""
        if block.id in self._cached:
            del self._cached[block.id]
            self._set_free(block)

    def cached_ids(self) -> list[int]:
        """CACHED blocks that no lease pins, the next one to be evicted first."""
        return list(self._cached)

    def _leave(self, block: Block, keep: bool) -> None:
        if keep:
            if block.state is not BlockState.CACHED:
                block.state, block.since_s = BlockState.CACHED, self.now_s
            self._cached[block.id] = None
        else:
            self._set_free(block)

    def _evict(self) -> None:
        block_id, _ = self._cached.popitem(last=False)
        block = self.blocks[block_id]
        self._on_evict(block)
        self.num_evictions += 1
        self._set_free(block)

    def _set_free(self, block: Block) -> None:
        block.state = BlockState.FREE
        self._free.append(block.id)

    def check_integrity(self, holders: Mapping[int, int], fences: Mapping[int, int], pins: Mapping[int, int]) -> None:
        """Of block b, `holders[b]` counts tables and fences that hold it, `fences[b]` the fences among them, `pins[b]` leases."""
        free, cached = set(self._free), set(self._cached)
        if len(free) != len(self._free):
            raise IntegrityError("a block is in the free list twice.")
        for block in self.blocks:
            self._check(block, holders.get(block.id, 0), fences.get(block.id, 0), pins.get(block.id, 0))
            pinned = block.pins > 0 and not block.refs
            listed = (block.state is BlockState.CACHED) == (block.id in cached or pinned) and not (pinned and block.id in cached)
            if (block.state is BlockState.FREE) != (block.id in free) or not listed:
                raise IntegrityError(f"block {block.id} is {block.state.name} but the lists say otherwise.")
        idle = sum(block.pins > 0 and not block.refs for block in self.blocks)
        if (self._num_idle, self.num_pinned) != (idle, sum(block.pins > 0 for block in self.blocks)):
            raise IntegrityError(f"{idle} idle blocks are pinned, but {self._num_idle} of {self.num_pinned} pinned ones were counted.")

    def _check(self, block: Block, holders: int, fences: int, pins: int) -> None:
        kept = pins or block.id in self._cached
        expected = BlockState.ACTIVE if holders else BlockState.CACHED if kept else BlockState.FREE
        if block.state is not expected:
            raise IntegrityError(f"block {block.id} is {block.state.name} but should be {expected.name}.")
        if block.refs != holders or block.fences != fences:
            found = f"{holders} holders, of these {fences} fences"
            raise IntegrityError(f"block {block.id} counts {block.refs} holders and {block.fences} fences, but has {found}.")
        if block.pins != pins:
            raise IntegrityError(f"block {block.id} counts {block.pins} pins, but {pins} leases pin it.")
