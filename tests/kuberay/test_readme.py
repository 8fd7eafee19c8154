"""The README of cluster/kuberay/ names values that there are, and the numbers that they have."""

import re
from typing import Any

import pytest
import yaml

from tests.kuberay.conftest import CHART, KUBERAY, ROOT, Render, env_of, groups_of, named
from tests.kuberay.schemas import errors_of

README = (KUBERAY / "README.md").read_text()
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
WORDS = re.findall(r"`([a-z]\w+(?:\.\w+)+)(?:\.\*)?(?:: \w+)?`", README)
PATHS = re.findall(
    r"`((?:cluster|chart|manifests|components|overlays|tests|serve)/[\w./-]*)`", README
)


def value_at(path: str) -> Any:
    """Return a value of values.yaml by its path. Raise KeyError if there is none."""
    value = VALUES
    for key in path.split("."):
        value = value[key]
    return value


def test_the_values_that_it_names_exist() -> None:
    named = {word for word in WORDS if word.split(".")[0] in VALUES}
    assert len(named) > 15
    for path in named:
        value_at(path)


def test_the_paths_that_it_names_exist() -> None:
    assert len(PATHS) > 8
    places = (ROOT, KUBERAY, KUBERAY / "manifests")
    # Its image is built there.
    missing = {path for path in PATHS if not any((place / path).exists() for place in places)}
    assert missing <= {"cluster/docker/"}


def example() -> Any:
    [text] = re.findall(r"^```yaml\n(.*?)^```", README, re.M | re.S)
    return yaml.safe_load(text)


def test_its_example_can_be_installed(render: Render) -> None:
    rendered = render(example())
    assert [
        errors_of(each) for objects in rendered.values() for each in objects if errors_of(each)
    ] == []


def test_its_example_reaches_the_database_and_the_store_of_its_jobs(render: Render) -> None:
    rendered = render(example())
    everyone = named(rendered["networkpolicy.yaml"])["flux-all"]["spec"]
    ports = {port["port"] for rule in everyone["egress"] for port in rule.get("ports", [])}
    assert 5432 in ports
    [group] = groups_of(rendered).values()
    assert {"PGPASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= env_of(group).keys()
    made = set(re.findall(r"create secret generic ([\w-]+)", README))
    assert made == {secret["existing"] for secret in example()["secrets"].values()}


def test_its_numbers_are_the_defaults() -> None:
    rows = dict(re.findall(r"^\| (.+?) \| (\d+) \|", README, re.M))
    defaults = VALUES["workerDefaults"]
    [group] = VALUES["workerGroups"]
    notice_s = defaults["terminationGracePeriodSeconds"] - VALUES["drain"]["marginSeconds"]
    assert {name: int(number) for name, number in rows.items()} == {
        "`upgrade.deletionDelaySeconds`": value_at("upgrade.deletionDelaySeconds"),
        "`terminationGracePeriodSeconds` less `drain.marginSeconds`": notice_s,
        "`initializingTimeoutSeconds`": value_at("initializingTimeoutSeconds"),
        "cards of `workerGroups`": group["replicas"] * group["gpusPerNode"],
        "`gpusPerNode`": group["gpusPerNode"],
    }


@pytest.mark.parametrize("version", ["kuberay-1.7.0", "prometheus-operator-0.93.0"])
def test_the_versions_are_those_of_the_schemas(version: str) -> None:
    name, _, number = version.rpartition("-")
    [path] = (ROOT / "tests/kuberay/schemas").glob(f"{name}-*.gz")
    assert path.name == f"{version}.schema.json.gz"
    assert number in README
