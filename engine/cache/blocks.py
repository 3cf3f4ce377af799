"""KV blocks as bookkeeping: who holds each, which are free, and in which order kept ones are given away.

    FREE    nobody uses it, it holds nothing of value
    ACTIVE  `refs` block tables (and fences, see manager.py) hold it
    CACHED  nobody holds it, but the prefix index knows what is in it; least recently used goes first

        take                    drop, indexed
    FREE ----> ACTIVE <=========================> CACHED ----> FREE
      ^           |              share                 evict (inside take)
      +-----------+ drop, not indexed

Must not know sequences, ids or tensors. Pure wing: standard library only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
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

    __slots__ = ("entry", "fences", "id", "refs", "state")

    def __init__(self, block_id: int) -> None:
        self.id = block_id
        self.state = BlockState.FREE
        self.refs = 0  # block tables + fences that hold it
        self.fences = 0  # of these, fences
        self.entry: Entry | None = None


class BlockPool:
    """All blocks of a rank group. `on_evict(block)` must make the block unfindable before it is reused."""

    def __init__(self, num_blocks: int, on_evict: Callable[[Block], None]) -> None:
        self.blocks = [Block(i) for i in range(num_blocks)]
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._on_evict = on_evict
        self.num_evictions = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_active(self) -> int:
        return len(self.blocks) - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `take` can give: FREE ones, then CACHED ones."""
        return len(self._free) + len(self._cached)

    def take(self) -> Block:
        """A block for one holder; the caller has looked at `num_available`."""
        if not self._free:
            self._evict()
        block = self.blocks[self._free.pop()]
        block.state, block.refs = BlockState.ACTIVE, 1
        return block

    def share(self, block: Block) -> None:
        """One holder more for a block that is ACTIVE or CACHED."""
        if block.state is BlockState.FREE:
            raise IntegrityError(f"block {block.id} is FREE and cannot be shared.")
        if block.state is BlockState.CACHED:
            del self._cached[block.id]
            block.state = BlockState.ACTIVE
        block.refs += 1

    def drop(self, block: Block, keep: bool) -> None:
        """One holder less; the last one leaves the block CACHED (`keep`) or FREE."""
        if block.refs <= 0:
            raise IntegrityError(f"block {block.id} is {block.state.name}, nobody holds it, and it was dropped again.")
        block.refs -= 1
        if block.refs:
            return
        if keep:
            block.state = BlockState.CACHED
            self._cached[block.id] = None
        else:
            self._set_free(block)

    def touch(self, block: Block) -> None:
        """Count a CACHED block as used just now."""
        if block.state is BlockState.CACHED:
            self._cached.move_to_end(block.id)

    def discard(self, block: Block) -> None:
        """A CACHED block that is worth nothing any more becomes FREE; an ACTIVE one stays with its holders."""
        if block.state is BlockState.CACHED:
            del self._cached[block.id]
            self._set_free(block)

    def cached_ids(self) -> list[int]:
        """CACHED blocks, the next one to be evicted first."""
        return list(self._cached)

    def _evict(self) -> None:
        block_id, _ = self._cached.popitem(last=False)
        block = self.blocks[block_id]
        self._on_evict(block)
        self.num_evictions += 1
        self._set_free(block)

    def _set_free(self, block: Block) -> None:
        block.state = BlockState.FREE
        self._free.append(block.id)

    def check_integrity(self, holders: dict[int, int], fences: dict[int, int]) -> None:
        """`holders[b]` counts tables and fences that hold block b, `fences[b]` the fences among them."""
        free, cached = set(self._free), set(self._cached)
        if len(free) != len(self._free):
            raise IntegrityError("a block is in the free list twice.")
        for block in self.blocks:
            expected = BlockState.ACTIVE if holders.get(block.id) else BlockState.CACHED if block.id in cached else BlockState.FREE
            if block.state is not expected:
                raise IntegrityError(f"block {block.id} is {block.state.name} but should be {expected.name}.")
            if block.refs != holders.get(block.id, 0) or block.fences != fences.get(block.id, 0):
                found = f"{holders.get(block.id, 0)} holders, of these {fences.get(block.id, 0)} fences"
                raise IntegrityError(f"block {block.id} counts {block.refs} holders and {block.fences} fences, but has {found}.")
            if (block.state is BlockState.FREE) != (block.id in free) or (block.state is BlockState.CACHED) != (block.id in cached):
                raise IntegrityError(f"block {block.id} is {block.state.name} but the lists say otherwise.")
