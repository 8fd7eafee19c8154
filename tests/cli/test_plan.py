"""`flux-ray plan`: what it prints, what it refuses and why, and how it ends."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

from flux_ray.cli.main import app
from flux_ray.cli.plan import print_plan
from flux_ray.config.tier import TierArgs
from flux_ray.planner.plan import make_plan

SERVE = Path(__file__).parents[2] / "serve"
HUB = "owner/name@revision"
IMPORT_PATH = "flux_ray.app:build_tier"


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """The command silences what the libraries say, for the rest of its process."""
    before = logging.root.manager.disable
    yield
    logging.disable(before)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """`config({"tier": "tiny"}, ...)`: a Serve config file with an application for each tier."""

    def write(*tiers: dict[str, Any], import_path: str = IMPORT_PATH) -> Path:
        applications = [
            # What was counted by hand was counted without a cache.
            {
                "name": args.get("tier", "nameless"),
                "route_prefix": None,
                "import_path": import_path,
                "args": {"cache_bytes": 0} | args,
            }
            for args in tiers
        ]
        return written(tmp_path, yaml.safe_dump({"applications": applications}))

    return write


def written(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


def invoke(path: Path, gpu: str = "h100-80gb", count: int = 8, *options: str) -> Result:
    arguments = ["plan", path, "--gpu", gpu, "--count", count, *options]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@cache
def planned_node() -> Result:
    """A file that fits."""
    return invoke(SERVE / "node-8gpu.yaml")


def refusal(result: Result) -> str:
    """The reason that a command gave that could not make a plan."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    return result.stderr


def prose(result: Result) -> str:
    """The output without regard to where lines break."""
    return " ".join(result.stdout.split())


def row_of(result: Result, tier: str) -> list[str]:
    """The cells of a tier's first row, from its first line."""
    line = next(line for line in result.stdout.splitlines() if line.startswith(f"│ {tier}"))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_a_node_that_fits() -> None:
    result = planned_node()
    assert result.exit_code == 0, result.output
    said = prose(result)
    assert "8 GPUs needed, 8 x h100-80gb given, of 84.93 usable each: all fits." in said
    assert "flux-2-dev: cheapest layout that fits: tensor 2, 2 GPUs a replica of 59.18" in said
    assert "or text_encoder: shared: tensor 1, 1 GPU a replica of 76.46 each, and one of" in said
    assert "or quantization: fp8, encoder_quantization: fp8: tensor 1, 1 GPU a replica" in said
    assert "for less latency: tensor 2 x sequence 4, 8 GPUs a replica of 44.55 each" in said
    assert "klein-4b: cheapest layout that fits: tensor 1, 1 GPU a replica of 19.49" in said


def test_a_row_has_the_bytes_by_component_their_total_and_the_card() -> None:
    result = planned_node()
    components = ["33.04", "18.02", "0.17", "6.46", "0.70", "0.80"]
    totals = ["59.18", "84.93", "55.50"]
    row = row_of(result, "flux-2-dev")
    assert row == ["flux-2-dev", "ranks 0-1, each", *components, *totals, "fits"]
    assert sum(map(float, components)) == pytest.approx(float(totals[0]), abs=0.03)
    assert re.search(r"bf16 / bf16 +│ x 2 replicas", result.stdout)


def test_one_card_too_few() -> None:
    result = invoke(SERVE / "node-8gpu.yaml", "h100-80gb", 7)
    assert result.exit_code == 1
    assert "8 GPUs needed, 7 x h100-80gb given" in prose(result)
    assert "it does not fit." in prose(result)
    # Every card by itself would hold what it has to.
    assert row_of(result, "flux-2-dev")[-1] == "fits"


def test_klein_4b_in_bf16_does_not_fit_8_gb() -> None:
    result = invoke(SERVE / "one-gpu.yaml", "rtx4060-8gb", 1)
    assert result.exit_code == 1
    *_, total, usable, default, verdict = row_of(result, "flux-2-klein-4b")
    assert (total, usable, default, verdict) == ("19.49", "8.16", "17.66", "does not fit")
    assert "flux-2-klein-4b: cheapest layout that fits: none" in prose(result)


def test_klein_4b_on_two_cards_of_8_gb_is_told_what_would_fit(config) -> None:
    result = invoke(config({"tier": "flux-2-klein-4b", "weights": HUB}), "rtx4060-8gb", 2)
    assert result.exit_code == 1
    assert (
        "or quantization: nf4, encoder_quantization: nf4, text_encoder: shared: tensor 1, 1 GPU a"
        " replica of 8.07 each, and one of 3.27 for the encoder of all replicas"
    ) in prose(result)


