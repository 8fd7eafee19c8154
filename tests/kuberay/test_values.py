"""Unknown values are refused, those of a Serve config file among them, and so are bad numbers."""

import json
import re
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from helm_python import HelmRenderError, HelmValuesError
from ray.serve.schema import ServeDeploySchema

import flux_ray
from flux_ray.cli.config_file import tiers_in
from flux_ray.config import BUILDERS, GatewayArgs, TierArgs
from flux_ray.planner.plan import make_plan
from tests.kuberay.conftest import CHART, ROOT, Render, container_of, groups_of, service_of

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
GROUP = {"name": "a", "replicas": 3, "gpusPerNode": 8, "cpu": 64, "memory": "9Gi"}


def folders_of(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all objects with named keys in a schema."""
    inner = [
        folder
        for value in schema.values()
        if isinstance(value, dict)
        for folder in folders_of(value)
    ]
    return inner + ([schema] if isinstance(schema.get("properties"), dict) else [])


def test_the_schema_lets_nothing_unknown_through() -> None:
    folders = folders_of(SCHEMA)
    assert len(folders) > 30
    open_ones = [each for each in folders if each.get("additionalProperties") is not False]
    assert [list(each["properties"]) for each in open_ones] == [["gateway"]]


def test_the_schema_knows_the_args_of_this_version() -> None:
    definitions = SCHEMA["definitions"]
    assert definitions["gatewayArgs"]["properties"].keys() == GatewayArgs.model_fields.keys()
    assert definitions["tierArgs"]["properties"].keys() == TierArgs.model_fields.keys()


def test_every_value_is_in_values_yaml() -> None:
    """So that who reads that file knows them all."""
    assert SCHEMA["properties"].keys() - VALUES.keys() == {"global"}
    shown = set(re.findall(r"^  (?:- |  |# )?(\w+):", (CHART / "values.yaml").read_text(), re.M))
    assert SCHEMA["properties"]["workerGroups"]["items"]["properties"].keys() <= shown


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("'nonsense' not allowed", {"nonsense": 1}),
    ("'gpus' not allowed", {"workerGroups": [GROUP | {"gpus": 8}]}),
    ("'num_replica' not allowed", {"serve": {"args": {"flux-2-dev": {"num_replica": 1}}}}),
    ("'alias' not allowed", {"serve": {"args": {"gateway": {"alias": {}}}}}),
    ("/upgrade/spareNodes", {"upgrade": {"spareNodes": True}}),
    ("/workerGroups", {"workerGroups": []}),
    ("/rayVersion", {"rayVersion": 2.6}),
    ("/head/memory", {"head": {"memory": "16GB"}}),
]


@pytest.mark.parametrize(("told", "values"), REFUSED, ids=[told for told, _ in REFUSED])
def test_an_unknown_value_is_refused(told: str, values: dict[str, Any], render: Render) -> None:
    with pytest.raises(HelmValuesError, match=told):
        render(values)


CONTRADICTIONS: list[tuple[str, dict[str, Any]]] = [
    ("deletionDelaySeconds 630 must be more", {"upgrade": {"deletionDelaySeconds": 630}}),
    ("is 660 and must be more", {"workerDefaults": {"terminationGracePeriodSeconds": 680}}),
    (
        "drain_timeout_s, 900",
        {"serve": {"args": {"flux-2-dev": {"drain_timeout_s": 900}}}},
    ),
    ("initializingTimeoutSeconds 7200 must", {"initializingTimeoutSeconds": 7200}),
    ("spareNodes: some needs autoscaler", {"upgrade": {"spareNodes": "some"}}),
    (
        "gatewayClassName",
        {"upgrade": {"spareNodes": "some"}, "autoscaler": {"enabled": True}},
    ),
    ("take 22 cards, and workerGroups have 16", {"workerGroups": [GROUP | {"replicas": 2}]}),
    ("two groups are named a", {"workerGroups": [GROUP, GROUP]}),
    (
        "16 ranks on 1 node",
        {"serve": {"args": {"flux-2-dev": {"parallel": {"tensor": 16}, "num_replicas": 1}}}},
    ),
    ("postgresql://", {"serve": {"args": {"gateway": {"jobs": {}}}}}),
    ("no application of that name", {"serve": {"args": {"flux-2-klein": {"num_replicas": 1}}}}),
    ("not both", {"secrets": {"keys": {"existing": "a", "file": "b"}}}),
    ("accessKeyId is missing", {"secrets": {"objectStore": {"secretAccessKey": "b"}}}),
    ("hostPath of one node", {"weights": {"job": True, "hostPath": "/x"}}),
    ("no Serve config file", {"serve": {"config": "tiers: [tiny]"}}),
    ("no Serve config file", {"serve": {"config": "a: ["}}),
    ("reach only 0.0.0.0", {"serve": {"config": (ROOT / "serve/laptop.yaml").read_text()}}),
]


@pytest.mark.parametrize(("told", "values"), CONTRADICTIONS, ids=[t for t, _ in CONTRADICTIONS])
def test_values_that_do_not_go_together_are_refused(
    told: str, values: dict[str, Any], render: Render
) -> None:
    with pytest.raises(HelmRenderError, match=told):
        render(values)


ADDRESSES = {
    "public_url": "https://flux.invalid",
    "jobs.database": "postgresql://flux@postgres.invalid/flux",
    "jobs.results": "s3://flux-results.invalid",
}


def test_an_address_that_only_stands_for_one_is_refused() -> None:
    """Each key is named, whether the address is the default fleet's or one's own."""
    helm_python.disable_logging()
    chart = helm_python.Chart.load(CHART)

    def refusal(args: dict[str, Any]) -> str:
        with pytest.raises(HelmRenderError) as refused:
            chart.render({"serve": {"args": {"gateway": args}}})
        return str(refused.value)

    jobs = {"database": "postgresql://flux@db/flux", "results": "s3://flux-results"}
    given = {"public_url": "https://flux.example.com", "jobs": jobs}
    for key, address in ADDRESSES.items():
        name = key.removeprefix("jobs.")
        wrong = given | ({"jobs": jobs | {name: address}} if "." in key else {name: address})
        told = f"serve.args.gateway.{key}: {address} only stands for an address of yours: set it"
        assert told in refusal(wrong)
    assert f"{ADDRESSES['public_url']} only stands" in refusal({"jobs": jobs})
    for url in ("https://flux.example.invalid:8443/a", "HTTPS://FLUX.INVALID"):
        assert f"public_url: {url} only stands" in refusal(given | {"public_url": url})
    invalid = {"public_url": "https://flux.invalid.example.com/a.invalid?b=.invalid"}
    assert chart.render({"serve": {"args": {"gateway": given | invalid}}})


def test_a_host_that_is_left_out_is_serves_default(render: Render) -> None:
    fleet = yaml.safe_load((CHART / "files/fleet.yaml").read_text().replace(".invalid", ".com"))
    assert ServeDeploySchema.model_validate(fleet).http_options.host == "0.0.0.0"
    del fleet["http_options"]["host"]
    assert ServeDeploySchema.model_validate(fleet).http_options.host == "0.0.0.0"
    assert render({"serve": {"config": yaml.safe_dump(fleet)}})


def test_a_long_name_is_refused(render: Render) -> None:
    assert render(name="x" * 47)
    with pytest.raises(HelmRenderError, match="48 characters"):
        render(name="x" * 48)


def test_the_serve_config_can_be_deployed(case: dict[str, Any], render: Render) -> None:
    text = service_of(render(case))["serveConfigV2"]
    applications = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    args = [BUILDERS[each.import_path].model_validate(each.args) for each in applications]
    assert sum(isinstance(each, GatewayArgs) and each.num_cpus > 0 for each in args) == 1


def test_the_default_fleet_fits_its_cards(render: Render, tmp_path: Path) -> None:
    rendered = render()
    path = tmp_path / "serve.yaml"
    path.write_text(service_of(rendered)["serveConfigV2"])
    [group] = groups_of(rendered).values()
    requests = container_of(group)["resources"]["requests"]
    plan = make_plan(tiers_in(path), "h100-80gb", group["replicas"] * requests["nvidia.com/gpu"])
    assert plan.fits
    assert group["labels"] == {"card": "h100"}
    # A replica's leader asks for the CPUs of its ranks, one a card, and a gateway for its own.
    most = max(args.num_cpus for args in tiers_in(path)) * requests["nvidia.com/gpu"]
    assert most + 2 < int(requests["cpu"])


def test_the_default_serve_config_is_the_one_of_serve(render: Render) -> None:
    args = {"gateway": {"public_url": "https://a.b", "jobs": {"database": "postgresql://a/b"}}}
    fleet = yaml.safe_load((ROOT / "serve/fleet.yaml").read_text())
    for application in fleet["applications"]:
        application["args"] |= args.get(application["name"], {})
    # Without a config of its own, as `render` would give it one.
    rendered = render({"serve": {"config": "", "args": args}})
    assert yaml.safe_load(service_of(rendered)["serveConfigV2"]) == fleet


def test_args_replace_those_of_the_file(render: Render) -> None:
    args = {"gateway": {"public_url": "https://a.b"}, "flux-2-dev": {"cache_bytes": 17179869184}}
    config = yaml.safe_load(service_of(render({"serve": {"args": args}}))["serveConfigV2"])
    deployed = {each["name"]: each["args"] for each in config["applications"]}
    assert deployed["gateway"]["public_url"] == "https://a.b"
    assert deployed["gateway"]["num_replicas"] == 4
    assert repr(deployed["flux-2-dev"]["cache_bytes"]) == "17179869184"


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == flux_ray.__version__
    assert f"ray[serve]=={VALUES['rayVersion']}" in (ROOT / "pyproject.toml").read_text()
