"""The manifests of Kubernetes agree with each other and with the server; no cluster is needed."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from demucs_infer import __version__
from demucs_infer.server import ServerSettings, create_app
from demucs_infer.server.settings import PREFIX, load_settings
from tests.helpers.cli_process import ROOT

FOLDER = ROOT / "deploy/kubernetes"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def load(name: str) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all((FOLDER / name).read_text("utf-8")) if each]


OBJECTS = [each for name in FILES if name != "kustomization.yaml" for each in load(name)]
(DEPLOYMENT,) = load("deployment.yaml")
POD = DEPLOYMENT["spec"]["template"]["spec"]
(SERVER,) = POD["containers"]
VARIABLES = {each["name"]: each.get("value", "") for each in SERVER["env"]}
KINDS = {"Deployment", "Service", "PersistentVolumeClaim", "StatefulSet", "PodMonitor"}
KINDS |= {"PodDisruptionBudget", "NetworkPolicy", "ScaledObject"}


def find(kind: str, name: str = "demucs-infer") -> dict[str, Any]:
    (found,) = (e for e in OBJECTS if e["kind"] == kind and e["metadata"]["name"] == name)
    return found


def find_all(value: Any, key: str) -> list[Any]:
    """Return all values of a key, at any depth."""
    if isinstance(value, list):
        return [found for each in value for found in find_all(each, key)]
    if not isinstance(value, dict):
        return []
    return [v for k, v in value.items() if k == key] + find_all(list(value.values()), key)


def test_every_file_is_listed_and_every_kind_is_there() -> None:
    (listed,) = load("kustomization.yaml")
    assert sorted([*listed["resources"], "kustomization.yaml"]) == FILES
    assert {each["kind"] for each in OBJECTS} == KINDS
    assert all(each["apiVersion"] and each["metadata"]["name"] for each in OBJECTS)
    assert listed["images"] == [{"name": SERVER["image"], "newTag": __version__}]


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet"])
def test_containers_have_no_privileges_and_have_limits(kind: str) -> None:
    for workload in (each for each in OBJECTS if each["kind"] == kind):
        pod = workload["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"]
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
            assert security["capabilities"]["drop"] == ["ALL"]
            assert set(container["resources"]) == {"requests", "limits"}
            assert container["readinessProbe"] and container["livenessProbe"]
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            claims = [
                each["metadata"]["name"]
                for each in workload["spec"].get("volumeClaimTemplates", [])
            ]
            assert mounts == {each["name"] for each in pod.get("volumes", [])} | set(claims)
            assert container["image"] == "demucs-infer" or re.search(
                r":\d+\.\d+\.\d+", container["image"]
            )


def test_user_of_the_pod_is_that_of_the_image() -> None:
    assert f"USER {POD['securityContext']['runAsUser']}\n" in (ROOT / "Dockerfile").read_text()


def test_variables_are_valid_settings(tmp_path: Path) -> None:
    names = {f"{PREFIX}{each.name.upper()}" for each in fields(ServerSettings)}
    assert set(VARIABLES) - names == {"TMPDIR"}
    keys = tmp_path / "api-keys"
    keys.write_text("a long key\n")
    values = {**VARIABLES, f"{PREFIX}API_KEYS_FILE": str(keys)}
    settings = load_settings({}, values)
    assert settings.api_keys and settings.offline and settings.log_format == "json"
    assert not settings.public and not settings.is_exposed
    seconds = settings.drain_seconds + settings.shutdown_seconds + 5
    assert POD["terminationGracePeriodSeconds"] > seconds
    probe = SERVER["readinessProbe"]
    noticed = probe["periodSeconds"] * (probe["failureThreshold"] + 1)
    assert settings.drain_seconds > noticed


def test_secrets_and_claims_exist() -> None:
    text = (FOLDER / "kustomization.yaml").read_text()
    given = set(re.findall(r"--from-(?:file|literal)=([\w-]+)=", text))
    references = find_all(OBJECTS, "secretKeyRef") + find_all(OBJECTS, "credentials")
    assert {each["name"] for each in references} == {"demucs-infer"}
    items = [item["key"] for items in find_all(OBJECTS, "items") for item in items]
    assert {each["key"] for each in references} | set(items) == given
    assert [each["claimName"] for each in find_all(POD, "persistentVolumeClaim")] == [
        "demucs-infer"
    ]
    assert find("PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]
    mounts = {mount["mountPath"] for mount in SERVER["volumeMounts"]}
    for name in ("DATA_DIR", "API_KEYS_FILE"):
        assert any(VARIABLES[f"{PREFIX}{name}"].startswith(f"{mount}/") for mount in mounts)


def test_ports_and_labels_agree() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert labels == DEPLOYMENT["spec"]["selector"]["matchLabels"]
    (port,) = SERVER["ports"]
    assert port["containerPort"] == ServerSettings.__dataclass_fields__["port"].default
    service = find("Service")["spec"]
    assert service["selector"] == labels and service["ports"][0]["targetPort"] == port["name"]
    policy = find("NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert policy["ingress"][0]["ports"][0]["port"] == port["containerPort"]
    assert find("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert find("PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"] == port["name"]
    assert find("ScaledObject")["spec"]["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]
    redis = find("StatefulSet", "demucs-redis")["spec"]["template"]
    assert (
        find("NetworkPolicy", "demucs-redis")["spec"]["podSelector"]["matchLabels"]
        == (redis["metadata"]["labels"])
    )
    assert find("Service", "demucs-redis")["spec"]["selector"] == redis["metadata"]["labels"]


def test_probes_are_routes_and_queries_are_metrics(tmp_path: Path) -> None:
    app = create_app(ServerSettings(data_dir=tmp_path, models=("htdemucs",)))
    paths = {getattr(route, "path", "") for route in app.routes}
    probes = {probe["path"] for probe in find_all(SERVER, "httpGet")}
    assert probes == {"/readyz", "/livez"} <= paths
    assert find("PodMonitor")["spec"]["podMetricsEndpoints"][0]["path"] in paths
    text = (ROOT / "demucs_infer/server/metrics.py").read_text()
    queries = [trigger["metadata"]["query"] for trigger in find("ScaledObject")["spec"]["triggers"]]
    names = re.findall(r"demucs_\w+", " ".join(queries))
    assert names == ["demucs_queue_wait_seconds_bucket", "demucs_jobs_waiting"]
    assert all(f'"{name.removesuffix("_bucket")}"' in text for name in names)