FOUR_BITS = {"quantization": "nf4", "encoder_quantization": "nf4"}


def test_what_it_was_told_does_fit(config) -> None:
    small = {"tier": "flux-2-klein-4b", "weights": HUB, "text_encoder": "shared", **FOUR_BITS}
    result = invoke(config(small), "rtx4060-8gb", 2)
    assert result.exit_code == 0, result.output
    assert "all fits" in prose(result)
    assert result.stdout.count("nf4 / nf4") == 2
    assert "of all replicas" in result.stdout


def test_a_card_for_images_of_the_default_size_only(config) -> None:
    fp8 = {"text_encoder": "shared", "quantization": "fp8"}
    small = {"tier": "flux-2-klein-4b", "weights": HUB, **fp8}
    result = invoke(config(small), "rtx4060-8gb", 2)
    assert result.exit_code == 1
    assert row_of(result, "flux-2-klein-4b")[-1] == "default only"


def test_cards_without_nvlink_are_told_what_is_slow(config) -> None:
    result = invoke(config({"tier": "flux-2-dev", "weights": HUB}), "l40s-48gb")
    assert "or without NVLink, slowly: tensor 4, 4 GPUs a replica of 33.04 each" in prose(result)


def test_tiny_on_a_processor_needs_no_card() -> None:
    result = invoke(SERVE / "laptop.yaml", "rtx4060-8gb", 1)
    assert result.exit_code == 0, result.output
    row = row_of(result, "tiny")
    assert (row[-1], row[-3]) == ("no card", "-")
    assert "0 GPUs needed" in prose(result)
    assert "cheapest" not in result.stdout


def test_published_figures_stand_beside_ours_with_a_reason() -> None:
    said = prose(planned_node())
    assert "flux-2-dev: published 90 GB full, ours 99.30: 90.4 = bf16 transformer 64.4" in said
    assert "flux-2-dev: published about 54 GB FP8, ours 54.93: weights 51.2" in said
    assert (
        "flux-2-klein-4b: published about 8 GB klein 4B, ours 17.66: that is the bf16 transformer"
        " alone, 7.75"
    ) in said


def test_json_is_one_object_of_bytes() -> None:
    result = invoke(SERVE / "node-8gpu.yaml", "h100-80gb", 7, "--json")
    assert result.exit_code == 1
    plan = json.loads(result.stdout)
    assert (plan["num_gpus"], plan["count"], plan["fits"]) == (8, 7, False)
    assert plan["card"]["name"] == "h100-80gb"
    dev, *_ = plan["tiers"]
    [card] = dev["cards"]
    assert (dev["tier"], dev["fits"], card["ranks"]) == ("flux-2-dev", True, [0, 1])
    assert card["bytes"]["transformer"] == 33_039_613_952
    assert sum(card["bytes"].values()) == card["total_bytes"]
    assert (dev["cheapest"]["tensor"], dev["fastest"]["sequence"]) == (2, 2)
    assert [claim["published"] for claim in dev["claims"]] == ["90 GB full", "about 54 GB FP8"]


