"""Render the chart of cluster/kuberay/ as Helm does, and read what comes out as Kubernetes does."""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
CHART = KUBERAY / "chart"
CASES = sorted((Path(__file__).parent / "values").glob("*.yaml"))
NAME, NAMESPACE = "flux", "images"

Object = dict[str, Any]
# Each value of `values` to what comes out, by template.
Render = Callable[..., dict[str, list[Object]]]


class StrictLoader(yaml.CSafeLoader):
    """Read YAML as the API server does with strict validation: a key twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping; ConstructorError names a key that is there twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"twice: {twice}", node.start_mark)
        return super().construct_mapping(node, deep)


def objects_in(text: str) -> list[Object]:
    """Return the objects of a file of manifests."""
    return [each for each in yaml.load_all(text, StrictLoader) if each]


def values_of(case: Path | None) -> Object:
    return {} if case is None else yaml.safe_load(case.read_text())


def addressed(values: Object) -> Object:
    """Return the values with addresses of somebody's in the default fleet: its own are refused."""
    fleet = (CHART / "files" / "fleet.yaml").read_text().replace(".invalid", ".example.com")
    return values | {"serve": {"config": fleet} | values.get("serve", {})}


@pytest.fixture(scope="session")
def render() -> Render:
    """Return the function that renders the chart with these values: objects by template."""
    helm_python.disable_logging()
    chart = helm_python.Chart.load(CHART)

    @cache
    def manifests(values: str, name: str) -> dict[str, list[Object]]:
        files = chart.render(addressed(json.loads(values)), name=name, namespace=NAMESPACE)
        return {
            Path(path).name: objects_in(text)
            for path, text in files.items()
            if path.endswith("yaml")
        }

    def rendered(values: Object | None = None, name: str = NAME) -> dict[str, list[Object]]:
        return copy.deepcopy(manifests(json.dumps(values or {}), name))

    return rendered


@pytest.fixture(params=[None, *CASES], ids=lambda case: "default" if case is None else case.stem)
def case(request: pytest.FixtureRequest) -> Object:
    """Return the values of each case in turn, those of no values file first."""
    return values_of(request.param)


def named(objects: list[Object]) -> dict[str, Object]:
    """Return the objects of one template by their names."""
    return {each["metadata"]["name"]: each for each in objects}


def service_of(rendered: dict[str, list[Object]]) -> Object:
    """Return the spec of the RayService."""
    [service] = rendered["rayservice.yaml"]
    return service["spec"]


def groups_of(rendered: dict[str, list[Object]]) -> dict[str, Object]:
    """Return the worker groups by name."""
    groups = service_of(rendered)["rayClusterConfig"]["workerGroupSpecs"]
    return {group["groupName"]: group for group in groups}


def container_of(group: Object) -> Object:
    """Return the container of Ray of a head or worker group."""
    return group["template"]["spec"]["containers"][0]


def env_of(group: Object) -> dict[str, Any]:
    """Return the variables of that container: a value, or where it comes from."""
    return {
        each["name"]: each.get("value", each.get("valueFrom"))
        for each in container_of(group)["env"]
    }
