"""Leases: what a session keeps of its last turn, so that the next one computes nothing twice.

A lease pins the block table that a finished sequence leaves behind, the partly filled last block included, until a
deadline. The next turn takes the table over and goes on behind the last position that both have in common. While
it runs the table is its own; when it ends the lease is pinned anew.

Whoever needs blocks comes first: where no block is FREE and none without a pin can be evicted, the lease that expires
soonest is broken. Its full blocks are then cached like any others, and what was evicted is computed again: a lease that
is broken, has expired or ended costs time and changes no answer.

Must not know clocks (time is an argument), API keys or text. Pure wing: standard library only.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from engine.cache.blocks import BlockPool, IntegrityError


@dataclass(frozen=True, slots=True)
class LeaseLimits:
    """`lease_s` counts from a session's last turn; leases may pin `max_pool_share` of the blocks, all together."""

    max_leases: int = 1024
    lease_s: float = 600.0
    max_pool_share: float = 0.5


class Lease:
    """Of one session. `table` is pinned and holds the K/V of the first `num_tokens` of `ids`; [] while there is nothing."""

    __slots__ = ("expires_s", "fence", "ids", "name", "num_tokens", "salt", "table", "users")

    def __init__(self, name: str, salt: bytes) -> None:
        self.name = name
        self.salt = salt
        self.ids: list[int] = []
        self.table: list[int] = []
        self.num_tokens = 0
        self.fence = -1  # the last step that may still write into the table
        self.users = 0  # sequences that wait or run under it
        self.expires_s = 0.0

    def common(self, token_ids: list[int]) -> int:
        """How many positions of the table are those of `token_ids`; the last id is always left to compute."""
        most = min(self.num_tokens, len(token_ids) - 1)
        if self.ids[:most] == token_ids[:most]:
            return most
        return next(i for i in range(most) if self.ids[i] != token_ids[i])


class Leases:
    """All leases by name. `unpin(table)` gives up the pins of a table; the manager knows what stays CACHED then."""

    def __init__(self, pool: BlockPool, unpin: Callable[[list[int]], None], limits: LeaseLimits) -> None:
        self.limits = limits
        self.num_broken = 0  # because memory or the share was short; expired and ended ones do not count
        self.num_expired = 0
        self._pool = pool
        self._unpin = unpin
        self._most_blocks = int(limits.max_pool_share * len(pool.blocks))
        self._leases: dict[str, Lease] = {}
        self._pinned: OrderedDict[str, Lease] = OrderedDict()  # of these, the ones with a table; soonest to expire first
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def num_pinned(self) -> int:
        """Leases that hold K/V now."""
        return len(self._pinned)

    def get(self, name: str) -> Lease | None:
        return self._leases.get(name)

    def names(self) -> list[str]:
        return list(self._leases)

    def open(self, name: str, salt: bytes, now: float) -> Lease:
        """The session's lease, renewed, for a sequence that will `close` it; a new one where there is none."""
        self._now = max(self._now, now)
        lease = self._leases.get(name)
        if lease is None:
            lease = self._leases[name] = Lease(name, salt)
        lease.users += 1
        self._renew(lease)
        while len(self._leases) > self.limits.max_leases and self._forget_one(lease):
            pass
        return lease

    def close(self, lease: Lease) -> None:
        """A sequence that was under the lease has ended; one that holds nothing and has no user is forgotten."""
        lease.users -= 1
        self._tidy(lease)

    def keep(self, lease: Lease, table: list[int], ids: list[int], num_tokens: int, salt: bytes, fence: int) -> None:
        """Pin what a sequence leaves behind, while it still holds it. Nothing happens when the session has ended meanwhile."""
        if self._leases.get(lease.name) is not lease:
            return
        if len(table) > self._most_blocks:  # it would break every other lease and then itself
            self.num_broken += 1
            table, ids, num_tokens = [], [], 0
        old = self._take(lease)
        for block_id in table:
            self._pool.pin(self._pool.blocks[block_id])
        self._unpin(old)
        lease.table, lease.ids, lease.num_tokens, lease.salt, lease.fence = list(table), ids, num_tokens, salt, fence
        if table:
            self._pinned[lease.name] = lease
            self._renew(lease)
        while self._pool.num_pinned > self._most_blocks:
            self.break_soonest()

    def hand_over(self, lease: Lease) -> None:
        """A sequence has taken over what it can use of the table."""
        self._unpin(self._take(lease))

    def end(self, name: str) -> bool:
        """Give up the session's K/V now, also what a running sequence of it would leave; False where there is no lease."""
        lease = self._leases.pop(name, None)
        if lease is None:
            return False
        self.hand_over(lease)
        return True

    def expire(self, now: float) -> None:
        """Give up what has passed its deadline."""
        self._now = self._pool.now_s = max(self._now, now)
        while self._pinned and (lease := next(iter(self._pinned.values()))).expires_s <= now:
            self.num_expired += 1
            self._give_up(lease)

    def break_soonest(self) -> None:
        """Memory is short: give up the lease that expires soonest."""
        if not self._pinned:
            raise IntegrityError("blocks are short, and no lease is left to break.")
        self.num_broken += 1
        self._give_up(next(iter(self._pinned.values())))

    def give_up_holding(self, block_id: int) -> None:
        """What the block holds is not to be trusted: no lease keeps it."""
        for lease in [lease for lease in self._pinned.values() if block_id in lease.table]:
            self._give_up(lease)

    def clear(self) -> None:
        """End all of them."""
        for name in self.names():
            self.end(name)

    def _renew(self, lease: Lease) -> None:
        lease.expires_s = self._now + self.limits.lease_s
        if lease.table:
            self._pinned.move_to_end(lease.name)

    def _take(self, lease: Lease) -> list[int]:
        """The table, which the lease does not have any more; its pins are still there."""
        table, lease.table, lease.ids, lease.num_tokens = lease.table, [], [], 0
        if table:
            del self._pinned[lease.name]
        return table

    def _give_up(self, lease: Lease) -> None:
        self.hand_over(lease)
        self._tidy(lease)

    def _tidy(self, lease: Lease) -> None:
        if not lease.users and not lease.table and self._leases.get(lease.name) is lease:
            del self._leases[lease.name]

    def _forget_one(self, newcomer: Lease) -> bool:
        """Room for another session: the idle one that expires soonest goes; False where all are in use."""
        idle = next((lease for lease in self._pinned.values() if not lease.users and lease is not newcomer), None)
        if idle is None:
            return False
        self.num_broken += 1
        self._give_up(idle)
        return True

    def check_integrity(self) -> Counter[int]:
        """How many leases pin each block, or `IntegrityError`."""
        pins: Counter[int] = Counter()
        for lease in self._leases.values():
            pins.update(lease.table)
            if not (lease.users or lease.table) or lease.num_tokens > len(lease.ids) or bool(lease.table) != (lease.name in self._pinned):
                raise IntegrityError(f"a lease of {len(lease.table)} blocks and {lease.users} users is kept wrongly.")
        expiries = [lease.expires_s for name, lease in self._pinned.items() if self._leases.get(name) is lease]
        if len(expiries) != len(self._pinned) or sorted(expiries) != expiries:
            raise IntegrityError(f"{len(self._pinned)} leases are pinned, but {len(expiries)} are known or their order is wrong.")
        return pins
