"""Greedy ids of SmolLM2-135M-Instruct in exact mode equal those of another implementation (transformers, float32).

The golden file holds 10 chat prompts with 64 ids each, made from the same weights dequantized and rounded to float16.
Every way of running must give exactly these ids: alone or together, prefix cached or not, preempted, in prompt parts of
any size, on one rank or two.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from config.schema import Config
from engine.sequence import SamplingParams
from tests.harness import answers, configure, running

GREEDY_64 = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
CASES = json.loads((Path(__file__).parent / "cases.json").read_text())


@pytest.fixture(scope="module")
def golden(assets: Path) -> list[dict[str, Any]]:
    file = json.loads((assets / "golden" / "smollm2-135m-instruct.float32.transformers.json").read_text())
    cases = next(value for value in file.values() if isinstance(value, list))
    assert len(cases) == 10
    return cases


def exact(path: Path, **sections: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(path), "dtype": "float32"},
        "engine": {"device": "cpu", "session_len": 512, "max_batch_size": 16},
        "cache": {"num_blocks": 256, "cache_block_seq_len": 16},
    }
    for name, knobs in sections.items():
        base[name] = base.get(name, {}) | knobs
    return configure(**base)


async def run(config: Config, golden: list[dict[str, Any]], *, together: bool, rounds: int = 1) -> tuple[list[list[int]], dict[str, int]]:
    async with running(config) as engine:
        for _ in range(rounds):
            ids = await answers(engine, [case["prompt_ids"] for case in golden], GREEDY_64, together=together)
        engine.check_integrity()
        seen = engine.snapshot()
        return ids, {"hits": seen.prefix_hits, "preemptions": seen.preemptions}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_greedy_ids_equal_the_golden_ones(case: dict[str, Any], golden: list[dict[str, Any]], smollm2: Path) -> None:
    config = exact(smollm2, **case["config"])
    ids, seen = asyncio.run(run(config, golden, together=case["together"], rounds=case.get("rounds", 1)))
    wrong = [g["name"] for g, got in zip(golden, ids, strict=True) if got != g["ids_64_ignore_eos"]]
    assert not wrong
    for count, least in case.get("at_least", {}).items():
        assert seen[count] >= least, f"{count} = {seen[count]}: the case did not happen"
    for count, most in case.get("at_most", {}).items():
        assert seen[count] <= most
