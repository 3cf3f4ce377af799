"""The sampler against its float64 reference, and the promises that `SamplingParams` makes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Scored
from engine.sampler import Sampler
from engine.sampler_reference import reference_distribution, reference_logprobs, sample_reference, uniform_reference
from engine.sequence import SamplingParams
from engine.step import BAD_LOGITS, NOTHING_LEFT, Admit

ROUNDING = 2e-6  # of probabilities and logprobs: float32 exponentials of float32 differences


def params_of(**fields):
    fields.setdefault("max_tokens", 64)
    return SamplingParams(**fields)


def sampler_with(params, vocab, token_ids=(0,), num_prompt=None, eos=(), slots=1, slot=0):
    sampler = Sampler(slots, 64, vocab)
    num_prompt = len(token_ids) if num_prompt is None else num_prompt
    sampler.admit(Admit(slot, tuple(token_ids), num_prompt, (), params, tuple(eos)))
    return sampler


def one(logits, params, token_ids=(0,), num_prompt=None, eos=()):
    logits = np.asarray(logits, np.float32)
    sampler = sampler_with(params, len(logits), token_ids, num_prompt, eos)
    ids, logprobs = sampler.sample(logits[None].copy(), (0,))
    return ids[0], (logprobs[0][1] if logprobs else None)


def random_logits(rng, vocab, kind):
    if kind == "ties":
        return rng.integers(-2, 3, vocab).astype(np.float32)
    scale = {"flat": 0.01, "usual": 3.0, "sharp": 30.0}[kind]
    return (rng.standard_normal(vocab) * scale).astype(np.float32)


def assert_agrees(token, logits, params, token_ids, num_prompt, eos):
    """`token` is the reference's id, or the reference's random number lies within rounding of token's interval."""
    expected, _ = sample_reference(logits, params, token_ids, num_prompt, eos)
    if token == expected:
        return
    assert token >= 0 and expected >= 0
    assert not params.greedy
    probabilities = reference_distribution(logits, params, token_ids, num_prompt, eos)
    end = np.cumsum(probabilities)
    u = uniform_reference(params.seed, len(token_ids))
    slack = ROUNDING / min(params.temperature, 1.0) * 10
    assert end[token] - probabilities[token] - slack <= u <= end[token] + slack


def some_masks(words, rng, vocab, token_ids):
    """allowed_token_ids and bad_words: of one id, and of two or three that go on from the end of the answer (or nearly do)."""
    fields = {}
    if words in ("allowed", "both"):
        fields["allowed_token_ids"] = tuple(rng.integers(0, vocab, rng.integers(1, 9)).tolist())
    if words in ("bad", "both"):
        last = [rng.integers(0, vocab, 3).tolist() for _ in range(3)]
        heads = [(), tuple(token_ids[-1:]), tuple(token_ids[-2:]), tuple(token_ids[:6])]
        fields["bad_words"] = tuple((*head, token) for head in heads for token in last[len(head) % 3])
    return fields


