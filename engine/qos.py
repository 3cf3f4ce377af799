"""QoS: where a sequence stands in line, from its user's group and quota (`config/qos.py`).

Strict between groups: while a sequence of a better group waits, none of a worse one begins. Inside a group users get
shares of the work in proportion to their quotas: start-time fair queueing (Goyal, Vin, Cheng 1996), the work being
prompt ids and answer ids. It is settled at reception: what runs is never taken back for somebody's sake (memory that is
short preempts by rank, as always). How long an answer will be is guessed; the difference is charged, or given back, when
it ends.

Starvation is possible and bounded: a sequence that others keep from its first step for admission.max_queue_age_s is
refused. A quota of 0 means: when nobody else of the group waits. Standard library only; knows no clock.
"""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

from config.qos import DEFAULT_USER, QosConfig
from engine.sequence import Sequence, Status

GUESS = 128  # ids of an answer, before it is known how many they are


class Account:
    """Of one user (all unknown ones share one): `due` is the virtual time at which what they asked for will have been served."""

    __slots__ = ("due", "group", "quota")

    def __init__(self, group: int, quota: float) -> None:
        self.group = group
        self.quota = quota
        self.due = 0.0


class Place(NamedTuple):
    """For `Sequence.group` and `Sequence.turn`, and what `finished` needs."""

    group: int
    turn: float
    cost: int
    account: Account


class Qos:
    """Called on the event loop: `place` and `waits` at every submit, `finished` once a sequence is over."""

    def __init__(self, config: QosConfig) -> None:
        self._accounts = {
            user: Account(number, quota)
            for number, group in enumerate(config.groups)
            for user, quota in group.quotas.items()
            if user != DEFAULT_USER
        }
        unknown = config.groups[config.default_group].quotas.get(DEFAULT_USER, 0.0)
        self._unknown = Account(config.default_group, unknown)
        self._clocks = [0.0] * len(config.groups)  # virtual time of each group: the latest turn that has begun
        self._lines: list[list[tuple[float, int, Sequence]]] = [[] for _ in config.groups]  # heaps
        self._places: dict[int, Place] = {}

    def place(self, user_id: str, num_prompt: int, max_tokens: int) -> Place:
        """Where a new sequence of this user stands; charges nothing yet."""
        account = self._accounts.get(user_id, self._unknown)
        cost = num_prompt + min(max_tokens, GUESS)
        turn = max(self._clock(account.group), account.due) if account.quota else math.inf
        return Place(account.group, turn, cost, account)

    def waits(self, sequence: Sequence, place: Place) -> None:
        """The sequence is in line: its user is charged."""
        self._places[sequence.id] = place
        if place.account.quota:
            place.account.due = place.turn + place.cost / place.account.quota
            heapq.heappush(self._lines[place.group], (place.turn, sequence.id, sequence))

    def finished(self, sequence: Sequence) -> None:
        """Charge what it really took."""
        _, _, cost, account = self._places.pop(sequence.id)
        if account.quota:
            taken = sequence.num_prompt + sequence.num_generated if sequence.first_scheduled_s >= 0 else 0
            account.due += (taken - cost) / account.quota

    def _clock(self, group: int) -> float:
        """Sequences leave a group's line in the order of their turns, so the first that still waits says how far it is."""
        line = self._lines[group]
        while line and (line[0][2].status is not Status.WAITING or line[0][2].first_scheduled_s >= 0):
            turn, _, sequence = heapq.heappop(line)
            if sequence.first_scheduled_s >= 0:
                self._clocks[group] = max(self._clocks[group], turn)
        return self._clocks[group]
