"""Finding stop strings in streamed text, however it is cut into pieces.

The stop that is complete first wins; of several that are complete at the same character, the longest. Text that may
still turn out to be the beginning of a stop is held back, nothing more. One automaton (Aho-Corasick) does all three:
its state after each character is the longest suffix of the text that begins some stop string.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Node:
    """`depth`: characters from the root; `match`: length of the longest stop string that ends here, 0 for none."""

    depth: int
    next: dict[str, _Node] = field(default_factory=dict)
    fallback: _Node | None = None
    match: int = 0


def _automaton(stops: Sequence[str]) -> _Node:
    root = _Node(0)
    for stop in stops:
        node = root
        for char in stop:
            node = node.next.setdefault(char, _Node(node.depth + 1))
        node.match = len(stop)
    queue = deque([root])
    while queue:
        node = queue.popleft()
        for char, child in node.next.items():
            child.fallback = root if node is root else _step(root, node.fallback, char)
            child.match = child.match or child.fallback.match
            queue.append(child)
    return root


def _step(root: _Node, node: _Node | None, char: str) -> _Node:
    while node is not None:
        found = node.next.get(char)
        if found is not None:
            return found
        node = node.fallback
    return root


class StopMatcher:
    """Passes text through until a stop string is complete.

    include: the stop string itself is part of the text. After `push` has said stopped, further text is swallowed.
    """

    __slots__ = ("_first", "_held", "_include", "_node", "_root", "matched", "stopped")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        if isinstance(stops, str) or not all(stops):
            raise ValueError("stop strings are a list of non-empty strings")
        self._root = self._node = _automaton(stops)
        self._first = frozenset(stop[0] for stop in stops)
        self._include = include
        self._held = ""  # the text of the current node: node.depth characters
        self.stopped = False
        self.matched = ""  # the stop string that was complete first

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be delivered now, whether a stop string is complete)."""
        if not self._held and self._first.isdisjoint(text) and not self.stopped:
            return text, False
        return self._push_slowly(text)

    def _push_slowly(self, text: str) -> tuple[str, bool]:
        if self.stopped:
            return "", True
        root, node = self._root, self._node
        for i, char in enumerate(text):
            node = node.next.get(char) or _step(root, node.fallback, char)
            if node.match:
                self.stopped = True
                seen = self._held + text[: i + 1]
                self._held = ""
                self.matched = seen[len(seen) - node.match :]
                return seen if self._include else seen[: len(seen) - node.match], True
        seen = self._held + text
        safe = len(seen) - node.depth
        self._node, self._held = node, seen[safe:]
        return seen[:safe], False

    def flush(self) -> str:
        """The text held back, at the end of an answer that no stop string ended."""
        text, self._held, self._node = self._held, "", self._root
        return text
