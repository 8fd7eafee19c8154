"""Prices before anything was measured: the fact sheet's tables, and what makes a request longer.

The tables are milliseconds a step of one image of 1024 x 1024 pixels unless said otherwise.
"""

from dataclasses import replace

import pytest

from flux_ray.catalog.flops import WORKLOADS
from flux_ray.catalog.tiers import TIERS
from flux_ray.config.tier import TierArgs
from flux_ray.errors import UnknownTier
from flux_ray.request import Encoding, ImageRequest, Mask, RgbImage
from flux_ray.router.pricing.cost import (
    Cost,
    ReplicaSpec,
    RequestShape,
    encode_parts_s,
    encoder_ranks,
    price,
    work_at,
    work_of,
)

WITHIN = 0.01
FLUX_1_WEIGHTS = {"blocks": 8_606_711_808, "whole": 3_294_696_512}
# Tensor x sequence ranks of a table's columns.
SPLITS = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8))
TABLE = {
    ("flux-2-dev", "h100-80gb"): (460.9, 251.6, 143.1, 88.8, 248.3, 128.4, 66.3),
    ("flux-2-dev", "h200-141gb"): (460.9, 249.5, 141.0, 86.8, 247.2, 127.9, 66.0),
    ("flux-2-dev", "b200-180gb"): (273.0, 147.6, 82.9, 50.6, 147.0, 76.4, 39.9),
    ("flux-2-dev", "l40s-48gb"): (1301.1, 879.1, 654.4, 542.1, 842.5, 466.6, 245.7),
    ("flux-2-dev", "rtx4090-24gb"): (2854.5, 1677.4, 1077.0, 776.8, 1639.5, 870.6, 449.0),
    ("flux-2-klein-9b", "h100-80gb"): (123.2, 70.7, 42.7, 28.7, 69.0, 36.4, 19.2),
    ("flux-2-klein-9b", "h200-141gb"): (123.2, 69.8, 41.8, 27.8, 68.6, 36.2, 19.1),
    ("flux-2-klein-9b", "b200-180gb"): (73.0, 41.4, 24.6, 16.3, 41.0, 21.9, 11.9),
    ("flux-2-klein-9b", "l40s-48gb"): (347.7, 269.3, 224.3, 201.9, 247.9, 141.5, 75.7),
    ("flux-2-klein-9b", "rtx4090-24gb"): (762.8, 485.9, 342.4, 270.6, 463.1, 251.2, 131.1),
    ("flux-2-klein-4b", "h100-80gb"): (56.8, 33.6, 21.0, 14.7, 33.0, 17.8, 9.6),
    ("flux-2-klein-4b", "h200-141gb"): (56.8, 33.1, 20.5, 14.2, 32.8, 17.6, 9.6),
    ("flux-2-klein-4b", "b200-180gb"): (33.6, 19.7, 12.1, 8.3, 19.8, 10.8, 6.1),
    ("flux-2-klein-4b", "l40s-48gb"): (160.3, 134.0, 117.5, 109.2, 123.8, 72.3, 39.2),
    ("flux-2-klein-4b", "rtx4090-24gb"): (351.7, 234.7, 173.3, 142.7, 224.0, 123.6, 65.2),
}
# Of dev on H100, by the image's side and its references of a megapixel; TP8 and SP8 last.
SHAPES = {
    # The sheet's last is 22.6: it has no time for the weights' way from memory, of which Ulysses
    # takes nothing. All 64.4 GB at 0.8 of 3.35 TB/s are 24.0, not 17.9 as the products.
    (512, 0): (143.1, 79.3, 45.7, 28.9, 79.3, 42.0, 28.7),
    (1024, 1): (950.4, 514.3, 289.4, 176.9, 506.5, 260.1, 132.8),
    (1024, 3): (2155.4, 1152.7, 638.4, 381.3, 1135.9, 580.0, 294.1),
    (2048, 0): (2155.4, 1152.7, 638.4, 381.3, 1135.9, 580.0, 294.1),
}
# Seconds of 28 steps of dev in FP8, over 1, 2, 4 and 8 tensor ranks.
FP8 = {
    "h100-80gb": (8.50, 4.84, 2.91, 1.94),
    "h200-141gb": (8.50, 4.79, 2.85, 1.88),
    "b200-180gb": (3.94, 2.28, 1.40, 0.95),
}
DEV = RequestShape("flux-2-dev", 1024, 1024, num_steps=28)
KLEIN = RequestShape("flux-2-klein-4b", 1024, 1024, num_steps=4)
H100 = ReplicaSpec("h100-80gb")


