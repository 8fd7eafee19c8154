"""The plan of a deployment, in plain values: what each card holds, and whether all of it fits."""

from functools import cache
from pathlib import Path

import pytest
from accelerate import init_empty_weights
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import nn
from transformers import MistralConfig, MistralModel, Qwen3Config, Qwen3Model

from flux_ray.config.tier import Parallel, TierArgs
from flux_ray.planner.plan import Plan, TierPlan, make_plan

GB = 10**9
HUB = "owner/name@revision"
# What was counted by hand was counted without.
NO_CACHE = {"cache_bytes": 0}


@cache
def plan_of(name: str, card: str = "h100-80gb", count: int = 8, **args: object) -> Plan:
    weights = None if name == "tiny" else HUB
    return make_plan(
        [TierArgs(**{"tier": name, "weights": weights} | NO_CACHE | args)], card, count
    )


def planned(name: str, card: str = "h100-80gb", count: int = 8, **args: object) -> TierPlan:
    [tier] = plan_of(name, card, count, **args).tiers
    return tier


def rank_of_dev(quantization: str | None, tensor: int, place: str = "colocated") -> TierPlan:
    return planned(
        "flux-2-dev",
        parallel=Parallel(tensor=tensor),
        quantization=quantization,
        encoder_quantization=quantization,
        text_encoder=place,
    )


@pytest.mark.parametrize(
    ("tensor", "num_parameters"),
    [(1, 32_223_281_152), (2, 16_519_806_976), (4, 8_668_069_888), (8, 4_742_201_344)],
)
def test_a_rank_of_dev_in_bf16_has_two_bytes_a_parameter(tensor: int, num_parameters: int) -> None:
    [card] = rank_of_dev(None, tensor).cards
    assert card.bytes.transformer == 2 * num_parameters
    assert card.ranks == tuple(range(tensor))


# Of dev: the linears of its blocks, which are split and become FP8, and all else.
NUM_IN_BLOCKS, NUM_WHOLE = 31_406_948_352, 816_332_800
# Rows that column-parallel linears share out, and those that row-parallel ones have whole: of 8
# double blocks (six of q, k, v and two MLPs; four) and 48 single ones (the fused projection; one).
NUM_SHARED_ROWS = 8 * (6 * 6144 + 2 * 36864) + 48 * 55296
NUM_WHOLE_ROWS = (8 * 4 + 48) * 6144


