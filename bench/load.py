"""HTTP load: `python -m bench.load --url http://127.0.0.1:23333 --num-prompts 100 --request-rate 4`.

Open loop: arrivals follow a schedule that is fixed beforehand and latency counts from the intended send time, also where
`--max-concurrency` makes a request wait in this client. Closed loop: an infinite rate with `--max-concurrency N` keeps N
requests running, and latency counts from the send. Speaks to any OpenAI-compatible server.

Prints vLLM's "Serving Benchmark Result" block; with `--json` the last line of stdout is one JSON object with the keys of
`vllm bench serve`. Exit code 1 when no request succeeded.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from bench import client, metrics, workload
from bench.client import Target
from bench.metrics import Answer
from bench.workload import Job

DRAIN_S = 5.0  # at the end of the time limit: how long cancelled requests may take to close


@dataclass(frozen=True, slots=True)
class Pace:
    """How the jobs are let go. `max_concurrency` 0: no bound."""

    open_loop: bool
    max_concurrency: int = 0
    max_seconds: float = 600.0


class Lag:
    """How late this client's own event loop runs: its figures say whether a latency is the server's or the client's."""

    def __init__(self, period_s: float = 0.02) -> None:
        self.period_s = period_s
        self.late_s: list[float] = []

    async def watch(self) -> None:
        while True:
            wanted = time.perf_counter() + self.period_s
            await asyncio.sleep(self.period_s)
            self.late_s.append(max(0.0, time.perf_counter() - wanted))


async def run(target: Target, jobs: Sequence[Job], pace: Pace, keep_text: bool = False) -> tuple[list[Answer], float, Lag]:
    """Send every job once; the answers in job order, the seconds from the start to the last end, and this client's lag.

    Past `max_seconds` nothing more is sent; what is still running is cancelled and counted as failed, with the reason.
    """
    bodies = [target.body(job) for job in jobs]
    answers = [Answer(job.at_s, input_len=job.input_len) for job in jobs]
    gate = asyncio.Semaphore(pace.max_concurrency) if pace.max_concurrency else None
    lag = Lag()
    async with client.session() as http:
        start = time.perf_counter()

        async def one(index: int) -> None:
            answer = answers[index]
            if gate is not None:
                async with gate:
                    if not pace.open_loop:
                        answer.intended_s = time.perf_counter() - start
                    await client.ask(http, target, bodies[index], answer, start, keep_text)
            else:
                await client.ask(http, target, bodies[index], answer, start, keep_text)

        watcher = asyncio.create_task(lag.watch())
        tasks: list[asyncio.Task[None]] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(pace.max_seconds):
                await _release(jobs, start, one, tasks)
                await asyncio.gather(*tasks)
        await _cancel([*tasks, watcher])
    for answer in answers:
        if answer.end_s < 0 and not answer.error:
            answer.error = f"not sent within --max-seconds {pace.max_seconds:g}"
    return answers, max((a.end_s for a in answers), default=0.0), lag


async def _release(jobs: Sequence[Job], start: float, one: Callable, tasks: list[asyncio.Task[None]]) -> None:
    for index, job in enumerate(jobs):
        wait = start + job.at_s - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(index)))


