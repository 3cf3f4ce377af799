"""Does a device give the ids that another implementation gives? `python -m bench.golden --model SmolLM2.gguf --golden FILE --device cuda`.

FILE is a golden file: prompts with 64 greedy ids each and, at each of them, the margin between the two highest float32 logits. The
device runs them alone, in a batch of 64, from the prefix cache, and preempted again and again in a pool that is too small. Ids
must equal the golden ones wherever the margin is over 0.1; where a sequence leaves the golden one at a smaller margin, what comes
after it cannot be compared and is not. Beside that every golden id is scored with the golden ids before it (prompt logprobs):
a choice at each of the positions. First logits are compared with those of the CPU backend in float32, whose ids are golden.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import describe_machine
from config.load import load_config
from config.schema import Config
from engine.build import build_engine, build_runner, resolve_spec
from engine.errors import EngineError
from engine.loop import Engine
from engine.parallel import Ranks
from engine.sequence import FinishReason, SamplingParams
from engine.step import Admit, StepPlan

TIE = 0.1  # logits closer than this may change places in 16 bits
LOGITS_TOLERANCE = 2e-2
TOGETHER = 64
IDS = 64


def configure(args: argparse.Namespace, *more: str) -> Config:
    sets = [
        f"model.path={args.model}", f"model.dtype={args.dtype}", f"engine.device={args.device}", f"engine.tp={args.tp}",
        "engine.session_len=512", f"engine.max_batch_size={TOGETHER}", "cache.cache_block_seq_len=16", "cache.num_blocks=2400",
        *more, *args.set,
    ]  # fmt: skip
    return load_config(None, sets=sets).config


def first_logits(config: Config, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """float32 [prompts, vocab]: logits of the first id after each prompt, from a runner in this process."""
    runner: Any = build_runner(config, Ranks())
    kept: list[np.ndarray] = []
    sample = runner._sampler.sample

    def keep(logits: Any, *rest: Any) -> Any:
        kept.append(np.array(logits.float().cpu().numpy() if hasattr(logits, "cpu") else logits, np.float32)[:1])
        return sample(logits, *rest)

    runner._sampler.sample = keep
    per_prompt = -(-512 // config.cache.cache_block_seq_len)
    for number, prompt in enumerate(prompts):
        admit = Admit(0, tuple(prompt), len(prompt), tuple(range(per_prompt)), SamplingParams(max_tokens=2, temperature=0.0))
        releases = (0,) if number else ()
        runner.step(StepPlan(10 + number, releases=releases, admits=(admit,), slots=(0,), starts=(0,), counts=(len(prompt),), samples=(1,)))
    runner.close()
    return np.concatenate(kept)


async def answer(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> tuple[list[int], list[Any]]:
    """Its ids, and the logprobs of the prompt's ids but the first where `params` asks for them."""
    generation = engine.submit(list(prompt), params)
    ids: list[int] = []
    while True:
        for event in await generation.next():
            if event.token_id >= 0:
                ids.append(event.token_id)
            if event.finish_reason is not None:
                if event.finish_reason is not FinishReason.LENGTH:
                    raise RuntimeError(f"a sequence ended with {event.finish_reason.name}")
                return ids, generation.sequence.prompt_logprobs


def compared(case: dict[str, Any], ids: list[int]) -> tuple[int, int, str]:
    """(positions compared, 1 where the sequence left the golden one at a near tie, what is wrong)."""
    margins = case["top1_top2_logit_margin_64"]
    for place, (got, true) in enumerate(zip(ids, case["ids_64_ignore_eos"], strict=True)):
        if got != true:
            wrong = "" if margins[place] <= TIE else f"{case['name']}: id {place} is {got}, not {true}, at a margin of {margins[place]:.2f}"
            return place, 1, wrong
    return len(ids), 0, ""


