"""`flux-ray deploy` against a fake dashboard: what it refuses, says, sends and waits for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner, Result

from flux_ray.cli import deploy as deploy_module
from flux_ray.cli.config_file import ConfigFile
from flux_ray.cli.dashboard import Dashboard
from flux_ray.cli.deploy import card_among, is_kind, longest_start_s
from flux_ray.cli.main import app
from flux_ray.config import ClusterNode, NamedArgs, TierArgs

LAPTOP = Path(__file__).parents[2] / "serve" / "laptop.yaml"
# What Serve 2.60 said of an argument that it did not know, in the middle shortened.
TRACE = """\
Deploying app 'tiny' failed with exception:
Traceback (most recent call last):
  File "application_state.py", line 926, in _reconcile_build_app_task
    serialized_application_autoscaling_policy_def, args, err = ray.get(
ray.exceptions.RayTaskError(RuntimeError): \x1b[36mray::build_serve_application()\x1b[39m (pid=1)
RuntimeError: Traceback (most recent call last):
  File "application_state.py", line 1800, in build_serve_application
pydantic_core._pydantic_core.ValidationError: 1 validation error for TierArgs
nonsense
  Extra inputs are not permitted [type=extra_forbidden, input_value=1, input_type=int]
    For further information visit https://errors.pydantic.dev/2.14/v/extra_forbidden
"""


class FakeCluster:
    """A dashboard whose Serve takes a config and then goes through the given states."""

    def __init__(self) -> None:
        self.applications: dict[str, Any] = {}
        self.puts: list[dict[str, Any]] = []
        # The states of each application after a PUT, by look; the last one stays.
        self.coming: dict[str, list[tuple[str, str]]] = {}
        self.nodes: list[dict[str, Any]] = [node(CPU=8.0)]
        self.ray = "2.60.0"

    def run(self, config: dict[str, Any]) -> None:
        """Have Serve run this config already."""
        self.applications = {
            each["name"]: application(each, "RUNNING") for each in as_noted(config)
        }

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "PUT":
            self.puts.append(json.loads(request.content))
            self.applications = {
                each["name"]: application(each, "DEPLOYING") for each in as_noted(self.puts[-1])
            }
            return httpx.Response(200)
        return httpx.Response(200, json=self.answer(request.url.path))

    def answer(self, path: str) -> Any:
        if path == "/api/serve/applications/":
            self.advance()
            return {"applications": self.applications, "http_options": {"port": 8000}}
        if path == "/api/v0/nodes":
            return {"data": {"result": {"result": self.nodes}}}
        if path == "/api/version":
            return {"ray_version": self.ray, "session_name": "session_1"}
        assert path == "/api/v0/cluster_metadata"
        return {"data": {"pythonVersion": "3.11.7"}}

    def advance(self) -> None:
        for name, each in self.applications.items():
            if self.puts and (states := self.coming.get(name, [("RUNNING", "")])):
                each["status"], each["message"] = states.pop(0) if len(states) > 1 else states[0]
                if each["status"] == "RUNNING":
                    each["deployments"] = deployments(name)


def node(ip: str = "n", **resources: float) -> dict[str, Any]:
    """A node as the state API of Ray 2.60 lists it."""
    labels = {"pool": "whole"}
    return {"node_ip": ip, "state": "ALIVE", "resources_total": resources, "labels": labels}


def as_noted(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The applications as Serve 2.60 notes them: with the logging config of the whole file."""
    shared = {"logging_config": config["logging_config"]}
    return [shared | each for each in config["applications"]]


def deployments(name: str) -> dict[str, Any]:
    return {name: {"target_num_replicas": 1, "replicas": [{"state": "RUNNING"}], "message": ""}}


def application(config: dict[str, Any], status: str) -> dict[str, Any]:
    found = deployments(config["name"]) if status == "RUNNING" else {}
    return {
        "status": status,
        "message": "",
        "deployed_app_config": config,
        "deployments": found,
    }


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(LAPTOP.read_text())


@pytest.fixture
def deploy(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Return `deploy(config, "--dry-run", ...)`, which runs the command on such a file."""
    monkeypatch.setattr(deploy_module, "POLL_S", 0.01)
    monkeypatch.setattr(deploy_module, "SETTLE_S", 0.05)
    transport = httpx.MockTransport(cluster)
    monkeypatch.setattr(
        deploy_module,
        "dashboard_at",
        lambda address, token_file: Dashboard(address, "secret", transport),
    )

    def run(config: dict[str, Any], *options: str) -> Result:
        path = tmp_path / "serve.yaml"
        path.write_text(yaml.safe_dump(config))
        return CliRunner().invoke(app, ["deploy", str(path), *options])

    return run


def test_what_serve_has_given_up_is_started_again(
    cluster: FakeCluster, config: dict[str, Any], deploy: Callable[..., Result]
) -> None:
    """The cause may be mended, as a licence that was accepted; the file is the same."""
    cluster.run(config)
    cluster.applications["tiny"] |= {"status": "DEPLOY_FAILED", "deployments": {}}
    result = deploy(config)
    assert result.exit_code == 0, result.output
    assert "tiny: failed before, started again" in result.stdout
    without, whole = cluster.puts
    assert [each["name"] for each in without["applications"]] == ["gateway", "tiny-tp2"]
    assert whole == config


def test_replicas_of_before_are_not_ended_for_a_second_try(
    cluster: FakeCluster, config: dict[str, Any], deploy: Callable[..., Result]
) -> None:
    cluster.run(config)
    cluster.applications["tiny"]["status"] = "DEPLOY_FAILED"
    deploy(config)
    assert cluster.puts == [config]


@pytest.mark.parametrize(
    ("nodes", "options"),
    [
        ([node(CPU=8.0), node(CPU=8.0)], []),
        # A head that has been started anew, and whose workers have not come back yet.
        ([node()], ["--may-grow"]),
        ([node(), node(CPU=8.0)], []),
        ([node(CPU=8.0)], ["--may-grow"]),
    ],
)
def test_paths_of_other_machines_are_only_warned_of(
    cluster: FakeCluster,
    config: dict[str, Any],
    deploy: Callable[..., Result],
    nodes: list[dict[str, Any]],
    options: list[str],
) -> None:
    cluster.nodes = nodes
    config["applications"][0]["args"]["keys_file"] = "/nowhere/keys.yaml"
    config["applications"][1]["args"]["weights"] = "/nowhere/weights"
    result = deploy(config, "--dry-run", *options)
    assert result.exit_code == 0, result.output
    assert "/nowhere/keys.yaml is not on this machine" in result.stderr
    assert "/nowhere/weights is not on this machine" in result.stderr


def test_a_head_without_processors_is_no_place_for_paths(
    cluster: FakeCluster, config: dict[str, Any], deploy: Callable[..., Result]
) -> None:
    cluster.nodes = [node()]
    config["applications"][0]["args"]["keys_file"] = "/nowhere/keys.yaml"
    result = deploy(config, "--dry-run")
    assert result.exit_code == 1, "it has no processors for the gateway"
    assert "/nowhere/keys.yaml is not on this machine" in result.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_cpus": 16}, "args.num_cpus: one replica takes 16 CPUs of one node, and no node has"),
        ({"node_labels": {"pool": "whoel"}}, "args.node_labels: no node has pool: whoel; correct"),
    ],
)
def test_room_that_nodes_lack(
    cluster: FakeCluster, config: dict[str, Any], deploy, change: dict[str, Any], said: str
) -> None:
    config["applications"][1]["args"] |= change
    result = deploy(config)
    assert (result.exit_code, cluster.puts) == (1, [])
    assert said in result.stderr
    warned = deploy(config, "--dry-run", "--may-grow")
    assert (warned.exit_code, said in warned.stderr) == (0, True)


def test_jobs_in_a_file_are_of_one_machine(
    cluster: FakeCluster, config: dict[str, Any], deploy: Callable[..., Result]
) -> None:
    cluster.nodes = [node("10.0.0.2", CPU=8.0), node("10.0.0.3", CPU=8.0)]
    result = deploy(config)
    assert (result.exit_code, cluster.puts) == (1, [])
    assert "args.jobs.database: sqlite:///~/.flux-ray/jobs.sqlite3 is of one" in result.stderr


def test_a_first_deployment(cluster: FakeCluster, config: dict[str, Any], deploy) -> None:
    cluster.coming["tiny"] = [("DEPLOYING", ""), ("DEPLOYING", ""), ("RUNNING", "")]
    result = deploy(config)
    assert result.exit_code == 0, result.output
    assert cluster.puts == [config]
    lines = result.stdout.splitlines()
    assert lines[:3] == ["gateway: new", "tiny: new", "tiny-tp2: new"]
    assert "tiny: deploying" in lines
    assert "tiny: running, 1 of 1 replicas" in lines
    assert lines[-1].startswith("all applications run, after ")
    assert "\x1b" not in result.output


def test_what_changes_is_said_before(cluster: FakeCluster, config: dict[str, Any], deploy) -> None:
    cluster.run(config)
    changed = yaml.safe_load(LAPTOP.read_text())
    changed["applications"][1]["args"] |= {"num_cpus": 0.5, "cache_bytes": 0}
    result = deploy(changed, "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "gateway: unchanged",
        "tiny: changed: args.cache_bytes, args.num_cpus",
        "tiny-tp2: unchanged",
        "dry run: nothing was changed",
    ]
    assert cluster.puts == []


def test_applications_are_removed_only_if_that_is_said(
    cluster: FakeCluster, config: dict[str, Any], deploy
) -> None:
    cluster.run(config)
    config["applications"].pop()
    config["applications"][0]["args"]["tiers"] = ["tiny"]
    result = deploy(config)
    assert result.exit_code == 1
    assert "applications: tiny-tp2 would be removed" in result.stderr
    assert cluster.puts == []
    assert deploy(config, "--remove").exit_code == 0
    assert len(cluster.puts) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nonsense": 1}, "application tiny: args.nonsense: Extra inputs are not permitted"),
        ({"parallel": {"tensor": 3}}, "parallel.tensor 3 does not divide the 4 heads"),
        (
            {"device": "cuda"},
            "num_replicas: 1 GPUs are needed (tiny 1), and the cluster has 0",
        ),
        ({"weights": "/nowhere"}, "args.weights: /nowhere is not there"),
    ],
)
def test_nothing_is_changed_if_a_check_fails(
    cluster: FakeCluster, config: dict[str, Any], deploy, change: dict[str, Any], said: str
) -> None:
    config["applications"][1]["args"] |= change
    result = deploy(config)
    assert result.exit_code == 1
    assert cluster.puts == []
    lines = result.stderr.splitlines()
    assert all(line.startswith("error: ") and "serve.yaml: " in line for line in lines)
    assert any(said in line for line in lines)


def test_a_deployment_that_fails_ends_with_one_sentence(
    cluster: FakeCluster, config: dict[str, Any], deploy
) -> None:
    cluster.run(config)
    cluster.coming["tiny"] = [("DEPLOYING", ""), ("DEPLOY_FAILED", TRACE)]
    result = deploy(config)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: application tiny failed: nonsense: Extra inputs are not permitted;"
        " 1 replica of before still serve\n"
    )


def test_a_deployment_that_takes_too_long(
    cluster: FakeCluster, config: dict[str, Any], deploy
) -> None:
    cluster.coming["tiny"] = [("DEPLOYING", "")]
    result = deploy(config, "--timeout", "1")
    assert result.exit_code == 1
    assert "error: not ready within 1 s: tiny deploying; Serve goes on with it" in result.stderr


@pytest.mark.parametrize(
    ("loads_s", "waits_s"), [((600, 60), 1800), ((600, 7200), 7500), ((), 1800)]
)
def test_it_waits_for_longer_than_weights_may_take(
    loads_s: tuple[float, ...], waits_s: float
) -> None:
    tiers = [TierArgs(tier="tiny", load_timeout_s=each) for each in loads_s]
    file = ConfigFile(LAPTOP, {}, [NamedArgs(each.tier, None, each) for each in tiers])
    assert longest_start_s(file) == waits_s


def test_it_need_not_wait(cluster: FakeCluster, config: dict[str, Any], deploy) -> None:
    cluster.coming["tiny"] = [("DEPLOY_FAILED", TRACE)]
    result = deploy(config, "--no-wait")
    assert result.exit_code == 0
    assert "Serve has taken the config" in result.stdout


def test_what_serve_will_not_take_is_said(
    cluster: FakeCluster, config: dict[str, Any], deploy
) -> None:
    config["http_options"]["port"] = 8001
    cluster.ray = "2.59.0"
    result = deploy(config, "--dry-run")
    assert result.exit_code == 0
    assert "http_options.port 8001 has no effect: Serve runs with 8000" in result.stderr
    assert "the cluster runs Ray 2.59.0 and this machine has" in result.stderr


def test_memory_is_planned_on_the_clusters_gpus(
    cluster: FakeCluster, config: dict[str, Any], deploy
) -> None:
    config["applications"][1:] = [
        {
            "name": "flux-2-klein-4b",
            "route_prefix": None,
            "import_path": "flux_ray.app:build_tier",
            "args": {"tier": "flux-2-klein-4b", "weights": "owner/name@revision"},
        }
    ]
    config["applications"][0]["args"] |= {
        "tiers": ["flux-2-klein-4b"],
        "default_tier": "flux-2-klein-4b",
    }
    cluster.nodes = [node(**{"GPU": 1.0, "CPU": 8.0, "accelerator_type:L4": 1.0})]
    resources = cluster.nodes[0]["resources_total"]
    assert deploy(config, "--dry-run").exit_code == 0
    result = deploy(config, "--dry-run", "--gpu", "rtx4060-8gb")
    assert result.exit_code == 1
    assert "application flux-2-klein-4b: does not fit on rtx4060-8gb: 19.5 GB of" in result.stderr
    resources["accelerator_type:X9"] = resources.pop("accelerator_type:L4")
    result = deploy(config, "--dry-run")
    assert (result.exit_code, "the kind of GPU is not known" in result.stderr) == (0, True)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:9"])
def test_no_dashboard(address: str) -> None:
    result = CliRunner().invoke(app, ["deploy", str(LAPTOP), "--address", address])
    assert result.exit_code == 1
    assert "error: nothing answers at http://127.0.0.1:9: start the cluster" in result.stderr


@pytest.mark.parametrize(
    ("accelerators", "card"),
    [
        (["H100"], "h100-80gb"),
        (["H100", "H100"], "h100-80gb"),
        (["H100", "L4"], None),
        (["A100"], None),
        (["A100-80G"], "a100-80gb"),
        ([], None),
        ([None], None),
    ],
)
def test_the_kind_of_gpu_that_a_cluster_has(
    accelerators: list[str | None], card: str | None
) -> None:
    assert card_among([ClusterNode("n", 8, 1, each) for each in accelerators]) == card
    assert not is_kind("l40s-48gb", "L4")
