"""files.yaml: what Pods have as files is what is deployed, and the script that is tested."""

from typing import Any

from tests.kuberay.conftest import CHART, Render, service_of


def test_pods_pull_the_weights_of_what_is_deployed(case: dict[str, Any], render: Render) -> None:
    rendered = render(case)
    [files] = rendered["files.yaml"]
    assert files["data"]["serve.yaml"] == service_of(rendered)["serveConfigV2"]


def test_the_script_is_whole(render: Render) -> None:
    [files] = render()["files.yaml"]
    script = (CHART / "files" / "drain_node.sh").read_text()
    assert files["data"]["drain_node.sh"].rstrip() == script.rstrip()
