"""What stages compute, counted again on the meta device: equal to the rows, FLOP by FLOP."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5EncoderModel

from flux_ray.catalog.flops import MAX_WHOLE_PIXELS, TILE_SIDE, WORKLOADS, VaeWork, reference_pixels
from flux_ray.catalog.tiers import TIERS, tier_for
from flux_ray.engine.api import EmptyModel, ImageSpec
from flux_ray.engine.encoding_cache import CachedEncoder
from flux_ray.engine.flux2.klein_kv import ReferenceKeys
from flux_ray.engine.flux2.pipeline import Flux2
from flux_ray.engine.loading import encoder_axis
from flux_ray.engine.registry import empty_model
from flux_ray.parallel.checkpoint import shards_for
from flux_ray.parallel.load import saved_tensors
from flux_ray.parallel.mesh import Axis, Mesh
from flux_ray.parallel.precision import is_quantized
from flux_ray.request import ImageRequest, Mask
from flux_ray.router.pricing.cost import ReplicaSpec, encoder_ranks, work_of
from tests.engine.generation import reference

ATTENTION = "aten.bmm"
# The others are these under other names.
DIFFERENT = (
    "tiny",
    "tiny-flux1",
    "flux-1-dev",
    "flux-2-klein-4b",
    "flux-2-klein-9b",
    "flux-2-dev",
)
# As one of these but for what the transformer reads and writes, or how many tokens it is given.
ALIKE = ("flux-1-schnell", "flux-1-fill-dev", "flux-1-depth-dev", "flux-2-klein-9b-kv")
# Whose blocks are other ones: counted in tests/engine/flux3/test_flops.py.
ELSEWHERE = ("flux-3-klein", "flux-3-klein-base")
HUB = "owner/name@revision"


@cache
def published(name: str) -> EmptyModel:
    """A tier's modules, which take seconds to build: nothing here changes them for good."""
    return empty_model(tier_for(name), HUB)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def count(call: Callable[[], object]) -> tuple[int, int]:
    """FLOPs of linear layers and convolutions, and of attention's products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    attention = counted.pop(ATTENTION, 0)
    return sum(counted.values()), attention


@pytest.fixture(scope="module", params=DIFFERENT)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> EmptyModel:
    tier = tier_for(name)
    return empty_model(tier, tier.weights) if tier.weights else published(name)


def forward(transformer: nn.Module, num_text: int, num_image: int) -> None:
    config = transformer.config
    inputs = {
        "hidden_states": empty(1, num_image, config.in_channels),
        "encoder_hidden_states": empty(1, num_text, config.joint_attention_dim),
        "timestep": empty(1),
        "guidance": empty(1) if config.guidance_embeds else None,
    }
    if isinstance(transformer, FluxTransformer2DModel):
        inputs["pooled_projections"] = empty(1, config.pooled_projection_dim)
        ids = {"img_ids": empty(num_image, 3), "txt_ids": empty(num_text, 3)}
    else:
        sizes = {"img_ids": num_image, "txt_ids": num_text}
        ids = {name: empty(1, size, 4, dtype=torch.int64) for name, size in sizes.items()}
    transformer(**inputs, **ids, return_dict=False)


def test_every_tier_has_a_row_of_its_own_size() -> None:
    assert set(WORKLOADS) == {tier.name for tier in TIERS}
    for tier in TIERS:
        if tier.weights is None:
            model = published(tier.name)
            work = WORKLOADS[tier.name].transformer
            assert num_weights(model.transformer) == (
                work.num_block_weights,
                work.num_other_weights,
            )


def num_weights(module: nn.Module) -> tuple[int, int]:
    """Of the blocks' linear layers, and all others."""
    sizes = {name: tensor.numel() for name, tensor in saved_tensors(module)}
    blocks = sum(size for name, size in sizes.items() if is_quantized(name))
    return blocks, sum(sizes.values()) - blocks


# Attention's products grow with the square of the tokens: three sizes tell of all others.
@pytest.mark.parametrize("num_image", [16, 1024, 16384])
def test_a_step_computes_what_the_row_says(name: str, model: EmptyModel, num_image: int) -> None:
    work, num_text = WORKLOADS[name].transformer, tier_for(name).text_length
    num_tokens = num_text + num_image
    counted = count(lambda: forward(model.transformer, num_text, num_image))
    assert counted == (work.product_flops(num_tokens), work.attention_flops(num_tokens))


@pytest.mark.parametrize("name", ALIKE)
def test_a_step_of_what_is_alike_computes_what_its_row_says(name: str) -> None:
    work, num_text = WORKLOADS[name].transformer, tier_for(name).text_length
    counted = count(lambda: forward(published(name).transformer, num_text, 64))
    assert counted == (work.product_flops(num_text + 64), work.attention_flops(num_text + 64))


