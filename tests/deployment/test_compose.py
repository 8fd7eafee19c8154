"""The compose file for one box: what Docker would refuse, and what nobody wants it to do."""

import copy
import gzip
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import flux_ray
from flux_ray.config.gateway import GatewayArgs, JobArgs
from tests.deployment.cluster_files import (
    DOCKER,
    args_in,
    compose,
    environment_in,
    environment_of_image,
)

SCHEMA = json.loads(gzip.decompress(Path(__file__).with_name("compose-spec.json.gz").read_bytes()))
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)
FILES = sorted(path.name for path in DOCKER.glob("compose*.yaml"))
SERVICES: dict[str, dict[str, Any]] = compose()["services"]
TEXT = (DOCKER / "compose.yaml").read_text()
# It ends when everything serves.
ONCE = {"deploy"}
SECRET = re.compile("PASSWORD|TOKEN|SECRET")


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_as_the_specification_has_it(name: str) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(compose(name))] == []


def test_the_specification_finds_mistakes() -> None:
    broken = copy.deepcopy(compose())
    broken["services"]["flux-ray"]["stop_grace_periode"] = "60s"
    broken["services"]["database"]["healthcheck"]["interval"] = ["5s"]
    assert len(list(VALIDATOR.iter_errors(broken))) == 2


def test_every_image_has_a_version() -> None:
    for name, service in SERVICES.items():
        image, _, tag = service["image"].rpartition(":")
        assert image and re.search(r"\d+\.\d+|\d{4}-\d\d-\d\d", tag), f"{name}: {service['image']}"
    assert SERVICES["flux-ray"]["image"] == f"flux-ray:{flux_ray.__version__}"
    assert SERVICES["deploy"]["image"] == SERVICES["flux-ray"]["image"]
    assert re.search(r"^ARG BASE=\S+:[\d.]+-\S+$", (DOCKER / "Dockerfile").read_text(), re.M)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_watched_and_bounded(name: str) -> None:
    service = SERVICES[name]
    assert service["deploy"]["resources"]["limits"]["memory"]
    if name in ONCE:
        assert service["restart"] == "no"
        return
    assert service["restart"] == "unless-stopped"
    assert {"test", "interval", "timeout", "retries"} <= service["healthcheck"].keys()


def test_secrets_come_from_outside() -> None:
    asked = set(re.findall(r"\$\{(\w+):\?", TEXT))
    for name, service in SERVICES.items():
        for key in service.get("environment", {}):
            if SECRET.search(key):
                assert re.search(rf"^ +{key}: \$\{{\w+:[?-][^}}]*\}}$", TEXT, re.M), f"{name}.{key}"
    example = environment_in(DOCKER / ".env.example")
    assert asked <= example.keys()
    assert set(example.values()) == {""}
    assert ".env" in (DOCKER / ".gitignore").read_text().split()


def test_only_the_load_balancer_may_be_let_out() -> None:
    """And that only if `.env` says so."""
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
    assert re.findall(r'ports: \["(\$\{\w+)', TEXT) == ["${FLUX_RAY_PUBLISH"]


@pytest.mark.parametrize("name", FILES)
def test_what_is_mounted_is_there(name: str) -> None:
    volumes = compose().get("volumes", {})
    mounted = set()
    for service in compose(name)["services"].values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            mounted.add(source)
            if source.startswith("."):
                assert (DOCKER / source).exists(), mount
            else:
                assert source in volumes
    if name == "compose.yaml":
        assert set(volumes) <= mounted
    else:
        assert mounted


def test_what_is_kept_by_default_outlives_the_container() -> None:
    mounted = {mount.split(":")[1] for mount in SERVICES["flux-ray"]["volumes"]}
    image = environment_of_image()
    assert {image["HOME"], image["HF_HOME"]} <= mounted
    jobs = JobArgs()
    assert jobs.results.startswith("~/") and jobs.database.startswith("sqlite:///~/")


def test_what_waits_for_another_waits_for_what_it_needs() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if other in ONCE else "service_healthy"
            assert how["condition"] == wanted, f"{name} waits for {other}"
    # Compose stops what waits before what it waits for: so the last request ends before Ray.
    assert "flux-ray" in SERVICES["load-balancer"]["depends_on"]
    assert SERVICES["load-balancer"]["stop_signal"] == "SIGUSR1"


@pytest.mark.parametrize("name", ["serve.yaml", "serve-gpu.yaml"])
def test_what_is_deployed_fits_the_other_services(name: str) -> None:
    text = (DOCKER / name).read_text()
    args = args_in(text)["gateway"]
    assert isinstance(args, GatewayArgs)
    assert set(args.tiers) == args_in(text).keys() - {"gateway"}
    assert args.jobs is not None
    url = re.fullmatch(r"postgresql://(\w+)@(\w+)/(\w+)", args.jobs.database)
    assert url
    user, host, database = url.groups()
    of_database = SERVICES[host]["environment"]
    assert (of_database["POSTGRES_USER"], of_database["POSTGRES_DB"]) == (user, database)
    store = re.fullmatch(r"http://(\w+):9000", args.jobs.results_options["endpoint_url"])
    assert store and args.jobs.results.removeprefix("s3://") in str(
        SERVICES[store[1]]["entrypoint"]
    )
    assert (
        SERVICES[store[1]]["environment"]["MINIO_ROOT_USER"]
        == (SERVICES["flux-ray"]["environment"]["AWS_ACCESS_KEY_ID"])
    )
    assert SERVICES["load-balancer"]["ports"] == [f"{args.public_url.removeprefix('http://')}:8080"]


def test_the_load_balancers_address_is_believed() -> None:
    address = SERVICES["load-balancer"]["networks"]["default"]["ipv4_address"]
    assert SERVICES["flux-ray"]["environment"]["FORWARDED_ALLOW_IPS"] == address
    assert SERVICES["load-balancer"]["environment"]["FLUX_RAY_NODE"] == "flux-ray:8000"
