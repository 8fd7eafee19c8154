"""prometheusrule.yaml: the alerts of cluster/monitoring/, as they are tested there."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.kuberay.conftest import CASES, ROOT, Render, values_of

CASE = {path.stem: values_of(path) for path in CASES}
ALERTS = ROOT / "cluster" / "monitoring" / "alerts.yaml"


def test_off_unless_asked_for(render: Render) -> None:
    assert render()["prometheusrule.yaml"] == []


def test_the_rules_are_those_that_are_tested(render: Render) -> None:
    [rule] = render(CASE["everything"])["prometheusrule.yaml"]
    assert rule["spec"] == yaml.safe_load(ALERTS.read_text())
    assert rule["metadata"]["labels"]["release"] == "prometheus"


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus"
)
def test_prometheus_takes_them(render: Render, tmp_path: Path) -> None:
    [rule] = render(CASE["everything"])["prometheusrule.yaml"]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(rule["spec"]))
    done = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
