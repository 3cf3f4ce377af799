"""docs/deploy.md: every command of it is run (elsewhere in this folder) or at least names files, flags and objects that exist."""

from __future__ import annotations

import json
import logging
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from api.log import FIELDS, JsonFormatter, noted
from config.cli import load, parser
from config.version import VERSION
from tests.deploy.image import CACHE, ROOT, Image, environment, instructions
from tests.deploy.test_kubernetes import one
from tests.deploy.test_systemd import analyze, installed

PAGE = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(part, comments=True)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    for part in re.split(r" && ", line)
    if shlex.split(part, comments=True)
]
__all__ = ["installed"]  # a fixture


def of(program: str, *words: str) -> list[list[str]]:
    found = [command for command in COMMANDS if command[: 1 + len(words)] == [program, *words]]
    assert found
    return found


def test_every_program_is_known() -> None:
    known = {"docker", "kubectl", "curl", "cp", "mkdir", "systemctl", "prometheus"}
    assert {command[0] for command in COMMANDS} == known


def test_docker_builds() -> None:
    arguments = {value.partition("=")[0] for step, value in instructions() if step == "ARG"}
    tags = []
    for command in of("docker", "build"):
        assert {word.partition("=")[0] for word in command if re.match(r"[A-Z]+=", word)} <= arguments
        tags.append(command[command.index("-t") + 1])
    assert tags == [f"numbatch:{VERSION}", f"numbatch:{VERSION}-cuda"]


def test_docker_run_starts_a_server(image: Image) -> None:
    (command,) = of("docker", "run")
    at = command.index(f"numbatch:{VERSION}")
    options, arguments = command[:at], command[at + 1 :]
    mounts = {words[1] for word in options if ":/" in word for words in [word.split(":")]}
    assert mounts == {"/models", CACHE}
    (key,) = [word for word in options if word.startswith("NUMBATCH_")]
    assert (
        load(parser().parse_args(arguments), {**environment_knobs(), **dict([key.split("=", 1)])}).config.model.path == "/models/model.gguf"
    )
    ended = image.run("--check", *arguments, **dict([key.split("=", 1)]))
    assert ended.returncode == 0, ended.stderr


def environment_knobs() -> dict[str, str]:
    return {name: value for name, value in environment().items() if name.startswith("NUMBATCH_")}


def test_kubectl_names_what_is_there() -> None:
    for command in of("kubectl", "apply"):
        assert (ROOT / command[-1]).is_file()
    (forward,) = of("kubectl", "port-forward")
    assert forward[2] == f"svc/{one('service.yaml', 'Service')['metadata']['name']}"
    (secret,) = of("kubectl", "create", "secret")
    assert secret[4] == one("dataset.yaml", "PersistentVolume")["spec"]["csi"]["nodePublishSecretRef"]["name"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "cp"], ids=" ".join)
def test_copied_files_exist(command: list[str]) -> None:
    sources = [word for word in command[1:-1] if not word.startswith("-")]
    assert sources and all((ROOT / source).exists() for source in sources)


def test_the_board_is_copied_where_grafana_looks() -> None:
    provider = (ROOT / "deploy/grafana/provisioning/dashboards/numbatch.yml").read_text(encoding="utf-8")
    (target,) = [command[-1].rstrip("/") for command in of("cp") if "numbatch.json" in command[-2]]
    assert target in provider


def test_prometheus_is_given_a_file() -> None:
    (command,) = of("prometheus")
    assert (ROOT / command[1].partition("=")[2]).is_file()


def test_the_rating_of_the_unit(installed: Path) -> None:
    (said,) = re.findall(r"rates it ([\d.]+) of 10", PAGE)
    (installed.parent / "numbatch.service.d/cuda.conf").unlink()
    ended: subprocess.CompletedProcess[str] = analyze("security", "--offline=yes", str(installed))
    found = re.search(r"exposure level for numbatch.service: ([\d.]+)", ended.stdout)
    assert found is not None and float(found[1]) <= float(said)


def test_the_knobs_of_traces(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "x.toml").write_text('[engine]\ndevice = "mock"\n' + block, encoding="utf-8")
    found = load(parser().parse_args(["--config", str(tmp_path / "x.toml")]), {}).config.telemetry
    assert found.otlp_endpoint == "http://127.0.0.1:4318/v1/traces" and found.sample_ratio == 0.1


def test_the_log_line_has_the_fields_of_one() -> None:
    (block,) = re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    shown = json.loads(block)
    fields = {
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "ms": 71.0,
        "id": "x",
        **noted(" prompt=5 cached=0 output=10 choices=1 finish=length"),
    }
    record = logging.makeLogRecord({"name": "numbatch.access", "levelname": "INFO", "msg": "m", FIELDS: fields})
    assert list(json.loads(JsonFormatter().format(record))) == list(shown)
    assert {name: shown[name] for name in fields if name != "id"} == {name: value for name, value in fields.items() if name != "id"}


def test_the_number_of_alerts() -> None:
    rules = (ROOT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8").count("- alert:")
    assert rules == 10 and "loads ten alerts" in PAGE
