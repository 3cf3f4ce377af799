"""Plans and results survive their encoding bit by bit; bytes that are not one are a ValueError, never a wrong value."""

from __future__ import annotations

import array

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.sequence import MAX_SEED, FinishReason, SamplingParams
from engine.step import MAGIC_PLAN, MAGIC_RESULT, Admit, Logprobs, StepPlan, StepResult, TokenEvent

ids = st.integers(0, (1 << 31) - 1)
id_lists = st.lists(ids, max_size=6).map(tuple)
floats = st.floats(allow_nan=False)


@st.composite
def sampling(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, (1 << 31) - 1))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        temperature=draw(st.floats(0, 2)),
        top_k=draw(ids),
        top_p=draw(st.floats(0, 1)),
        min_p=draw(st.floats(0, 1)),
        repetition_penalty=draw(st.floats(0.01, 100)),
        presence_penalty=draw(st.floats(-2, 2)),
        frequency_penalty=draw(st.floats(-2, 2)),
        logit_bias=tuple(draw(st.dictionaries(ids, st.floats(-100, 100), max_size=4)).items()),
        stop_token_ids=draw(id_lists),
        ignore_eos=draw(st.booleans()),
        seed=draw(st.integers(0, MAX_SEED)),
        logprobs=draw(st.integers(-1, 128)),
        allowed_token_ids=draw(id_lists),
        bad_words=tuple(draw(st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), max_size=3))),
        prompt_logprobs=draw(st.integers(-1, 128)),
    )


admits = st.builds(Admit, ids, id_lists, ids, id_lists, sampling(), id_lists)


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    rows = draw(st.lists(st.tuples(ids, ids, ids, st.integers(0, 1)), max_size=5))
    blocks = draw(st.lists(st.tuples(ids, ids), max_size=4))
    columns = [tuple(row[i] for row in rows) for i in range(4)]
    newly = [tuple(block[i] for block in blocks) for i in range(2)]
    return StepPlan(draw(ids), draw(id_lists), tuple(draw(st.lists(admits, max_size=3))), *newly, *columns)


@st.composite
def logprobs(draw: st.DrawFn) -> Logprobs:
    top = draw(st.lists(st.tuples(ids, floats), max_size=3))
    return Logprobs(draw(floats), draw(ids), tuple(t for t, _ in top), tuple(p for _, p in top))


@st.composite
def results(draw: st.DrawFn) -> StepResult:
    sampled = draw(st.lists(st.integers(-2, (1 << 31) - 1), max_size=6))
    found = []
    for index in draw(st.sets(st.integers(0, len(sampled) - 1))) if sampled else ():
        found.append((index, draw(logprobs())))
    prompt = draw(st.lists(st.tuples(ids, ids, logprobs()), max_size=2))
    return StepResult(draw(ids), tuple(sampled), tuple(found), draw(ids), tuple(prompt))


@settings(deadline=None)
@given(plans())
def test_a_plan_round_trips(plan: StepPlan) -> None:
    data = plan.encode()
    assert StepPlan.decode(data) == plan
    assert len(data) % 4 == 0 and plan.num_tokens == sum(plan.counts)


@settings(deadline=None)
@given(results())
def test_a_result_round_trips(result: StepResult) -> None:
    assert StepResult.decode(result.encode()) == result


def test_a_steady_decode_plan_is_small() -> None:
    n = 256
    plan = StepPlan(9, slots=tuple(range(n)), starts=(77,) * n, counts=(1,) * n, samples=(1,) * n)
    assert len(plan.encode()) == 4 * (4 * n + 10)


@settings(deadline=None)
@given(plans(), st.data())
def test_a_cut_or_longer_plan_is_refused(plan: StepPlan, data: st.DataObject) -> None:
    encoded = plan.encode()
    for broken in (encoded[: data.draw(st.integers(0, len(encoded) - 1))], encoded + b"\0\0\0\0", encoded + b"\0"):
        with pytest.raises(ValueError, match="an encoded"):
            StepPlan.decode(broken)


