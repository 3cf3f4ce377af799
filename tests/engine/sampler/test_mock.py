"""The mock runner: same ids as the naive answer however a sequence is cut, and a canary that does fire."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.schema import Cache, Config
from config.schema import Engine as Knobs
from engine.mock import EOS_ONE_IN, MOCK_EOS, MockCanaryError, MockRunner, mock_answer
from engine.models.spec import ModelSpec, RopeSpec
from engine.sequence import SamplingParams
from engine.step import NOTHING_LEFT, Admit, StepPlan

SPEC = ModelSpec(
    family="mock", vocab_size=260, hidden_size=0, intermediate_size=0, num_layers=0, num_heads=1, num_kv_heads=1, head_dim=0,
    rms_norm_eps=1e-6, max_position=512, rope=RopeSpec(), bos_token_id=256, eos_token_ids=(MOCK_EOS,),
)  # fmt: skip
PROMPT = tuple(b"What is a block table?")


def runner(block=4, batch=4):
    config = dataclasses.replace(Config(), engine=Knobs(device="mock", max_batch_size=batch), cache=Cache(cache_block_seq_len=block))
    return MockRunner(config, SPEC, 256, 64)


def blocks_for(n, block=4, first=0):
    return tuple(range(first, first + -(-n // block)))


def params_of(n=20, **fields):
    return SamplingParams(max_tokens=n, ignore_eos=True, **fields)


def drive(mock, params, prompt=PROMPT, part=5, slot=1, known=(), n=20):
    """Prompt parts of `part`, then decode; -> the answer, `known` included."""
    ids = [*prompt, *known]
    admit = Admit(slot, tuple(ids), len(prompt), blocks_for(len(prompt) + n + 1, mock._block_seq_len), params, (MOCK_EOS,))
    step, start, answer = 0, 0, list(known)
    while len(answer) < n:
        count = min(part, len(prompt) + len(answer) - start)
        sampled = start + count == len(prompt) + len(answer)
        plan = StepPlan(
            step, admits=(admit,) if step == 0 else (), slots=(slot,), starts=(start,), counts=(count,), samples=(int(sampled),)
        )
        answer += mock.step(plan).token_ids
        start, step = start + count, step + 1
    mock.step(StepPlan(step, releases=(slot,)))
    return answer


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 259), min_size=1, max_size=40),
    part=st.integers(1, 50),
    seed=st.integers(0, (1 << 64) - 1),
    block=st.sampled_from([1, 2, 4, 16, 64]),
    cut=st.integers(0, 19),
    min_tokens=st.sampled_from([0, 7]),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_any_cut_gives_the_naive_answer(prompt, part, seed, block, cut, min_tokens, temperature):
    params = params_of(seed=seed, min_tokens=min_tokens, stop_token_ids=(40, 41), temperature=temperature)
    free_running = dataclasses.replace(params, stop_token_ids=(), min_tokens=0)
    wanted = mock_answer(prompt, free_running)
    assert drive(runner(block), free_running, prompt, part) == wanted
    assert drive(runner(block), free_running, prompt, part, known=wanted[:cut]) == wanted  # as after a preemption
    stopping = mock_answer(prompt, params)
    assert len(stopping) >= max(min_tokens, 1)
    assert drive(runner(block), params, prompt, part, n=len(stopping)) == stopping


def test_seeds_matter_unless_greedy():
    sampled = {tuple(mock_answer(PROMPT, params_of(seed=seed))) for seed in range(10)}
    greedy = {tuple(mock_answer(PROMPT, params_of(seed=seed, temperature=0.0))) for seed in range(10)}
    assert (len(sampled), len(greedy)) == (10, 1)


def test_ids_are_printable_and_one_in_64_ends():
    answer = mock_answer(PROMPT, params_of(20_000))
    ends = answer.count(MOCK_EOS)
    assert all(32 <= token < 127 or token == MOCK_EOS for token in answer)
    assert 0.8 < ends * EOS_ONE_IN / len(answer) < 1.2


def test_logprobs_are_consistent():
    mock = runner()
    admit = Admit(0, PROMPT, len(PROMPT), blocks_for(64), params_of(logprobs=5))
    result = mock.step(StepPlan(0, admits=(admit,), slots=(0,), starts=(0,), counts=(len(PROMPT),), samples=(1,)))
    (index, logprobs), token = result.logprobs[0], result.token_ids[0]
    assert index == 0
    assert logprobs.top_ids[0] == token and len(set(logprobs.top_ids)) == 5
    assert logprobs.logprob == logprobs.top_logprobs[logprobs.rank]


def admit_plan(step, slot, ids, blocks, start=0, **more):
    return StepPlan(
        step, admits=(Admit(slot, tuple(ids), len(ids), tuple(blocks), params_of()),),
        slots=(slot,), starts=(start,), counts=(len(ids) - start,), samples=(1,), **more,
    )  # fmt: skip


def test_the_canary_fires_when_a_reused_prefix_is_not_the_same():
    for ids, error in ((PROMPT, False), ((7, *PROMPT[1:]), True), ((*PROMPT[:15], 7, *PROMPT[16:]), True)):
        mock = runner()
        mock.step(admit_plan(0, 0, PROMPT, blocks_for(24)))
        again = admit_plan(1, 1, ids, (0, 1, 2, 3, 20, 21), start=16)
        if error:
            with pytest.raises(MockCanaryError, match="slot 1 reads position"):
                mock.step(again)
        else:
            assert len(mock.step(again).token_ids) == 1


def test_the_canary_fires_when_a_block_is_given_to_two():
    mock = runner()
    n = len(PROMPT)
    mock.step(admit_plan(0, 0, PROMPT, blocks_for(n + 1)))
    mock.step(admit_plan(1, 1, PROMPT[::-1], (10, 11, 2, 12, 13, 14)))  # block 2 belongs to slot 0
    with pytest.raises(MockCanaryError, match="slot 0 reads position"):
        mock.step(StepPlan(2, slots=(0,), starts=(n,), counts=(1,), samples=(1,)))


def test_the_canary_fires_when_positions_were_never_computed():
    with pytest.raises(MockCanaryError, match="reads position 0"):
        runner().step(admit_plan(0, 0, PROMPT, blocks_for(24), start=1))


def test_plans_that_contradict_the_batch_are_refused():
    n = len(PROMPT)
    good = admit_plan(0, 0, PROMPT, blocks_for(n + 1))
    for change, match in [
        ({"samples": (0,)}, "has samples = 0"),
        ({"counts": (n + 1,)}, f"has {n} ids"),
        ({"counts": (n - 1,)}, "has samples = 1"),
        ({"slots": (2,)}, "slot 2 has a row but holds no sequence"),
        ({"releases": (0,)}, "slot 0 is released"),
        ({"block_slots": (3,), "block_ids": (9,)}, "slot 3 gets a block"),
        ({"admits": (dataclasses.replace(good.admits[0], blocks=(0, 1)),)}, "no block for position"),
        ({"admits": (dataclasses.replace(good.admits[0], blocks=(0, 1, 2, 3, 4, 64)),)}, "does not exist"),
        ({"admits": (dataclasses.replace(good.admits[0], blocks=(0, 1, 2, 3, 1, 5)),)}, "same KV slot"),
        ({"slots": (0, 0), "starts": (0, 0), "counts": (n, n), "samples": (1, 1)}, "two rows"),
    ]:
        with pytest.raises(MockCanaryError, match=match):
            runner().step(dataclasses.replace(good, **change))
    mock = runner()
    mock.step(good)
    with pytest.raises(MockCanaryError, match="given away"):
        mock.step(dataclasses.replace(good, step=1))


def test_two_sequences_side_by_side_and_the_time_a_step_takes():
    config = dataclasses.replace(
        Config(), engine=Knobs(device="mock", max_batch_size=2, mock_step_s=0.02), cache=Cache(cache_block_seq_len=4)
    )
    mock = MockRunner(config, SPEC, 256, 64)
    admits = tuple(Admit(i, PROMPT[i:], len(PROMPT) - i, blocks_for(28, first=10 * i), params_of(seed=i)) for i in range(2))
    counts = tuple(len(admit.token_ids) for admit in admits)
    result = mock.step(StepPlan(0, admits=admits, slots=(0, 1), starts=(0, 0), counts=counts, samples=(1, 1)))
    second = mock.step(StepPlan(1, slots=(1, 0), starts=(counts[1], counts[0]), counts=(1, 1), samples=(1, 1)))
    for i in range(2):
        assert [result.token_ids[i], second.token_ids[1 - i]] == mock_answer(PROMPT[i:], params_of(seed=i))[:2]
    assert second.elapsed_us >= 20_000


def test_masks_choose_another_id_as_the_naive_answer_does():
    free = mock_answer(PROMPT, params_of(seed=3))
    assert set(drive(runner(), params_of(seed=3, allowed_token_ids=(65, 66)))) <= {65, 66}
    for fields in ({"allowed_token_ids": (65, 66, 67), "bad_words": ((65, 66), (67,))}, {"bad_words": ((free[0],), (free[3], free[4]))}):
        params = params_of(seed=3, **fields)
        wanted = mock_answer(PROMPT, params)
        assert len(wanted) == 20 and wanted != free and drive(runner(), params) == wanted
        assert not [word for word in params.bad_words for i in range(20) if tuple(wanted[i : i + len(word)]) == word]


def test_masks_that_leave_nothing():
    assert mock_answer(PROMPT, params_of(allowed_token_ids=(65,), bad_words=((65, 65),))) == [65]
    assert drive(runner(), params_of(1, allowed_token_ids=(65,), bad_words=((65,),)), n=1) == [NOTHING_LEFT]


def test_prompt_logprobs_do_not_depend_on_how_the_prompt_is_cut():
    found = []
    for part in (3, 50):
        mock, params = runner(), params_of(prompt_logprobs=4)
        admit = Admit(0, PROMPT, len(PROMPT), blocks_for(len(PROMPT) + 1), params, (MOCK_EOS,))
        values, start = [], 0
        while start < len(PROMPT):
            count = min(part, len(PROMPT) - start)
            sampled = int(start + count == len(PROMPT))
            plan = StepPlan(start, admits=(admit,) if start == 0 else (), slots=(0,), starts=(start,), counts=(count,), samples=(sampled,))
            values += mock.step(plan).prompt_logprobs
            start += count
        assert [(row, position) for row, position, _ in values] == [(0, i) for i in range(1, len(PROMPT))]
        found.append([value for _, _, value in values])
    assert found[0] == found[1] and len({value.logprob for value in found[0]}) > 3
    assert all(value.top_ids[value.rank] == token for value, token in zip(found[0], PROMPT[1:]) if value.rank < 4)
