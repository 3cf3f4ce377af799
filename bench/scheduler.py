"""How long the scheduler takes: `plan` + `apply` of one step in steady decode, one step in flight, as the loop drives it.

    python -m bench.scheduler [--json] [--steps 2000] [--block-seq-len 64]

Every sequence decodes one token a step. Block growth, prefix-cache commits (SHA-256 of each block that fills up) and
token events are in the figure; making up the result is not. `churn` is the same with answers of 128 tokens, each
finished sequence replaced by a new one at once. Knows no model: the "runner" samples a constant id.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import deque

from engine.cache.manager import CacheManager
from engine.scheduler import Scheduler
from engine.sequence import SamplingParams, Sequence
from engine.step import StepPlan, StepResult

SIZES = (1, 64, 256, 1024)
PROMPT = 32
ANSWER = 128
WARM_UP = 200  # steps left out: prompts, first growth


def drive(num_sequences: int, steps: int, block_seq_len: int, *, churn: bool) -> list[float]:
    """Microseconds of `plan` + `apply`, one figure a step."""
    longest = PROMPT + (ANSWER if churn else steps + WARM_UP) + 8
    manager = CacheManager(num_sequences * (-(-longest // block_seq_len) + 1), block_seq_len)
    scheduler = Scheduler(manager, max_batch_size=num_sequences, max_step_tokens=8192, session_len=longest)
    number = 0
    for number in range(num_sequences):  # answers end at different steps, blocks fill up at different steps
        _add(scheduler, number, PROMPT + number % 29, ANSWER - number % 97 if churn else longest)
    in_flight: deque[StepPlan] = deque()
    micros = []
    for _ in range(WARM_UP + steps):
        begin = time.perf_counter()
        plan = scheduler.plan(0.0)
        planned = time.perf_counter()
        if plan is not None:
            in_flight.append(plan)
        spent = planned - begin
        if len(in_flight) == 2 or plan is None:
            done = in_flight.popleft()
            result = StepResult(done.step, (7,) * sum(done.samples))
            begin = time.perf_counter()
            events = scheduler.apply(result, 0.0)
            spent += time.perf_counter() - begin
            for _ in range(sum(event.finish_reason is not None for event in events)):
                number += 1
                _add(scheduler, number, PROMPT, ANSWER)
        micros.append(spent * 1e6)
    return micros[WARM_UP:]


def _add(scheduler: Scheduler, number: int, num_prompt: int, max_tokens: int) -> None:
    prompt = [number * 31 % 1009, *range(num_prompt - 1)]
    params = SamplingParams(max_tokens=max_tokens)
    scheduler.add(Sequence(number, prompt, num_prompt, params, eos_token_ids=frozenset((2,)), arrival_s=float(number)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--block-seq-len", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    print(f"plan + apply, us a step; blocks of {args.block_seq_len}; {args.steps} steps")
    print(f"{'':8}{'sequences':>10}{'p50':>9}{'p99':>9}{'max':>9}{'ns a sequence':>15}")
    for kind, churn in (("steady", False), ("churn", True)):
        for size in SIZES:
            micros = drive(size, args.steps, args.block_seq_len, churn=churn)
            p50, p99 = statistics.median(micros), statistics.quantiles(micros, n=100)[98]
            print(f"{kind:8}{size:10}{p50:9.1f}{p99:9.1f}{max(micros):9.1f}{p50 / size * 1e3:15.0f}")
            prefix = "churn_" if churn else ""
            found.setdefault(f"{prefix}plan_apply_us_p50", {})[str(size)] = round(p50, 1)
            found.setdefault(f"{prefix}plan_apply_us_p99", {})[str(size)] = round(p99, 1)
    if args.json:
        print(json.dumps({**found, "steps": args.steps, "block_seq_len": args.block_seq_len}))


if __name__ == "__main__":
    main()
