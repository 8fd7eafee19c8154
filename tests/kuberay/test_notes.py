"""NOTES.txt: what the operator of a new release is told."""

import re
from typing import Any

import helm_python

from tests.kuberay.conftest import CASES, CHART, addressed, values_of

CASE = {path.stem: values_of(path) for path in CASES}


def notes(values: dict[str, Any]) -> str:
    helm_python.disable_logging()
    chart = helm_python.Chart.load(CHART)
    rendered = chart.render(addressed(values), name="flux", namespace="images")
    return rendered["flux-ray/templates/NOTES.txt"]


def test_open_doors_are_named() -> None:
    assert "Nobody is asked for a key: give `secrets.keys`" in notes({})
    assert "the service is public" in notes({"service": {"type": "LoadBalancer"}})
    assert "Nobody" not in notes(CASE["spare-nodes"])


def test_a_head_without_redis_is_named() -> None:
    assert "Without `redis.address`" in notes({})
    assert "Without `redis.address`" not in notes(CASE["spare-nodes"])


def test_the_service_is_the_one_that_the_operator_makes() -> None:
    assert "port-forward service/flux-serve-svc 8000" in notes({})


def test_its_commands_are_of_this_namespace() -> None:
    commands = re.findall(r"kubectl \S+ \S+", notes({}))
    assert len(commands) == 3
    assert set(commands) == {"kubectl -n images"}


def test_licences_that_are_not_accepted_are_named() -> None:
    assert "acceptLicences" in notes({})
    assert "acceptLicences" not in notes({"weights": {"acceptLicences": True}})
