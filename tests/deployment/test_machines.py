"""The systemd units, and the file for `ray up`: what systemd and Ray say of them."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from flux_ray.cli.main import app
from tests.deployment.cluster_files import MACHINES, ROOT, compose, environment_in, unit

UNITS = ["head", "worker", "deploy"]
# Prints a line for each file of a list: the number of workers, or why it is refused.
VALIDATE = """
import json, sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
for text in json.load(sys.stdin):
    try:
        config = prepare_config(yaml.safe_load(text))
        validate_config(config)
        print(config["max_workers"])
    except Exception as error:
        print(type(error).__name__)
"""


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_units(tmp_path) -> None:
    """With programs that are here in the place of those that the units start."""
    for name in UNITS:
        text = (MACHINES / f"flux-ray-{name}.service").read_text()
        whole = re.sub(r"/opt/flux-ray/bin/[\w-]+", "/bin/true", text)
        (tmp_path / f"flux-ray-{name}.service").write_text(whole)
    command = ["systemd-analyze", "verify", "--man=no", *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["head", "worker"])
def test_ray_is_ended_by_its_own_process(name: str) -> None:
    """It drains, or ends the others the gentle way; systemd kills what is left after that."""
    keys = unit(name)
    assert keys["KillMode"] == ["mixed"]
    assert "--block" in keys["ExecStart"][0].split()
    assert set(keys.get("KillSignal", ["SIGTERM"])) == {"SIGTERM"}
    assert not keys.keys() & {"ExecStop", "ExecStopPost"}
    assert keys["Restart"] == ["always"]


def test_variables_of_the_units_are_in_their_file() -> None:
    told = environment_in(MACHINES / "flux-ray.env")
    for name in UNITS:
        text = " ".join(unit(name)["ExecStart"])
        for variable in re.findall(r"\$\{?(\w+)", text):
            assert variable in told


COMMANDS = {each.name or each.callback.__name__ for each in app.registered_commands}


@pytest.mark.skipif("deploy" not in COMMANDS, reason="there is no `flux-ray deploy` yet")
def test_the_command_that_deploys_takes_what_it_is_given() -> None:
    told = unit("deploy")["ExecStart"][0].split()
    assert told[:2] == ["/opt/flux-ray/bin/flux-ray", "deploy"]
    for words in (told[1:], compose()["services"]["deploy"]["command"][1:]):
        help_of_it = CliRunner().invoke(app, ["deploy", "--help"]).output
        options = {word.split("=")[0] for word in words[1:] if word.startswith("--")}
        assert {option for option in options if option not in help_of_it} == set()


def test_a_head_has_no_work_and_its_dashboard_is_its_own() -> None:
    config = yaml.safe_load((MACHINES / "ray-up.yaml").read_text())
    (by_ray_up,) = (line for line in config["head_start_ray_commands"] if "ray start" in line)
    for command in (unit("head")["ExecStart"][0], by_ray_up):
        assert "--num-cpus=0" in command.split()
        assert "--dashboard-host=127.0.0.1" in command.split()


def test_ray_up_takes_the_file() -> None:
    """In another process: the import alone takes seconds, and Ray's warnings are its own."""
    text = (MACHINES / "ray-up.yaml").read_text()
    texts = [text, text.replace("setup_", "set_up_"), text.replace("worker_ips:", "workers:")]
    command = [sys.executable, "-c", VALIDATE]
    done = subprocess.run(
        command, input=json.dumps(texts), capture_output=True, text=True, check=True
    )
    workers = yaml.safe_load(text)["provider"]["worker_ips"]
    assert done.stdout.split() == [str(len(workers)), "ValidationError", "ClickException"]


def test_ray_up_copies_from_the_top_of_the_repository() -> None:
    config = yaml.safe_load((MACHINES / "ray-up.yaml").read_text())
    here = config["file_mounts"]["~/flux-ray"]
    assert (ROOT / here / "cluster" / "vm" / "flux-ray.env").exists()
    assert {".venv", ".git"} <= set(config["rsync_exclude"])
    (setup,) = config["setup_commands"]
    assert ".venv/serve.stamp" in (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    assert "make .venv/serve.stamp" in setup