async def _cancel(tasks: list[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=DRAIN_S)


async def first_model(url: str, api_key: str) -> str:
    """The first name in /v1/models."""
    auth = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with client.session() as http, http.get(url + "/v1/models", headers=auth) as response:
        body = await response.json(content_type=None)
        if response.status != 200 or not body.get("data"):
            raise ValueError(f"{url}/v1/models answered {response.status} and names no model; give --model.")
        return body["data"][0]["id"]


async def wait_ready(url: str, seconds: float) -> float:
    """Seconds until /health answered 200; `TimeoutError` naming the last answer after `seconds`."""
    start, last = time.perf_counter(), "nothing"
    async with client.session() as http:
        while True:
            try:
                async with http.get(url + "/health", timeout=aiohttp.ClientTimeout(total=5)) as response:
                    if response.status == 200:
                        return time.perf_counter() - start
                    last = f"HTTP {response.status}"
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                last = type(error).__name__
            if time.perf_counter() - start > seconds:
                raise TimeoutError(f"{url}/health was not 200 within {seconds:g} s (last: {last}).")
            await asyncio.sleep(0.1)


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """The jobs that the command line describes, in order of their intended send times, and behind them those to warm up with."""
    words, count = args.endpoint == "chat", args.num_prompts + args.num_warmups
    if args.trace:
        lengths = args.length_scale, args.max_input_len, args.max_output_len
        play = workload.Playback(args.trace_speed, *lengths, args.vocab_size, args.seed, words)
        return list(workload.trace_jobs(workload.read_trace(Path(args.trace)), count, play))
    times = workload.arrival_times(count, args.request_rate, args.burstiness, args.seed)
    if args.dataset == "mixed512":
        prompts = workload.mixed_prompts(count, args.length_scale, args.vocab_size, args.seed, words)
    elif args.dataset == "random":
        lengths = args.input_len, args.output_len, args.range_ratio
        prompts = workload.random_prompts(count, *lengths, args.vocab_size, args.seed, words)
    elif args.dataset == "corpus":
        prompts = workload.corpus_prompts(_needed(args), count, args.input_len, args.output_len, _encoder(args), args.seed)
    else:
        prompts = workload.jsonl_prompts(_needed(args), count, args.output_len)
    return [Job(at_s, *prompt) for at_s, prompt in zip(times, prompts, strict=True)]


def _needed(args: argparse.Namespace) -> Path:
    if not args.dataset_path:
        raise ValueError(f"--dataset {args.dataset} needs --dataset-path.")
    return Path(args.dataset_path)


def _encoder(args: argparse.Namespace) -> Callable[[str], list[int]] | None:
    if not args.tokenizer or args.endpoint == "chat":
        return None
    from text.tokenizer import load_tokenizer  # only needed here; the other datasets run without a tokenizer

    return load_tokenizer(Path(args.tokenizer)).encode


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.load", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--url", default="http://127.0.0.1:23333", help="server, without a path")
    p.add_argument("--model", default="", help="model name; default: the first of /v1/models")
    p.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    p.add_argument("--dataset", choices=("random", "mixed512", "corpus", "jsonl"), default="random")
    p.add_argument("--dataset-path", default="", help="text file for corpus, JSON lines for jsonl")
    p.add_argument("--tokenizer", default="", help="corpus: cut prompts to exactly --input-len ids of this tokenizer")
    p.add_argument("--input-len", type=_at_least(1), default=128, help="prompt tokens")
    p.add_argument("--output-len", type=_at_least(1), default=128, help="answer tokens")
    p.add_argument("--range-ratio", type=_between(0, 1), default=0.0, help="random: lengths vary by plus or minus this share")
    p.add_argument("--vocab-size", type=_at_least(4), default=32000, help="random ids are below this")
    p.add_argument("--num-prompts", type=_at_least(1), default=None, help="requests to send; 100, mixed512: 512")
    p.add_argument("--request-rate", type=_positive, default=math.inf, help="arrivals a second; inf: all at once")
    p.add_argument("--burstiness", type=_positive, default=1.0, help="1: Poisson arrivals; less: burstier")
    p.add_argument("--max-concurrency", type=_at_least(0), default=0, help="requests running at once; 0: no bound")
    p.add_argument("--trace", default="", help="arrivals and lengths from an Azure CSV or a Mooncake JSONL")
    p.add_argument("--trace-speed", type=_positive, default=1.0, help="play the trace this many times faster")
    p.add_argument("--length-scale", type=_between(0.001, 100), default=1.0, help="trace, mixed512: multiply lengths by this")
    p.add_argument("--max-input-len", type=_at_least(0), default=0, help="trace: cut prompts to this; 0: uncut")
    p.add_argument("--max-output-len", type=_at_least(0), default=0, help="trace: cut answers to this; 0: uncut")
    p.add_argument("--ignore-eos", action="store_true", help="answers run to their full length")
    p.add_argument("--temperature", type=_between(0, 2), default=0.0)
    p.add_argument("--extra-body", type=_json_object, default={}, help="JSON object merged into every request")
    p.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help="objectives, e.g. ttft:200 tpot:50 e2el:5000")
    p.add_argument("--num-warmups", type=_at_least(0), default=0, help="requests sent before the run, not counted")
    p.add_argument("--ready-check-timeout-sec", type=_between(0, 3600), default=0.0, help="wait this long for /health; 0: do not ask")
    p.add_argument("--request-timeout", type=_positive, default=600.0, help="seconds one answer may take")
    p.add_argument("--max-seconds", type=_positive, default=600.0, help="seconds the whole run may take")
    p.add_argument("--seed", type=_at_least(0), default=0)
    p.add_argument("--save-result", default="", metavar="FILE", help="append the result to this file as one JSON line")
    p.add_argument("--save-detailed", action="store_true", help="keep itls and generated texts in the result")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="compare the last results of two files; sends nothing")
    p.add_argument("--json", action="store_true", help="last line of stdout: the result as JSON")
    return p


