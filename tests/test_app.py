"""The deployment graph: what `build_tier` asks Serve for. No Ray runs."""

import pytest
from pydantic import ValidationError
from ray.serve import Application

from flux_ray.app import build_gateway, build_tier, replicas_of
from flux_ray.config.gateway import GatewayArgs
from flux_ray.config.tier import Parallel, TierArgs


def deployments_of(application: Application) -> dict[str, object]:
    """By name: the one that is bound, and those that it is given."""
    bound = application._bound_deployment
    inner = [argument for argument in bound.init_args if isinstance(argument, Application)]
    return {bound.name: bound} | {
        name: found for app in inner for name, found in deployments_of(app).items()
    }


def test_a_group_is_placed_as_one() -> None:
    args = TierArgs(tier="tiny-tp2", parallel=Parallel(tensor=2))
    (leader,) = deployments_of(build_tier(args)).values()
    config = leader._replica_config
    assert config.placement_group_bundles is None, "Serve spreads only replicas without"
    assert config.ray_actor_options["num_cpus"] == config.ray_actor_options["num_gpus"] == 2


def test_autoscaling_goes_by_the_ledger_and_a_number_of_replicas_by_itself() -> None:
    fixed = TierArgs(tier="tiny", num_replicas=3)
    assert deployments_of(build_tier(fixed))["tiny"].num_replicas == 3
    scaled = TierArgs(tier="tiny", autoscaling={"min_replicas": 0, "max_replicas": 4, "idle_s": 9})
    config = deployments_of(build_tier(scaled))["tiny"]._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas) == (0, 4)
    assert config.policy.policy_kwargs["tier"] == "tiny"
    assert config.policy.policy_kwargs["rules"]["idle_s"] == 9
    assert config.policy.policy_kwargs["terms"] is None, "of no budget"


def test_the_policy_is_told_the_headroom_and_the_terms_of_the_budget() -> None:
    scaling = {"max_replicas": 4, "gpu_budget": 8, "priority": 3, "headroom": 2.0}
    terms = {"gpu_budget": 8, "num_gpus_per_replica": 2, "priority": 3}
    for device, said in (("cuda", terms), ("cpu", None)):
        args = TierArgs(
            tier="tiny", device=device, parallel=Parallel(tensor=2), autoscaling=scaling
        )
        told = replicas_of(args)["autoscaling_config"].policy.policy_kwargs
        assert told["rules"]["headroom"] == 2.0
        assert told["terms"] == said


def test_a_shared_text_encoder_is_a_deployment_with_a_gpu_of_its_own() -> None:
    args = TierArgs(
        tier="flux-2-dev",
        weights="x/y@z",
        text_encoder="shared",
        num_replicas=3,
        node_labels={"pool": "!whole"},
    )
    deployments = deployments_of(build_tier(args))
    assert list(deployments) == ["flux-2-dev", "flux-2-dev-text-encoder"]
    encoder = deployments["flux-2-dev-text-encoder"]
    assert encoder.num_replicas == 1
    options = encoder._replica_config.ray_actor_options
    assert options["num_gpus"] == 1
    assert options["label_selector"] == {"pool": "!whole"}


def drain_s(application: Application) -> list[float]:
    return [
        deployment._deployment_config.graceful_shutdown_timeout_s
        for deployment in deployments_of(application).values()
    ]


def test_a_replica_has_as_long_to_end_as_its_tiers_longest_request_takes() -> None:
    assert drain_s(build_tier(TierArgs(tier="tiny", device="cpu"))) == [20]
    args = TierArgs(tier="flux-2-klein-4b", weights="x/y@z", text_encoder="shared")
    assert drain_s(build_tier(args)) == [55, 55]
    said = args.model_copy(update={"drain_timeout_s": 7.0})
    assert drain_s(build_tier(said)) == [7, 7]
    # What waits in a gateway may take all of its `request_timeout_s`.
    assert drain_s(build_gateway(GatewayArgs(tiers=("tiny",)))) == [660]


def test_replicas_say_of_themselves_how_long_they_have() -> None:
    """As a number: a gateway of the release before this one can read no other."""
    (leader,) = deployments_of(build_tier(TierArgs(tier="tiny", device="cpu"))).values()
    (args,) = leader.init_args
    assert args.drain_timeout_s == 20


def test_gateways_take_processors_of_their_own() -> None:
    """More than none: they are never on a head that has none to give."""
    for fields, num_cpus in (({}, 0.1), ({"num_cpus": 2}, 2)):
        args = GatewayArgs(tiers=("tiny",), **fields)
        (gateway,) = deployments_of(build_gateway(args)).values()
        assert gateway._replica_config.ray_actor_options["num_cpus"] == num_cpus
    with pytest.raises(ValidationError, match="num_cpus"):
        GatewayArgs(tiers=("tiny",), num_cpus=0)
