"""Answers of /v1/responses that a later request may go on from: in memory, bounded by number and size, the oldest go first.

An entry belongs to the API key that made it. Nothing survives a restart.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

MAX_CHARS = 64 << 20  # of all texts together


@dataclass(slots=True)
class Stored:
    """One response: as it is given back, what was asked, and the conversation including its answer (no instructions)."""

    key: str
    response: dict[str, Any]
    input_items: list[dict[str, Any]]
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return 1024 + sum(len(message["content"]) for message in self.messages)


class ResponseStore:
    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: OrderedDict[str, tuple[Stored, int]] = OrderedDict()
        self._chars = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, name: str, stored: Stored) -> None:
        self._drop(name)
        self._entries[name] = (stored, stored.size)
        self._chars += stored.size
        while len(self._entries) > self._most or (self._chars > MAX_CHARS and self._entries):
            self._drop(next(iter(self._entries)))

    def get(self, name: str, key: str) -> Stored | None:
        """The caller's own entry of that name."""
        found = self._entries.get(name)
        return found[0] if found is not None and found[0].key == key else None

    def delete(self, name: str, key: str) -> bool:
        if self.get(name, key) is None:
            return False
        self._drop(name)
        return True

    def _drop(self, name: str) -> None:
        if name in self._entries:
            self._chars -= self._entries.pop(name)[1]
