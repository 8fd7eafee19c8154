"""Check manifests without a cluster: by the CRDs, by Kubernetes' own schemas, and by the webhook.

`schemas/` has the CRDs of KubeRay 1.7.0 and of the Prometheus operator 0.93.0 (both Apache-2.0) as
JSON schemas: descriptions are left out, unknown keys are forbidden, and what has a default need not
be given. The operator's webhook refuses more than its CRD does; `webhook_errors` has its rules
(`ValidateRayServiceSpec` and `ValidateRayClusterSpec` of its source).
"""

import gzip
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

FOLDER = Path(__file__).parent / "schemas"
KUBERNETES = "1.37"
GROUPS = {"ray.io": "kuberay", "monitoring.coreos.com": "prometheus-operator"}
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?")
UPGRADES = {"NewCluster", "NewClusterWithIncrementalUpgrade", "None"}
MANAGED = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}
RESOURCES = {"num-cpus", "num-gpus", "memory", "resources"}

Object = dict[str, Any]


@cache
def validator_for(group: str, version: str, kind: str) -> jsonschema.Draft7Validator:
    [path] = FOLDER.glob(f"{GROUPS[group]}-*.gz")
    schemas = json.loads(gzip.decompress(path.read_bytes()))
    return jsonschema.Draft7Validator(schemas[kind][version])


def errors_of(manifest: Object) -> list[str]:
    """Return what the API server and the webhook would refuse in one object."""
    group, _, version = manifest["apiVersion"].rpartition("/")
    if group not in GROUPS:
        try:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            return [str(error).splitlines()[0]]
        return []
    found = validator_for(group, version, manifest["kind"]).iter_errors(manifest)
    errors = [f"{'/'.join(map(str, each.absolute_path))}: {each.message}" for each in found]
    # The webhook sees only what the CRD has let through.
    is_asked = manifest["kind"] == "RayService" and not errors
    return list(webhook_errors(manifest)) if is_asked else errors


def webhook_errors(service: Object) -> Iterator[str]:
    """Yield what the operator's webhook, or later its controller, refuses in a RayService."""
    name, spec = service["metadata"]["name"], service["spec"]
    if len(name) > 47 or not DNS_1035.fullmatch(name):
        yield f"name {name}"
    timeout = service["metadata"].get("annotations", {}).get("ray.io/initializing-timeout", "1")
    if not re.fullmatch(r"[1-9]\d*|([1-9]\d*[smh])+", timeout):
        yield f"initializing-timeout {timeout}"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds"
    cluster = spec["rayClusterConfig"]
    if cluster["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headService.metadata.name"
    yield from upgrade_errors(spec)
    yield from auth_errors(cluster)
    yield from redis_errors(cluster)
    yield from gate_errors(cluster)
    for group in cluster["workerGroupSpecs"]:
        yield from size_errors(group, cluster.get("enableInTreeAutoscaling", False))
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield from group_errors(group)


def upgrade_errors(spec: Object) -> Iterator[str]:
    strategy = spec.get("upgradeStrategy", {})
    if strategy.get("type", "None") not in UPGRADES:
        yield f"upgradeStrategy.type {strategy['type']}"
    if strategy.get("type") != "NewClusterWithIncrementalUpgrade":
        return
    options = strategy.get("clusterUpgradeOptions", {})
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent", -1)
    if not spec["rayClusterConfig"].get("enableInTreeAutoscaling"):
        yield "incremental without autoscaler"
    if not 0 <= step <= surge <= 100:
        yield f"stepSizePercent {step}, maxSurgePercent {surge}"
    if options.get("intervalSeconds", 0) <= 0 or not options.get("gatewayClassName"):
        yield "intervalSeconds, gatewayClassName"


def auth_errors(cluster: Object) -> Iterator[str]:
    auth = cluster.get("authOptions", {})
    if auth.get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is not for a RayService"
    version = cluster.get("rayVersion", "")
    if auth.get("mode") == "token":
        parts = re.fullmatch(r"(\d+)\.(\d+)\.\d+", version)
        if parts is None or (int(parts[1]), int(parts[2])) < (2, 52):
            yield f"mode token with rayVersion {version!r}"


def redis_errors(cluster: Object) -> Iterator[str]:
    head = cluster["headGroupSpec"]
    names = {each["name"] for each in head["template"]["spec"]["containers"][0].get("env", [])}
    if names & MANAGED:
        yield f"the operator sets {names & MANAGED}"
    options = cluster.get("gcsFaultToleranceOptions")
    if options is None:
        return
    if {"redis-password", "redis-username"} & head.get("rayStartParams", {}).keys():
        yield "rayStartParams of Redis"
    if options.get("backend", "redis") != "redis" or "storage" in options:
        yield "a backend other than redis is behind a feature gate"


def gate_errors(cluster: Object) -> Iterator[str]:
    """What is behind a feature gate that is off, or not for a RayService."""
    for key in ("networkPolicy", "tlsOptions", "historyServerOptions", "upgradeStrategy"):
        if key in cluster:
            yield key


def size_errors(group: Object, is_autoscaled: bool) -> Iterator[str]:
    low, high = group.get("minReplicas"), group.get("maxReplicas")
    if not is_autoscaled and (low is None or high is None):
        yield "minReplicas and maxReplicas are needed without the autoscaler"
    if low is not None and high is not None and not 0 <= low <= high:
        yield f"minReplicas {low}, maxReplicas {high}"
    if group.get("suspend"):
        yield "suspend of a group"
    if not is_autoscaled and ("priority" in group or "idleTimeoutSeconds" in group):
        yield "priority and idleTimeoutSeconds are the autoscaler's"


def group_errors(group: Object) -> Iterator[str]:
    params = group.get("rayStartParams", {})
    if RESOURCES & params.keys() and group.get("resources"):
        yield "resources and rayStartParams"
    if "labels" in params:
        yield "rayStartParams.labels"
    for key, value in group.get("labels", {}).items():
        if not LABEL.fullmatch(value) or not LABEL.fullmatch(key.rpartition("/")[2]):
            yield f"label {key}: {value}"
    for container in group["template"]["spec"]["containers"]:
        for port in container.get("ports", []):
            if not PORT_NAME.fullmatch(port["name"]):
                yield f"port {port['name']}: at most 15 characters"
