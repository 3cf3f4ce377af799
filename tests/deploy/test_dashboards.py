"""The Grafana dashboard and the Prometheus rules read nothing that a server does not expose, and are well formed."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.api.harness import serving
from tests.deploy.promql import Exposed, fill, reads

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/numbatch.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [
    rule for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text(encoding="utf-8"))["groups"] for rule in group["rules"]
]


@pytest.fixture(scope="module")
def exposed() -> Iterator[Exposed]:
    with serving() as server:
        status, _ = server.post("/v1/completions", {"model": "mock", "prompt": "tell me", "max_tokens": 4, "ignore_eos": True})
        assert status == 200
        yield Exposed.parse(server.request("GET", "/metrics")[2].decode())


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_reads_what_is_exposed(panel: dict[str, Any], exposed: Exposed) -> None:
    for target in panel["targets"]:
        shown = frozenset(re.findall(r"{{\s*(\w+)\s*}}", target["legendFormat"]))
        assert not exposed.faults(target["expr"], shown)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_reads_what_is_exposed(rule: dict[str, Any], exposed: Exposed) -> None:
    shown = frozenset(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
    assert not exposed.faults(rule["expr"], shown)
    assert set(rule["annotations"]) == {"summary", "description"}
    assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_variables_read_what_is_exposed(exposed: Exposed) -> None:
    queries = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    assert queries
    for query in queries:
        expr, label = re.fullmatch(r"label_values\((.*), (\w+)\)", query).groups()  # type: ignore[union-attr]
        assert not exposed.faults(expr)
        (name, _), *_ = reads(fill(expr)).selectors
        assert label in exposed.labels(name)


@pytest.mark.parametrize(
    "expr",
    [
        "vllm:num_requests_runing",  # a name misspelt
        'rate(vllm:request_success_total{reason="stop"}[1m])',  # another metric's label
        'rate(vllm:request_success_total{finished_reason="stopped"}[1m])',  # a value that is never there
        "sum by (finished_reason) (vllm:num_requests_running)",  # grouped by what it has not
        "histogram_quantile(0.5, sum by (le) (rate(vllm:time_to_first_token_seconds_sum[1m])))",  # no buckets there
    ],
)
def test_faults_are_seen(expr: str, exposed: Exposed) -> None:
    assert exposed.faults(expr)


def test_every_metric_of_ours_is_on_the_dashboard(exposed: Exposed) -> None:
    shown = {name for panel in PANELS for target in panel["targets"] for name, _ in reads(fill(target["expr"])).selectors}
    ours = {
        name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in exposed.series if name.startswith("numbatch:")
    }
    assert not {name for name in ours if not any(seen.startswith(name) for seen in shown)}


def test_the_dashboard_is_well_formed() -> None:
    """What Grafana asks of a file it is given: an identity, a schema, panels with a place, a type, a source and queries."""
    assert DASHBOARD["uid"] and DASHBOARD["title"] and DASHBOARD["schemaVersion"] >= 36
    assert "id" not in DASHBOARD, "the number of one Grafana's database"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    for panel in PANELS:
        assert panel["type"] in ("timeseries", "stat") and panel["title"] and panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert [target["refId"] for target in panel["targets"]] == [chr(65 + i) for i in range(len(panel["targets"]))]
        for holder in (panel, *panel["targets"]):
            assert holder["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    used = set(re.findall(r"\$\{?(?!__)(\w+)", json.dumps(DASHBOARD["panels"])))
    assert used <= variables


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for place in places:
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24 and place["h"] > 0
    for a, b in itertools.combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart, (a, b)


def test_grafana_finds_the_source_and_the_dashboard() -> None:
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8"))
    boards = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/numbatch.yml").read_text(encoding="utf-8"))
    scrape = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
    assert sources["apiVersion"] == boards["apiVersion"] == 1
    assert [source["type"] for source in sources["datasources"]] == ["prometheus"]
    assert sources["datasources"][0]["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]
    assert boards["providers"][0]["options"]["path"]
    assert [job["metrics_path"] for job in scrape["scrape_configs"]] == ["/metrics"]
