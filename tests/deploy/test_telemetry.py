"""Traces reach a collector with the caller's parent, counts and phases, and log lines are objects where that is asked for."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
import urllib.request
from typing import Any

import pytest

from api.log import JsonFormatter, noted
from api.tracing import Tracing
from config.errors import ConfigError
from config.schema import Telemetry
from tests.deploy.collector import attributes, collecting
from tests.e2e.support import ROOT, Server, free_port

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BODY = {"model": "mock", "prompt": "a secret prompt", "max_tokens": 5, "ignore_eos": True, "n": 2}

STREAMED = {"model": "mock", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "ignore_eos": True, "stream": True}


def test_traces_and_json_logs() -> None:
    with collecting() as collector:
        with Server(f"telemetry.otlp_endpoint={collector.endpoint}", "server.log_format=json", "engine.mock_step_s=0.005") as server:
            server.ready()
            headers = {"Content-Type": "application/json", "traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "asked-by-me"}
            request = urllib.request.Request(server.url + "/v1/completions", json.dumps(BODY).encode(), headers)
            before = time.time_ns()
            with urllib.request.urlopen(request, timeout=20) as answer:
                assert answer.status == 200
            after = time.time_ns()
            assert server.post("/v1/completions", {**BODY, "n": 0})[0] == 400
            assert server.post_raw("/v1/chat/completions", STREAMED)[1].endswith("data: [DONE]\n\n")
            server.signal(signal.SIGTERM)  # what waits to be sent is sent
            assert server.wait(15) == 0
            log = server.log
    check_spans(collector, before, after)
    check_log(log)


def check_spans(collector: Any, before: int, after: int) -> None:
    good, bad = collector.named("POST /v1/completions")
    assert {resource["service.name"] for resource in collector.resources} == {"numbatch"}
    assert (good.trace_id.hex(), good.parent_span_id.hex()) == (TRACE, PARENT)
    assert bad.trace_id.hex() != TRACE and not bad.parent_span_id
    said = attributes(good)
    assert said["http.response.status_code"] == 200 and said["numbatch.request_id"] == "asked-by-me"
    assert said["gen_ai.usage.output_tokens"] == 10 and said["gen_ai.usage.input_tokens"] > 0
    assert said["gen_ai.response.finish_reasons"] == ["length"]
    assert attributes(bad)["http.response.status_code"] == 400
    assert before <= good.start_time_unix_nano < good.end_time_unix_nano <= after + 1_000_000_000
    parts = [span for span in collector.spans if span.parent_span_id == good.span_id]
    assert sorted(span.name for span in parts) == sorted(["queue", "prefill", "decode"] * 2)
    for index in (0, 1):
        queue, prefill, decode = sorted(
            (span for span in parts if attributes(span)["gen_ai.choice.index"] == index), key=lambda span: span.start_time_unix_nano
        )
        assert (queue.name, prefill.name, decode.name) == ("queue", "prefill", "decode")
        assert abs(queue.end_time_unix_nano - prefill.start_time_unix_nano) < 1000
        assert abs(prefill.end_time_unix_nano - decode.start_time_unix_nano) < 1000
        assert decode.end_time_unix_nano - decode.start_time_unix_nano >= 4 * 5_000_000  # 4 more steps of 5 ms
        assert good.start_time_unix_nano <= queue.start_time_unix_nano and decode.end_time_unix_nano <= good.end_time_unix_nano
    (streamed,) = collector.named("POST /v1/chat/completions")
    assert attributes(streamed)["gen_ai.usage.output_tokens"] == 4
    assert len([span for span in collector.spans if span.parent_span_id == streamed.span_id]) == 3
    assert not [span for span in collector.spans if "/health" in span.name]
    assert "secret" not in str(collector.spans)


def check_log(log: str) -> None:
    records = [json.loads(line) for line in log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(record) for record in records)
    (access,) = [record for record in records if record.get("id") == "asked-by-me"]
    assert (access["logger"], access["method"], access["route"], access["status"]) == ("numbatch.access", "POST", "/v1/completions", 200)
    assert (access["output"], access["choices"], access["finish"]) == (10, 2, "length")
    assert access["ms"] > 0 and "secret" not in log


def test_a_collector_that_is_gone_disturbs_nobody() -> None:
    with Server(f"telemetry.otlp_endpoint=http://127.0.0.1:{free_port()}/v1/traces") as server:
        server.ready()
        assert server.post("/v1/completions", BODY)[0] == 200
        server.signal(signal.SIGTERM)
        assert server.wait(15) == 0


def test_without_the_libraries_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"telemetry\.otlp_endpoint: needs .*numbatch\[otel\]"):
        Tracing(Telemetry(otlp_endpoint="http://127.0.0.1:4318/v1/traces"))


def test_nothing_is_loaded_where_nobody_asks() -> None:
    code = "import sys, api.lifecycle; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout == "[]\n"


@pytest.mark.parametrize("address", ["127.0.0.1:4318", "grpc://127.0.0.1:4317/", "http://"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    command = [sys.executable, "server.py", "--config", "config/mock.toml", "--check", "--set", f"telemetry.otlp_endpoint={address}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "telemetry.otlp_endpoint" in ended.stderr


def test_a_record_is_one_line() -> None:
    try:
        raise ValueError("two\nlines \ud800")
    except ValueError:
        record = logging.LogRecord("numbatch.http", logging.ERROR, __file__, 1, "it %s", ("failed\n",), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line and json.loads(line)["message"] == "it failed\n"
    assert "ValueError" in json.loads(line)["exception"]


def test_a_note_as_values() -> None:
    assert noted(" prompt=5 cached=0 finish=stop") == {"prompt": 5, "cached": 0, "finish": "stop"}
    assert noted("") == {}
