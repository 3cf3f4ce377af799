"""Many concurrent streams on the mock engine: none lost, every text equal to its one-at-a-time text.

python -m tests.e2e.streams --streams 2000 --tokens 128
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass

from engine.mock import mock_answer
from engine.sequence import SamplingParams
from tests.e2e.support import Server, Stream, many_files
from text.tokenizer import ByteTokenizer

WIDE = ("engine.max_prefill_token_num=16384",)  # a step has room for every stream
CONNECTING = 200  # requests that are on their way in at a time: a ramp, not a wall of SYNs


@dataclass
class Outcome:
    streams: int
    peak: int  # open at the same time
    wrong: list[int]
    events: int
    elapsed_s: float


def prompt_of(i: int) -> list[int]:
    return list(f"stream {i}: what follows is a hash of what came before".encode())


def expected_text(i: int, tokens: int) -> str:
    """The text of stream i, made one id at a time and decoded at once; special ids are not text."""
    params = SamplingParams(max_tokens=tokens, seed=i, ignore_eos=True)
    return bytes(token for token in mock_answer(prompt_of(i), params) if token < ByteTokenizer.BOS).decode()


async def run(port: int, streams: int, tokens: int) -> Outcome:
    gate, open_now, peak, wrong, events = asyncio.Semaphore(CONNECTING), 0, 0, [], 0

    async def one(i: int) -> None:
        nonlocal open_now, peak, events
        body = {"prompt": prompt_of(i), "max_tokens": tokens, "seed": i, "ignore_eos": True, "stream": True}
        async with gate:
            stream = await Stream.open(port, body)
        open_now += 1
        peak = max(peak, open_now)
        text, seen = await stream.text()
        open_now -= 1
        events += len(seen)
        finishes = [c["finish_reason"] for e in seen[:-1] for c in e.json()["choices"] if c["finish_reason"]]
        if stream.status != 200 or text != expected_text(i, tokens) or seen[-1].data != "[DONE]" or finishes != ["length"]:
            wrong.append(i)

    started = time.monotonic()
    await asyncio.gather(*(one(i) for i in range(streams)))
    return Outcome(streams, peak, wrong, events, time.monotonic() - started)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("--streams", type=int, default=2000)
    cli.add_argument("--tokens", type=int, default=128)
    cli.add_argument("--step-s", type=float, default=0.1, help="seconds a step takes, so that all streams overlap")
    args = cli.parse_args()
    many_files()
    with Server(f"engine.mock_step_s={args.step_s}", *WIDE) as server:
        outcome = asyncio.run(run(server.ready().port, args.streams, args.tokens))
        left = server.metric("vllm:num_requests_running")
    report = {"streams": args.streams, "peak": outcome.peak, "wrong": len(outcome.wrong), "events": outcome.events, "left": left}
    print(json.dumps(report | {"elapsed_s": round(outcome.elapsed_s, 1)}))
    if outcome.wrong or left:
        raise SystemExit(f"wrong streams: {outcome.wrong[:20]}")


if __name__ == "__main__":
    main()