@settings(deadline=None)
@given(results(), st.data())
def test_a_cut_or_longer_result_is_refused(result: StepResult, data: st.DataObject) -> None:
    encoded = result.encode()
    for broken in (encoded[: data.draw(st.integers(0, len(encoded) - 1))], encoded + b"\0\0\0\0"):
        with pytest.raises(ValueError, match="an encoded"):
            StepResult.decode(broken)


def _try(kind: type[StepPlan] | type[StepResult], data: bytes) -> None:
    """Either a ValueError, or a value that round-trips."""
    try:
        value = kind.decode(data)
    except ValueError:
        return
    assert kind.decode(value.encode()).encode() == value.encode()


@settings(deadline=None, max_examples=300)
@given(plans() | results(), st.data())
def test_a_changed_word_is_another_value_or_refused(value: StepPlan | StepResult, data: st.DataObject) -> None:
    ints = array.array("i", value.encode())
    ints[data.draw(st.integers(0, len(ints) - 1))] = data.draw(st.sampled_from((-1, 0, 1, 7, (1 << 31) - 1, -(1 << 31))))
    _try(type(value), ints.tobytes())


@settings(deadline=None)
@given(st.binary(max_size=200))
@example(b"")
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="an encoded step"):
        StepPlan.decode(data)
    with pytest.raises(ValueError, match="an encoded step"):
        StepResult.decode(data)
    data = data[: len(data) // 4 * 4]
    _try(StepPlan, array.array("i", (MAGIC_PLAN,)).tobytes() + data)
    _try(StepResult, array.array("i", (MAGIC_RESULT,)).tobytes() + data)


def words(*ints: int) -> bytes:
    return array.array("i", ints).tobytes()


@pytest.mark.parametrize(
    ("kind", "data", "says"),
    [
        (StepPlan, words(MAGIC_RESULT, 0, 0, 0, 0), "wrong magic"),
        (StepResult, words(MAGIC_PLAN, 0, 0, 0, 0), "wrong magic"),
        (StepPlan, words(MAGIC_PLAN, 0, -1), "announces -1 ints"),
        (StepPlan, words(MAGIC_PLAN, 0, 9, 1), "announces 9 ints"),
        (StepPlan, words(MAGIC_PLAN, 0, 0, 0, 0, 0, 0, 0, 0, -1), "-1 where a count belongs"),
        (StepPlan, words(MAGIC_PLAN, 0, 0, 1, 5, 0, 0, 0, 0, 0, 0), "different lengths"),
        (StepPlan, words(MAGIC_PLAN, 0, 0, 0, 0, 1, 5, 0, 0, 0, 0), "different lengths"),
        (StepResult, words(MAGIC_RESULT, 0, 0, 1, 5, 1, 1, 0, 0, 0, 0), "logprobs for id 1 of 1"),
    ],
)
def test_malformed(kind: type[StepPlan] | type[StepResult], data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kind.decode(data)


def test_malformed_sampling_parameters_are_a_value_error() -> None:
    plan = StepPlan(0, admits=(Admit(0, (1,), 1, (0,), SamplingParams(max_tokens=77, logit_bias=((5, 1.0),))),))
    ints = array.array("i", plan.encode())
    worse = array.array("i", ints)
    worse[worse.index(77)] = 0
    with pytest.raises(ValueError, match="bad sampling parameters: max_tokens"):
        StepPlan.decode(worse.tobytes())
    at = ints.index(5) - 1  # one id with a bias, two words: say two ids, so that the lists no longer fit
    del ints[at : at + 2]
    ints.insert(at, 0)
    with pytest.raises(ValueError, match="0 ids with a bias, but 2 words"):
        StepPlan.decode(ints.tobytes())


def test_an_event_cannot_be_changed() -> None:
    event = TokenEvent(3, 5)
    assert (event.sequence_id, event.token_id, event.logprobs, event.finish_reason) == (3, 5, None, None)
    assert TokenEvent(3, -1, finish_reason=FinishReason.ABORT).finish_reason is FinishReason.ABORT
    with pytest.raises(AttributeError):
        event.token_id = 6  # type: ignore[misc]
