"""A real Prometheus reads the shipped files, scrapes a server, and answers every panel's query. Skipped where there is none."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.api.harness import until
from tests.deploy.promql import VARIABLES
from tests.deploy.test_dashboards import DEPLOY, PANELS, RULES
from tests.e2e.support import Server, free_port

HERE = Path(__file__).resolve().parent


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on this machine")
    return found


def checked(*command: str, cwd: Path) -> str:
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_promtool_accepts_the_configuration() -> None:
    assert "is valid prometheus config" in checked(tool("promtool"), "check", "config", "prometheus.yml", cwd=DEPLOY / "prometheus")


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    for file in (HERE / "alerts_test.yml", DEPLOY / "prometheus/alerts.yml"):
        shutil.copy(file, tmp_path)
    assert "SUCCESS" in checked(tool("promtool"), "test", "rules", "alerts_test.yml", cwd=tmp_path)


class Prometheus:
    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str, **query: str) -> Any:
        url = f"http://127.0.0.1:{self.port}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.loads(answer.read())["data"]

    def is_scraping(self, at_least: int) -> bool:
        try:
            found = self.get("/api/v1/query", query='count_over_time(vllm:num_requests_running{job="numbatch"}[30s])')["result"]
        except (OSError, urllib.error.HTTPError):
            return False
        return bool(found) and float(found[0]["value"][1]) >= at_least


@contextmanager
def prometheus(server: Server, folder: Path) -> Iterator[Prometheus]:
    """The shipped configuration with this server's port, and quicker scrapes than anyone needs."""
    text = (DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8")
    assert "127.0.0.1:23333" in text and "_interval: 5s" in text
    (folder / "prometheus.yml").write_text(
        text.replace("127.0.0.1:23333", f"127.0.0.1:{server.port}").replace("_interval: 5s", "_interval: 200ms"), encoding="utf-8"
    )
    shutil.copy(DEPLOY / "prometheus/alerts.yml", folder)
    port = free_port()
    command = [
        tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield Prometheus(port)
    finally:
        process.kill()
        process.wait()


def traffic(server: Server, stop: threading.Event) -> None:
    """One small request after the other; every second one finds its prompt in the cache."""
    number = 0
    while not stop.is_set():
        number += 1
        server.post(
            "/v1/completions", {"model": "mock", "prompt": f"{number // 2} " + "tell me " * 20, "max_tokens": 6, "ignore_eos": True}
        )
        stop.wait(0.05)


def test_every_panel_gets_data(tmp_path: Path) -> None:
    tool("prometheus")
    stop = threading.Event()
    with Server() as server, prometheus(server, tmp_path) as monitor:
        server.ready()
        client = threading.Thread(target=traffic, args=(server, stop))
        client.start()
        try:
            until(lambda: monitor.is_scraping(10), 40, "Prometheus did not scrape the server")
            empty = [
                (panel["title"], target["refId"], found)
                for panel in PANELS
                for target in panel["targets"]
                if not has_data(found := monitor.get("/api/v1/query", query=filled(target["expr"]))["result"])
            ]
            assert not empty
            until(lambda: all(rule["health"] == "ok" for rule in loaded(monitor)), 10, "rules were not evaluated")
            assert [rule["name"] for rule in loaded(monitor)] == [rule["alert"] for rule in RULES]
            assert [rule["name"] for rule in loaded(monitor) if rule["state"] == "firing"] == []
        finally:
            stop.set()
            client.join(10)


def filled(expr: str) -> str:
    for name, value in (VARIABLES | {"$__rate_interval": "10s"}).items():
        expr = expr.replace(name, value)
    return expr


def has_data(result: list[dict[str, Any]]) -> bool:
    return any(math.isfinite(float(series["value"][1])) for series in result)


def loaded(monitor: Prometheus) -> list[dict[str, Any]]:
    return [rule for group in monitor.get("/api/v1/rules")["groups"] for rule in group["rules"]]
