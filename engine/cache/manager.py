"""What the scheduler sees of the cache: match, reserve, grow, commit, release, and the fence around steps in flight.

Order of effects, which is the whole safety argument:

1. `reserve` and `grow` put blocks into a table; the plan that writes them leaves afterwards.
2. `commit` makes full blocks findable; it is called when the step that wrote them has *ended*.
3. `release` with a fence keeps the blocks held (they can be matched, but not given to anybody else) until
   `step_ended` says that the last step issued before the release is over.
4. A sequence of a session takes over the table of its lease (sessions.py) when no step may write into it any more, and
   its table is pinned before it is released.

Must not know priorities, budgets or time. Pure wing: standard library only.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import NamedTuple

from engine.cache.blocks import Block, BlockPool, BlockState, IntegrityError
from engine.cache.prefix import Entry, PrefixIndex, pack, root
from engine.cache.sessions import Lease, LeaseLimits, Leases


class Match(NamedTuple):
    """What a table for some ids would be made of."""

    hits: list[int]  # blocks whose K/V is there already, first ones of the table
    num_new: int  # blocks to compute
    num_taken: int  # by how much `num_available` falls when this is reserved: new ones and CACHED hits
    num_cached: int = 0  # positions whose K/V is there: whole blocks, and of a lease's last one the beginning
    lease: Lease | None = None  # whose table is taken over, or given up for a longer match


class CacheManager:
    """Blocks 0 .. num_blocks-1 of `block_seq_len` positions each; a block table is a plain list of block ids."""

    def __init__(
        self, num_blocks: int, block_seq_len: int, *, enable_prefix_caching: bool = True, limits: LeaseLimits | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.block_seq_len = block_seq_len
        self.enable_prefix_caching = enable_prefix_caching
        self.index = PrefixIndex(block_seq_len)
        self.prefix_queries = 0  # tokens looked up by first admissions
        self.prefix_hits = 0  # of these, found
        self.num_returning = 0  # blocks that only fences hold
        self._pool = BlockPool(num_blocks, self._forget, self._break_lease)
        self.leases = Leases(self._pool, self._unpin, limits or LeaseLimits())
        self._fenced: deque[tuple[int, list[int]]] = deque()  # (last step that may touch the blocks, table)

    @property
    def blocks(self) -> list[Block]:
        """All of them, for who looks on (the status page); only the pool changes them."""
        return self._pool.blocks

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_active(self) -> int:
        return self._pool.num_active

    @property
    def num_cached(self) -> int:
        return self._pool.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that can be had now, evicting CACHED ones and breaking leases if need be."""
        return self._pool.num_available

    @property
    def num_pinned(self) -> int:
        """Blocks that leases pin, ACTIVE or CACHED."""
        return self._pool.num_pinned

    @property
    def num_evictions(self) -> int:
        return self._pool.num_evictions

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_seq_len)

    # -- a table's life -----------------------------------------------------------------------------------

    def match(self, token_ids: list[int], salt: bytes = b"", lease: Lease | None = None) -> Match:
        """Look the ids up; changes nothing. At least the last id is left to compute."""
        size, blocks = self.block_seq_len, self._pool.blocks
        most = (len(token_ids) - 1) // size
        hits: list[int] = []
        leased = num_cached = 0
        if lease is not None and lease.table and lease.salt == salt:
            leased = lease.common(token_ids)
        if self.enable_prefix_caching and len(self.index) and leased // size < most:
            hits = self.index.longest(salt, token_ids, most)
            num_cached = len(hits) * size
        if lease is not None and leased >= num_cached:
            hits = lease.table[: leased // size]
            num_cached = len(hits) * size
            if leased > num_cached and self._writable(blocks[lease.table[len(hits)]]):
                hits.append(lease.table[len(hits)])
                num_cached = leased
        num_new = self.blocks_for(len(token_ids)) - len(hits)
        num_taken = num_new + sum([blocks[b].state is BlockState.CACHED for b in hits])
        return Match(hits, num_new, num_taken, num_cached, lease if lease is not None and lease.table else None)

    def reserve(self, match: Match) -> list[int] | None:
        """The table that `match` describes, or None (and nothing changed) when there are too few blocks.

        `match` must be fresh: nothing reserved, grown, committed or released since.
        """
        if match.num_taken > self.num_available:
            return None
        for block_id in match.hits:  # before anything is taken, so that no hit is evicted
            self._share(self._pool.blocks[block_id])
        if match.lease is not None:
            self.leases.hand_over(match.lease)
        return match.hits + [self._pool.take().id for _ in range(match.num_new)]

    def grow(self, table: list[int]) -> bool:
        """Append one block to the table; False (and nothing changed) when there is none."""
        if not self.num_available:
            return False
        table.append(self._pool.take().id)
        return True

    def commit(self, table: list[int], token_ids: list[int], salt: bytes, first: int, last: int) -> None:
        """Blocks first .. last-1 of the table are full and the step that filled them has ended: make them findable.

        A chain that was broken by a collision (or discarded) stays out of the index from there on.
        """
        if not self.enable_prefix_caching:
            return
        blocks, size = self._pool.blocks, self.block_seq_len
        parent: Entry | None = blocks[table[first - 1]].entry if first else root(salt)
        for i in range(first, last):
            if parent is None:
                return
            block = blocks[table[i]]
            parent = block.entry = self.index.insert(parent, pack(token_ids, i * size, (i + 1) * size), block.id)

    def keep(self, lease: Lease, table: list[int], token_ids: list[int], num_computed: int, salt: bytes, fence: int | None) -> None:
        """Pin what a sequence of a session leaves behind; before its `release`, with the same fence."""
        num_tokens = min(num_computed, len(token_ids))
        kept = table[: self.blocks_for(num_tokens)]
        self.leases.keep(lease, kept, token_ids, num_tokens, salt, -1 if fence is None else fence)

    def release(self, table: list[int], fence: int | None) -> None:
        """Give a table back. `fence`: the last step issued that may touch its blocks, None when no step is in flight."""
        if fence is None:
            self._drop(table)
            return
        for block_id in table:
            block = self._pool.blocks[block_id]
            block.fences += 1
            self.num_returning += block.fences == block.refs
        self._fenced.append((fence, table))

    def step_ended(self, step: int) -> None:
        """All steps up to `step` are over: blocks that waited for them go back."""
        while self._fenced and self._fenced[0][0] <= step:
            _, table = self._fenced.popleft()
            for block_id in table:
                block = self._pool.blocks[block_id]
                self.num_returning -= block.fences == block.refs == 1
                block.fences -= 1
            self._drop(table)

    def distrust(self, token_ids: list[int], salt: bytes) -> None:
        """What is cached for these ids may be wrong (their logits were not finite): nobody will find it again."""
        for block_id in self.index.longest(salt, token_ids, len(token_ids) // self.block_seq_len):
            self.leases.give_up_holding(block_id)
            self._discard(self._pool.blocks[block_id])

    def reset_cache(self) -> None:
        """Forget every prefix and end every lease: CACHED blocks become FREE, running sequences keep theirs."""
        self.leases.clear()
        for block in self._pool.blocks:
            self._discard(block)

    def num_sole(self, table: list[int]) -> int:
        """Blocks that nobody but this table holds: what its release will give."""
        return sum([self._pool.blocks[block_id].refs == 1 for block_id in table])

    # -- inside -------------------------------------------------------------------------------------------

    def _share(self, block: Block) -> None:
        self.num_returning -= 0 < block.fences == block.refs
        self._pool.share(block)

    def _drop(self, table: list[int]) -> None:
        """From the tail, so that a chain's tail is evicted before its head."""
        for block_id in reversed(table):
            block = self._pool.blocks[block_id]
            self._pool.drop(block, keep=block.refs == 1 and not block.pins and self._keeps(block))

    def _unpin(self, table: list[int]) -> None:
        """From the tail as well."""
        for block_id in reversed(table):
            block = self._pool.blocks[block_id]
            self._pool.unpin(block, keep=block.pins == 1 and not block.refs and self._keeps(block))

    def _break_lease(self) -> None:
        self.leases.break_soonest()

    @staticmethod
    def _writable(block: Block) -> bool:
        """Whether the one lease that pins the block may pass it on to be written."""
        return block.pins == 1 and not block.refs and block.entry is None

    def _keeps(self, block: Block) -> bool:
        """Whether a block that its last holder drops stays CACHED: it is the one that matches find for its content."""
        entry = block.entry
        if entry is None:
            return False
        if entry.block_id == block.id:
            return True
        block.entry = None
        twin = self._pool.blocks[entry.block_id]
        if twin.entry is entry:  # stays younger than the blocks that follow it in the table being dropped
            self._pool.touch(twin)
        return False

    def _discard(self, block: Block) -> None:
        self._forget(block)
        self._pool.discard(block)

    def _forget(self, block: Block) -> None:
        """What the block held cannot be found any more, unless a twin is the one that is indexed."""
        entry, block.entry = block.entry, None
        if entry is not None and entry.block_id == block.id:
            self.index.remove(entry)

    def check_writable(self, table: list[int], first: int) -> None:
        """Blocks from the table's `first` on are still written: one holder, and nobody can find them."""
        for block_id in table[first:]:
            block = self._pool.blocks[block_id]
            if block.refs != 1 or block.pins or block.entry is not None:
                raise IntegrityError(f"block {block_id} is written while {block.refs} hold it, a lease pins it or the index knows it.")

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Every block in exactly one state, every count equal to what `tables` and fences say, or `IntegrityError`."""
        holders: Counter[int] = Counter()
        fences: Counter[int] = Counter()
        for table in tables:
            if len(set(table)) != len(table):
                raise IntegrityError(f"a block table names a block twice: {table}.")
            holders.update(table)
        for _, table in self._fenced:
            fences.update(table)
        holders.update(fences)
        self._pool.check_integrity(holders, fences, self.leases.check_integrity())
        returning = sum(0 < block.fences == block.refs for block in self._pool.blocks)
        if returning != self.num_returning:
            raise IntegrityError(f"{returning} blocks are held by fences alone, but {self.num_returning} were counted.")
        indexed = self.index.check_integrity()
        for block in self._pool.blocks:
            entry = indexed.get(block.id)
            if entry is not None and block.entry is not entry:
                raise IntegrityError(f"the prefix index names block {block.id}, which does not know it.")
            if block.state is BlockState.CACHED and entry is None and not block.pins:
                raise IntegrityError(f"block {block.id} is CACHED but nothing can find it.")
            if block.state is BlockState.FREE and block.entry is not None:
                raise IntegrityError(f"block {block.id} is FREE but claims to hold something.")
