"""A sequence moves only as the table says; sampling parameters are finite, typed and in range or refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.errors import BadParameter, InvalidMove, QueueFull
from engine.sequence import MAX_SEED, MOVES, SamplingParams, Sequence, Status


def sequence(status: Status) -> Sequence:
    return Sequence(7, [1, 2, 3], 2, SamplingParams(max_tokens=4), status=status, num_pending=1)


@pytest.mark.parametrize("to", Status)
@pytest.mark.parametrize("start", Status)
def test_all_pairs_of_moves(start: Status, to: Status) -> None:
    allowed = {
        (Status.WAITING, Status.RUNNING),
        (Status.WAITING, Status.FINISHED),
        (Status.RUNNING, Status.WAITING),
        (Status.RUNNING, Status.FINISHED),
    }
    seq = sequence(start)
    if (start, to) in allowed:
        seq.move(to)
        assert seq.status is to
    else:
        with pytest.raises(InvalidMove, match=f"7 cannot move from {start.name} to {to.name}"):
            seq.move(to)
        assert seq.status is start
    assert set(MOVES) == set(Status)


def test_counts() -> None:
    seq = sequence(Status.RUNNING)
    assert (seq.num_tokens, seq.num_generated) == (4, 1)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", (0, -1, 1 << 31, 1.0, True, "4", None)),
        ("min_tokens", (-1, 5, 2.0)),
        ("temperature", (-0.1, 2.1, math.nan, math.inf, "1", True)),
        ("top_k", (-1, 1 << 31, 0.5)),
        ("top_p", (-0.1, 1.1, math.nan)),
        ("min_p", (-0.1, 1.1, math.nan)),
        ("repetition_penalty", (0.0, 101, -math.inf)),
        ("presence_penalty", (-2.1, 2.1)),
        ("frequency_penalty", (-2.1, 2.1)),
        ("seed", (-1, MAX_SEED + 1, 1.5)),
        ("logprobs", (-2, 129, False)),
        ("logit_bias", (((-1, 1.0),), ((1 << 31, 1.0),), ((1, 101.0),), ((1, math.nan),), ((1, 1.0), (1, 2.0)))),
        ("stop_token_ids", ((-1,), (1 << 31,), (1.0,))),
        ("allowed_token_ids", ((-1,), (1 << 31,), (True,))),
        ("bad_words", (((-1,),), ((1, 2.0),), ((),), ((1,) * 257,), ((1,),) * 1025)),
        ("prompt_logprobs", (-2, 129, None)),
        ("ignore_eos", (0, 1, None)),
    ],
)
def test_bad_values_are_refused_by_name(field: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(BadParameter) as caught:
            SamplingParams(**{"max_tokens": 4, field: value})
        assert caught.value.param == field and field in str(caught.value) and str(caught.value).endswith(".")


def test_edges_are_accepted() -> None:
    SamplingParams(max_tokens=1, min_tokens=1, temperature=2.0, top_p=0.0, min_p=1.0, seed=MAX_SEED, logprobs=128)
    SamplingParams(max_tokens=(1 << 31) - 1, temperature=0, repetition_penalty=100, presence_penalty=-2, frequency_penalty=2)


def test_greedy_and_plain() -> None:
    assert SamplingParams(max_tokens=1, temperature=0.0).greedy and SamplingParams(max_tokens=1, top_k=1).greedy
    assert not SamplingParams(max_tokens=1).greedy and SamplingParams(max_tokens=1, top_p=0.5).plain
    for knob in (
        {"logit_bias": ((1, 1.0),)},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"min_tokens": 1},
        {"allowed_token_ids": (1,)},
        {"bad_words": ((1, 2),)},
    ):
        assert not SamplingParams(max_tokens=1, **knob).plain  # type: ignore[arg-type]


def test_ids_outside_the_vocabulary() -> None:
    SamplingParams(max_tokens=1, logit_bias=((9, 1.0),), stop_token_ids=(9,)).check_vocabulary(10)
    for field, value in (
        ("logit_bias", ((10, 1.0),)),
        ("stop_token_ids", (3, 10)),
        ("allowed_token_ids", (10,)),
        ("bad_words", ((1,), (2, 10))),
    ):
        with pytest.raises(BadParameter, match="id 10, but the vocabulary ends at 9") as caught:
            SamplingParams(max_tokens=1, **{field: value}).check_vocabulary(10)  # type: ignore[arg-type]
        assert caught.value.param == field


def test_queue_full_says_when_to_come_back() -> None:
    error = QueueFull("Full.", 3, per_key=True)
    assert (str(error), error.retry_after_s, error.per_key) == ("Full.", 3, True)