def step_ms(work: RequestShape, layout: ReplicaSpec) -> float:
    return price(replace(work, num_steps=1), layout).denoise_s * 1e3


@pytest.mark.parametrize(("tier", "card"), TABLE)
def test_a_step_takes_what_the_fact_sheet_says(tier: str, card: str) -> None:
    work = RequestShape(tier, 1024, 1024, num_steps=1)
    said = [step_ms(work, ReplicaSpec(card, *split)) for split in SPLITS]
    assert said == pytest.approx(TABLE[tier, card], rel=WITHIN)


@pytest.mark.parametrize(("side", "num_references"), SHAPES)
def test_other_shapes_take_what_the_fact_sheet_says(side: int, num_references: int) -> None:
    work = replace(DEV, width=side, height=side, references=(1024 * 1024,) * num_references)
    said = [step_ms(work, ReplicaSpec("h100-80gb", *split)) for split in SPLITS]
    assert said == pytest.approx(SHAPES[side, num_references], rel=WITHIN)


@pytest.mark.parametrize("card", FP8)
def test_fp8_takes_what_the_fact_sheet_says(card: str) -> None:
    said = [price(DEV, ReplicaSpec(card, tensor, 1, "fp8")).denoise_s for tensor in (1, 2, 4, 8)]
    assert said == pytest.approx(FP8[card], rel=WITHIN)


def test_two_tensor_ranks_by_four_sequence_ranks_are_faster_than_eight_tensor_ranks() -> None:
    mixed = step_ms(DEV, ReplicaSpec("h100-80gb", 2, 4))
    # Products, sums over 2 of a quarter of the tokens, tokens of half the heads over 4, passes.
    activations_ms = 4608 * 6144 * 2 / 4 / 1e6
    sums = activations_ms * 64 / 270 + 80 * 0.012
    exchanges = activations_ms * 224 * (3 / 4) / 2 / 270 + 224 * 0.012
    passes = activations_ms * 320 / (3350 * 0.8)
    assert mixed == pytest.approx(460.9 / 8 + sums + exchanges + passes, rel=0.001)
    assert (
        step_ms(DEV, ReplicaSpec("h100-80gb", 1, 8))
        < mixed
        < step_ms(DEV, ReplicaSpec("h100-80gb", 8))
    )


def test_every_step_and_every_image_is_paid_for_but_the_prompt_only_once() -> None:
    one = price(KLEIN, H100)
    more = price(replace(KLEIN, num_steps=8, num_images=3), H100)
    assert more.denoise_s == pytest.approx(6 * one.denoise_s)
    assert more.decode_s == pytest.approx(3 * one.decode_s)
    assert more.encode_s < 1.1 * one.encode_s
    assert more.total_s == more.encode_s + more.denoise_s + more.decode_s


def test_a_preview_costs_what_decoding_an_image_does() -> None:
    one, more = price(KLEIN, H100), price(replace(KLEIN, num_previews=2, num_images=3), H100)
    assert more.decode_s == pytest.approx(9 * one.decode_s)
    assert more.denoise_s == pytest.approx(3 * one.denoise_s)


def test_dev_at_four_megapixels_with_references_costs_hundreds_of_klein_images() -> None:
    work = RequestShape("flux-2-dev", 2048, 2048, num_steps=50, references=(1024 * 1024,) * 4)
    assert price(work, H100).denoise_s > 500 * price(KLEIN, H100).denoise_s


def test_references_lengthen_encoding_and_every_step_but_not_decoding() -> None:
    plain = price(KLEIN, H100)
    with_two = price(replace(KLEIN, references=(1024 * 1024, 512 * 512)), H100)
    assert with_two.encode_s > plain.encode_s + 0.009
    assert with_two.denoise_s > 2 * plain.denoise_s
    assert with_two.decode_s == plain.decode_s


