"""Who may still come in: bounds of one API key and of all, and after how long to try again."""

from __future__ import annotations

from typing import Any

import pytest

from config.schema import Admission as Limits
from engine.admission import LONGEST_RETRY_S, Admission
from engine.errors import QueueFull
from engine.sequence import SamplingParams, Sequence


def line(admission: Admission, *members: tuple[str, int]) -> list[Sequence]:
    """(key, tokens) of sequences that wait."""
    waiting = []
    for number, (key, num_tokens) in enumerate(members):
        waiting.append(Sequence(number, [1] * num_tokens, num_tokens, SamplingParams(max_tokens=1)))
        admission.admitted(waiting[-1], key)
    return waiting


@pytest.mark.parametrize(
    ("limits", "num_prompt", "key", "refused"),
    [
        ({}, 10, "a", None),
        ({"max_requests": 3}, 1, "a", (False, "already has 3 sequences")),
        ({"max_requests_per_key": 2}, 1, "a", (True, "This API key already has 2 sequences")),
        ({"max_requests_per_key": 2}, 1, "b", None),
        ({"max_queue_tokens": 40}, 10, "c", None),
        ({"max_queue_tokens": 40}, 11, "c", (False, "30 prompt tokens already wait, the bound is 40")),
        ({"max_queue_tokens_per_key": 25}, 5, "a", None),
        ({"max_queue_tokens_per_key": 25}, 6, "a", (True, "20 prompt tokens of this API key already wait, the bound is 25")),
        ({"max_queue_tokens_per_key": 25}, 15, "b", None),
        ({"max_queue_tokens_per_key": 25}, 100, "c", None),  # nothing of it waits: it may try
    ],
)
def test_bounds(limits: dict[str, Any], num_prompt: int, key: str, refused: tuple[bool, str] | None) -> None:
    admission = Admission(Limits(**limits), pool_tokens=1000)
    waiting = line(admission, ("a", 10), ("b", 10), ("a", 10))
    if refused is None:
        admission.check(num_prompt, key, waiting)
        return
    with pytest.raises(QueueFull, match=refused[1]) as caught:
        admission.check(num_prompt, key, waiting)
    assert caught.value.per_key == refused[0] and 1 <= caught.value.retry_after_s <= LONGEST_RETRY_S


def test_the_line_is_summed_once_between_changes() -> None:
    admission = Admission(Limits(), pool_tokens=1000)
    waiting = line(admission, ("a", 10), ("b", 10))
    assert admission.waiting_tokens(waiting) == 20
    late = Sequence(9, [1] * 5, 5, SamplingParams(max_tokens=1))
    admission.admitted(late, "a")
    assert admission.waiting_tokens([]) == 25, "counted as it came in"
    admission.queue_changed()
    assert admission.waiting_tokens([late]) == 5


def test_when_to_try_again_follows_the_rate_of_finishes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("engine.admission.time.monotonic", lambda: now[0])
    admission = Admission(Limits(max_requests=8), pool_tokens=1000)
    waiting = line(admission, *(("a", 1) for _ in range(20)))
    for number in range(12):
        now[0] += 2.0
        admission.finished(number)
    with pytest.raises(QueueFull) as caught:
        admission.check(1, "a", waiting[:4])
    assert caught.value.retry_after_s == 10, "five of the line, one finishes every 2 s"
    now[0] += 1e6
    with pytest.raises(QueueFull) as caught:
        admission.check(1, "a", waiting[:4])
    assert caught.value.retry_after_s == LONGEST_RETRY_S
