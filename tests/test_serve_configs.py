"""What is in serve/ can be deployed, and fits the cards that it is for."""

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.checks import BUILDERS
from flux_ray.config.gateway import GatewayArgs, check_addresses
from flux_ray.config.tier import Args, TierArgs
from flux_ray.planner.plan import make_plan
from flux_ray.router.pricing.config_check import drain_timeout_s

FOLDER = Path(__file__).parent.parent / "serve"
FILES = sorted(FOLDER.glob("*.yaml"))
# A line that was taken out of YAML, unlike a sentence about it.
TAKEN_OUT = re.compile(r"^  #(- |  )", re.M)
PINNED = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")


def applications_in(text: str) -> dict[str, tuple[str, Args]]:
    """Return import path and typed args by name, without applications that are not ours."""
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    return {
        application.name: (
            application.import_path,
            BUILDERS[application.import_path].model_validate(application.args),
        )
        for application in schema.applications
        if application.import_path in BUILDERS
    }


def tiers_in(text: str) -> dict[str, TierArgs]:
    return {
        name: args
        for name, (_, args) in applications_in(text).items()
        if isinstance(args, TierArgs)
    }


def num_gpus(args: TierArgs) -> int:
    """As the leaders will ask for them, and a shared text encoder."""
    if args.device == "cpu":
        return 0
    return args.num_replicas * args.parallel.num_ranks + (args.text_encoder == "shared")


def text_of(name: str) -> str:
    return (FOLDER / name).read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_is_valid_for_serve_and_for_us(path: Path) -> None:
    applications = applications_in(path.read_text())
    gateways = [args for _, args in applications.values() if isinstance(args, GatewayArgs)]
    assert [name for name, args in applications.items() if args[1] is gateways[0]] == ["gateway"]
    tiers = tiers_in(path.read_text())
    assert {name: args.tier for name, args in tiers.items()} == {name: name for name in tiers}
    assert set(gateways[0].tiers) == set(tiers)
    assert len(gateways) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_weights_from_the_hub_are_pinned(path: Path) -> None:
    for args in tiers_in(path.read_text()).values():
        if tier_for(args.tier).weights is None:
            assert PINNED.fullmatch(args.weights)


def test_a_node_has_eight_gpus_and_they_hold_what_is_served() -> None:
    tiers = tiers_in(text_of("node-8gpu.yaml"))
    assert sum(map(num_gpus, tiers.values())) == 8
    assert {args.parallel.num_ranks for args in tiers.values()} > {1}
    for card in ("h100-80gb", "a100-80gb"):
        plan = make_plan(list(tiers.values()), card, 8)
        assert plan.num_gpus == 8
        assert plan.fits


def test_one_card_of_24_gb_is_enough_for_one_gpu() -> None:
    tiers = tiers_in(text_of("one-gpu.yaml"))
    for card in ("rtx4090-24gb", "l4-24gb"):
        assert make_plan(list(tiers.values()), card, 1).fits


def test_two_cards_of_24_gb_are_enough_for_flux_1_or_one_without_a_shared_text_encoder() -> None:
    """As its own comments say; and on one of 40 GB nothing has to be quantized."""
    [dev] = tiers_in(text_of("flux-1.yaml")).values()
    one = {"text_encoder": "colocated"}
    for card, count, changes in (
        ("rtx4090-24gb", 2, {}),
        ("rtx4090-24gb", 1, one | {"encoder_quantization": "fp8"}),
        ("a100-40gb", 2, {"quantization": None}),
    ):
        plan = make_plan([dev.model_copy(update=changes)], card, count)
        assert plan.fits and plan.num_gpus == count


def fleets() -> dict[str, tuple[str, int]]:
    """The file as it is, and with the operator's tiers, with its number of cards."""
    text = text_of("fleet.yaml")
    return {"as it is": (text, 22), "with all tiers": (TAKEN_OUT.sub(r"  \1", text), 38)}