def test_decoding_in_tiles_takes_more_a_pixel() -> None:
    """Four megapixels are nine overlapping tiles."""
    one, four = (replace(KLEIN, width=side, height=side) for side in (1024, 2048))
    assert price(four, H100).decode_s > 5 * price(one, H100).decode_s


def test_files_are_no_work_of_a_replica() -> None:
    """They are made while it draws the next request."""
    png, webp = (request(encoding=Encoding(each)) for each in ("png", "webp"))
    large = request(encoding=Encoding(scaled_to=(4096, 2048)))
    assert work_of(png) == work_of(webp) == work_of(large)


def test_a_small_step_takes_as_long_as_the_host_needs_to_launch_it() -> None:
    small = replace(KLEIN, width=64, height=64)
    assert step_ms(small, ReplicaSpec("b200-180gb")) == pytest.approx(25 * 0.2)


def test_a_step_takes_no_less_than_the_way_of_the_weights_from_memory() -> None:
    """66 GB of weights in all, at 0.8 of 300 GB/s: a card that computes fast for its memory."""
    small = replace(DEV, width=64, height=64)
    assert step_ms(small, ReplicaSpec("l4-24gb")) >= 2 * 32_223_281_152 / (0.8 * 300e9) * 1e3


@pytest.mark.parametrize("quantization", ["fp8", "int8", "nf4"])
def test_weights_that_are_unpacked_make_a_step_longer(quantization) -> None:
    """A100 has no FP8 units."""
    plain = step_ms(DEV, ReplicaSpec("a100-80gb"))
    assert step_ms(DEV, ReplicaSpec("a100-80gb", quantization=quantization)) > plain * 1.02


def test_fp32_takes_longer_than_bf16() -> None:
    fp32 = ReplicaSpec("h100-80gb", dtype="float32")
    assert step_ms(DEV, fp32) > 5 * step_ms(DEV, H100)
    # FP8 units multiply by activations of two bytes only.
    assert step_ms(DEV, replace(fp32, quantization="fp8")) > step_ms(DEV, fp32)


def test_more_threads_of_a_processor_take_less() -> None:
    work = RequestShape("tiny", 192, 192, num_steps=4)
    one, four = (ReplicaSpec("cpu", dtype="float32", num_threads=number) for number in (1, 4))
    assert price(work, four).denoise_s < 0.7 * price(work, one).denoise_s


@pytest.mark.parametrize("tier", [tier.name for tier in TIERS])
def test_every_tier_has_a_price(tier: str) -> None:
    cost = price(RequestShape(tier, 64, 64, num_steps=1), H100)
    assert min(cost.encode_s, cost.denoise_s, cost.decode_s) > 0


def test_the_split_text_encoder_encodes_faster_than_a_shared_one() -> None:
    split = ReplicaSpec("h100-80gb", tensor=4)
    shared = replace(split, is_encoder_shared=True)
    assert encoder_ranks(split, 8) == 4
    assert encoder_ranks(shared, 8) == 1
    assert price(DEV, split).encode_s < 0.6 * price(DEV, shared).encode_s


def test_parts_of_a_text_encoder_wait_for_each_other() -> None:
    """60 sums of 512 x 5120 numbers over two cards at 18 GB/s, and a collective's start each."""
    one, two = (price(DEV, ReplicaSpec("l40s-48gb", tensor)).encode_s for tensor in (1, 2))
    assert two - one / 2 == pytest.approx(60 * (512 * 5120 * 2 / 18e9 + 12e-6), rel=0.02)


def test_a_layout_is_what_the_args_say() -> None:
    args = TierArgs(
        tier="flux-2-dev",
        weights="owner/name@revision",
        parallel={"tensor": 2, "sequence": 4},
        quantization="fp8",
        encoder_quantization="int8",
        text_encoder="shared",
        num_cpus=4,
    )
    layout = ReplicaSpec.of(args, "h200-141gb")
    assert layout == ReplicaSpec("h200-141gb", 2, 4, "fp8", "int8", "bfloat16", True)
    assert layout.num_ranks == 8


