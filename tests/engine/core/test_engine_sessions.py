"""Sessions and QoS in the running engine: what a turn computes, 1,000 sessions on a pool for 100, shares of the work."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.errors import BadParameter
from engine.loop import Engine, Generation
from engine.mock import MOCK_EOS, mock_answer
from engine.sequence import FinishReason, SamplingParams
from tests.harness import collect, configure, running

GREEDY = SamplingParams(max_tokens=5, temperature=0.0)


async def turn(engine: Engine, ids: list[int], params: SamplingParams, session: str = "", salt: bytes = b"") -> Generation:
    generation = engine.submit(ids, params, session=session, salt=salt)
    events = await collect(generation)
    assert events[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    return generation


async def conversation(engine: Engine, turns: list[list[int]], session: str) -> tuple[list[list[int]], list[int]]:
    """The answers; of each turn, how many ids of its prompt were computed. Without a session nothing is found."""
    history: list[int] = []
    answers, computed = [], []
    for number, words in enumerate(turns):
        generation = await turn(engine, history + words, GREEDY, session, b"" if session else b"%d" % number)
        history = generation.sequence.token_ids
        answers.append(history[generation.num_prompt :])
        computed.append(generation.num_prompt - generation.num_cached)
    engine.check_integrity()
    return answers, computed


def check_twenty_turns(config: dict[str, Any], turns: list[list[int]]) -> None:
    """New ids, and at most one more: the last of an answer that ended for its length has no K/V yet."""

    async def main() -> None:
        async with running(configure(**config)) as engine:
            answers, computed = await conversation(engine, turns, "s")
            lengths = [[], *answers[:-1]]
            owed = [len(words) + (len(before) == GREEDY.max_tokens) for words, before in zip(turns, lengths, strict=True)]
            assert [number - due for number, due in zip(computed, owed, strict=True)] == [0] * 20
            alone, whole = await conversation(engine, turns, "")
        assert answers == alone
        assert sum(computed) == sum(map(len, turns)) + sum(len(before) == GREEDY.max_tokens for before in lengths) < sum(whole) / 5

    asyncio.run(main())


def test_twenty_turns_of_the_mock() -> None:
    turns = [[65 + (i * 7 + j) % 26 for j in range(1 + i % 6)] for i in range(20)]
    check_twenty_turns({"engine": {"device": "mock"}, "cache": {"num_blocks": 64, "cache_block_seq_len": 16}}, turns)


def test_twenty_turns_of_a_model(smollm2: Path) -> None:
    turns = [[1 + (i * 131 + j * 17) % 40000 for j in range(2 + i % 7)] for i in range(20)]
    config = {
        "model": {"path": str(smollm2), "dtype": "float32"}, "engine": {"device": "cpu", "session_len": 512, "max_batch_size": 2},
        "cache": {"num_blocks": 24, "cache_block_seq_len": 32},
    }  # fmt: skip
    check_twenty_turns(config, turns)


def test_a_thousand_sessions_on_a_pool_for_a_hundred() -> None:
    """Two rounds of turns, 50 at a time. The mock reads every block back, so K/V of somebody else would be an error."""
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    histories: dict[int, list[int]] = {i: [] for i in range(1000)}

    async def one(engine: Engine, i: int, words: list[int]) -> int:
        prompt = histories[i] + words
        generation = await turn(engine, prompt, params, f"s{i}")
        histories[i] = generation.sequence.token_ids
        assert histories[i][len(prompt) :] == mock_answer(prompt, params, (MOCK_EOS,))
        return generation.num_cached

    async def main() -> None:
        config = configure(
            engine={"device": "mock", "max_batch_size": 64},
            cache={"num_blocks": 400, "cache_block_seq_len": 4},  # 16 positions a session after its first turn
            sessions={"max_pool_share": 1.0},
        )
        async with running(config) as engine:
            cached = 0
            for number, first in itertools.product(range(2), range(0, 1000, 50)):
                words = [[97 + (i // 26**j) % 26 for j in range(8)] for i in range(first, first + 50)]
                found = await asyncio.gather(*(one(engine, first + k, words[k]) for k in range(50)))
                cached += sum(found) if number else 0
                engine.check_integrity()
            seen = engine.snapshot()
            assert seen.leases_broken >= 1700 and 0 < seen.leases <= 100 and seen.pinned <= 400
            assert cached < 1000, "in the order in which they speak, every session was broken before its second turn"
            last = await asyncio.gather(*(one(engine, i, [65]) for i in range(980, 1000)))
            assert all(found >= 31 - 3 for found in last), "those that spoke last are still there"

    asyncio.run(main())


# -- QoS ----------------------------------------------------------------------------------------------------


def qos(tmp_path: Path, **groups: dict[str, float]) -> dict[str, str]:
    members = {name: [{"id": user, "quota_pct": quota} for user, quota in quotas.items()] for name, quotas in groups.items()}
    path = tmp_path / "qos.json"
    path.write_text(json.dumps({"enable_user_qos": True, "user_groups": list(groups), "user_group_map": members}))
    return {"qos_config_path": str(path)}


async def served(engine: Engine, users: dict[str, int], *, total: int) -> Counter[str]:
    """Each user keeps 24 sequences waiting or running, with prompts of so many ids, until so much work is done; work by user."""
    work: Counter[str] = Counter()

    async def client(user: str, length: int, number: int) -> None:
        for i in itertools.count():
            ids = [65 + (number * 31 + i * 7 + j) % 26 for j in range(length)]
            params = SamplingParams(max_tokens=4 + (number + i) % 9, temperature=0.0, ignore_eos=True)
            generation = engine.submit(ids, params, user_id=user)
            await collect(generation)
            work[user] += length + params.max_tokens

    tasks = [asyncio.create_task(client(user, length, number)) for user, length in users.items() for number in range(24)]
    while work.total() < total:
        await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return work


def run_qos(admission: dict[str, Any], users: dict[str, int], total: int = 20_000) -> Counter[str]:
    async def main() -> Counter[str]:
        config = configure(
            engine={"device": "mock", "max_batch_size": 4, "max_prefill_token_num": 64},
            cache={"num_blocks": 256, "cache_block_seq_len": 16, "enable_prefix_caching": False},
            admission={"max_queue_age_s": 600.0, **admission},
        )
        async with running(config) as engine:
            return await served(engine, users, total=total)

    return asyncio.run(main())


@pytest.mark.parametrize("lengths", [(8, 8, 8), (4, 24, 12)])
def test_shares_follow_the_quotas(tmp_path: Path, lengths: tuple[int, int, int]) -> None:
    """Work, not requests: a user with longer prompts gets fewer of them. Quotas are normalised: 30, 15, 5 are 60, 30, 10 %."""
    admission = qos(tmp_path, Gold={"a": 30, "b": 15, "c": 5})
    work = run_qos(admission, dict(zip("abc", lengths, strict=True)))
    shares = {user: work[user] / work.total() for user in "abc"}
    assert shares == pytest.approx({"a": 0.6, "b": 0.3, "c": 0.1}, abs=0.03)


def test_a_better_group_is_served_alone_while_it_waits(tmp_path: Path) -> None:
    admission = qos(tmp_path, Platinum={"a": 1}, Gold={"b": 100}, Silver={"default": 10}, Bronze={"c": 100})
    work = run_qos(admission, {"c": 8, "b": 8, "a": 8, "nobody": 8}, total=8000)
    assert work["a"] / work.total() > 0.97, "only what was there before it is served beside it"


def test_unknown_users_share_the_default_entry_of_the_third_group(tmp_path: Path) -> None:
    admission = qos(tmp_path, Platinum={"a": 1}, Gold={"b": 1}, Silver={"default": 25, "s": 75}, Bronze={"default": 100, "c": 100})
    work = run_qos(admission, {"x": 8, "": 8, "s": 8, "c": 8}, total=12000)
    assert work["s"] / work.total() == pytest.approx(0.75, abs=0.04)
    assert (work["x"] + work[""]) / work.total() == pytest.approx(0.25, abs=0.04)
    assert work["c"] / work.total() < 0.03


def test_a_quota_of_zero_is_for_when_nobody_else_waits(tmp_path: Path) -> None:
    admission = qos(tmp_path, Gold={"a": 100, "z": 0})
    work = run_qos(admission, {"z": 8, "a": 8}, total=8000)
    assert work["a"] / work.total() > 0.97
    assert run_qos(admission, {"z": 8}, total=2000)["z"] >= 2000


def test_running_work_is_not_pulled_back_and_starvation_ends_in_a_refusal(tmp_path: Path) -> None:
    admission = {**qos(tmp_path, Platinum={"a": 100}, Bronze={"c": 100}), "max_queue_age_s": 0.5}

    async def main() -> None:
        config = configure(engine={"device": "mock", "max_batch_size": 1, "mock_step_s": 0.005}, admission=admission)
        async with running(config) as engine:
            long = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
            worse = engine.submit([65, 66], long, user_id="c")
            events = await worse.next()
            better = [engine.submit([67, i], long, user_id="a") for i in range(4)]
            starved = engine.submit([68, 69], long, user_id="c")
            while events[-1].finish_reason is None:
                events += await worse.next()
            assert events[-1].finish_reason is FinishReason.LENGTH and worse.sequence.num_preemptions == 0
            assert all(b.sequence.num_generated == 0 for b in better)
            begin = time.monotonic()
            last = (await collect(starved))[-1]
            assert last.finish_reason is FinishReason.ABORT and starved.sequence.first_scheduled_s < 0
            assert time.monotonic() - begin < 2
            with pytest.raises(BadParameter, match="The user's group decides who goes first"):
                engine.submit([1], GREEDY, priority=-1, user_id="c")

    asyncio.run(main())