def test_json_ends_well_where_all_fits() -> None:
    result = invoke(SERVE / "one-gpu.yaml", "rtx4090-24gb", 1, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["fits"] is True


@pytest.mark.parametrize("width", [60, 80, 132])
def test_no_number_is_cut(width: int, capsys: pytest.CaptureFixture) -> None:
    dev = TierArgs(tier="flux-2-dev", weights=HUB, parallel={"tensor": 2})
    print_plan(make_plan([dev], "h100-80gb", 2), Console(width=width))
    shown = capsys.readouterr().out
    assert "59.18" in shown.split("cheapest")[0]
    assert "…" not in shown


@pytest.mark.parametrize(
    ("options", "assumed"),
    [
        ((), "assuming --gpu h100-80gb --count 8\n"),
        (("--count", "1"), "assuming --gpu h100-80gb\n"),
        (("--gpu", "h200-141gb"), "assuming --count 8\n"),
        (("--gpu", "h200-141gb", "--count", "2"), ""),
    ],
)
def test_the_hardware_that_was_not_named_is_said(options: tuple[str, ...], assumed: str) -> None:
    result = CliRunner().invoke(app, ["plan", str(SERVE / "laptop.yaml"), *options, "--json"])
    assert result.exit_code == 0, result.output
    assert "".join(re.findall(r"assuming .*\n", result.stderr)) == assumed
    assert json.loads(result.stdout)


def test_an_unknown_card_is_answered_with_those_there_are() -> None:
    reason = refusal(invoke(SERVE / "laptop.yaml", "h999"))
    assert "no card named 'h999'" in reason
    assert "h100-80gb" in reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("applications: [", "serve.yaml cannot be read"),
        ("tier: tiny", "it has no list of `applications`"),
        ("applications: tiny", "it has no list of `applications`"),
        ("applications: [tiny]", "it has no list of `applications`"),
        ("", "is no Serve config file"),
    ],
)
def test_a_file_that_is_no_serve_config(text: str, reason: str, tmp_path: Path) -> None:
    assert reason in refusal(invoke(written(tmp_path, text)))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_bytes(b"\xff\xfe\xff")
    assert "cannot be read" in refusal(invoke(path))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"tier": "tiny", "tensr": 2}, "application tiny: args.tensr: Extra inputs"),
        ({"tier": "tiny", "parallel": {"tensors": 2}}, "args.parallel.tensors: Extra inputs"),
        ({"tier": "tiny", "parallel": {"tensor": 0}}, "args.parallel.tensor: "),
        ({"tier": "tiny", "quantization": "fp4"}, "args.quantization: "),
        ({"num_replicas": 2}, "application nameless: args.tier: Field required"),
        ({"tier": "huge"}, "application huge: no tier named 'huge'; known tiers: tiny"),
        ({"tier": "flux-2-dev"}, "args: Value error, tier flux-2-dev needs `weights`"),
        ({"tier": "flux-2-dev", "weights": "FLUX.2-dev"}, "tier flux-2-dev: weights 'FLUX.2-dev'"),
        (
            {"tier": "flux-2-dev", "weights": HUB, "parallel": {"tensor": 5}},
            "tier flux-2-dev: parallel.tensor 5 does not divide the 48 heads",
        ),
    ],
)
def test_args_that_the_cluster_would_refuse(args: dict[str, Any], reason: str, config) -> None:
    assert reason in refusal(invoke(config(args)))


def scaled(tier: str, tensor: int = 1, least: int = 1, **scaling: object) -> dict[str, Any]:
    scaling = {"min_replicas": least, "max_replicas": 9} | scaling
    parallel = {"tensor": tensor}
    return {"tier": tier, "weights": HUB, "parallel": parallel, "autoscaling": scaling}


@pytest.mark.parametrize(
    ("dev", "klein", "reason"),
    [
        (8, 9, "must be the same in all tiers that scale, not flux-2-dev 8, flux-2-klein-4b 9"),
        (8, None, "must be the same in all tiers that scale, not flux-2-dev 8, flux-2-klein-4b no"),
        (5, 5, "autoscaling.gpu_budget 5 is below the min_replicas of all: 6 GPUs"),
    ],
)
def test_budgets_that_do_not_fit_together(
    dev: int, klein: int | None, reason: str, config: Callable[..., Path]
) -> None:
    path = config(
        scaled("flux-2-dev", 2, 2, gpu_budget=dev),
        scaled("flux-2-klein-4b", 1, 2, gpu_budget=klein),
    )
    said = " ".join(refusal(invoke(path)).split())
    assert reason in said
    assert "autoscaling.gpu_budget" in said


def test_a_budget_below_one_group_is_named(config: Callable[..., Path]) -> None:
    path = config(scaled("flux-2-dev", 2, 0, gpu_budget=1))
    reason = "application flux-2-dev: args: Value error, autoscaling.gpu_budget 1 is below one"
    assert reason in refusal(invoke(path))


@pytest.mark.parametrize("import_path", ["flux_ray.app:build", "other.app:build_tier", ""])
def test_an_application_that_is_not_ours(import_path: str, config) -> None:
    reason = refusal(invoke(config({"tier": "tiny"}, import_path=import_path)))
    assert f"application tiny: import_path {import_path}" in reason
    assert IMPORT_PATH in reason


@pytest.mark.parametrize("arguments", [(SERVE / "none.yaml",), (SERVE,), ()])
def test_no_file_to_plan(arguments: tuple[Path, ...]) -> None:
    assert CliRunner().invoke(app, ["plan", *map(str, arguments)]).exit_code == 2


def test_no_card_at_all() -> None:
    assert invoke(SERVE / "laptop.yaml", "h100-80gb", 0).exit_code == 2
