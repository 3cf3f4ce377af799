"""Who may still come in: the bounds on sequences, on those of one API key, and on prompt tokens that wait.

Everything here runs on the event loop, at every submit, so it must not walk the queue each time (one bound, off by default,
does). Knows no HTTP: a refusal is
`QueueFull`, with the seconds after which about one more sequence will have finished.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterable

from config.schema import Admission as Limits
from engine.errors import QueueFull
from engine.sequence import Sequence

LONGEST_RETRY_S = 60


class Admission:
    """`pool_tokens`: positions that the KV pool holds."""

    def __init__(self, limits: Limits, pool_tokens: int) -> None:
        self._limits = limits
        self._most_waiting_tokens = limits.max_queue_tokens or 4 * pool_tokens
        self._keys: dict[int, str] = {}  # of each sequence that has not finished
        self._per_key: Counter[str] = Counter()
        self._finished_s: deque[float] = deque(maxlen=64)
        self._waiting_tokens: int | None = None  # summed once between two changes of the queue that are not submits

    def check(self, num_prompt: int, key: str, waiting: list[Sequence]) -> None:
        """Raise QueueFull where one more sequence of `num_prompt` tokens is too many."""
        limits = self._limits
        if len(self._keys) >= limits.max_requests:
            message = f"The server already has {limits.max_requests} sequences; try again later."
        elif self._per_key[key] >= limits.max_requests_per_key:
            message = f"This API key already has {limits.max_requests_per_key} sequences; try again later."
            raise QueueFull(message, self._retry_after_s(len(waiting)), per_key=True)
        elif (mine := self._waiting_of(key, waiting)) and mine + num_prompt > limits.max_queue_tokens_per_key:
            bound = limits.max_queue_tokens_per_key
            message = f"{mine} prompt tokens of this API key already wait, the bound is {bound}; try again later."
            raise QueueFull(message, self._retry_after_s(len(waiting)), per_key=True)
        elif waiting and self.waiting_tokens(waiting) + num_prompt > self._most_waiting_tokens:
            bound = self._most_waiting_tokens
            message = f"{self.waiting_tokens(waiting)} prompt tokens already wait, the bound is {bound}; try again later."
        else:
            return
        raise QueueFull(message, self._retry_after_s(len(waiting)))

    def admitted(self, sequence: Sequence, key: str) -> None:
        self._keys[sequence.id] = key
        self._per_key[key] += 1
        if self._waiting_tokens is not None:
            self._waiting_tokens += sequence.num_prompt

    def finished(self, sequence_id: int) -> None:
        key = self._keys.pop(sequence_id)
        self._per_key[key] -= 1
        if not self._per_key[key]:
            del self._per_key[key]
        self._finished_s.append(time.monotonic())

    def queue_changed(self) -> None:
        """The scheduler took something out of the queue, or put it back."""
        self._waiting_tokens = None

    def waiting_tokens(self, waiting: Iterable[Sequence]) -> int:
        if self._waiting_tokens is None:
            self._waiting_tokens = sum(sequence.num_tokens for sequence in waiting)
        return self._waiting_tokens

    def _waiting_of(self, key: str, waiting: Iterable[Sequence]) -> int:
        """Tokens of one key that wait; 0 where that has no bound. Walks the line, which admission keeps short."""
        if not self._limits.max_queue_tokens_per_key:
            return 0
        return sum(sequence.num_tokens for sequence in waiting if self._keys.get(sequence.id) == key)

    def _retry_after_s(self, num_waiting: int) -> int:
        """Seconds until the line will have moved on, at the rate of the finishes seen last; 1 .. LONGEST_RETRY_S."""
        times = self._finished_s
        if len(times) < 2:
            return 1
        rate = (len(times) - 1) / max(time.monotonic() - times[0], 1e-3)
        return max(1, min(LONGEST_RETRY_S, math.ceil((num_waiting + 1) / rate)))
