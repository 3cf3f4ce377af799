"""The prefix index: which block holds the K/V of which beginning of a text.

Only full blocks are indexed. An entry's key is SHA-256(key of its parent + its ids as int32); the parent of a
first block is a root whose key is the salt, so that different salts (API keys) never meet. A key finds an entry,
but ids and ancestors are compared before it is believed: a hash collision costs a hit and never serves wrong K/V.

Must not know block states or sequences. Pure wing: standard library only.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable

from engine.cache.blocks import IntegrityError


class Entry:
    """Content of one full block: `ids` packed, after everything `parent` stands for. A root has no parent."""

    __slots__ = ("block_id", "ids", "key", "parent")

    def __init__(self, parent: Entry | None, key: bytes, ids: bytes, block_id: int) -> None:
        self.parent = parent
        self.key = key
        self.ids = ids
        self.block_id = block_id

    def stands_for(self, parent: Entry, ids: bytes) -> bool:
        """True when this entry is exactly `ids` after `parent`.

        The ancestors of an entry may have been evicted and computed again, so two chains may be equal without
        being the same objects; they are then walked until they meet, and joined so that this is paid once.
        """
        if self.ids != ids or self.parent is None:
            return False
        mine: Entry | None = self.parent
        other: Entry | None = parent
        while mine is not other:
            if mine is None or other is None or mine.ids != other.ids:
                return False
            mine, other = mine.parent, other.parent
        self.parent = parent
        return True


def root(salt: bytes) -> Entry:
    """The parent of first blocks under `salt`."""
    return Entry(None, salt, salt, -1)


def pack(token_ids: list[int], start: int, stop: int) -> bytes:
    return array("i", token_ids[start:stop]).tobytes()


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class PrefixIndex:
    """Key -> entry. `digest` is an argument so that tests can make it collide."""

    def __init__(self, block_seq_len: int, digest: Callable[[bytes], bytes] = sha256) -> None:
        self.block_seq_len = block_seq_len
        self.digest = digest
        self._entries: dict[bytes, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, salt: bytes, token_ids: list[int], most: int) -> list[int]:
        """Block ids that hold the longest indexed beginning of `token_ids`, at most `most` blocks."""
        parent, found = root(salt), []
        for i in range(most):
            ids = pack(token_ids, i * self.block_seq_len, (i + 1) * self.block_seq_len)
            entry = self._entries.get(self.digest(parent.key + ids))
            if entry is None or not entry.stands_for(parent, ids):
                break
            found.append(entry.block_id)
            parent = entry
        return found

    def insert(self, parent: Entry, ids: bytes, block_id: int) -> Entry | None:
        """What `block_id` holds from now on: a new entry, the one another block made, or None on a collision."""
        key = self.digest(parent.key + ids)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(parent, key, ids, block_id)
        elif not entry.stands_for(parent, ids):
            return None
        return entry

    def remove(self, entry: Entry) -> None:
        del self._entries[entry.key]

    def check_integrity(self) -> dict[int, Entry]:
        """The entry of each indexed block."""
        found: dict[int, Entry] = {}
        for key, entry in self._entries.items():
            if entry.key != key or entry.block_id in found:
                raise IntegrityError(f"the prefix index names block {entry.block_id} wrongly or twice.")
            found[entry.block_id] = entry
        return found
