"""Small random models of every family give the ids that transformers gives, on every backend and in every order of work.

The ids in `toys.transformers.json` were made by transformers in float32 from the same checkpoints (`toy_checkpoint` is
seeded); each step's margin is above 6e-5.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from engine.sequence import SamplingParams
from tests.fixtures.toy import toy_checkpoint
from tests.harness import answers, configure, running

GOLDEN = json.loads((Path(__file__).parent / "toys.transformers.json").read_text())
GREEDY_24 = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)

WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "reference": {"engine": {"device": "reference"}},
    "cpu": {},
    "cpu, one thread": {"engine": {"num_threads": 1}},
    "cpu, blocks of 4, preempted": {"cache": {"cache_block_seq_len": 4, "num_blocks": 34}},
    "cpu, prompt parts of 3": {"engine": {"max_prefill_token_num": 3}},
}


async def run(model: Path, sections: dict[str, dict[str, Any]], prompts: list[list[int]]) -> tuple[list[list[int]], int]:
    engine = {"device": "cpu", "max_batch_size": 8, "session_len": 128} | sections.get("engine", {})
    cache = {"num_blocks": 64, "cache_block_seq_len": 16} | sections.get("cache", {})
    config = configure(model={"path": str(model), "dtype": "float32"}, engine=engine, cache=cache)
    async with running(config) as started:
        ids = await answers(started, prompts, GREEDY_24, together=True)
        again = await answers(started, prompts, GREEDY_24, together=False)  # now their prefixes are cached
        started.check_integrity()
        assert ids == again
        return ids, started.snapshot().preemptions


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=[case["name"] for case in GOLDEN["cases"]])
def test_ids_equal_those_of_transformers(case: dict[str, Any], way: str, tmp_path: Path) -> None:
    model = toy_checkpoint(tmp_path / "model", case["family"], **case["config"])
    ids, preemptions = asyncio.run(run(model, WAYS[way], GOLDEN["prompts"]))
    assert ids == case["ids"]
    assert (preemptions > 0) == ("preempted" in way)


@pytest.mark.parametrize("case", [GOLDEN["cases"][i] for i in (0, 1, 5)], ids=lambda case: case["name"])
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_two_ranks_give_the_ids_of_one(case: dict[str, Any], device: str, tmp_path: Path) -> None:
    model = toy_checkpoint(tmp_path / "model", case["family"], shards=2, **case["config"])
    ids, _ = asyncio.run(run(model, {"engine": {"device": device, "tp": 2, "check_ranks": True}}, GOLDEN["prompts"]))
    assert ids == case["ids"]


def test_four_ranks_share_two_kv_heads(tmp_path: Path) -> None:
    case = GOLDEN["cases"][0]
    model = toy_checkpoint(tmp_path / "model", case["family"], **case["config"])
    ids, _ = asyncio.run(run(model, {"engine": {"device": "reference", "tp": 4}}, GOLDEN["prompts"]))
    assert ids == case["ids"]