def test_references_that_are_kept_compute_what_the_row_says() -> None:
    """Alone once, without any text; then each step attends to their keys and values."""
    name, num_text, num_image, num_kept = "flux-2-klein-9b-kv", 512, 32, 4096
    work = WORKLOADS[name].transformer
    transformer = empty_model(tier_for(name), HUB).transformer
    keys = ReferenceKeys()
    keys.install(transformer)
    with keys.recorded() as kept:
        products, attention = count(lambda: forward(transformer, 0, num_kept))
    assert attention == work.attention_flops(num_kept)
    # The row has the text's embedding in it, which is not computed here.
    assert 0.999 < products / work.product_flops(num_kept) < 1
    with keys.inserted(kept, num_text):
        counted = count(lambda: forward(transformer, num_text, num_image))
    num_tokens = num_text + num_image
    assert counted == (
        work.product_flops(num_tokens),
        work.attention_flops(num_tokens, num_kept),
    )


def test_ranks_exchange_as_often_as_the_row_says(name: str, model: EmptyModel) -> None:
    """A sum after every layer that is split along its input, two exchanges around an attention."""
    work, transformer = WORKLOADS[name].transformer, model.transformer
    shards = shards_for(transformer, transformer._tp_plan, 2)
    reduced = [shard for name, shard in shards.items() if shard.dim == 1]
    assert len(reduced) == 4 * work.num_double_blocks + work.num_single_blocks
    attentions = [module for module in transformer.modules() if hasattr(module, "processor")]
    assert len(attentions) == work.num_blocks
    config = transformer.config
    assert work.width == config.num_attention_heads * config.attention_head_dim


def encoding_inputs(model: EmptyModel, length: int) -> dict[str, object]:
    """T5 attends to everything; the others are told to what."""
    inputs: dict[str, object] = {"input_ids": empty(1, length, dtype=torch.int64)}
    if isinstance(model.text_encoder, T5EncoderModel):
        return inputs
    # Four dimensions: a mask of tokens would be looked at, and these have no values.
    mask = empty(1, 1, length, length)
    return inputs | {"attention_mask": mask, "output_hidden_states": True, "use_cache": False}


def test_a_prompt_computes_what_the_row_says(name: str, model: EmptyModel) -> None:
    work, length = WORKLOADS[name].text_encoder, tier_for(name).text_length
    counted = count(lambda: model.text_encoder(**encoding_inputs(model, length)))
    assert counted == (work.product_flops(length), work.attention_flops)


def test_the_text_encoder_is_as_large_as_the_row_says(name: str, model: EmptyModel) -> None:
    work, config = WORKLOADS[name].text_encoder, model.text_encoder.config
    assert (work.width, work.num_layers) == (config.hidden_size, config.num_hidden_layers)
    assert work.num_block_weights == num_weights(model.text_encoder)[0]
    assert work.num_heads == model.text_model.num_heads


def test_the_second_text_encoder_computes_what_the_row_says(name: str, model: EmptyModel) -> None:
    """FLUX.1's CLIP, with all of its 77 tokens."""
    work, clip = WORKLOADS[name].text_encoder, model.whole_text_encoder
    if clip is None:
        assert (work.whole_flops, work.num_whole_weights, work.num_whole_layers) == (0, 0, 0)
        return
    words = empty(1, clip.config.max_position_embeddings, dtype=torch.int64)
    assert sum(count(lambda: clip(input_ids=words))) == work.whole_flops
    assert sum(num_weights(clip)) == work.num_whole_weights
    assert work.num_whole_layers == clip.config.num_hidden_layers


def test_a_shorter_prompt_of_schnell_is_what_its_row_says() -> None:
    dev, schnell = (WORKLOADS[name].text_encoder for name in ("flux-1-dev", "flux-1-schnell"))
    assert tier_for("flux-1-dev").text_length == 2 * tier_for("flux-1-schnell").text_length
    assert dev == replace(schnell, attention_flops=4 * schnell.attention_flops)


def count_decoding(vae: nn.Module, width: int, height: int) -> int:
    latents = empty(1, vae.config.latent_channels, height // 8, width // 8)
    return sum(count(lambda: vae.decode(latents)))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (192, 80), (1024, 1024)])
def test_decoding_computes_what_the_row_says(
    name: str, model: EmptyModel, width: int, height: int
) -> None:
    counted = count_decoding(model.vae, width, height)
    assert counted == WORKLOADS[name].vae.decode_flops(width, height)


