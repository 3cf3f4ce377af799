"""What is published: the OpenAPI document, the page made from it, metrics, health; and that the document is true."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from prometheus_client.parser import text_string_to_metric_families
from schemathesis.specs.openapi.checks import positive_data_acceptance

from api.app import add_routes
from api.counters import FIRST_TOKEN_S, REQUEST_S, STEP_TOKENS, TOKEN_S
from api.log import log_throughput
from tests.api.harness import Running, mock_config, post_bytes, serving, until

SKIPPED = ("/", "/docs", "/openapi.json", "/metrics", "/sleep")  # a server that sleeps refuses what comes after
EXAMPLES = 12  # of each operation; the acceptance run takes 2,000 and more
PATIENT_S = 60


def document(server: Running) -> Any:
    return json.loads(server.request("GET", "/openapi.json")[2])


def test_every_route_is_in_the_document_and_none_else(server: Running) -> None:
    class Router:
        paths: set[tuple[str, str]] = set()

        def add_get(self, path: str, handler: object, **_: object) -> None:
            self.paths.add((path, "get"))

        def add_post(self, path: str, handler: object, **_: object) -> None:
            self.paths.add((path, "post"))

        def add_delete(self, path: str, handler: object, **_: object) -> None:
            self.paths.add((path, "delete"))

        def add_route(self, method: str, path: str, handler: object, **_: object) -> None:
            assert (method, path) == ("*", "/{path:.*}")

    add_routes(Router())  # type: ignore[arg-type]
    published = {(path, method) for path, methods in document(server)["paths"].items() for method in methods}
    assert {(re.sub(r":[^}]*", "", path), method) for path, method in Router.paths} == published


def test_the_page_loads_nothing(server: Running) -> None:
    status, headers, data = server.request("GET", "/docs")
    page = data.decode()
    assert status == 200 and headers["content-type"].startswith("text/html") and "default-src 'none'" in headers["content-security-policy"]
    assert not re.findall(r"(src|href)=|<script|url\(|@import", page)
    for path, methods in document(server)["paths"].items():
        assert all(f"{method.upper()} {path}" in page for method in methods)
    assert "repetition_penalty" in page


def test_requests_made_from_the_document_meet_no_5xx(server: Running) -> None:
    """schemathesis: status, media type and body of every answer are as published, and what the document forbids is refused.

    Not asked: that everything the document allows is accepted. JSON Schema counts 1.0 as an integer, this server does
    not, and it cannot say that two fields contradict each other.
    """
    failures: list[str] = []
    for found in schemathesis.openapi.from_dict(document(server)).get_all_operations():
        operation = found.ok()
        if operation.path in SKIPPED:
            continue

        @given(case=operation.as_strategy())
        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        def check(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict) and type(wait := case.body.get("timeout")) in (int, float) and 0 < wait < PATIENT_S:
                case.body["timeout"] = PATIENT_S  # a request that sets itself too short a time gets its 504, which has its own test
            case.call_and_validate(base_url=server.url, excluded_checks=[positive_data_acceptance])

        try:
            check()
        except Exception as error:  # collected: one failing operation must not hide the others
            failures.append(f"{operation.label}: {error}")
    assert not failures, "\n".join(failures)


def families(server: Running) -> dict[str, Any]:
    text = server.request("GET", "/metrics")[2].decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(server: Running, name: str, **labels: str) -> float:
    for family in families(server).values():
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    raise AssertionError(f"no sample {name} {labels}")


LMDEPLOY = {
    "gauge": ("num_requests_succeeded", "num_requests_failed", "num_api_requests_routed", "num_api_requests_waiting", "num_requests_running",
              "num_requests_waiting", "gpu_cache_usage_perc", "prefix_cache_hit_rate"),
    "counter": ("prompt_tokens", "generation_tokens", "cached_tokens", "request_success"),
    "histogram": ("request_prompt_tokens", "request_generation_tokens", "request_cached_tokens", "request_cache_hit_ratio",
                  "iteration_tokens_total", "time_to_first_token_seconds", "time_per_output_token_seconds", "iter_token_latency",
                  "e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds",
                  "request_prefill_time_seconds", "request_decode_time_seconds"),
}  # fmt: skip
VLLM = {
    "gauge": ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    "counter": ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens", "prompt_tokens_cached", "generation_tokens",
                "request_success", "admission_rejections"),
    "histogram": ("request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total", "request_params_n",
                  "request_params_max_tokens", "time_to_first_token_seconds", "inter_token_latency_seconds",
                  "request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
                  "request_inference_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
}  # fmt: skip


def test_metrics_carry_both_sets_of_names(server: Running) -> None:
    server.post("/v1/completions", {"prompt": "hi", "max_tokens": 5})
    found = families(server)
    for prefix, kinds in (("lmdeploy", LMDEPLOY), ("vllm", VLLM)):
        for kind, names in kinds.items():
            for name in names:
                family = found[f"{prefix}:{name}"]
                assert family.type == kind, family
                assert all(sample.labels["model_name"] == "mock" and sample.labels["engine"] == "0" for sample in family.samples)


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("lmdeploy:time_to_first_token_seconds", FIRST_TOKEN_S), ("vllm:time_to_first_token_seconds", FIRST_TOKEN_S),
        ("vllm:e2e_request_latency_seconds", REQUEST_S), ("vllm:inter_token_latency_seconds", TOKEN_S),
        ("lmdeploy:time_per_output_token_seconds", TOKEN_S), ("vllm:iteration_tokens_total", STEP_TOKENS),
    ],
)  # fmt: skip
def test_buckets(server: Running, name: str, bounds: tuple[float, ...]) -> None:
    samples = families(server)[name].samples
    assert [float(s.labels["le"]) for s in samples if s.name.endswith("_bucket")] == [*map(float, bounds), float("inf")]
    counts = [s.value for s in samples if s.name.endswith("_bucket")]
    assert counts == sorted(counts) and counts[-1] == next(s.value for s in samples if s.name.endswith("_count"))


def test_what_the_counters_count(server: Running) -> None:
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:prompt_tokens_cached_total", "vllm:request_params_n_sum")
    before = [value(server, name) for name in names]
    lengths = value(server, "vllm:request_success_total", finished_reason="length")
    body = {"prompt": ["a prompt of more than sixteen", "b"], "n": 2, "max_tokens": 5, "ignore_eos": True, "stream": True}
    server.request("POST", "/v1/completions", body)
    after = [value(server, name) for name in names]
    assert after[0] - before[0] == 30 and after[1] - before[1] == 20 and after[3] - before[3] == 4
    assert value(server, "vllm:request_success_total", finished_reason="length") - lengths == 4
    assert value(server, "lmdeploy:num_api_requests_routed") == 0


ANSWERS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    "/v1/responses": {"input": "hi", "max_output_tokens": 3},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    "/v1/chat/interactive": {"prompt": "hi", "request_output_len": 3},
    "/generate": {"text": "hi", "max_tokens": 3},
    "/get_ppl": {"input": "hi"},
    "/v2/models/mock/generate": {"text_input": "hi", "max_tokens": 3},
    "/v2/models/mock/infer": {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["hi"]}]},
}


@pytest.mark.parametrize("path", ANSWERS)
def test_every_protocol_is_counted_and_named(server: Running, path: str) -> None:
    """Requests, tokens and time to the first one; the caller's X-Request-Id comes back."""
    names = (
        "vllm:request_success_total",
        "vllm:prompt_tokens_total",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:time_to_first_token_seconds_count",
    )

    def counts() -> list[float]:
        found = families(server).values()
        return [sum(s.value for family in found for s in family.samples if s.name == name) for name in names]

    before = counts()
    status, headers, data = server.request("POST", path, ANSWERS[path], {"X-Request-Id": "of-mine"})
    assert status == 200 and headers["x-request-id"] == "of-mine", data
    after = counts()
    assert after[0] - before[0] == 1 and after[1] > before[1] and after[2] - before[2] == 1
    assert after[3] - before[3] == (path != "/get_ppl")  # which gives no token


