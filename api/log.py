"""What the server writes down: requests without their text, a throughput line, and one line a step at DEBUG.

Set up once by `server.py`. A log that cannot be written (closed pipe, full disk) never disturbs serving.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import logging
import sys
import time
from typing import Any

from api.service import Service
from engine.loop import StepRecord

stats_log = logging.getLogger("numbatch.stats")
step_log = logging.getLogger("numbatch.step")
LAG_PERIOD_S = 0.1
FIELDS = "fields"  # of a record: what its message says, as values


class QuietHandler(logging.StreamHandler):
    """Counts what it could not write instead of complaining to a stream that is gone."""

    num_lost = 0

    def handleError(self, record: logging.LogRecord) -> None:
        QuietHandler.num_lost += 1


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC, ISO 8601), level, logger, message, then the record's own fields, then an exception."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        entry: dict[str, Any] = {"time": stamp, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        entry |= getattr(record, FIELDS, {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def noted(note: str) -> dict[str, Any]:
    """A request's note as values: " prompt=5 finish=stop" is {"prompt": 5, "finish": "stop"}."""
    pairs = (word.partition("=") for word in note.split())
    return {name: int(value) if value.isdecimal() else value for name, _, value in pairs}


def setup_logging(level: str, form: str = "text") -> None:
    """Everything of ours to stderr at `level`; libraries from WARNING up. `form`: server.log_format."""
    handler = QuietHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
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
    step_log.debug("%s", step_line(record), extra={FIELDS: dataclasses.asdict(record)})


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
            kv, hits = 100 * s.active / max(s.num_blocks, 1), 100 * s.prefix_hits / max(s.prefix_queries, 1)
            fields = {
                "prompt_tokens_per_s": round(prompt, 1),
                "generation_tokens_per_s": round(generated, 1),
                "running": s.num_running,
                "waiting": s.num_waiting,
                "kv_cache_usage_percent": round(kv, 1),
                "prefix_cache_hit_percent": round(hits, 1),
            }
            stats_log.info(
                "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, Running: %d reqs, "
                "Waiting: %d reqs, KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
                prompt,
                generated,
                s.num_running,
                s.num_waiting,
                kv,
                hits,
                extra={FIELDS: fields},
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
