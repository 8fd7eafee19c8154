"""`flux-ray deploy` and `status` on the shared cluster: a good change, a bad one, and the truth."""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner, Result

from flux_ray.cli.main import app
from tests.cluster.conftest import DEPLOYED, PATIENCE_S, deploy, free_port, is_ready, wait_until

# Those that answer what the commands ask; each is a process, so the others stay away.
MODULES = "ServeHead,StateHead,ReportHead,JobHead"


@pytest.fixture
def dashboard(address: str, tmp_path: Path) -> Iterator[str]:
    """Start a dashboard beside the shared Ray, which has none, and yield its address."""
    import ray.dashboard
    from ray._private.worker import global_worker

    node, port = global_worker.node, free_port()
    process = subprocess.Popen(
        [
            sys.executable,
            str(Path(ray.dashboard.__file__).with_name("dashboard.py")),
            "--host=127.0.0.1",
            f"--port={port}",
            "--port-retries=0",
            f"--temp-dir={node.get_temp_dir_path()}",
            f"--log-dir={tmp_path}",
            f"--session-dir={node.get_session_dir_path()}",
            f"--gcs-address={node.gcs_address}",
            f"--cluster-id-hex={node.cluster_id.hex()}",
            f"--node-ip-address={node.node_ip_address}",
            f"--modules-to-load={MODULES}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(address), what="the dashboard")
        yield address
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def answers(dashboard: str) -> bool:
    paths = ("/api/serve/applications/", "/api/v0/nodes", "/api/version", "/api/prometheus/sd")
    try:
        return all(httpx.get(f"{dashboard}{path}", timeout=30).is_success for path in paths)
    except httpx.HTTPError:
        return False


@pytest.fixture
def changed(address: str) -> Iterator[dict[str, Any]]:
    """Yield the running config with a second gateway, and deploy the one of before at the end."""
    before = copy.deepcopy(DEPLOYED)
    changed = copy.deepcopy(before)
    args = {"tiers": ["tiny"], "default_tier": "tiny", "card": "cpu"}
    (gateway,) = (each for each in before["applications"] if each["name"] == "gateway")
    second = {"name": "second", "route_prefix": "/second", "import_path": gateway["import_path"]}
    changed["applications"].append(second | {"args": args})
    yield changed
    deploy(before)
    wait_until(lambda: not is_ready(f"{address}/second"), what="the second gateway to be gone")


def test_a_good_change_a_bad_one_and_the_status(
    address: str, dashboard: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "serve.yaml"

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--address", dashboard])

    def deploy_file() -> Result:
        file.write_text(yaml.safe_dump(changed))
        # The ranks of `tiny-tp2` are the tests' own.
        return run("deploy", str(file), "--allow-others", "--timeout", str(PATIENCE_S))

    good = deploy_file()
    assert good.exit_code == 0, good.output
    lines = good.stdout.splitlines()
    assert {"second: new", "tiny: unchanged", "gateway: unchanged"} <= set(lines)
    assert lines[-1].startswith("all applications run")
    assert is_ready(f"{address}/second")

    changed["applications"][-1]["args"]["tiers"] = ["tinny"]
    refused = deploy_file()
    assert refused.exit_code == 1
    assert "no tier named 'tinny'" in refused.stderr

    # Only Serve can see that: it takes the config, and then it fails.
    changed["applications"][-1] |= {"import_path": "tests.cluster.nowhere:build", "args": {}}
    failed = deploy_file()
    assert failed.exit_code == 1
    (said,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert "application second failed: ModuleNotFoundError: No module named" in said
    assert said.endswith("1 replica of before still serve")
    assert is_ready(f"{address}/second")

    status = run("status", address, "--json")
    assert status.exit_code == 1, "an application has failed"
    seen = json.loads(status.stdout)
    assert seen["problems"] == []
    assert ["second", "DEPLOY_FAILED"] in seen["others"]
    tiny = next(tier for tier in seen["tiers"] if tier["tier"] == "tiny")
    assert (tier_state(tiny), tiny["is_ready"]) == (("RUNNING", 1, 1), True)


def tier_state(tier: dict[str, Any]) -> tuple[str, int, int]:
    return tier["state"], tier["running"], tier["ranks"]