@settings(max_examples=400, deadline=None)
@given(
    vocab=st.sampled_from([1, 2, 3, 63, 64, 65, 127, 500, 1000, 5000]),
    kind=st.sampled_from(["ties", "flat", "usual", "sharp"]),
    data_seed=st.integers(0, 10_000),
    seed=st.integers(0, (1 << 64) - 1),
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 1.5, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 3, 40, 500]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.013, 0.31]),
    repetition=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    presence=st.sampled_from([0.0, 0.0, 0.5, -0.7]),
    frequency=st.sampled_from([0.0, 0.0, 0.3, -0.2]),
    min_tokens=st.sampled_from([0, 0, 3, 10]),
    masked=st.booleans(),
    words=st.sampled_from(["", "", "allowed", "bad", "both"]),
)
def test_equals_the_reference(
    vocab, kind, data_seed, seed, temperature, top_k, top_p, min_p, repetition, presence, frequency, min_tokens, masked, words
):
    rng = np.random.default_rng(data_seed)
    logits = random_logits(rng, vocab, kind)
    if masked:
        logits[rng.random(vocab) < 0.4] = -np.inf
    token_ids = rng.integers(0, vocab, 12).tolist()
    eos = tuple(set(rng.integers(0, vocab, 2).tolist()))
    stop = tuple(set(rng.integers(0, vocab, 2).tolist()))
    bias = tuple((int(i), float(rng.normal())) for i in set(rng.integers(0, vocab, 4).tolist()) if data_seed % 2)
    params = params_of(
        seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition,
        presence_penalty=presence, frequency_penalty=frequency, min_tokens=min_tokens, logit_bias=bias, stop_token_ids=stop,
        ignore_eos=bool(data_seed % 3 == 0), logprobs=min(5, vocab), **some_masks(words, rng, vocab, token_ids),
    )  # fmt: skip
    token, logprobs = one(logits, params, token_ids, 7, eos)
    assert_agrees(token, logits, params, token_ids, 7, eos)
    if token >= 0:
        expected = reference_logprobs(logits, token, 5)
        assert (logprobs.rank, logprobs.top_ids) == (expected.rank, expected.top_ids)
        np.testing.assert_allclose(logprobs.logprob, expected.logprob, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(logprobs.top_logprobs, expected.top_logprobs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["ties", "flat", "usual", "sharp"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 9, "top_p": 0.7},
        {"temperature": 0.5, "top_p": 0.9},
        {"temperature": 2.0},
    ],
)
def test_frequencies_are_the_probabilities(kind, fields):
    """Chi-square over 20,000 draws (one sequence each, seeds 0..): fixed, so it either passes or the law is wrong."""
    vocab, draws = 24, 20_000
    logits = random_logits(np.random.default_rng(5), vocab, kind)
    sampler = Sampler(draws, 8, vocab)
    for seed in range(draws):
        sampler.admit(Admit(seed, (0, 1, 2), 3, (), params_of(seed=seed, **fields)))
    ids, _ = sampler.sample(np.tile(logits, (draws, 1)), range(draws))
    expected = reference_distribution(logits, params_of(**fields), (0, 1, 2), 3) * draws
    counts = np.bincount(ids, minlength=vocab)
    assert not counts[expected == 0].any()
    likely = expected >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi_square = ((observed - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 1


def test_positions_of_one_sequence_are_independent_draws():
    vocab, length = 8, 20_000
    sampler = sampler_with(params_of(max_tokens=length, seed=3), vocab)
    ids = [sampler.sample(np.zeros((1, vocab), np.float32), (0,))[0][0] for _ in range(length)]
    pairs = np.bincount(np.array(ids[:-1]) * vocab + ids[1:], minlength=vocab * vocab)
    wanted = (length - 1) / vocab**2
    assert ((pairs - wanted) ** 2 / wanted).sum() < 63 + 4 * np.sqrt(126)


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-30}, {"temperature": 1e-300}, {"min_p": 1.0}]
)
def test_limits_that_are_greedy(fields):
    rng = np.random.default_rng(1)
    for seed in range(50):
        logits = random_logits(rng, 777, "usual")
        assert one(logits, params_of(seed=seed, **fields))[0] == logits.argmax()


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}])
def test_equal_logits_give_the_lowest_id(fields):
    for value in (0.0, -0.0, 5.0, -1e30, 3e38):
        assert one(np.full(200, value), params_of(seed=9, **fields))[0] == 0
    mixed = np.zeros(200, np.float32)
    mixed[:100] = -0.0  # equal to 0.0
    assert one(mixed, params_of(**fields))[0] == 0


@pytest.mark.parametrize("top_p, kept", [(0.25, 1), (0.2500001, 2), (0.5, 2), (0.75, 3), (0.7500001, 4), (1.0, 4), (1e-9, 1)])
def test_the_id_that_crosses_top_p_is_kept(top_p, kept):
    got = {one(np.full(4, 1.5), params_of(seed=seed, top_p=top_p))[0] for seed in range(100)}
    assert got == set(range(kept))