@pytest.mark.parametrize(("tensor", "gigabytes"), [(1, 33.04), (2, 17.34), (4, 9.48), (8, 5.56)])
def test_a_rank_of_dev_in_fp8_has_one_byte_a_parameter_of_its_blocks(
    tensor: int, gigabytes: float
) -> None:
    [card] = rank_of_dev("fp8", tensor).cards
    scales = 4 * (NUM_SHARED_ROWS // tensor + NUM_WHOLE_ROWS)
    assert card.bytes.transformer == NUM_IN_BLOCKS // tensor + scales + 2 * NUM_WHOLE
    # The scales were not counted before.
    assert card.bytes.transformer / GB == pytest.approx(gigabytes, rel=0.002)


@pytest.mark.parametrize(
    ("quantization", "tensor", "place", "gigabytes", "more"),
    [
        (None, 1, "colocated", 102.4, 0.41),
        (None, 2, "colocated", 54.3, 1.11),
        (None, 4, "colocated", 30.3, 1.11),
        (None, 8, "colocated", 18.3, 1.11),
        (None, 1, "shared", 67.7, 0.41),
        (None, 8, "shared", 12.8, 1.11),
        ("fp8", 1, "colocated", 54.3, 0.55),
        ("fp8", 2, "colocated", 30.3, 1.11),
        ("fp8", 4, "colocated", 18.3, 1.11),
        ("fp8", 8, "colocated", 12.3, 1.11),
        ("fp8", 1, "shared", 36.3, 0.55),
        ("fp8", 2, "shared", 20.6, 1.11),
    ],
)
def test_a_card_of_dev_at_a_megapixel_holds_what_was_counted_by_hand(
    quantization: str | None, tensor: int, place: str, gigabytes: float, more: float
) -> None:
    """By hand: weights, VAE, the larger of a step and a decoding, 1.5 for CUDA and NCCL.

    `more` is what the plan adds. Eight requests that wait hold 0.13, and decoding takes 0.97 more
    on a card than its modules do, as measured since. One card has no NCCL: 0.7 less, and in FP8
    0.1 more, since a step then takes more than a decoding by what becomes FP8.
    """
    card = rank_of_dev(quantization, tensor, place).cards[0]
    assert card.default_bytes / GB == pytest.approx(gigabytes + more, abs=0.1)
    assert card.total_bytes > card.default_bytes


MISTRAL_24B = MistralConfig(
    vocab_size=131072,
    hidden_size=5120,
    intermediate_size=32768,
    num_hidden_layers=30,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
QWEN3_4B = Qwen3Config(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=27,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)


def build_dev() -> tuple[nn.Module, nn.Module]:
    """dev is what diffusers makes without a word; of Mistral's 40 layers 30 are used."""
    return Flux2Transformer2DModel(), MistralModel(MISTRAL_24B)


def build_klein_4b() -> tuple[nn.Module, nn.Module]:
    transformer = Flux2Transformer2DModel(
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )
    return transformer, Qwen3Model(QWEN3_4B)


@pytest.mark.parametrize(
    ("name", "build"), [("flux-2-dev", build_dev), ("flux-2-klein-4b", build_klein_4b)]
)
def test_weights_are_those_of_the_modules_on_the_meta_device(name: str, build) -> None:
    with init_empty_weights():
        (transformer, text_encoder), vae = build(), AutoencoderKLFlux2()
    # The last hidden state is taken before the norm that follows it.
    text_encoder.norm = nn.Identity()
    [card] = planned(name).cards
    for module, num_bytes in (
        (transformer, card.bytes.transformer),
        (text_encoder, card.bytes.text_encoder),
    ):
        assert num_bytes == 2 * sum(parameter.numel() for parameter in module.parameters())
    # The VAE's batch norm has statistics too, and an integer.
    assert card.bytes.vae == sum(
        tensor.numel() * (2 if tensor.is_floating_point() else 8)
        for tensor in vae.state_dict().values()
    )


@pytest.mark.parametrize(
    ("quantization", "encoder", "place", "default", "largest"),
    [
        (None, None, "colocated", False, False),
        ("fp8", None, "colocated", False, False),
        ("fp8", "fp8", "colocated", False, False),
        ("nf4", "nf4", "colocated", False, False),
        ("fp8", None, "shared", True, False),
        ("nf4", "nf4", "shared", True, True),
    ],
)
def test_which_klein_4b_fits_on_cards_of_8_gb(
    quantization: str | None, encoder: str | None, place: str, default: bool, largest: bool
) -> None:
    """At its default size, and at four megapixels with four references. Shared takes two cards."""
    tier = planned(
        "flux-2-klein-4b",
        "rtx4060-8gb",
        2,
        quantization=quantization,
        encoder_quantization=encoder,
        text_encoder=place,
    )
    assert all(card.fits_default for card in tier.cards) == default
    assert tier.fits == largest
    assert (tier.cheapest is not None) == largest


def test_a_plan_fits_only_where_there_are_cards_enough() -> None:
    args = {"parallel": Parallel(tensor=2), "num_replicas": 3}
    assert plan_of("flux-2-dev", count=6, **args).fits
    short = plan_of("flux-2-dev", count=5, **args)
    assert short.num_gpus == 6
    assert short.tiers[0].fits
    assert not short.fits


def test_cards_are_counted_over_all_tiers() -> None:
    tiers = [
        TierArgs(tier="flux-2-dev", weights=HUB, parallel=Parallel(tensor=2, sequence=2)),
        TierArgs(tier="flux-2-klein-4b", weights=HUB, num_replicas=3),
        TierArgs(tier="tiny", device="cpu"),
    ]
    plan = make_plan(tiers, "h100-80gb", 7)
    assert [tier.num_gpus for tier in plan.tiers] == [4, 3, 0]
    assert plan.num_gpus == 7
    assert plan.fits


def test_a_shared_text_encoder_has_one_card_for_all_replicas() -> None:
    tier = planned("flux-2-dev", parallel=Parallel(tensor=2), num_replicas=3, text_encoder="shared")
    rank, encoder = tier.cards
    assert tier.num_gpus == 3 * 2 + 1
    assert (rank.ranks, encoder.ranks) == ((0, 1), ())
    assert (rank.bytes.text_encoder, encoder.bytes.transformer) == (0, 0)
    # Whole: 30 layers and the embedding.
    assert encoder.bytes.text_encoder == 2 * 17_343_754_240


def test_one_card_that_is_too_small_is_enough_not_to_fit() -> None:
    """The transformer in 4 bits would fit; the text encoder of all replicas would not."""
    tier = planned("flux-2-dev", "rtx5090-32gb", quantization="nf4", text_encoder="shared")
    rank, encoder = tier.cards
    assert rank.fits
    assert not encoder.fits
    assert not tier.fits
    assert tier.cheapest is None


@pytest.mark.parametrize("card", ["h100-80gb", "rtx4060-8gb"])
def test_tiny_on_a_processor_needs_no_card(card: str) -> None:
    plan = plan_of("tiny", card, 1, device="cpu", dtype="float32", parallel=Parallel(tensor=2))
    [tier] = plan.tiers
    assert plan.fits
    assert (plan.num_gpus, tier.num_gpus) == (0, 0)
    assert (tier.cheapest, tier.alternatives, tier.fastest) == (None, (), None)
    [footprint] = [card.bytes for card in tier.cards]
    assert (footprint.communication, footprint.runtime) == (0, 0)
    assert 0 < footprint.transformer < 0.02 * GB


@pytest.mark.parametrize(
    ("name", "published", "gigabytes", "words"),
    [
        ("flux-2-dev", "90 GB full", 99.3, ("90.4", "64.4", "25.8", "30 of its 40 layers")),
        ("flux-2-dev", "about 54 GB FP8", 54.9, ("51.2", "about 3 to run")),
        ("flux-2-klein-4b", "about 8 GB klein 4B", 17.6, ("transformer alone, 7.75",)),
    ],
)
def test_published_figures_stand_beside_ours_with_a_reason(
    name: str, published: str, gigabytes: float, words: tuple[str, ...]
) -> None:
    [claim] = [claim for claim in planned(name).claims if claim.published == published]
    assert claim.our_bytes / GB == pytest.approx(gigabytes, abs=0.05)
    for word in words:
        assert word in claim.why


def test_published_figures_do_not_depend_on_the_layout() -> None:
    split = {"parallel": Parallel(tensor=4), "quantization": "fp8", "text_encoder": "shared"}
    assert planned("flux-2-dev", **split).claims == planned("flux-2-dev").claims


def test_nothing_was_published_of_other_shapes(small_dev: Path) -> None:
    other, pro = planned("flux-2-dev", weights=str(small_dev)), planned("flux-2-pro")
    assert (other.source, other.claims) == (str(small_dev), ())
    assert (pro.source, pro.claims) == ("the published shapes", ())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"parallel": Parallel(tensor=5)}, "tier flux-2-dev: parallel.tensor 5"),
        ({"weights": "FLUX.2-dev"}, "tier flux-2-dev: weights 'FLUX.2-dev'"),
        ({"parallel": Parallel(tensor=2), "encoder_quantization": "nf4"}, "tier flux-2-dev: .*nf4"),
    ],
)
def test_what_is_impossible_on_any_card_is_refused(args: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_of("flux-2-dev", **args)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tier flux-2-dev: .*model_index\.json"):
        plan_of("flux-2-dev", weights=str(tmp_path))


def test_a_card_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"no card named 'h999'.*h100-80gb.*rtx4060-8gb"):
        plan_of("tiny", "h999", device="cpu")


def test_an_encoder_in_four_bits_is_whole_where_only_tokens_are_shared() -> None:
    four_bits = {"quantization": "nf4", "encoder_quantization": "nf4"}
    [alone] = planned("flux-2-dev", **four_bits).cards
    [shared] = planned("flux-2-dev", parallel=Parallel(sequence=2), **four_bits).cards
    assert shared.bytes.text_encoder == alone.bytes.text_encoder