def _at_least(low: int) -> Callable[[str], int]:
    def check(word: str) -> int:
        if not word.isdecimal() or not low <= int(word) <= workload.MAX_REQUESTS:
            raise argparse.ArgumentTypeError(f"must be an integer from {low} to {workload.MAX_REQUESTS}, not {word!r}")
        return int(word)

    return check


def _between(low: float, high: float) -> Callable[[str], float]:
    def check(word: str) -> float:
        value = float(word)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, not {word!r}")
        return value

    return check


def _positive(word: str) -> float:
    value = float(word)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {word!r}")
    return value


def _json_object(word: str) -> dict:
    value = json.loads(word)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


async def bench(args: argparse.Namespace) -> dict:
    """The whole command after parsing: wait, warm up, run, and return the result."""
    objectives = metrics.parse_goodput(args.goodput)
    jobs = make_jobs(args)
    url, key = args.url.rstrip("/"), os.environ.get("OPENAI_API_KEY", "")
    if args.ready_check_timeout_sec:
        await wait_ready(url, args.ready_check_timeout_sec)
    model = args.model or await first_model(url, key)
    target = Target(url, model, args.endpoint, args.temperature, args.ignore_eos, key, args.request_timeout, args.extra_body)
    if args.num_warmups:
        # prompts of their own: the run must not find its prompts in the server's prefix cache
        warm = [dataclasses.replace(job, at_s=0.0) for job in jobs[args.num_prompts :]]
        await run(target, warm, Pace(False, args.max_concurrency, args.max_seconds))
    pace = Pace(bool(args.trace) or math.isfinite(args.request_rate), args.max_concurrency, args.max_seconds)
    answers, duration, lag = await run(target, jobs[: args.num_prompts], pace, keep_text=args.save_detailed)
    return describe(args, model) | metrics.result(answers, duration, objectives, args.save_detailed) | {
        "client_lag_p99_ms": metrics.percentile(lag.late_s, 99) * 1000
    }  # fmt: skip


def describe(args: argparse.Namespace, model: str) -> dict:
    """What was run, under vLLM's names."""
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": "openai-chat" if args.endpoint == "chat" else "openai",
        "model_id": model,
        "num_prompts": args.num_prompts,
        "request_rate": args.request_rate if math.isfinite(args.request_rate) else "inf",
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency or None,
        "seed": args.seed,
        "dataset": Path(args.trace).name if args.trace else args.dataset,
    }


def compare_files(a: str, b: str) -> list[dict]:
    """The comparison of the last JSON line of each file, printed as a table."""
    left, right = (json.loads(Path(name).read_text(encoding="utf-8").strip().splitlines()[-1]) for name in (a, b))
    rows = metrics.compare(left, right)
    print(f"{'':16}{'A':>10}{'B':>10}{'B/A':>8}   95 % interval")
    for row in rows:
        print(f"{row['metric']:16}{row['a']:>10.1f}{row['b']:>10.1f}{row['ratio']:>8.3f}   {row['low']:.3f} .. {row['high']:.3f}")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.num_prompts = args.num_prompts or (workload.MIXED if args.dataset == "mixed512" else 100)
    if args.compare:
        rows = compare_files(*args.compare)
        if args.json:
            print(json.dumps({"compare": rows}))
        return 0
    try:
        out = asyncio.run(bench(args))
    except (ValueError, OSError, aiohttp.ClientError) as error:
        print(f"bench.load: {error}", file=sys.stderr)
        return 2
    print(metrics.block(out))
    if args.save_result:
        with open(args.save_result, "a", encoding="utf-8") as file:
            file.write(json.dumps(out) + "\n")
    if args.json:
        print(json.dumps(out))
    return 0 if out["completed"] else 1


if __name__ == "__main__":
    sys.exit(main())
