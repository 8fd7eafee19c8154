"""The activation model against what FLUX.3's own code allocates, on the meta device."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.tier import Parallel
from flux_ray.engine.api import Forward
from flux_ray.engine.flux3.activations import denoise_bytes
from flux_ray.engine.flux3.empty_model import PUBLISHED, EmptyFlux3, empty_model
from flux_ray.engine.flux3.transformer import PLAN, Flux3Transformer, set_local_heads
from flux_ray.parallel.checkpoint import shards_for
from flux_ray.parallel.load import build_empty, dtype_of, finish_linears, place
from flux_ray.parallel.mesh import Axis
from tests.engine.allocations import peak_bytes

TIER = tier_for("flux-3-klein")
NUM_TEXT = TIER.text_length
WITHIN_A_TENTH = 0.1


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def rank_of(num_ranks: int) -> Flux3Transformer:
    """One rank's part of klein's transformer, with fewer blocks: the peak is one's."""
    shape = PUBLISHED["flux-3-klein"] | {"num_layers": 2, "num_single_layers": 2}
    model = build_empty(lambda: Flux3Transformer(**shape))
    axis, shards = Axis(0, num_ranks), shards_for(model, PLAN, num_ranks)
    for name, parameter in list(model.named_parameters()):
        whole = parameter.shape
        local = shards[name].local_shape(whole, axis) if name in shards else whole
        place(model, name, empty(*local, dtype=dtype_of(model, name, torch.bfloat16)))
    finish_linears(model, shards, axis)
    set_local_heads(model, num_ranks)
    return model


def measured_forward(model: Flux3Transformer, num_image: int, num_references: int) -> int:
    inputs: dict[str, Any] = {}
    if num_references:
        inputs["image_cond_hidden_states"] = empty(1, num_references, 128)
        inputs["image_cond_ids"] = empty(num_references, 4, dtype=torch.float32)

    def forward() -> None:
        model(
            hidden_states=empty(1, num_image, 128),
            encoder_hidden_states=empty(1, NUM_TEXT, 20480),
            timestep=empty(1),
            target_timestep=empty(1),
            img_ids=empty(num_image, 4, dtype=torch.float32),
            txt_ids=empty(NUM_TEXT, 4, dtype=torch.float32),
            return_dict=False,
            **inputs,
        )

    return peak_bytes(forward)


@pytest.mark.parametrize(("num_image", "num_references"), [(4096, 0), (4096, 4096), (16384, 40960)])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_a_step_takes_what_the_model_says(
    num_ranks: int, num_image: int, num_references: int
) -> None:
    model = rank_of(num_ranks)
    forward = Forward(NUM_TEXT, num_image + num_references, Parallel(tensor=num_ranks), 2)
    measured = measured_forward(model, num_image, num_references)
    assert denoise_bytes(model.config, forward) == pytest.approx(measured, rel=WITHIN_A_TENTH)


@pytest.fixture(scope="module")
def model() -> EmptyFlux3:
    model = empty_model(TIER, "owner/name@revision")
    for module in (model.text_encoder, model.vae):
        for name, parameter in list(module.named_parameters()):
            place(module, name, empty(*parameter.shape))
    return model


def test_a_prompt_takes_what_the_model_says(model: EmptyFlux3) -> None:
    measured = peak_bytes(
        lambda: model.text_encoder(
            input_ids=empty(1, NUM_TEXT, dtype=torch.int64),
            # Four dimensions: a mask of tokens would be looked at, and these have no values.
            attention_mask=empty(1, 1, NUM_TEXT, NUM_TEXT),
            position_ids=empty(1, NUM_TEXT, dtype=torch.int64),
            output_hidden_states=True,
            use_cache=False,
        )
    )
    assert model.prompt_bytes(NUM_TEXT, 1, 2) == pytest.approx(measured, rel=WITHIN_A_TENTH)


def test_a_large_lone_reference_takes_no_more_than_a_tile(model: EmptyFlux3) -> None:
    vae, pixels = model.vae, 1024 * 1024
    measured = peak_bytes(lambda: vae.encode(empty(1, 3, 1024, 1024)))
    assert model.encode_bytes(pixels, 2) == pytest.approx(measured, rel=WITHIN_A_TENTH)
    vae.use_tiling = True
    tiled = peak_bytes(lambda: vae.encode(empty(1, 3, 2048, 2048)))
    assert tiled < model.decode_bytes(4 * pixels, 2)
