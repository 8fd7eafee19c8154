"""`flux-ray simulate`: a config file and a trace in, a table, an object or an image out."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flux_ray.cli.main import app
from flux_ray.router.trace import TracedRequest
from flux_ray.simulator.traffic import write_trace

ROOT = Path(__file__).parents[2]
FLEET = ROOT / "serve" / "fleet.yaml"
HUB = "black-forest-labs/FLUX.2-klein-4B@e7b7dc2"
QUICK = ("--hours", 0.05, "--load", 0.6)


def invoke(*arguments):
    return CliRunner().invoke(app, ["simulate", *(str(argument) for argument in arguments)])


def figures(*arguments):
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 1
    return " ".join(result.stderr.split())


@pytest.fixture
def config(tmp_path):
    """A file with one tier of klein on four cards, or as told."""

    def write(**args):
        args = {"tier": "flux-2-klein-4b", "weights": HUB, "num_replicas": 4} | args
        builder = "flux_ray.app:build_tier"
        named = {"import_path": builder, "name": args["tier"], "route_prefix": None}
        application = named | {"args": args}
        path = tmp_path / "serve.yaml"
        path.write_text(yaml.safe_dump({"applications": [application]}))
        return path

    return write


def test_the_fleet_as_a_table():
    result = invoke("--config", FLEET, *QUICK)
    assert result.exit_code == 0, result.output
    for word in ("flux-2-dev", "flux-2-klein-9b", "flux-2-klein-4b", "SLO met", "GPU hours", "all"):
        assert word in result.stdout
    assert "…" not in result.stdout


def test_the_fleet_as_one_object():
    report = figures("--config", FLEET, *QUICK)
    assert set(report["tiers"]) == {"flux-2-dev", "flux-2-klein-9b", "flux-2-klein-4b"}
    for counts in (report["all"], *report["tiers"].values()):
        ends = sum(counts[name] for name in ("met", "late", "refused", "lost"))
        assert ends == counts["arrived"] > 0
        assert counts["slo_attainment"] == counts["met"] / counts["arrived"]
    waits = report["tiers"]["flux-2-klein-4b"]["wait_s"]
    assert 0 <= waits["p50"] <= waits["p95"] <= waits["p99"]
    # Nothing scales: eight groups of two, three cards and two cards, for three minutes.
    assert report["all"]["gpu_hours"] == pytest.approx((16 + 3 + 2) * 0.05, rel=1e-6)


def test_a_seed_gives_the_same_outcome():
    once, again, other = (figures("--config", FLEET, *QUICK, "--seed", n) for n in (1, 1, 2))
    assert once == again != other


def test_more_load_attains_less(config):
    path = config()
    attained = [
        figures("--config", path, "--hours", 0.1, "--load", load)["all"]["slo_attainment"]
        for load in (0.3, 0.95, 1.5)
    ]
    assert attained[0] > 0.99 > attained[1] > attained[2]


@pytest.mark.parametrize("pattern", ["poisson", "bursty", "diurnal", "burst"])
def test_patterns(pattern, config):
    assert figures("--config", config(), *QUICK, "--trace", pattern)["all"]["arrived"] > 100


def test_scaling_through_a_burst(config):
    arguments = ("--config", config(), "--trace", "burst", "--hours", 0.25, "--load", 0.5)
    fixed = figures(*arguments)["all"]
    scaled = figures(*arguments, "--min-replicas", 1, "--max-replicas", 40)["all"]
    assert scaled["slo_attainment"] > fixed["slo_attainment"] + 0.2
    few = figures(*arguments, "--min-replicas", 1, "--max-replicas", 40, "--gpus", 5)["all"]
    assert few["gpu_hours"] <= 5 * 0.25
    slow = figures(*arguments, "--max-replicas", 40, "--cold-start-s", 600)["all"]
    assert slow["slo_attainment"] < scaled["slo_attainment"]


def test_a_tier_that_scales_as_the_config_says(config):
    scaling = {"min_replicas": 0, "max_replicas": 4, "cold_start_s": 5.0, "idle_s": 30.0}
    arguments = ("--hours", 0.2, "--load", 0.3)
    fixed = figures("--config", config(), *arguments)["all"]
    scaled = figures("--config", config(autoscaling=scaling), *arguments)["all"]
    # The load is that of four replicas in both.
    assert scaled["arrived"] == fixed["arrived"]
    assert 0.3 < scaled["gpu_hours"] / fixed["gpu_hours"] < 0.7
    assert scaled["slo_attainment"] > 0.9
    slow = figures("--config", config(autoscaling=scaling), *arguments, "--cold-start-s", 90)
    assert slow["all"]["slo_attainment"] < scaled["slo_attainment"]


def test_tiers_that_share_gpus_never_hold_more():
    arguments = ("--config", FLEET, "--trace", "burst", "--hours", 0.1)
    report = figures(*arguments, "--min-replicas", 1, "--max-replicas", 99, "--gpus", 12)
    # Those that finish what they run before they go are held a little longer.
    assert report["all"]["gpu_hours"] <= 12 * 0.1 * 1.05
    assert all(tier["met"] for tier in report["tiers"].values())


@pytest.fixture
def sharing(tmp_path):
    """A file with two tiers that share five GPUs, too few for half of what nine of each can do."""

    def write(**klein_9b):
        applications = []
        for tier, own in (("flux-2-klein-4b", {}), ("flux-2-klein-9b", klein_9b)):
            scaling = {"max_replicas": 9, "cold_start_s": 5.0, "gpu_budget": 5} | own
            args = {"tier": tier, "weights": HUB, "autoscaling": scaling}
            named = {"import_path": "flux_ray.app:build_tier", "name": tier, "route_prefix": None}
            applications.append(named | {"args": args})
        path = tmp_path / "sharing.yaml"
        path.write_text(yaml.safe_dump({"applications": applications}))
        return path

    return write


def attained(*arguments):
    report = figures("--hours", 0.1, "--load", 0.5, *arguments)
    tiers = [report["tiers"][tier]["slo_attainment"] for tier in sorted(report["tiers"])]
    return tiers, report["all"]["gpu_hours"]


def test_the_budget_and_the_priorities_of_the_config(sharing):
    equal, gpu_hours = attained("--config", sharing())
    assert gpu_hours <= 5 * 0.1 * 1.05
    preferred, _ = attained("--config", sharing(priority=1))
    assert preferred[1] > equal[1] + 0.1
    assert preferred[0] < equal[0]
    enough, gpu_hours = attained("--config", sharing(), "--gpus", 18)
    assert min(enough) > 0.9
    assert gpu_hours > 5 * 0.1 * 1.05


def test_the_headroom_of_the_config(config):
    gpu_hours = [
        figures("--config", config(autoscaling={"max_replicas": 9, "headroom": headroom}), *QUICK)[
            "all"
        ]["gpu_hours"]
        for headroom in (0.0, 4.0)
    ]
    assert gpu_hours[0] < gpu_hours[1]


def test_budgets_of_the_config_that_disagree(sharing):
    reason = refusal("--config", sharing(gpu_budget=6), *QUICK)
    assert "autoscaling.gpu_budget must be the same in all tiers that scale" in reason


def test_failures_cost_requests(config):
    arguments = ("--config", config(), "--hours", 0.2, "--load", 0.8)
    sound, failing = (
        figures(*arguments, "--failures-per-hour", number)["all"] for number in (0, 100)
    )
    assert failing["met"] < sound["met"]


def test_a_trace_from_a_file(config, tmp_path):
    path = tmp_path / "trace.jsonl"
    start = 1.7e9
    entries = [
        TracedRequest(start + second, "flux-2-klein-4b", 1024, 1024, 4) for second in range(60)
    ]
    # Its own deadline is shorter than its work.
    entries.append(TracedRequest(start + 60, "flux-2-klein-4b", 1024, 1024, 4, deadline_s=0.01))
    write_trace(path, entries)
    report = figures("--config", config(), "--trace", path)
    assert (report["all"]["arrived"], report["all"]["refused"]) == (61, 1)
    assert report["end_s"] < 70


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"at_s": 1, "tier": "tiny", "colour": 2}', "line 1: unknown key 'colour'"),
        ('{"at_s": 1, "tier": "tiny"}', "asks for tiny, which the config does not serve"),
    ],
)
def test_a_trace_that_is_wrong(line, reason, config, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{line}\n")
    assert reason in refusal("--config", config(), "--trace", path)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--trace", "poison"), "poison is no file, no folder and no pattern: poisson, bursty"),
        (("--gpu", "h999"), "no card named 'h999'"),
        (("--min-replicas", 5, "--max-replicas", 3), "min_replicas 5 is above max_replicas 3"),
        (("--max-replicas", 9, "--gpus", 3), "gpu_budget 3 is below the min_replicas of all: 4"),
        (("--plot", "out.gif"), "out.gif must end in one of: .svg, .png"),
    ],
)
def test_what_cannot_be_simulated(arguments, reason, config):
    assert reason in refusal("--config", config(), *QUICK, *arguments)


def test_a_group_larger_than_the_budget(config):
    dev = config(tier="flux-2-dev", parallel={"tensor": 2}, num_replicas=1)
    reason = refusal("--config", dev, *QUICK, "--max-replicas", 9, "--gpus", 1)
    assert "gpu_budget 1 is below one replica of flux-2-dev, which takes 2 GPUs" in reason


@pytest.mark.parametrize("arguments", [(), ("--config", "none.yaml"), ("--config", FLEET, "-x")])
def test_wrong_arguments(arguments):
    assert invoke(*arguments).exit_code == 2


@pytest.mark.parametrize(("name", "begin"), [("out.svg", b"<?xml"), ("new/out.png", b"\x89PNG")])
def test_an_image(name, begin, config, tmp_path):
    path = tmp_path / name
    result = invoke("--config", config(), *QUICK, "--plot", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(begin)


def test_it_takes_seconds_and_neither_torch_nor_ray():
    code = f"""
import sys
from typer.testing import CliRunner
from flux_ray.cli.main import app
result = CliRunner().invoke(app, ["simulate", "--config", {str(FLEET)!r}, "--hours", "0.02"])
assert result.exit_code == 0, result.output
print(*sys.modules)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "ray", "matplotlib", "diffusers"} & set(loaded)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30
