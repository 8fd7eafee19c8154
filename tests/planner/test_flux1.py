"""Plans of FLUX.1, and of klein that keeps its references: weights to the byte of the modules."""

from functools import cache
from typing import Any

import pytest
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FluxTransformer2DModel
from rich.console import Console
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux_ray.catalog.tiers import tier_for
from flux_ray.cli.plan import layout_lines, print_plan
from flux_ray.config.tier import Parallel, TierArgs
from flux_ray.planner.candidate import default_demand
from flux_ray.planner.plan import Plan, TierPlan, make_plan

GB = 10**9
HUB = "owner/name@revision"
# What was counted by hand was counted without.
NO_CACHE = {"cache_bytes": 0}


@cache
def plan_of(name: str, card: str, count: int, **args: object) -> Plan:
    return make_plan([TierArgs(**{"tier": name, "weights": HUB} | NO_CACHE | args)], card, count)


def planned(name: str, card: str = "h100-80gb", count: int = 8, **args: object) -> TierPlan:
    [tier] = plan_of(name, card, count, **args).tiers
    return tier


T5_XXL = T5Config(
    vocab_size=32128,
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
)
CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)


def build_vae() -> nn.Module:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "config", "known"),
    [
        ("flux-1-dev", {"guidance_embeds": True}, 11_901_408_320),
        ("flux-1-krea-dev", {"guidance_embeds": True}, 11_901_408_320),
        ("flux-1-pro", {"guidance_embeds": True}, 11_901_408_320),
        ("flux-1-kontext-dev", {"guidance_embeds": True}, 11_901_408_320),
        ("flux-1-schnell", {"guidance_embeds": False}, 11_891_178_560),
        (
            "flux-1-fill-dev",
            {"guidance_embeds": True, "in_channels": 384, "out_channels": 64},
            11_902_391_360,
        ),
        (
            "flux-1-depth-dev",
            {"guidance_embeds": True, "in_channels": 128, "out_channels": 64},
            11_901_604_928,
        ),
        (
            "flux-1-canny-dev",
            {"guidance_embeds": True, "in_channels": 128, "out_channels": 64},
            11_901_604_928,
        ),
    ],
)
def test_the_transformer_is_that_of_the_module_on_the_meta_device(
    name: str, config: dict[str, Any], known: int
) -> None:
    with init_empty_weights():
        transformer = FluxTransformer2DModel(**config)
    tier = planned(name)
    assert num_parameters(transformer) == known == tier.num_parameters
    [card] = tier.cards
    assert card.bytes.transformer == 2 * known


def test_both_text_encoders_and_the_vae_are_those_of_the_modules_on_the_meta_device() -> None:
    with init_empty_weights():
        t5, clip, vae = T5EncoderModel(T5_XXL), CLIPTextModel(CLIP_L), build_vae()
    # The embedding has two names, and a checkpoint has it once.
    num_words = t5.encoder.embed_tokens.weight.numel()
    is_twice = t5.encoder.embed_tokens.weight is not t5.shared.weight
    num_t5 = num_parameters(t5) - is_twice * num_words
    assert (num_t5, num_parameters(clip)) == (4_762_310_656, 123_060_480)
    [card] = planned("flux-1-dev").cards
    assert card.bytes.text_encoder == 2 * (num_t5 + num_parameters(clip))
    assert card.bytes.vae == 2 * num_parameters(vae) == 2 * 83_819_683


# Of dev: the linears of its blocks, which become FP8 with a scale for each row, and all else.
NUM_IN_BLOCKS, NUM_OTHER = 8_606_711_808, 3_294_696_512
NUM_ROWS = 19 * (8 * 3072 + 2 * (12288 + 3072)) + 38 * (3 * 3072 + 12288 + 3072)


