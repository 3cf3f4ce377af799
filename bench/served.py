"""A server of our own, started for one measurement: `python -m bench.served --model DIR --workload mixed512 --json`.

Ready: seconds from the command to the first token that a client has in hand (the interpreter, the weights, the kernels and
HTTP are all in it); `--cold` gives the server an empty kernel cache. Then the mixed workload, streamed, all requests at once,
from this process, which is not the server's. Prefix caching is off. The server is gone when this ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from bench import load, metrics, workload
from bench.client import Target
from bench.load import Pace
from bench.machine import describe_machine
from bench.offline import LONG_LISTS
from bench.workload import Job
from config.errors import ConfigError
from config.load import load_config
from engine.build import resolve_spec
from engine.errors import EngineError

ROOT = Path(__file__).resolve().parent.parent
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that was started: where it will answer, and when its command was given (monotonic)."""

    url: str
    started_s: float
    process: subprocess.Popen[str]


@contextlib.contextmanager
def serving(knobs: list[str], **options: Any) -> Iterator[Serving]:
    """`python server.py` with these --set words on a free port; ended by SIGTERM, and by SIGKILL where that is not heard."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [word for knob in (*knobs, f"server.server_port={port}") for word in ("--set", knob)]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "server.py", *words], cwd=ROOT, text=True, **options)
    try:
        yield Serving(f"http://127.0.0.1:{port}", started, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=STOP_TIMEOUT_S)
        finally:
            process.kill()
            process.wait()


async def wait_alive(server: Serving, seconds: float) -> None:
    """Until /health is green; RuntimeError at once where the process ends first."""
    waiting = asyncio.ensure_future(load.wait_ready(server.url, seconds))
    while not waiting.done():
        if (code := server.process.poll()) is not None:
            waiting.cancel()
            raise RuntimeError(f"the server ended with exit code {code} before it was ready")
        await asyncio.wait([waiting], timeout=0.2)
    await waiting


async def first_token(server: Serving, seconds: float, vocab_size: int) -> tuple[float, Target]:
    """Seconds from the command to the first token, and how to ask for more."""
    await wait_alive(server, seconds)
    target = Target(server.url, await load.first_model(server.url, ""), ignore_eos=True)
    answers, _, _ = await load.run(target, [Job(0.0, workload.random_ids(random.Random(1), 4, vocab_size), 4, 1)], Pace(False))
    if answers[0].error:
        raise RuntimeError(f"the first request failed: {answers[0].error}")
    return time.perf_counter() - server.started_s, target


async def measure(server: Serving, args: argparse.Namespace) -> dict[str, Any]:
    ready_s, target = await first_token(server, args.ready_timeout, args.vocab_size)
    out: dict[str, Any] = {"ready_s": ready_s}
    if args.workload:
        runs = []
        for _ in range(args.repeats):
            prompts = workload.mixed_prompts(args.requests, args.length_scale, args.vocab_size, 0)
            jobs = [Job(0.0, *prompt) for prompt in prompts]
            answers, seconds, lag = await load.run(target, jobs, Pace(False, 0, args.max_seconds))
            found = metrics.result(answers, seconds, {}, detailed=False)
            runs.append({k: v for k, v in found.items() if k not in LONG_LISTS})
            runs[-1]["client_lag_p99_ms"] = metrics.percentile(lag.late_s, 99) * 1000
        out["mixed_http"] = sorted(runs, key=lambda run: run["output_throughput"])[len(runs) // 2]
        out["runs"] = runs
    return out


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.served", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--model", default="", help="checkpoint directory or .gguf file; empty: what --set says")
    p.add_argument("--device", default="auto", help="as engine.device")
    p.add_argument("--workload", choices=("mixed512",), default=None, help="what to send once it is ready; default: nothing")
    p.add_argument("--requests", type=int, default=workload.MIXED, help="only the first so many")
    p.add_argument("--length-scale", type=float, default=1.0)
    p.add_argument("--vocab-size", type=int, default=0, help="random ids are below this; 0: what the model has")
    p.add_argument("--max-batch-size", type=int, default=512, help="as engine.max_batch_size")
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--cold", action="store_true", help="with an empty kernel cache")
    p.add_argument("--ready-timeout", type=float, default=600.0, help="seconds to wait for /health")
    p.add_argument("--max-seconds", type=float, default=1800.0, help="seconds the workload may take")
    p.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as for server.py")
    p.add_argument("--json", action="store_true")
    return p


def knobs(args: argparse.Namespace, kernel_cache: str) -> list[str]:
    bound = max(512, args.requests)
    return [
        f"model.path={args.model}", f"engine.device={args.device}", f"engine.max_batch_size={args.max_batch_size}",
        "cache.enable_prefix_caching=false", f"admission.max_requests={bound}", f"admission.max_requests_per_key={bound}",
        "admission.max_queue_age_s=3600", f"admission.max_queue_tokens={1 << 40}", "server.log_level=ERROR",
        *([f"engine.kernel_cache_dir={kernel_cache}"] if kernel_cache else []), *args.set,
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if not (args.requests >= 1 and args.repeats >= 1 and args.length_scale > 0 and (args.vocab_size > 4 or args.vocab_size == 0)):
        p.error("--requests, --repeats and --length-scale must be above 0, --vocab-size above 4")
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory()) if args.cold else ""
        try:
            args.vocab_size = args.vocab_size or resolve_spec(load_config(None, sets=knobs(args, cache)).config).vocab_size
            environment = {name: value for name, value in os.environ.items() if not (cache and name == "NUMBA_CACHE_DIR")}
            server = stack.enter_context(serving(knobs(args, cache), env=environment))
            out = asyncio.run(measure(server, args))
        except (EngineError, ConfigError, OSError, RuntimeError, ValueError, TimeoutError, aiohttp.ClientError) as error:
            print(f"bench.served: {error}", file=sys.stderr)
            return 2
    out |= {"bench": "served", "model": Path(args.model).name, "cold": args.cold, "set": args.set, "machine": describe_machine()}
    print(f"first token {out['ready_s']:.2f} s after the command{' (empty kernel cache)' if args.cold else ''}")
    failed = 0
    if "mixed_http" in out:
        print(metrics.block(out["mixed_http"]))
        failed = out["mixed_http"]["failed"]
    if args.json:
        print(json.dumps(out))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