@pytest.mark.parametrize(("width", "height"), [(1040, 1024), (2048, 1040), (4096, 512)])
@pytest.mark.parametrize("name", ["flux-1-dev", "flux-2-dev"])
def test_tiles_compute_what_the_row_says(
    monkeypatch: pytest.MonkeyPatch, name: str, width: int, height: int
) -> None:
    """Above a megapixel, as the engine does; the embedded model never gets there."""
    vae = published(name).vae
    monkeypatch.setattr(vae, "use_tiling", True)
    assert vae.tile_sample_min_size == TILE_SIDE
    assert tier_for("tiny").max_pixels < MAX_WHOLE_PIXELS
    work = WORKLOADS[name].vae
    assert count_decoding(vae, width, height) == work.decode_flops(width, height)
    encoding = count(lambda: vae.encode(empty(1, 3, height, width)))
    assert sum(encoding) == work.edit_flops(width, height)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (192, 80), (1024, 1024)])
def test_encoding_a_reference_computes_what_the_row_says(
    name: str, model: EmptyModel, width: int, height: int
) -> None:
    counted = count(lambda: model.vae.encode(empty(1, 3, height, width)))
    assert sum(counted) == WORKLOADS[name].vae.encode_flops(width * height)


@pytest.mark.parametrize(
    ("name", "tokens", "total", "attention"),
    [
        ("flux-2-dev", 1536, 87.77, 3.25),
        ("flux-2-dev", 4608, 282.60, 29.22),
        ("flux-2-dev", 8704, 582.78, 104.26),
        ("flux-2-dev", 16896, 1321.68, 392.89),
        ("flux-2-klein-9b", 1536, 22.73, 1.24),
        ("flux-2-klein-9b", 4608, 75.51, 11.13),
        ("flux-2-klein-9b", 16896, 385.60, 149.67),
        ("flux-2-klein-4b", 1536, 10.17, 0.72),
        ("flux-2-klein-4b", 4608, 34.82, 6.52),
        ("flux-2-klein-4b", 16896, 191.39, 87.70),
    ],
)
def test_rows_agree_with_what_was_counted_before(
    name: str, tokens: int, total: float, attention: float
) -> None:
    """TFLOP, to the digits that were written down."""
    work = WORKLOADS[name].transformer
    counted = (work.product_flops(tokens) + work.attention_flops(tokens)) / 1e12
    assert counted == pytest.approx(total, abs=0.005)
    assert work.attention_flops(tokens) / 1e12 == pytest.approx(attention, abs=0.005)


def test_the_vae_agrees_with_what_was_counted_before() -> None:
    vae = WORKLOADS["flux-2-dev"].vae
    assert vae.decode_flops(1024, 1024) / 1e12 == pytest.approx(10.47, abs=0.005)
    assert vae.encode_flops(1024 * 1024) / 1e12 == pytest.approx(4.89, abs=0.005)


def test_four_megapixels_are_nine_tiles() -> None:
    """Of 1024, 1024 and 512 pixels a side; here of a VAE with one FLOP a pixel."""
    assert VaeWork(1, 1, 0.0).decode_flops(2048, 2048) == 2560**2


@pytest.mark.parametrize(
    ("width", "height"), [(64, 64), (100, 79), (192, 192), (193, 192), (777, 333), (1024, 130)]
)
def test_a_reference_counts_as_large_as_the_engine_takes_it(
    klein_adapter: Flux2, width: int, height: int
) -> None:
    taken = klein_adapter.reference_pixels(reference(width, height, seed=1))
    limit = tier_for("tiny").max_reference_pixels
    assert reference_pixels(width, height, limit) == taken.shape[-1] * taken.shape[-2]


@pytest.mark.parametrize("mask", [None, Mask(100, 79, b"\xff" * 7900)])
def test_a_step_has_as_many_tokens_as_the_engine_gives_it(
    klein_adapter: Flux2, mask: Mask | None
) -> None:
    references = (reference(100, 79, seed=1), reference(300, 200, seed=2))
    asked = ImageRequest(
        "id", "tiny", "a ring", 128, 80, 4, 1.0, 7, references=references, mask=mask
    )
    given, _ = CachedEncoder(klein_adapter, 0, "cpu").encode(asked, ())
    state = klein_adapter.prepare(given, ImageSpec(128, 80, 4), 7)
    assert given.references
    parts = (given.prompt.tensors["embeds"], state.latents, given.references["latents"])
    assert work_of(asked).num_tokens == sum(part.shape[1] for part in parts)


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize(
    ("tensor", "sequence"), [(1, 1), (2, 1), (2, 4), (4, 2), (1, 8), (8, 2), (2, 8)]
)
def test_the_text_encoder_is_split_over_as_many_ranks_as_the_engine_says(
    tensor: int, sequence: int, quantization
) -> None:
    world, axes = Axis(0, tensor * sequence), (Axis(0, tensor), Axis(0, sequence))
    mesh = Mesh(world=world, tensor=axes[0], sequence=axes[1])
    layout = ReplicaSpec("h100-80gb", tensor, sequence, encoder_quantization=quantization)
    assert encoder_ranks(layout, 8) == encoder_axis(8, mesh, quantization).size