def test_a_processor_needs_no_card() -> None:
    args = TierArgs(tier="tiny", device="cpu", dtype="float32", num_cpus=2.5)
    assert ReplicaSpec.of(args, "whatever") == ReplicaSpec("cpu", dtype="float32", num_threads=2)


def test_an_unknown_card_is_refused_by_name() -> None:
    args = TierArgs(tier="flux-2-klein-4b", weights="owner/name@revision")
    with pytest.raises(ValueError, match="no card named 'h1000'; known cards: b200"):
        ReplicaSpec.of(args, "h1000")


def request(**changes: object) -> ImageRequest:
    plain = ImageRequest("id", "flux-2-dev", "a ring", 1024, 512, 28, 4.0, seed=7)
    return replace(plain, **changes)


def test_work_is_what_of_a_request_makes_it_long() -> None:
    asked = request(num_images=2)
    assert work_of(asked) == RequestShape("flux-2-dev", 1024, 512, 28, (), 2)
    assert work_of(asked).num_tokens == 512 + 64 * 32
    assert work_of(request(num_previews=3)).num_previews == 3
    assert work_of(request(num_previews=3, num_steps=2)).num_previews == 1, "as many as are made"
    edit = request(references=(RgbImage(64, 64, b""),), mask=Mask(64, 64, b""), strength=0.25)
    assert work_of(edit).num_steps == 7


def test_words_seed_and_guidance_cost_nothing() -> None:
    assert work_of(request(prompt="two rings", seed=8, guidance=9.0)) == work_of(request())


def test_references_count_as_large_as_the_model_takes_them() -> None:
    """A large one is scaled down to a megapixel, sides are cut to whole tokens."""
    large, odd = RgbImage(4000, 1000, b""), RgbImage(100, 79, b"")
    work = work_of(request(references=(large, odd)))
    assert work.references == (2048 * 512, 96 * 64)
    assert work.num_tokens == 512 + 64 * 32 + 128 * 32 + 6 * 4


def test_a_mask_costs_nothing_where_its_image_is_the_reference_that_it_is() -> None:
    """The image is scaled to what is drawn: as a reference that has that size already."""
    image, mask = RgbImage(1500, 750, b""), Mask(1500, 750, b"")
    masked = work_of(request(references=(image, image), mask=mask))
    plain = work_of(request(references=(RgbImage(1024, 512, b""), image)))
    assert masked == replace(plain, is_masked=True)
    assert price(masked, H100) == price(plain, H100)


def test_a_large_image_under_a_mask_is_encoded_once_more() -> None:
    """In nine tiles, as it is decoded, and it has the tokens of a reference of a megapixel."""
    image, mask = RgbImage(2048, 2048, b""), Mask(2048, 2048, b"")
    large = request(width=2048, height=2048, references=(image,))
    plain, masked = (price(work_of(each), H100) for each in (large, replace(large, mask=mask)))
    assert masked.denoise_s == plain.denoise_s
    assert masked.decode_s == plain.decode_s
    work = work_of(replace(large, mask=mask))
    assert work.encoded_pixels == 1024**2 + 2048**2
    extra_s = masked.encode_s - plain.encode_s
    words_s = price(replace(work, references=(), is_masked=False), H100).encode_s
    assert 6 < extra_s / (plain.encode_s - words_s) < 9