@pytest.mark.parametrize("top_k, kept", [(2, 2), (3, 3), (64, 64), (65, 65), (130, 130)])
def test_top_k_breaks_ties_by_lower_id(top_k, kept):
    got = {one(np.zeros(300), params_of(seed=seed, top_k=top_k))[0] for seed in range(1500)}
    assert got == set(range(kept))


def test_top_p_works_on_what_top_k_left():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    got = {one(logits, params_of(seed=seed, top_k=2, top_p=0.55))[0] for seed in range(200)}
    assert got == {0}  # 0.4 / 0.7 > 0.55


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.nan])
def test_a_bad_row_is_marked_and_its_neighbours_are_not_touched(fields, bad):
    vocab, rng = 150, np.random.default_rng(2)
    logits = np.stack([random_logits(rng, vocab, "usual") for _ in range(5)])
    alone = [one(row, params_of(seed=i, **fields))[0] for i, row in enumerate(logits)]
    for where in (0, 63, 64, 149):
        sampler = Sampler(5, 64, vocab)
        for i in range(5):
            sampler.admit(Admit(i, (0,), 1, (), params_of(seed=i, **fields)))
        spoiled = logits.copy()
        spoiled[2, where] = bad
        ids, _ = sampler.sample(spoiled, range(5))
        assert ids == [*alone[:2], BAD_LOGITS, *alone[3:]]


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {}, {"logprobs": 2}, {"repetition_penalty": 1.5}])
def test_masks_are_no_error_and_nothing_left_is(fields):
    row = np.full(70, -np.inf)
    assert one(row, params_of(**fields))[0] == BAD_LOGITS
    row[66] = -3
    assert one(row, params_of(**fields))[0] == 66


def test_a_mask_does_not_hide_a_bad_logit():
    for bad in (np.nan, np.inf):
        logits = np.array([bad, 0.0, 1.0])
        params = params_of(min_tokens=5, temperature=0.0, stop_token_ids=(0,))
        assert one(logits, params)[0] == BAD_LOGITS


def test_a_bad_row_leaves_its_slot_as_it_was():
    params = params_of(seed=4, presence_penalty=1.0)
    sampler, other = sampler_with(params, 50), sampler_with(params, 50)
    assert sampler.sample(np.full((1, 50), np.nan, np.float32), (0,))[0] == [BAD_LOGITS]
    for _ in range(5):
        zeros = np.zeros((1, 50), np.float32)
        assert sampler.sample(zeros.copy(), (0,)) == other.sample(zeros.copy(), (0,))


def test_min_tokens_masks_what_would_end_the_answer():
    logits = np.array([9.0, 8.0, 1.0, 0.0])
    params = params_of(temperature=0.0, min_tokens=2, stop_token_ids=(1,))
    assert one(logits, params, (3,), eos=(0,))[0] == 2
    assert one(logits, params, (3, 3), 1, eos=(0,))[0] == 2
    assert one(logits, params, (3, 3, 3), 1, eos=(0,))[0] == 0
    ignoring = params_of(temperature=0.0, min_tokens=2, stop_token_ids=(1,), ignore_eos=True)
    assert one(logits, ignoring, (3,), eos=(0,))[0] == 0  # an ignored end ends nothing


def test_min_tokens_with_every_id_masked_is_an_error_and_not_an_answer():
    params = params_of(min_tokens=2, stop_token_ids=(1,))
    assert one([1.0, 2.0], params, eos=(0,))[0] == BAD_LOGITS