@pytest.mark.parametrize("name", ["as it is", "with all tiers"])
def test_the_fleet_fits_its_nodes(name: str) -> None:
    text, count = fleets()[name]
    tiers = tiers_in(text)
    assert sum(map(num_gpus, tiers.values())) == count
    plan = make_plan(list(tiers.values()), "h100-80gb", count)
    assert plan.num_gpus == count
    assert plan.fits
    pairs = [args for args in tiers.values() if args.parallel.num_ranks == 2]
    wholes = [args for args in tiers.values() if args.parallel.num_ranks == 8]
    num_pairs = sum(args.num_replicas for args in pairs)
    num_singles = count - 2 * num_pairs - 8 * len(wholes)
    for on_each in product(range(num_singles + 1), repeat=3):
        if sum(on_each) == num_singles:
            assert sum((8 - num) // 2 for num in on_each) >= num_pairs, "however they are spread"
    assert all(args.node_labels for args in wholes), "the other nodes are never empty"


def test_the_fleet_says_how_its_tiers_share_their_cards() -> None:
    (example,) = re.findall(r"# `(autoscaling: .+)`$", text_of("fleet.yaml"), re.M)
    tiers = tiers_in(text_of("fleet.yaml"))
    num_encoders = sum(args.text_encoder == "shared" for args in tiers.values())
    for args in tiers.values():
        said = args.model_dump(exclude={"num_replicas"}) | yaml.safe_load(example)
        scaling = TierArgs.model_validate(said).autoscaling
        assert scaling is not None
        assert scaling.gpu_budget == sum(map(num_gpus, tiers.values())) - num_encoders


def test_the_operators_tiers_are_off_until_there_are_weights() -> None:
    on, _ = fleets()["as it is"]
    every, _ = fleets()["with all tiers"]
    operators: dict[str, Any] = {
        name: args.weights for name, args in tiers_in(every).items() if name not in tiers_in(on)
    }
    assert operators.keys() == {"flux-2-pro", "flux-2-max"}
    assert all(weights.startswith("/") for weights in operators.values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_commented_out_of_a_gateways_args_is_valid(path: Path) -> None:
    """Where everybody may come, the file says how to ask for keys."""
    text = path.read_text()
    whole = re.sub(r"^      # (?=keys_file: )", "      ", text, flags=re.M)
    _, args = applications_in(whole)["gateway"]
    assert isinstance(args, GatewayArgs)
    assert args.public_url and args.jobs is not None
    assert args.keys_file is not None or "host: 127.0.0.1" in text


# An address of the file that the operator has to change.
STANDS_FOR = re.compile(r"flux\.invalid|postgres\.invalid|flux-results\.invalid")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_is_deployed_with_an_address_that_only_stands_for_one(path: Path) -> None:
    """A laptop's address is right for everybody: only its own machine reaches it."""
    text = path.read_text()
    if path.name.startswith("laptop"):
        assert not STANDS_FOR.search(text)
        check(text)
        return
    assert "public_url: https://flux.invalid" in text
    # Each is named until it is changed.
    while STANDS_FOR.search(text):
        with pytest.raises(ValueError, match="only stands for an address"):
            check(text)
        text = STANDS_FOR.sub("ours.example.com", text, count=1)
    check(text)


def check(text: str) -> None:
    _, args = applications_in(text)["gateway"]
    assert isinstance(args, GatewayArgs)
    check_addresses(args)


@pytest.mark.parametrize("name", ["fleet.yaml", "node-8gpu.yaml"])
def test_the_drain_time_that_the_file_tells_of_is_that_of_the_tier(name: str) -> None:
    text = text_of(name)
    dev = tiers_in(text)["flux-2-dev"]
    assert f"it is {drain_timeout_s(dev):.0f} for dev on two cards" in text
    shorter = tiers_in(text.replace("# drain_timeout_s", "drain_timeout_s"))["flux-2-dev"]
    assert shorter.drain_timeout_s == 60
