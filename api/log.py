"""What the server writes down: requests without their text, a throughput line, and one line a step at DEBUG.

Set up once by `server.py`. A log that cannot be written (closed pipe, full disk) never disturbs serving.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time

from api.service import Service
from engine.loop import StepRecord

stats_log = logging.getLogger("numbatch.stats")
step_log = logging.getLogger("numbatch.step")
LAG_PERIOD_S = 0.1


class QuietHandler(logging.StreamHandler):
    """Counts what it could not write instead of complaining to a stream that is gone."""

    num_lost = 0

    def handleError(self, record: logging.LogRecord) -> None:
        QuietHandler.num_lost += 1


def setup_logging(level: str) -> None:
    """Everything of ours to stderr at `level`; libraries from WARNING up."""
    handler = QuietHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("numbatch").setLevel(level)


def step_line(record: StepRecord) -> str:
    """The seeds' fields: decode rows, rows of prompt parts, tokens, longest row, longest context; then microseconds."""
    return (
        f"step = {record.step}, dc_bsz = {record.dc_bsz}, pf_bsz = {record.pf_bsz}, n_tok = {record.n_tok}, "
        f"max_q = {record.max_q}, max_k = {record.max_k}, us = {record.elapsed_us}"
    )


def trace_step(record: StepRecord) -> None:
    """An engine observer; add it only when the level is DEBUG."""
    step_log.debug("%s", step_line(record))


async def log_throughput(service: Service, period_s: float) -> None:
    """One line a period while anything happens, and one more when it stops."""
    was_busy = False
    before, then = _totals(service), time.monotonic()
    while True:
        await asyncio.sleep(period_s)
        after, now = _totals(service), time.monotonic()
        if service.engine is None:
            continue
        s = service.engine.snapshot()
        busy = after != before or s.num_running > 0 or s.num_waiting > 0
        if busy or was_busy:
            prompt, generated = ((a - b) / (now - then) for a, b in zip(after, before, strict=True))
            stats_log.info(
                "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, Running: %d reqs, "
                "Waiting: %d reqs, KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
                prompt,
                generated,
                s.num_running,
                s.num_waiting,
                100 * s.active / max(s.num_blocks, 1),
                100 * s.prefix_hits / max(s.prefix_queries, 1),
            )
        was_busy, before, then = busy, after, now


async def measure_lag(service: Service) -> None:
    """How late the event loop is, ten times a second, into the metrics."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_PERIOD_S
        await asyncio.sleep(LAG_PERIOD_S)
        service.metrics.loop_lag_s.observe(max(loop.time() - due, 0.0))


def _totals(service: Service) -> tuple[int, int]:
    return service.metrics.prompt_tokens, service.metrics.generation_tokens