def test_bias_and_penalties_add_up():
    logits = np.array([2.0, 2.0, -1.0, 0.5, 0.0], np.float32)
    edits = params_of(temperature=0.0, repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5, logit_bias=((4, 0.9),))
    # prompt 0, answer 1 1 2: 0 -> 1; 1 -> 1 - 0.5 - 0.5 = 0; 2 -> -2 - 0.75; 3 stays 0.5; 4 -> 0.9
    token, _ = one(logits, edits, (0, 1, 1, 2), 1)
    assert token == 0
    token, _ = one(logits, edits, (0, 0, 1, 1, 2), 1)  # id 0 in the answer, too: 1 - 0.25 - 0.5
    assert token == 4


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 20}, {}])
def test_readmitting_with_the_answer_so_far_continues_alike(fields):
    """What preemption does, at every point, to another slot, with every kind of edit."""
    vocab, rng = 90, np.random.default_rng(8)
    steps = [random_logits(rng, vocab, "usual") for _ in range(12)]
    params = params_of(
        seed=77, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3, min_tokens=6, stop_token_ids=(5,),
        logit_bias=((3, 2.0),), logprobs=3, **fields,
    )  # fmt: skip
    prompt = (1, 2, 3, 2)
    sampler = sampler_with(params, vocab, prompt, eos=(7,))
    straight = [sampler.sample(row[None].copy(), (0,)) for row in steps]
    ids = [result[0][0] for result in straight]
    for cut in range(1, 12):
        other = sampler_with(params, vocab, (*prompt, *ids[:cut]), 4, eos=(7,), slots=3, slot=2)
        assert [other.sample(row[None].copy(), (2,)) for row in steps[cut:]] == straight[cut:]


def test_neither_batch_mates_nor_slots_nor_row_order_matter():
    vocab, rng = 333, np.random.default_rng(4)
    kinds = [
        params_of(seed=i, **f)
        for i, f in enumerate([{}, {"top_k": 9}, {"top_p": 0.8}, {"temperature": 0.0}, {"min_p": 0.05, "presence_penalty": 1.0}])
    ]
    steps = rng.standard_normal((6, 5, vocab)).astype(np.float32) * 2

    def run(order):
        sampler = Sampler(16, 64, vocab)
        for i in order:
            sampler.admit(Admit(3 * i, (i, i), 2, (), kinds[i]))
        out = {i: [] for i in order}
        for step in steps:
            ids, _ = sampler.sample(step[list(order)].copy(), [3 * i for i in order])
            for i, token in zip(order, ids, strict=True):
                out[i].append(token)
        return out

    together = run((0, 1, 2, 3, 4))
    assert run((4, 2, 0, 3, 1)) == together
    for i in range(5):
        assert run((i,)) == {i: together[i]}


def test_a_released_slot_forgets():
    sampler = sampler_with(params_of(temperature=0.0, logit_bias=((5, 100.0),), logprobs=1, repetition_penalty=3.0), 20)
    row = np.zeros((1, 20), np.float32)
    row[0, 3] = 1
    assert sampler.sample(row.copy(), (0,))[0] == [5]
    sampler.release(0)
    sampler.admit(Admit(0, (3,), 1, (), params_of(temperature=0.0)))
    assert sampler.sample(row.copy(), (0,)) == ([3], [])


def test_many_ids_outgrow_the_first_capacity():
    params = params_of(max_tokens=400, seed=1, frequency_penalty=2.0)
    sampler = sampler_with(params, 300)
    got = [sampler.sample(np.zeros((1, 300), np.float32), (0,))[0][0] for _ in range(300)]
    answer = []
    for token in got:
        assert_agrees(token, np.zeros(300, np.float32), params, (0, *answer), 1, ())
        answer.append(token)
    assert len(set(got)) > 200


def test_logprobs_are_of_the_raw_logits_and_at_most_the_vocabulary():
    logits = np.array([1.0, 3.0, -np.inf, 2.0], np.float32)
    params = params_of(temperature=0.0, logit_bias=((0, 50.0),), logprobs=100)
    token, logprobs = one(logits, params)
    assert token == 0
    assert (logprobs.rank, logprobs.top_ids) == (2, (1, 3, 0))  # nothing at -inf: it has no finite logprob
    p = np.exp(logits.astype(np.float64) - 3)
    np.testing.assert_allclose(np.exp(logprobs.top_logprobs), sorted(p / p.sum())[:0:-1], rtol=1e-6)
    assert logprobs.logprob == logprobs.top_logprobs[2]