def test_a_prompt_that_is_padded_to_its_own_length_is_priced_by_it() -> None:
    """FLUX.3 pads to multiples of 80 tokens; how many it has is estimated from its bytes."""
    prompts = ("a ring", "a ring " * 100, "a ring " * 10_000)
    works = [work_of(request(tier="flux-3-klein", prompt=prompt)) for prompt in prompts]
    assert [work.text_length for work in works] == [80, 240, 3600]
    assert [work.num_tokens - work.text_length for work in works] == [works[0].pixels // 256] * 3
    costs = [price(work, H100) for work in works]
    assert costs[0].denoise_s < costs[1].denoise_s < costs[2].denoise_s
    # A short prompt takes as long as it takes to read the weights.
    assert costs[0].encode_s == costs[1].encode_s < costs[2].encode_s
    assert costs[2] == price(replace(works[2], num_text=None), H100)
    assert work_of(request(prompt="a ring " * 10_000)).num_text is None


def test_a_prompt_to_steer_away_from_is_priced_by_its_own_length() -> None:
    """Each of the two forwards has the text of its own prompt, and each prompt is encoded."""
    long = "a ring " * 2_000
    base = request(tier="flux-3-klein-base", width=64, height=64, num_steps=1)

    def cost(prompt: str, negative: str | None) -> Cost:
        return price(work_of(replace(base, prompt=prompt, negative_prompt=negative)), H100)

    short_s, long_s = (cost(prompt, None).denoise_s for prompt in ("a ring", long))
    assert long_s > 5 * short_s
    assert cost("a ring", long).denoise_s == pytest.approx(short_s + long_s)
    assert cost(long, "a ring").denoise_s == pytest.approx(short_s + long_s)
    assert cost(long, "").denoise_s == pytest.approx(short_s + long_s)
    assert cost("a ring", long).encode_s == pytest.approx(cost(long, "a ring").encode_s)
    assert cost("a ring", long).encode_s > cost(long, "").encode_s


def test_an_unknown_tier_has_no_work() -> None:
    with pytest.raises(UnknownTier):
        work_of(request(tier="flux-3"))


@pytest.mark.parametrize("sequence", [1, 4])
def test_steering_away_from_a_prompt_doubles_every_step_and_nothing_else(sequence: int) -> None:
    layout = ReplicaSpec("h100-80gb", sequence=sequence)
    asked = request(tier="flux-1-dev", height=1024)
    one, two = work_of(asked), work_of(replace(asked, negative_prompt="a ring"))
    plain, steered = price(one, layout), price(two, layout)
    assert steered.denoise_s == 2 * plain.denoise_s
    assert steered.decode_s == plain.decode_s
    # A second prompt is encoded too. An empty one is the same for all requests, and cached.
    words_s, _ = encode_parts_s(one, layout)
    assert steered.encode_s - plain.encode_s == pytest.approx(words_s)
    empty = price(work_of(replace(asked, negative_prompt="")), layout)
    assert (empty.denoise_s, empty.encode_s) == (steered.denoise_s, plain.encode_s)


@pytest.mark.parametrize("name", ["flux-1-dev", "flux-2-klein-4b-base"])
def test_without_a_cache_an_empty_negative_prompt_is_encoded_each_time(name: str) -> None:
    asked = replace(request(tier=name, height=1024), negative_prompt="")
    kept, encoded = (
        price(work_of(asked), ReplicaSpec("h100-80gb", has_cache=has_cache))
        for has_cache in (True, False)
    )
    words_s, _ = encode_parts_s(work_of(asked), H100)
    assert encoded.encode_s - kept.encode_s == pytest.approx(words_s)


def test_a_base_model_takes_two_forwards_without_being_asked() -> None:
    base, klein = (work_at(f"flux-2-klein-4b{end}", 1024, 1024, 4) for end in ("-base", ""))
    assert price(base, H100).denoise_s == 2 * price(klein, H100).denoise_s


@pytest.mark.parametrize("size", [(200, 120), (1024, 1024), (4000, 3000)])
def test_kontexts_reference_costs_the_same_whatever_its_size(size: tuple[int, int]) -> None:
    work = work_of(request(tier="flux-1-kontext-dev", references=(RgbImage(*size, b""),)))
    assert work.num_tokens == 512 + 64 * 32 + 4150
    largest = replace(work, references=(4150 * 256,))
    assert price(work, H100) == price(largest, H100)
    assert price(work, H100).denoise_s > 2 * price(replace(work, references=()), H100).denoise_s


def test_an_image_to_fill_or_to_follow_costs_its_encoding_and_no_tokens() -> None:
    image, mask = RgbImage(1024, 512, b""), Mask(1024, 512, b"")
    plain = work_of(request(tier="flux-1-fill-dev"))
    filled = work_of(request(tier="flux-1-fill-dev", references=(image,), mask=mask))
    assert filled.num_tokens == plain.num_tokens == 512 + 64 * 32
    assert filled.encoded_pixels == 1024 * 512
    extra_s = price(filled, H100).encode_s - price(plain, H100).encode_s
    followed = work_of(
        request(tier="flux-1-canny-dev", references=(image,), follows_reference=True)
    )
    assert followed.num_tokens == plain.num_tokens
    assert followed.encoded_pixels == 1024 * 512
    words_s, _ = encode_parts_s(followed, H100)
    # With the noise of the image, which is a launch.
    assert price(followed, H100).encode_s == pytest.approx(words_s + extra_s + 0.2e-3)
    # 0.5 MP of VAE at 0.62 of 989 TFLOP/s.
    assert extra_s == pytest.approx((4_132_096 * 2**19 + 2**37) / (0.62 * 989e12), rel=0.01)


def test_a_kontext_under_a_mask_encodes_its_image_twice() -> None:
    """As a reference about a megapixel large, and as what is kept, as large as it is."""
    image, mask = RgbImage(512, 512, b""), Mask(512, 512, b"")
    asked = request(tier="flux-1-kontext-dev", width=512, references=(image,))
    plain, masked = work_of(asked), work_of(replace(asked, mask=mask))
    assert masked.encoded_pixels == plain.encoded_pixels + 512 * 512
    assert masked.num_tokens == plain.num_tokens


def test_a_klein_that_keeps_no_latents_encodes_an_image_under_a_mask_once_more() -> None:
    image, mask = RgbImage(1024, 512, b""), Mask(1024, 512, b"")
    for tier, more in (("flux-2-klein-9b", 0), ("flux-2-klein-9b-kv", 1024 * 512)):
        plain = work_of(request(tier=tier, references=(image,)))
        masked = work_of(request(tier=tier, references=(image,), mask=mask))
        assert masked.encoded_pixels == plain.encoded_pixels + more


def test_references_that_are_kept_cost_attention_and_no_products() -> None:
    """Klein KV: each step reads their keys and values, which are computed with the encoding."""
    pixels = (1024 * 1024,) * 3
    kv = RequestShape("flux-2-klein-9b-kv", 1024, 1024, 4, pixels)
    plain = replace(kv, tier="flux-2-klein-9b")
    alone = replace(kv, references=())
    assert (kv.num_tokens, kv.num_kept_tokens) == (512 + 4096, 3 * 4096)
    assert plain.num_tokens == 512 + 4 * 4096
    work, flops_s = WORKLOADS["flux-2-klein-9b-kv"].transformer, 0.62 * 989e12
    read = 4 * work.width * work.num_blocks * 4608 * 3 * 4096
    step_s = (price(kv, H100).denoise_s - price(alone, H100).denoise_s) / 4
    assert step_s == pytest.approx(read / flops_s, rel=0.001)
    # Once: all of a forward of the references alone.
    once = work.product_flops(3 * 4096) + work.attention_flops(3 * 4096)
    once_s = price(kv, H100).encode_s - price(plain, H100).encode_s
    assert once_s == pytest.approx(once / flops_s, rel=0.001)
    assert price(kv, H100).total_s < 0.6 * price(plain, H100).total_s


def test_schnell_reads_half_the_words() -> None:
    dev, schnell = (RequestShape(f"flux-1-{name}", 1024, 1024, 4) for name in ("dev", "schnell"))
    assert dev.num_tokens - schnell.num_tokens == 256
    assert price(schnell, H100).encode_s < price(dev, H100).encode_s


def test_flux_1_takes_what_was_measured_by_others() -> None:
    """153.6 ms a step of dev at a megapixel on an H100 (xDiT), 127.6 on an H200 (SGLang)."""
    assert 110 < step_ms(RequestShape("flux-1-dev", 1024, 1024, 1), H100) < 155


def test_tensor_ranks_of_flux_1_each_read_all_of_its_modulations() -> None:
    """Small images wait for the weights: the 3.3 billion whole ones take as long on eight."""
    small = RequestShape("flux-1-dev", 64, 64, 1)
    one, eight = (step_ms(small, ReplicaSpec("l4-24gb", tensor)) for tensor in (1, 8))
    read_ms = {name: 2 * size / (0.8 * 300e9) * 1e3 for name, size in FLUX_1_WEIGHTS.items()}
    assert one == pytest.approx(sum(read_ms.values()), rel=0.01)
    assert eight > read_ms["whole"] + read_ms["blocks"] / 8
