"""What a Serve config file may say, and what is an error before anything starts."""

import pickle

import pytest
from pydantic import ValidationError

from flux_ray.config.gateway import GatewayArgs
from flux_ray.config.tier import TierArgs
from flux_ray.errors import UnknownTier


def test_unknown_keys_are_errors():
    with pytest.raises(ValidationError, match="num_gpus_per_node"):
        TierArgs(tier="tiny", num_gpus_per_node=8)
    with pytest.raises(ValidationError, match="max_body"):
        GatewayArgs.model_validate({"tiers": ["tiny"], "limits": {"max_body": 1}})


def test_args_survive_a_process_border():
    args = GatewayArgs(tiers=("tiny",))
    assert pickle.loads(pickle.dumps(args)) == args


def test_the_embedded_tier_needs_no_weights():
    assert TierArgs(tier="tiny").weights is None


def test_other_tiers_need_weights():
    with pytest.raises(ValidationError, match="needs `weights`"):
        TierArgs(tier="flux-2-klein-4b")


def test_tiers_must_be_in_the_catalogue():
    with pytest.raises(UnknownTier, match="flux-9"):
        TierArgs(tier="flux-9")
    with pytest.raises(UnknownTier, match="flux-9"):
        GatewayArgs(tiers=("flux-9",))


def test_the_default_tier_is_served():
    with pytest.raises(ValidationError, match="not among tiers"):
        GatewayArgs(tiers=("tiny",), default_tier="flux-2-klein-4b")


@pytest.mark.parametrize("field", ["request_timeout_s", "num_replicas"])
def test_numbers_are_positive(field):
    with pytest.raises(ValidationError, match=field):
        GatewayArgs.model_validate({"tiers": ["tiny"], field: 0})


def test_four_bit_weights_are_not_split():
    with pytest.raises(ValidationError, match=r"parallel\.tensor must be 1"):
        TierArgs(tier="tiny", quantization="nf4", parallel={"tensor": 2})
    assert (
        TierArgs(tier="tiny", quantization="nf4", parallel={"sequence": 2}).parallel.num_ranks == 2
    )
    assert TierArgs(tier="tiny", quantization="fp8", parallel={"tensor": 2}).parallel.num_ranks == 2


@pytest.mark.parametrize("parallel", [{"tensor": 0}, {"tensors": 2}, {"sequence": -1}])
def test_a_layout_that_makes_no_sense_is_refused(parallel):
    with pytest.raises(ValidationError, match="parallel"):
        TierArgs(tier="tiny", parallel=parallel)


@pytest.mark.parametrize("tier", ["flux-3-klein", "flux-3-klein-base"])
def test_a_split_of_tokens_that_the_model_does_not_have_is_refused_before_gpus_are_taken(tier):
    args = {"tier": tier, "weights": "/weights", "parallel": {"tensor": 2, "sequence": 2}}
    with pytest.raises(ValidationError, match=r"parallel\.sequence is 2: set it to 1, and"):
        TierArgs.model_validate(args)
    assert TierArgs.model_validate(args | {"parallel": {"tensor": 2}}).parallel.num_ranks == 2


SCALING = {"min_replicas": 2, "max_replicas": 4}


def scaled(device="cuda", **scaling):
    return TierArgs(
        tier="tiny", device=device, parallel={"tensor": 2}, autoscaling=SCALING | scaling
    ).autoscaling


def test_a_gpu_budget_holds_what_its_tier_must_have():
    assert scaled(gpu_budget=4, priority=-1, headroom=0).gpu_budget == 4
    with pytest.raises(ValidationError, match=r"autoscaling\.gpu_budget 1 is below one replica"):
        scaled(min_replicas=0, gpu_budget=1)
    with pytest.raises(ValidationError, match=r"gpu_budget 3 is below autoscaling\.min_replicas 2"):
        scaled(gpu_budget=3)


def test_a_tier_on_processors_takes_no_gpus():
    assert scaled(device="cpu", gpu_budget=1).gpu_budget == 1


@pytest.mark.parametrize(("field", "value"), [("gpu_budget", 0), ("headroom", -0.1)])
def test_scaling_that_makes_no_sense_is_refused(field, value):
    with pytest.raises(ValidationError, match=rf"autoscaling\.{field}"):
        scaled(**{field: value})
