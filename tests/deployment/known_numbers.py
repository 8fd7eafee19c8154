"""Every number of the files of cluster/ and serve/, and of the code, that others depend on.

The names are those in the table of docs/operations.md.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from ray.serve._private import constants as of_serve

from flux_ray.catalog.tiers import TIERS
from flux_ray.config.gateway import GatewayArgs, Limits
from flux_ray.config.tier import TierArgs
from flux_ray.router.pricing.config_check import drain_timeout_s
from tests.deployment.cluster_files import (
    DOCKER,
    HAPROXY,
    MACHINES,
    SERVE_CONFIGS,
    args_in,
    compose,
    environment_in,
    environment_of_make,
    environment_of_unit,
    haproxy_option,
    haproxy_timeout,
    haproxy_word,
    nginx_value,
    num_bytes,
    pods_of_chart,
    ray_service,
    rendered_chart,
    seconds,
    unit,
)


@dataclass(frozen=True)
class Number:
    """A value in seconds, bytes or as it is, and the place that it is from or holds for."""

    name: str
    value: float
    place: str


def all_numbers() -> list[Number]:
    return [
        *(number for place, text in serve_configs() for number in of_serve_config(place, text)),
        *of_load_balancers(),
        *of_machines(),
        *of_compose(),
        *of_chart(),
        *of_environment(),
    ]


def serve_configs() -> Iterator[tuple[str, str]]:
    for path in SERVE_CONFIGS:
        yield path.name, path.read_text()
    service = ray_service()
    if service is not None:
        yield "chart", service["serveConfigV2"]


def of_serve_config(place: str, text: str) -> Iterator[Number]:
    http = yaml.safe_load(text)["http_options"]
    yield Number("`request_timeout_s` of Serve", http["request_timeout_s"], place)
    kept = http.get("keep_alive_timeout_s", of_serve.DEFAULT_UVICORN_KEEP_ALIVE_TIMEOUT_S)
    yield Number("`keep_alive_timeout_s` of Serve", kept, place)
    for args in args_in(text).values():
        if isinstance(args, GatewayArgs):
            yield from of_gateway(place, args)
        elif isinstance(args, TierArgs):
            yield Number("`drain_timeout_s` of tiers", drain_timeout_s(args), place)
            yield Number("`load_timeout_s` of tiers", args.load_timeout_s, place)
            yield Number("`retry_s` of tiers", args.retry_s, place)


def of_gateway(place: str, args: GatewayArgs) -> Iterator[Number]:
    yield Number("`request_timeout_s` of gateways", args.request_timeout_s, place)
    yield Number("`drain_timeout_s` of gateways", args.drain_timeout_s, place)
    yield Number("`num_cpus` of gateways", args.num_cpus, place)
    yield Number("`uploads.grace_s`", args.uploads.grace_s, place)
    yield Number("`uploads.max_s`", args.uploads.max_s, place)
    yield Number("`limits.max_body_bytes`", args.limits.max_body_bytes, place)
    at_once = args.num_replicas * args.max_ongoing_requests
    yield Number("requests that all gateways take at once", at_once, place)
    pixels = max(tier.max_pixels for tier in TIERS)
    largest = pixels * 3 * args.limits.max_images * 4 / 3
    yield Number("the largest answer", largest, place)


def of_load_balancers() -> Iterator[Number]:
    both = "load balancers"
    for name in ("client", "server"):
        yield Number("time for an answer", haproxy_timeout(name), both)
    for name in ("proxy_read_timeout", "proxy_send_timeout", "send_timeout"):
        yield Number("time for an answer", seconds(nginx_value(name)), both)
    kept = seconds(nginx_value("keepalive_timeout", "upstream"))
    yield Number("their keep-alive", kept, both)
    yield Number("their keep-alive", haproxy_timeout("http-keep-alive"), both)
    yield Number("their patience with a body", haproxy_timeout("http-request"), both)
    yield Number("their patience with a body", seconds(nginx_value("client_body_timeout")), both)
    check_s = haproxy_timeout("check") + seconds(haproxy_option("default-server", "inter"))
    noticed_s = int(haproxy_option("default-server", "fall")) * check_s
    yield Number("HAProxy notices a drained node", noticed_s, both)
    retries = int(haproxy_word("retries"))
    silent_s = seconds(haproxy_word("srvtcpka-idle"))
    silent_s += int(haproxy_word("srvtcpka-cnt")) * seconds(haproxy_word("srvtcpka-intvl"))
    tried_s = haproxy_timeout("queue") + retries * haproxy_timeout("connect") + silent_s
    yield Number("HAProxy tries other nodes, after a silent one", tried_s, both)
    (limit,) = re.findall(r"hdr_val\(content-length\) gt (\d+)", HAPROXY.read_text())
    yield Number("their limit of a body", float(limit), both)
    yield Number("their limit of a body", num_bytes(nginx_value("client_max_body_size")), both)
    most = float(haproxy_word("maxconn"))
    yield Number("requests that they take at once", most, both)
    # One connection to the client and one to the node.
    yield Number(
        "requests that they take at once", int(nginx_value("worker_connections")) / 2, both
    )


def of_machines() -> Iterator[Number]:
    place = "systemd"
    worker, head, deployment = unit("worker"), unit("head"), unit("deploy")
    notice = environment_of_unit("worker")["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
    yield Number("notice of a drain", float(notice), place)
    yield Number("time until SIGKILL", seconds(worker["TimeoutStopSec"][0]), place)
    started_s = seconds(deployment["TimeoutStartSec"][0])
    yield Number("time for a deployment", started_s, place)
    waits_s = told_timeout(deployment["ExecStart"][0])
    for own_place in (place, *(path.name for path in SERVE_CONFIGS if path.parent != DOCKER)):
        yield Number("`--timeout` of `flux-ray deploy`", waits_s, own_place)
    away_s = seconds(head["TimeoutStopSec"][0]) + seconds(head["RestartSec"][0])
    yield Number("a head stops and starts", away_s, place)
    waits = environment_in(MACHINES / "flux-ray.env")["RAY_gcs_rpc_server_reconnect_timeout_s"]
    yield Number("`RAY_gcs_rpc_server_reconnect_timeout_s`", float(waits), place)
    ray_up = yaml.safe_load((MACHINES / "ray-up.yaml").read_text())
    for command in [*head["ExecStart"], ray_up["head_start_ray_commands"][-1]]:
        (offered,) = re.findall(r"--num-cpus=(\S+)", command)
        yield Number("processors of a head", float(offered), place)


def told_timeout(command: str) -> float:
    (told,) = re.findall(r"--timeout=(\d+)", command)
    return float(told)


def of_compose() -> Iterator[Number]:
    place = "compose"
    services = compose()["services"]
    node = services["flux-ray"]
    stops_s = seconds(services["load-balancer"]["stop_grace_period"])
    yield Number("`stop_grace_period` of the load balancer", stops_s, place)
    (objects,) = (
        float(word.split("=")[1]) for word in node["command"] if "object-store-memory" in word
    )
    yield Number("Ray's objects", objects, place)
    yield Number("shared memory", num_bytes(node["shm_size"]), place)
    waits_s = told_timeout(" ".join(services["deploy"]["command"]))
    for path in sorted(DOCKER.glob("serve*.yaml")):
        yield Number("`--timeout` of `flux-ray deploy`", waits_s, path.name)
    args = args_in((DOCKER / "serve.yaml").read_text())["gateway"]
    assert isinstance(args, GatewayArgs)
    held = args.num_replicas * args.limits.max_held_bytes + objects
    yield Number("what gateways hold, and Ray's objects", held, place)
    limit = node["deploy"]["resources"]["limits"]["memory"]
    yield Number("memory of the container", num_bytes(limit), place)


def of_chart() -> Iterator[Number]:
    for kind, group, pod in pods_of_chart():
        place = f"chart's {kind}"
        (shared,) = (each["emptyDir"]["sizeLimit"] for each in pod["volumes"] if "emptyDir" in each)
        yield Number("Ray's objects", float(group["rayStartParams"]["object-store-memory"]), place)
        yield Number("shared memory", num_bytes(shared), place)
        if kind == "head":
            offered = group["rayStartParams"]["num-cpus"]
            yield Number("processors of a head", float(offered), "chart")
        else:
            grace_s = pod["terminationGracePeriodSeconds"]
            yield Number("time until SIGKILL", grace_s, "chart")
            (container,) = pod["containers"]
            notice = container["lifecycle"]["preStop"]["exec"]["command"][-1]
            yield Number("notice of a drain", float(notice), "chart")
            yield from of_memory(container, group)
    service = ray_service()
    if service is not None:
        kept_s = service["rayClusterDeletionDelaySeconds"]
        yield Number("`rayClusterDeletionDelaySeconds`", kept_s, "chart")
        (whole,) = (each for each in rendered_chart() if each["kind"] == "RayService")
        starts_s = whole["metadata"]["annotations"]["ray.io/initializing-timeout"]
        yield Number("time for a deployment", float(starts_s), "chart")


def of_memory(container: dict[str, Any], group: dict[str, Any]) -> Iterator[Number]:
    objects = float(group["rayStartParams"]["object-store-memory"])
    # As many gateways as could be on one node.
    held = 4 * Limits().max_held_bytes + objects
    yield Number("what gateways hold, and Ray's objects", held, "chart's worker")
    limit = container["resources"]["limits"]["memory"]
    yield Number("memory of the container", num_bytes(limit), "chart's worker")


def of_environment() -> Iterator[Number]:
    """Yield what every file that starts Ray sets; another test holds them equal."""
    place, set_by_make = "Makefile", environment_of_make()
    for name in ("PROXY_HEALTH_CHECK_TIMEOUT_S", "PROXY_READY_CHECK_TIMEOUT_S"):
        variable = f"RAY_SERVE_{name}"
        yield Number(f"`{variable}`", float(set_by_make[variable]), place)
    longest = set_by_make["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"]
    yield Number("`RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH`", float(longest), place)
    drains_s = of_serve.PROXY_MIN_DRAINING_PERIOD_S
    yield Number("`RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S`", drains_s, place)
