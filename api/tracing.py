"""OpenTelemetry traces, where `telemetry.otlp_endpoint` asks for them: one span a request, three below it a sequence.

Everything is made after an answer has ended, from the times that are kept anyway, so tracing costs a stream nothing; a
thread of the library's sends batches and drops what it cannot deliver. A caller's `traceparent` is the parent. Spans
carry counts, routes and times, never text. The libraries are an extra, loaded only when asked for.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from aiohttp import web

from api.generate import Answer, Choice
from config.errors import ConfigError
from config.schema import Telemetry
from config.version import VERSION

EXTRA = "needs OpenTelemetry's libraries: pip install 'numbatch[otel]', or leave it empty."
MAX_CHOICES = 16  # of one request that get spans of their own
FLUSH_MS = 2000  # for the last batch when the server stops
EXPORT_TIMEOUT_S = 5

_answers: ContextVar[list[Answer]] = ContextVar("answers")  # of the request that this task serves


class Tracing:
    """Spans of requests, to one endpoint. Used from the event loop only."""

    def __init__(self, knobs: Telemetry) -> None:
        """ConfigError where the libraries are not installed."""
        try:
            sdk = importlib.import_module("opentelemetry.sdk.trace")
            exporting = importlib.import_module("opentelemetry.sdk.trace.export")
            sampling = importlib.import_module("opentelemetry.sdk.trace.sampling")
            resources = importlib.import_module("opentelemetry.sdk.resources")
            otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
            propagation = importlib.import_module("opentelemetry.trace.propagation.tracecontext")
            self._trace = importlib.import_module("opentelemetry.trace")
        except ImportError as error:
            raise ConfigError(f"telemetry.otlp_endpoint: {EXTRA}") from error
        resource = resources.Resource.create({"service.name": "numbatch", "service.version": VERSION})
        sampler = sampling.ParentBased(sampling.TraceIdRatioBased(knobs.sample_ratio))
        self._provider = sdk.TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
        exporter = otlp.OTLPSpanExporter(endpoint=knobs.otlp_endpoint, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(exporting.BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("numbatch", VERSION)
        self._propagator = propagation.TraceContextTextMapPropagator()

    @staticmethod
    def begin() -> None:
        """A request begins in this task."""
        _answers.set([])

    @staticmethod
    def ended(answer: Answer) -> None:
        """An answer of this task's request has ended."""
        found = _answers.get(None)
        if found is not None and answer not in found:
            found.append(answer)

    def record(self, request: web.Request, route: str, status: int, started_s: float, identity: str) -> None:
        """The request is over: its spans. `started_s` is monotonic."""
        now_s = time.monotonic()
        # spans carry the wall clock's nanoseconds; everything here is measured by the monotonic one
        wall_ns = time.clock_gettime_ns(time.CLOCK_REALTIME)

        def stamp(at_s: float) -> int:
            return wall_ns - round((now_s - at_s) * 1e9)

        answers = _answers.get([])
        method = request.method[:8]  # from outside, and not checked where nothing answers it
        span = self._tracer.start_span(
            f"{method} {route}",
            context=self._propagator.extract({name.lower(): value for name, value in request.headers.items()}),
            kind=self._trace.SpanKind.SERVER,
            start_time=stamp(started_s),
            attributes={
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "numbatch.request_id": identity,
                **_counts(answers),
            },
        )
        if span.is_recording():
            if status >= 500 or any(answer.outcome == "error" for answer in answers):
                span.set_status(self._trace.StatusCode.ERROR)
            parent = self._trace.set_span_in_context(span)
            choices = [choice for answer in answers for choice in answer.choices]
            for choice in choices[:MAX_CHOICES]:
                for name, begin_s, end_s in _phases(choice, now_s):
                    part = self._tracer.start_span(
                        name, context=parent, start_time=stamp(begin_s), attributes={"gen_ai.choice.index": choice.index}
                    )
                    part.end(stamp(end_s))
        span.end(stamp(now_s))

    async def close(self) -> None:
        """Send what waits, for a moment; what cannot be delivered is dropped."""
        await asyncio.to_thread(self._provider.force_flush, FLUSH_MS)
        await asyncio.to_thread(self._provider.shutdown)


def _counts(answers: list[Answer]) -> dict[str, Any]:
    if not answers:
        return {}
    usages = [answer.usage for answer in answers]
    return {
        "gen_ai.usage.input_tokens": sum(usage.prompt_tokens for usage in usages),
        "gen_ai.usage.output_tokens": sum(usage.completion_tokens for usage in usages),
        "gen_ai.response.finish_reasons": [answer.outcome for answer in answers],
        "numbatch.cached_tokens": sum(usage.cached_tokens for usage in usages),
    }


def _phases(choice: Choice, now_s: float) -> Iterator[tuple[str, float, float]]:
    """(name, begin, end) of what a sequence went through, monotonic seconds; the last phase it reached ends with it."""
    sequence = choice.generation.sequence
    end_s = choice.last_s or now_s
    marks = [("queue", sequence.arrival_s), ("prefill", sequence.first_scheduled_s), ("decode", sequence.first_token_s)]
    reached = [mark for mark in marks if mark[1] >= 0]
    for (name, begin_s), (_, next_s) in zip(reached, [*reached[1:], ("", max(end_s, reached[-1][1]))], strict=True):
        yield name, begin_s, next_s