def test_dev_in_fp8_fits_cards_of_24_gb_beside_a_shared_text_encoder() -> None:
    tier = planned("flux-1-dev", "rtx4090-24gb", 2, quantization="fp8", text_encoder="shared")
    rank, encoder = tier.cards
    assert rank.bytes.transformer == NUM_IN_BLOCKS + 4 * NUM_ROWS + 2 * NUM_OTHER
    assert rank.bytes.text_encoder == 0
    assert encoder.bytes.text_encoder == 2 * (4_762_310_656 + 123_060_480)
    assert (rank.fits, encoder.fits, tier.num_gpus) == (True, True, 2)


def test_dev_in_bf16_does_not_fit_a_card_of_24_gb_and_is_told_what_does() -> None:
    tier = planned("flux-1-dev", "rtx4090-24gb", 1)
    assert not tier.fits and tier.cheapest is None
    [layout, *_] = tier.alternatives
    assert layout.changes == {"quantization": "fp8", "encoder_quantization": "fp8"}
    assert (layout.tensor, layout.encoder_bytes) == (1, None)


def test_kontext_fits_beside_a_klein_that_keeps_its_references_on_cards_of_80_gb() -> None:
    tiers = [
        TierArgs(tier=name, weights=HUB) for name in ("flux-1-kontext-dev", "flux-2-klein-9b-kv")
    ]
    plan = make_plan(tiers, "h100-80gb", 2)
    assert plan.fits and plan.num_gpus == 2
    [kontext], [klein] = (tier.cards for tier in plan.tiers)
    assert kontext.bytes.transformer == 2 * 11_901_408_320
    assert klein.bytes.transformer == 2 * 9_078_581_248
    assert klein.bytes.text_encoder == 2 * 5_831_883_520


@pytest.mark.parametrize(("tensor", "gigabytes"), [(1, 23.80), (2, 15.19), (4, 10.89), (8, 8.74)])
def test_tensor_ranks_share_only_a_part_of_flux_1(tensor: int, gigabytes: float) -> None:
    tier = planned("flux-1-dev", parallel=Parallel(tensor=tensor))
    [card] = tier.cards
    assert (tier.num_parameters, tier.num_whole_parameters) == (11_901_408_320, 3_293_062_208)
    shared = tier.num_parameters - tier.num_whole_parameters
    assert card.bytes.transformer == 2 * (shared // tensor + tier.num_whole_parameters)
    assert card.bytes.transformer / GB == pytest.approx(gigabytes, abs=0.01)


def test_the_plan_says_that_tensor_ranks_share_only_a_part(capsys: pytest.CaptureFixture) -> None:
    split = {"parallel": Parallel(tensor=2)}
    print_plan(plan_of("flux-1-dev", "a100-40gb", 2, **split), Console(width=150))
    said = " ".join(capsys.readouterr().out.split())
    assert "3.3 of its 11.9 billion parameters are whole on each" in said
    assert not any("whole on each" in line for line in layout_lines(planned("flux-2-dev", **split)))
    assert planned("flux-2-dev", **split).num_whole_parameters == 816_332_800


def test_a_fill_needs_room_for_its_image_at_any_size() -> None:
    """The default image of Fill and Canny comes with one to encode; that of dev does not."""
    for name in ("flux-1-fill-dev", "flux-1-canny-dev"):
        assert planned(name).largest.encodes_image
    assert planned("flux-1-fill-dev").largest.num_references == 1
    assert planned("flux-1-canny-dev").largest.num_references == 0
    assert planned("flux-1-dev").largest.encodes_image, "under a mask"
    assert not default_demand(tier_for("flux-1-dev")).encodes_image


def test_kept_references_take_memory_in_place_of_longer_steps() -> None:
    """Four references of 4096 tokens, in 32 blocks, as keys and values of 4096 numbers each."""
    kv, plain = planned("flux-2-klein-9b-kv"), planned("flux-2-klein-9b")
    kept = 4 * 4096 * 32 * 2 * 4096 * 2
    [with_kept], [without] = kv.cards, plain.cards
    more = with_kept.bytes.activations - without.bytes.activations
    assert 0.5 * kept < more < 1.1 * kept
    assert with_kept.default_bytes - without.default_bytes < 0.01 * GB
