"""The manifests of `yamls/`: valid by the published schemas, one with another, with the image and with the server's flags."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from config.cli import load, parser
from config.load import LoadedConfig
from config.version import VERSION
from tests.deploy.image import CACHE, UID

YAMLS = Path(__file__).resolve().parents[2] / "yamls"
VERSIONS = ("1.25", "1.29", "1.33", kubernetes_validate.latest_version())


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((YAMLS / name).read_text(encoding="utf-8")))


def one(name: str, kind: str) -> dict[str, Any]:
    (found,) = [document for document in manifests(name) if document["kind"] == kind]
    return found


def pod() -> dict[str, Any]:
    return dict(one("deploy.yaml", "Deployment")["spec"]["template"]["spec"])


def container() -> dict[str, Any]:
    (found,) = pod()["containers"]
    return dict(found)


def loaded(**environ: str) -> LoadedConfig:
    """The configuration that the Deployment's arguments make, on a machine without a card."""
    arguments: argparse.Namespace = parser().parse_args([*container()["args"], "--set", "server.server_name=0.0.0.0"])
    return load(arguments, environ)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["dataset.yaml", "deploy.yaml", "service.yaml"])
def test_the_published_schemas_accept_it(name: str, version: str) -> None:
    for document in manifests(name):
        kubernetes_validate.validate(document, version, strict=True)


def test_a_fault_is_seen() -> None:
    document = one("deploy.yaml", "Deployment")
    document["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSIONS[0], strict=True)


def test_the_names_of_the_seed() -> None:
    assert one("deploy.yaml", "Deployment")["metadata"]["name"] == "lmdeploy"
    assert one("service.yaml", "Service")["metadata"]["name"] == "lmdeploy-service"
    assert {path.name for path in YAMLS.iterdir()} == {"dataset.yaml", "deploy.yaml", "service.yaml"}  # kubectl delete -f ./yamls
    server = loaded().config.server
    assert server.server_port == 8000 and loaded().config.model.model_name == "qwen"
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_service_leads_to_the_container() -> None:
    service, deployment = one("service.yaml", "Service")["spec"], one("deploy.yaml", "Deployment")["spec"]
    assert service["selector"].items() <= deployment["template"]["metadata"]["labels"].items()
    assert deployment["selector"]["matchLabels"].items() <= deployment["template"]["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    (way,) = service["ports"]
    assert (way["port"], ports[way["targetPort"]]) == (8000, 8000)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container()[probe]["httpGet"]["port"] in ports
    assert deployment["template"]["metadata"]["annotations"]["prometheus.io/port"] == "8000"


def test_the_claim_is_the_one_of_the_dataset() -> None:
    claim = one("dataset.yaml", "PersistentVolumeClaim")
    volume = one("dataset.yaml", "PersistentVolume")
    (model,) = [v["persistentVolumeClaim"] for v in pod()["volumes"] if "persistentVolumeClaim" in v]
    assert model["claimName"] == claim["metadata"]["name"] and model["readOnly"]
    assert claim["spec"]["selector"]["matchLabels"].items() <= volume["metadata"]["labels"].items()
    for key in ("accessModes", "storageClassName"):
        assert claim["spec"][key] == volume["spec"][key]
    (mount,) = [mount for mount in container()["volumeMounts"] if mount["name"] == "model"]
    assert loaded().config.model.path == mount["mountPath"]
    assert volume["spec"]["csi"]["volumeAttributes"]["path"] == "/" + Path(mount["mountPath"]).name


def test_volumes_are_mounted_and_mounts_have_volumes() -> None:
    assert {mount["name"] for mount in container()["volumeMounts"]} == {volume["name"] for volume in pod()["volumes"]}
    assert CACHE in {mount["mountPath"] for mount in container()["volumeMounts"]}  # the image's only folder to write to
    assert container()["securityContext"]["readOnlyRootFilesystem"]


def test_the_drain_fits_into_the_grace_period() -> None:
    knobs = loaded().config.shutdown
    assert knobs.drain_delay_s >= container()["readinessProbe"]["periodSeconds"] * container()["readinessProbe"]["failureThreshold"]
    assert pod()["terminationGracePeriodSeconds"] >= knobs.drain_delay_s + knobs.drain_timeout_s + 5


def test_a_slow_start_is_no_death() -> None:
    probe = container()["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= loaded().config.engine.init_timeout_s
    assert probe["periodSeconds"] <= 5  # the seed's pod is ready after 27 s: nobody may wait long for the next probe


def test_the_image_and_its_user() -> None:
    assert container()["image"].startswith(f"numbatch:{VERSION}")
    assert (pod()["securityContext"]["runAsUser"], pod()["securityContext"]["runAsNonRoot"]) == (UID, True)


def test_keys_of_the_secret_are_asked_for() -> None:
    (variable,) = container()["env"]
    assert variable["valueFrom"]["secretKeyRef"]["optional"]
    assert loaded().config.server.api_keys == ()
    keys = loaded(**{variable["name"]: "first-key-0123456789abcdef,second-key-0123456789abcdef"}).config.server.api_keys
    assert keys == ("first-key-0123456789abcdef", "second-key-0123456789abcdef")


def test_operating_says_the_same() -> None:
    page = (YAMLS.parent / "docs/operating.md").read_text(encoding="utf-8")
    for probe in ("livenessProbe", "readinessProbe"):
        shown = re.search(rf"{probe}:\s*({{.*}})", page)
        assert shown is not None
        assert yaml.safe_load(shown[1])["httpGet"]["path"] == container()[probe]["httpGet"]["path"]
