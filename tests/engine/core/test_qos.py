"""Places in line, one server, no clock: shares when answers are not as long as asked for, and after a silence."""

from __future__ import annotations

from collections import Counter

import pytest

from config.qos import Group, QosConfig
from engine.qos import Qos
from engine.sequence import FinishReason, SamplingParams, Sequence, Status


class Line:
    """Serves one sequence at a time, the first in line; each user keeps `backlog` of them there."""

    def __init__(self, quotas: dict[str, float], asks: dict[str, tuple[int, int, int]], backlog: int = 8) -> None:
        """`asks`: of each user's sequences prompt, max_tokens, and how long the answer is in truth."""
        self.qos = Qos(QosConfig((Group("all", quotas),), 0))
        self.asks = asks
        self.backlog = backlog
        self.waiting: list[tuple[float, int, Sequence, str]] = []
        self.work: Counter[str] = Counter()
        self.number = 0

    def fill(self, users: str) -> None:
        for user in users:
            while sum(user == other for *_, other in self.waiting) < self.backlog:
                self.add(user)

    def add(self, user: str) -> Sequence:
        prompt, most, _ = self.asks[user]
        self.number += 1
        place = self.qos.place(user, prompt, most)
        seq = Sequence(self.number, [1] * prompt, prompt, SamplingParams(max_tokens=most), group=place.group, turn=place.turn)
        self.qos.waits(seq, place)
        self.waiting.append((place.turn, self.number, seq, user))
        return seq

    def serve(self) -> None:
        self.waiting.sort(key=lambda entry: entry[:2])
        *_, seq, user = self.waiting.pop(0)
        seq.move(Status.RUNNING)
        seq.first_scheduled_s = 1.0
        seq.token_ids += [1] * self.asks[user][2]
        self.end(seq)
        self.work[user] += len(seq.token_ids)

    def end(self, seq: Sequence) -> None:
        seq.move(Status.FINISHED)
        seq.finish_reason = FinishReason.LENGTH
        self.qos.finished(seq)

    def run(self, users: str, total: int) -> dict[str, float]:
        """Shares of the next `total` units of work."""
        self.work.clear()
        while self.work.total() < total:
            self.fill(users)
            self.serve()
        return {user: self.work[user] / self.work.total() for user in users}


def test_answers_shorter_than_asked_for_are_charged_as_they_are() -> None:
    line = Line({"a": 0.5, "b": 0.5}, {"a": (10, 4000, 10), "b": (10, 10, 10)})
    line.run("ab", 2000)
    assert line.run("ab", 10_000) == pytest.approx({"a": 0.5, "b": 0.5}, abs=0.03)


def test_answers_longer_than_guessed_are_charged_too() -> None:
    line = Line({"a": 0.75, "b": 0.25}, {"a": (10, 900, 900), "b": (10, 300, 100)})
    line.run("ab", 20_000)
    assert line.run("ab", 400_000) == pytest.approx({"a": 0.75, "b": 0.25}, abs=0.03)


def test_who_was_silent_has_saved_up_nothing() -> None:
    line = Line({"a": 0.5, "b": 0.5}, {"a": (10, 10, 10), "b": (10, 10, 10)})
    line.run("a", 20_000)
    assert line.run("ab", 2000) == pytest.approx({"a": 0.5, "b": 0.5}, abs=0.06)


def test_what_never_ran_costs_nothing() -> None:
    line = Line({"a": 0.5, "b": 0.5}, {"a": (10, 10, 10), "b": (10, 10, 10)})
    line.run("ab", 2000)
    for _ in range(200):
        seq = line.add("a")
        line.waiting.pop()
        line.end(seq)
    assert line.run("ab", 2000) == pytest.approx({"a": 0.5, "b": 0.5}, abs=0.06)
    assert len(line.qos._places) == len(line.waiting), "nothing is remembered of sequences that are over"