def test_the_number_of_series_does_not_grow_with_what_clients_send(server: Running) -> None:
    before = server.request("GET", "/metrics")[2].count(b"\n")
    for i in range(50):
        server.request("GET", f"/nowhere/{i}", headers={"X-Request-Id": f"id-{i}"})
        server.post("/v1/completions", {"prompt": "x", "model": f"model-{i}"})
    assert server.request("GET", "/metrics")[2].count(b"\n") == before


def test_health_says_what_is_wrong(server: Running) -> None:
    assert json.loads(server.request("GET", "/health")[2]) == {"status": "ready", "reason": ""}
    service = server.service
    server.call(lambda: setattr(service, "draining", True))
    try:
        assert server.request("GET", "/health")[0] == 503
        assert json.loads(server.request("GET", "/health/ready")[2])["status"] == "draining"
        assert server.request("GET", "/health/live")[0] == 200
        assert server.post("/v1/completions", {"prompt": "x"})[0] == 503
    finally:
        server.call(lambda: setattr(service, "draining", False))


def test_health_is_red_when_the_engine_makes_no_progress() -> None:
    config = mock_config(engine={"mock_step_s": 1.5, "step_timeout_s": 2.0})
    with serving(config) as slow:
        with slow.connect() as raw:
            raw.sendall(post_bytes("/v1/completions", b'{"prompt": "x", "max_tokens": 1}'))
            until(lambda: slow.request("GET", "/health")[0] == 503, 3, "health stayed green")
            assert json.loads(slow.request("GET", "/health")[2])["status"] == "stalled"
            assert slow.request("GET", "/health/live")[0] == 200
            assert raw.recv(15) == b"HTTP/1.1 200 OK"
        until(lambda: slow.request("GET", "/health")[0] == 200, 3, "health stayed red")


def test_no_prompt_in_any_log(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    secret = "xyzzy-secret"
    with caplog.at_level("DEBUG"), caplog.at_level("DEBUG", logger="numbatch"):
        server.post("/v1/completions", {"prompt": secret, "max_tokens": 2, "stop": secret, "user": secret, "cache_salt": secret})
        server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": secret}], "max_tokens": 2})
        server.post("/v1/completions", {"prompt": secret, "temperature": 9})
        server.request("GET", f"/{secret}?q={secret}")
        server.request("POST", "/v1/completions", secret.encode())
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("numbatch")]
    assert len(lines) == 5 and not [line for line in lines if secret in line]


def test_the_throughput_line(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    async def for_a_while() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await log_throughput(server.service, 0.1)

    with caplog.at_level("INFO", "numbatch.stats"), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.run, for_a_while)
        time.sleep(0.05)
        server.post("/v1/completions", {"prompt": "hi", "max_tokens": 20, "ignore_eos": True})
        waiting.result()
    lines = [record.getMessage() for record in caplog.records if record.name == "numbatch.stats"]
    pattern = r"Avg prompt throughput: [\d.]+ tokens/s, Avg generation throughput: [\d.]+ tokens/s, Running: \d+ reqs, Waiting: \d+ reqs, "
    assert 1 <= len(lines) <= 2, "one line while something happens, one when it stops, none while idle"
    assert all(re.match(pattern + r"KV cache usage: [\d.]+%, Prefix cache hit rate: [\d.]+%$", line) for line in lines)
