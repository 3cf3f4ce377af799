"""`/metrics`: the counters as Prometheus families under two sets of names.

LMDeploy's and vLLM's names, labels and buckets, so that their dashboards and routers work unchanged; beside them a
few of our own (`numbatch:`). Label values come from closed sets, so the number of series is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from api.counters import Histogram, Metrics
from api.log import QuietHandler
from api.service import SERVICE, Service
from engine.loop import EngineSnapshot

NO_ENGINE = EngineSnapshot(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0)


class Families:
    """A Prometheus collector over `Metrics` and the engine's snapshot."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        service = self._service
        engine = service.engine
        snapshot = engine.snapshot() if engine is not None else NO_ENGINE
        write = _Writer(service.model_name)
        yield from _lmdeploy(write, service.metrics, snapshot)
        yield from _vllm(write, service.metrics, snapshot)
        yield from _ours(write, service, snapshot)


class _Writer:
    """Builds families that carry the two labels every name has."""

    def __init__(self, model_name: str) -> None:
        self.keys = ["model_name", "engine"]
        self.values = [model_name, "0"]

    def gauge(self, name: str, doc: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, doc, labels=self.keys)
        family.add_metric(self.values, value)
        return family

    def counter(self, name: str, doc: str, value: float) -> Metric:
        family = CounterMetricFamily(name, doc, labels=self.keys)
        family.add_metric(self.values, value)
        return family

    def split(self, name: str, doc: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(name, doc, labels=[*self.keys, label])
        for key, value in values.items():
            family.add_metric([*self.values, key], value)
        return family

    def histogram(self, name: str, doc: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(name, doc, labels=self.keys)
        family.add_metric(self.values, histogram.cumulative(), histogram.total)
        return family


def _lmdeploy(write: _Writer, m: Metrics, s: EngineSnapshot) -> Iterator[Metric]:
    succeeded = m.finished["stop"] + m.finished["length"]
    failed = m.finished["abort"] + m.finished["error"]
    used = s.active / s.num_blocks if s.num_blocks else 0.0
    hits = s.prefix_hits / s.prefix_queries if s.prefix_queries else 0.0
    name = "lmdeploy:{}".format
    yield write.gauge(name("num_requests_succeeded"), "Answers that ended with stop or length.", succeeded)
    yield write.gauge(name("num_requests_failed"), "Answers that were aborted or failed.", failed)
    yield write.gauge(name("num_api_requests_routed"), "Requests handed to the engine and not answered yet.", m.live_requests)
    yield write.gauge(name("num_api_requests_waiting"), "Sequences that wait for the engine.", s.num_waiting)
    yield write.gauge(name("num_requests_running"), "Sequences in the persistent batch.", s.num_running)
    yield write.gauge(name("num_requests_waiting"), "Sequences that wait for the engine.", s.num_waiting)
    yield write.gauge(name("gpu_cache_usage_perc"), "Share of the KV blocks that running sequences use, 0 to 1.", used)
    yield write.gauge(name("prefix_cache_hit_rate"), "Share of prompt tokens found in the prefix cache, 0 to 1.", hits)
    yield write.counter(name("prompt_tokens"), "Prompt tokens of requests that have a first token.", m.prompt_tokens)
    yield write.counter(name("generation_tokens"), "Tokens generated.", m.generation_tokens)
    yield write.counter(name("cached_tokens"), "Prompt tokens found in the prefix cache.", m.cached_tokens)
    yield write.split(name("request_success"), "Answers by how they ended.", "finished_reason", m.finished)
    for key, doc, histogram in (*_common(m), *_lmdeploy_only(m)):
        yield write.histogram(name(key), doc, histogram)


def _vllm(write: _Writer, m: Metrics, s: EngineSnapshot) -> Iterator[Metric]:
    name = "vllm:{}".format
    used = s.active / s.num_blocks if s.num_blocks else 0.0
    yield write.gauge(name("num_requests_running"), "Sequences in the persistent batch.", s.num_running)
    yield write.gauge(name("num_requests_waiting"), "Sequences that wait for the engine.", s.num_waiting)
    yield write.gauge(name("kv_cache_usage_perc"), "Share of the KV blocks that running sequences use, 0 to 1.", used)
    yield write.counter(name("prefix_cache_queries"), "Prompt tokens looked up in the prefix cache.", s.prefix_queries)
    yield write.counter(name("prefix_cache_hits"), "Prompt tokens found in the prefix cache.", s.prefix_hits)
    yield write.counter(name("num_preemptions"), "Sequences that lost their KV blocks and started over.", s.preemptions)
    yield write.counter(name("prompt_tokens"), "Prompt tokens of requests that have a first token.", m.prompt_tokens)
    yield write.counter(name("prompt_tokens_cached"), "Prompt tokens found in the prefix cache.", m.cached_tokens)
    yield write.counter(name("generation_tokens"), "Tokens generated.", m.generation_tokens)
    yield write.split(name("request_success"), "Answers by how they ended.", "finished_reason", m.finished)
    yield write.split(name("admission_rejections"), "Requests refused before they were queued.", "reason", m.refused)
    for key, doc, histogram in (*_common(m), *_vllm_only(m)):
        yield write.histogram(name(key), doc, histogram)


def _common(m: Metrics) -> tuple[tuple[str, str, Histogram], ...]:
    return (
        ("request_prompt_tokens", "Prompt tokens of a request.", m.request_prompt),
        ("request_generation_tokens", "Tokens generated for a request.", m.request_generation),
        ("iteration_tokens_total", "Tokens computed in a step.", m.step_tokens),
        ("time_to_first_token_seconds", "From the request's arrival to its first token.", m.first_token_s),
        ("e2e_request_latency_seconds", "From the request's arrival to its end.", m.request_s),
        ("request_queue_time_seconds", "From arrival in the engine to the first step.", m.queue_s),
        ("request_inference_time_seconds", "From the first step to the end.", m.inference_s),
        ("request_prefill_time_seconds", "From the first step to the first token.", m.prefill_s),
        ("request_decode_time_seconds", "From the first token to the end.", m.decode_s),
    )


def _lmdeploy_only(m: Metrics) -> tuple[tuple[str, str, Histogram], ...]:
    return (
        ("request_cached_tokens", "Prompt tokens of a request found in the prefix cache.", m.request_cached),
        ("request_cache_hit_ratio", "Of a request's prompt tokens, the share found in the prefix cache.", m.hit_ratio),
        ("time_per_output_token_seconds", "Mean time of an answer's tokens after the first.", m.per_token_s),
        ("iter_token_latency", "Computing time of a step, seconds.", m.step_s),
    )


def _vllm_only(m: Metrics) -> tuple[tuple[str, str, Histogram], ...]:
    return (
        ("inter_token_latency_seconds", "Gap between tokens of an answer.", m.inter_token_s),
        ("request_time_per_output_token_seconds", "Mean time of an answer's tokens after the first.", m.per_token_s),
        ("request_params_n", "Answers that a request asked for.", m.request_n),
        ("request_params_max_tokens", "max_tokens of a request.", m.request_max_tokens),
    )


def _ours(write: _Writer, service: Service, s: EngineSnapshot) -> Iterator[Metric]:
    gate = service.gate
    yield write.gauge("numbatch:session_leases", "Sessions whose last turn's K/V is kept.", s.leases)
    yield write.gauge("numbatch:session_blocks", "KV blocks that sessions keep.", s.pinned)
    yield write.counter("numbatch:session_leases_broken", "Sessions that will be computed again because memory was short.", s.leases_broken)
    yield write.gauge("numbatch:open_connections", "Open connections.", gate.num_open if gate else 0)
    yield write.counter("numbatch:refused_connections", "Connections over http.max_connections.", gate.num_refused if gate else 0)
    yield write.counter("numbatch:bad_requests", "Requests that could not be parsed as HTTP.", gate.num_bad if gate else 0)
    yield write.counter("numbatch:stalled_readers", "Readers cut off after http.write_stall_timeout_s.", gate.num_stalled if gate else 0)
    yield write.counter("numbatch:lost_log_lines", "Log lines that could not be written.", QuietHandler.num_lost)
    yield write.histogram("numbatch:event_loop_lag_seconds", "How late the event loop ran a timer.", service.metrics.loop_lag_s)


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics"""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Families(request.app[SERVICE]))
    body = generate_latest(registry)
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})