async def way(
    name: str, config: Config, cases: list[dict[str, Any]], *, copies: int = 1, together: bool = False, rounds: int = 1
) -> dict[str, Any]:
    """All cases in one way; its last round is compared."""
    params = SamplingParams(max_tokens=IDS, temperature=0.0, ignore_eos=True)
    engine = build_engine(config, resolve_spec(config))
    await engine.start()
    try:
        chosen = [cases[i % len(cases)] for i in range(copies)] if copies > 1 else cases
        for _ in range(rounds):
            if together:
                answers = await asyncio.gather(*(answer(engine, case["prompt_ids"], params) for case in chosen))
            else:
                answers = [await answer(engine, case["prompt_ids"], params) for case in chosen]
        seen = engine.snapshot()
    finally:
        await engine.stop()
    results = [compared(case, ids) for case, (ids, _) in zip(chosen, answers, strict=True)]
    out = {
        "way": name, "sequences": len(chosen), "positions": sum(n for n, _, _ in results), "left_at_ties": sum(n for _, n, _ in results),
        "wrong": [words for *_, words in results if words], "hits": seen.prefix_hits, "preemptions": seen.preemptions,
    }  # fmt: skip
    print(json.dumps(out), flush=True)
    return out


async def scored(config: Config, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Each golden id after the golden ids before it: is it the first choice?"""
    engine = build_engine(config, resolve_spec(config))
    await engine.start()
    try:
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=1)
        found = [await answer(engine, [*case["prompt_ids"], *case["ids_64_ignore_eos"]], params) for case in cases]
    finally:
        await engine.stop()
    differ, wrong, positions, error = 0, [], 0, 0.0
    for case, (_, logprobs) in zip(cases, found, strict=True):
        for place, (margin, true) in enumerate(zip(case["top1_top2_logit_margin_64"], case["logprobs_64"], strict=True)):
            score = logprobs[len(case["prompt_ids"]) - 1 + place]
            positions += 1
            error = max(error, abs(score.logprob - true))
            if score.rank > 0:
                differ += 1
                if margin > TIE:
                    wrong.append(f"{case['name']}: id {place} has rank {score.rank} at a margin of {margin:.2f}")
    out = {"way": "scored", "positions": positions, "differ": differ, "wrong": wrong, "worst_logprob": error}
    print(json.dumps(out), flush=True)
    return out


async def ways(args: argparse.Namespace, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    whole = configure(args)
    return [
        await scored(whole, cases),
        await way("alone", whole, cases),
        await way("batch of 64", whole, cases, copies=TOGETHER, together=True),
        await way("prefix hit", whole, cases, rounds=2),
        await way("preempted", configure(args, "cache.num_blocks=90"), cases, copies=TOGETHER, together=True),
    ]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.golden", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--model", required=True)
    p.add_argument("--golden", type=Path, required=True, help="a golden file: prompts, ids, margins")
    p.add_argument("--device", default="cuda")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    p.add_argument("--tp", type=int, default=1)
    p.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    p.add_argument("--json", action="store_true")
    args = p.parse_args(argv)
    cases = next(value for value in json.loads(args.golden.read_text()).values() if isinstance(value, list))
    out: dict[str, Any] = {"bench": "golden", "model": Path(args.model).name, "device": args.device, "dtype": args.dtype, "tp": args.tp}
    try:
        out["ways"] = asyncio.run(ways(args, cases))
        if args.tp == 1:
            prompts = [case["prompt_ids"] for case in cases]
            own = first_logits(configure(args, "cache.num_blocks=64"), prompts)
            args.device, args.dtype = "cpu", "float32"
            true = first_logits(configure(args, "cache.num_blocks=64"), prompts)
            errors = np.linalg.norm(own - true, axis=1) / np.linalg.norm(true, axis=1)
            out["first_logits"] = {"median": float(np.median(errors)), "worst": float(errors.max())}
            own, true = (each - each.mean(axis=1, keepdims=True) for each in (own, true))  # what all ids share, no probability sees
            out["first_logits"]["worst_centred"] = float((np.linalg.norm(own - true, axis=1) / np.linalg.norm(true, axis=1)).max())
            print(json.dumps(out["first_logits"]), flush=True)
    except (EngineError, OSError, RuntimeError) as error:
        print(f"bench.golden: {error}", file=sys.stderr)
        return 2
    wrong = [words for found in out["ways"] for words in found["wrong"]]
    bad = bool(wrong) or out.get("first_logits", {"worst": 0.0})["worst"] > LOGITS_TOLERANCE
    if args.json:
        print(json.dumps(out | {"machine": describe_machine()}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