def test_large_vocabulary_against_float64():
    rng = np.random.default_rng(6)
    for fields in ({}, {"top_p": 0.95}, {"top_k": 1000}, {"top_k": 100, "top_p": 0.5}, {"min_p": 0.001}):
        for kind in ("flat", "usual", "sharp"):
            logits = random_logits(rng, 151_936, kind)
            for seed in range(3):
                params = params_of(seed=seed, logprobs=20, **fields)
                token, logprobs = one(logits, params)
                assert_agrees(token, logits, params, (0,), 1, ())
                expected = reference_logprobs(logits, token, 20)
                assert logprobs.top_ids == expected.top_ids
                np.testing.assert_allclose(logprobs.top_logprobs, expected.top_logprobs, rtol=1e-6, atol=1e-6)


def test_wrong_shapes_and_vocabularies_are_refused():
    sampler = sampler_with(params_of(), 10)
    with pytest.raises(ValueError, match="not float32"):
        sampler.sample(np.zeros((1, 9), np.float32), (0,))
    with pytest.raises(ValueError, match="not float32"):
        sampler.sample(np.zeros((1, 10), np.float64), (0,))
    with pytest.raises(ValueError, match="1048575"):
        Sampler(1, 8, 1 << 20)


def test_no_rows_is_no_work():
    assert sampler_with(params_of(), 10).sample(np.zeros((0, 10), np.float32), ()) == ([], [])


def test_one_compilation_serves_every_kind_of_row():
    """So that a warm-up with any parameters leaves nothing to compile for a request."""
    from engine import sampler_kernels

    sampler = sampler_with(params_of(), 100)
    for i, fields in enumerate(
        [{}, {"top_k": 4}, {"min_p": 0.1}, {"temperature": 0.0}, {"logprobs": 0}, {"presence_penalty": 1.0, "logprobs": 1}]
    ):
        sampler.admit(Admit(0, (0,), 1, (), params_of(seed=i, **fields)))
        sampler.sample(np.zeros((1, 100), np.float32), (0,))
    loops = (sampler_kernels.sample_rows, sampler_kernels.row_logprobs)
    assert [len(loop.signatures) for loop in loops] == [1, 1]


def test_a_bad_word_of_several_ids_is_kept_from_the_answer_as_it_grows():
    """Greedy, with id 3 likeliest, then 2: "3 3" may not be, so 3 and 2 alternate; a prompt that ends in 3 is no part of it."""
    logits = np.array([0, 1, 2, 3], np.float32)
    sampler = sampler_with(params_of(temperature=0.0, bad_words=((3, 3),)), 4, (3,))
    answer = [sampler.sample(logits[None].copy(), (0,))[0][0] for _ in range(4)]
    assert answer == [3, 2, 3, 2]


def test_where_masks_leave_nothing_the_row_says_so_and_bad_logits_stay_bad():
    params = params_of(allowed_token_ids=(1,), bad_words=((1,),))
    assert one([0, 1, 2], params)[0] == NOTHING_LEFT
    assert one([0, 1, np.nan], params)[0] == BAD_LOGITS
    assert one([0, 1, np.inf], params)[0] == BAD_LOGITS
    assert one([-np.inf] * 3, params)[0] == BAD_LOGITS


def test_prompt_ids_are_scored_as_sampled_ones_are():
    rng = np.random.default_rng(3)
    logits = np.stack([random_logits(rng, 70, "usual") for _ in range(3)])
    logits[2, 5] = np.nan
    sampler = Sampler(1, 8, 70)
    i32 = np.int32
    scored = Scored(np.array([0, 1, 2], i32), np.array([4, 4, 5], i32), np.array([1, 2, 9], i32), np.array([7, 69, 0], i32), [2, 0, 1])
    found = sampler.score(logits, scored)
    assert [(row, position) for row, position, _ in found] == [(4, 1), (4, 2), (5, 9)]
    for i, (token, k) in enumerate(((7, 2), (69, 0))):
        expected, value = reference_logprobs(logits[i], token, k), found[i][2]
        assert (value.rank, value.top_ids) == (expected.rank, expected.top_ids)
        np.testing.assert_allclose((value.logprob, *value.top_logprobs), (expected.logprob, *expected.top_logprobs), rtol=1e-6, atol=1e-6)
    assert (found[2][2].logprob, found[2][2].top_ids) == (-np.inf, ())
