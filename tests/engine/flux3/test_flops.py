"""What FLUX.3's stages compute, counted again on the meta device, against the rows of prices."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flux_ray.catalog.flops import WORKLOADS
from flux_ray.catalog.tiers import tier_for
from flux_ray.engine.api import EmptyModel
from flux_ray.engine.registry import empty_model
from flux_ray.parallel.load import saved_tensors
from flux_ray.parallel.precision import is_quantized
from tests.engine.test_flops import count

NUM_TEXT = tier_for("flux-3-klein").text_length


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.fixture(scope="module", params=["flux-3-klein", "flux-3-klein-base"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> EmptyModel:
    return empty_model(tier_for(name), "owner/name@revision")


def counted(model: EmptyModel, num_text: int, num_image: int, num_references: int = 0) -> Any:
    inputs: dict[str, Any] = {}
    if model.transformer.config.flow_map:
        inputs["target_timestep"] = empty(1)
    if num_references:
        inputs["image_cond_hidden_states"] = empty(1, num_references, 128)
        inputs["image_cond_ids"] = empty(num_references, 4)
    return count(
        lambda: model.transformer(
            hidden_states=empty(1, num_image, 128),
            encoder_hidden_states=empty(1, num_text, 20480),
            timestep=empty(1),
            img_ids=empty(num_image, 4),
            txt_ids=empty(num_text, 4),
            return_dict=False,
            **inputs,
        )
    )


@pytest.mark.parametrize("num_image", [16, 4096, 16384])
def test_the_products_of_a_step_are_those_of_the_row(
    name: str, model: EmptyModel, num_image: int
) -> None:
    work = WORKLOADS[name].transformer
    products, attention = counted(model, NUM_TEXT, num_image)
    assert products == work.product_flops(NUM_TEXT + num_image)
    # The row has all tokens attend to all in every block. In the first 5 of 33 each kind does so
    # by itself.
    said = work.attention_flops(NUM_TEXT + num_image)
    assert 0.92 * said <= attention <= said


@pytest.mark.parametrize(("num_text", "num_references"), [(80, 0), (80, 4096), (3600, 40960)])
def test_a_short_prompt_and_references_are_within_two_percent(
    name: str, model: EmptyModel, num_text: int, num_references: int
) -> None:
    """A text token is wider than one of an image, and one of a reference is not read out."""
    products, _ = counted(model, num_text, 4096, num_references)
    said = WORKLOADS[name].transformer.product_flops(num_text + 4096 + num_references)
    assert said == pytest.approx(products, rel=0.02)


def num_weights(module: Any) -> tuple[int, int]:
    sizes = {name: tensor.numel() for name, tensor in saved_tensors(module)}
    blocks = sum(size for name, size in sizes.items() if is_quantized(name))
    return blocks, sum(sizes.values()) - blocks


def test_the_models_are_as_large_as_the_rows_say(name: str, model: EmptyModel) -> None:
    work, config = WORKLOADS[name].transformer, model.transformer.config
    assert num_weights(model.transformer) == (work.num_block_weights, work.num_other_weights)
    assert work.width == config.num_attention_heads * config.attention_head_dim
    assert (work.num_double_blocks, work.num_single_blocks) == (5, 28)
    text, encoder = WORKLOADS[name].text_encoder, model.text_encoder.config
    assert (text.width, text.num_layers) == (encoder.hidden_size, encoder.num_hidden_layers)
    assert text.num_block_weights == num_weights(model.text_encoder)[0]
    assert text.num_heads == model.text_model.num_heads


@pytest.mark.parametrize("length", [80, NUM_TEXT])
def test_a_prompt_computes_what_the_row_says(name: str, model: EmptyModel, length: int) -> None:
    work = WORKLOADS[name].text_encoder
    products, attention = count(
        lambda: model.text_encoder(
            input_ids=empty(1, length, dtype=torch.int64),
            attention_mask=empty(1, 1, length, length),
            position_ids=empty(1, length, dtype=torch.int64),
            output_hidden_states=True,
            use_cache=False,
        )
    )
    assert products == work.product_flops(length)
    assert attention == work.attention_flops * length**2 // NUM_TEXT**2


@pytest.mark.parametrize(("width", "height"), [(192, 80), (1024, 1024)])
def test_the_vae_computes_what_the_row_says(
    name: str, model: EmptyModel, width: int, height: int
) -> None:
    work = WORKLOADS[name].vae
    latents = empty(1, 32, height // 8, width // 8)
    assert sum(count(lambda: model.vae.decode(latents))) == work.decode_flops(width, height)
    encoded = count(lambda: model.vae.encode(empty(1, 3, height, width)))
    assert sum(encoded) == work.encode_flops(width * height)
