"""The activation model against what the modules' own code allocates, on the meta device."""

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import T5Config

from flux_ray.config.tier import Parallel
from flux_ray.engine.api import Forward
from flux_ray.engine.flux1.activations import denoise_bytes, prompt_bytes
from flux_ray.engine.flux1.empty_model import DEV, T5_XXL, VAE
from flux_ray.engine.loading import T5_PLAN, t5_of
from flux_ray.engine.rotary import TableEmbedder
from flux_ray.engine.vae import decode_bytes, encode_bytes
from flux_ray.parallel.checkpoint import shards_for
from flux_ray.parallel.load import build_empty, finish_linears, place
from flux_ray.parallel.mesh import Axis
from flux_ray.parallel.sequence import split_sequence
from tests.engine.allocations import peak_bytes

NUM_TEXT = 512
WITHIN_A_TENTH = 0.1
LAYOUTS = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (2, 4), (1, 8), (1, 3)]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def split_in_bf16(module: nn.Module, plan: dict, num_ranks: int) -> nn.Module:
    """One rank's part of a module."""
    axis, shards = Axis(0, num_ranks), shards_for(module, plan, num_ranks)
    for name, parameter in list(module.named_parameters()):
        whole = parameter.shape
        local = shards[name].local_shape(whole, axis) if name in shards else whole
        place(module, name, empty(*local))
    finish_linears(module, shards, axis)
    return module


def rank_of(parallel: Parallel) -> FluxTransformer2DModel:
    """One rank's part of dev's transformer, with fewer blocks: the peak is one's."""
    few = {"num_layers": 2, "num_single_layers": 2}
    model = build_empty(lambda: FluxTransformer2DModel(**(DEV | few)))
    split_in_bf16(model, model._tp_plan, parallel.tensor)
    split_sequence(model, Axis(0, parallel.sequence))
    model.pos_embed = TableEmbedder(model.pos_embed)
    return model


@pytest.mark.parametrize("num_image", [4096, 8192 + 4150])
@pytest.mark.parametrize(("tensor", "sequence"), LAYOUTS)
def test_a_step_takes_what_the_model_says(tensor: int, sequence: int, num_image: int) -> None:
    """Also where tokens have to be padded: 512 on three ranks, 12342 on four."""
    parallel = Parallel(tensor=tensor, sequence=sequence)
    model = rank_of(parallel)

    def forward() -> None:
        model(
            hidden_states=empty(1, num_image, 64),
            encoder_hidden_states=empty(1, NUM_TEXT, 4096),
            pooled_projections=empty(1, 768),
            timestep=empty(1),
            guidance=empty(1, dtype=torch.float32),
            img_ids=empty(num_image, 256, dtype=torch.float32),
            txt_ids=empty(NUM_TEXT, 256, dtype=torch.float32),
            return_dict=False,
        )

    said = denoise_bytes(model.config, Forward(NUM_TEXT, num_image, parallel, 2))
    assert said == pytest.approx(peak_bytes(forward), rel=WITHIN_A_TENTH)


def test_fp8_products_keep_more_than_bf16_ones() -> None:
    config = build_empty(lambda: FluxTransformer2DModel(**DEV)).config
    for tensor in (1, 2, 4, 8):
        plain = Forward(NUM_TEXT, 4096, Parallel(tensor=tensor), 2)
        fp8 = Forward(NUM_TEXT, 4096, Parallel(tensor=tensor), 2, quantizes_activations=True)
        assert denoise_bytes(config, fp8) > denoise_bytes(config, plain)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return split_in_bf16(build_empty(lambda: AutoencoderKL(**VAE)), {}, 1)


@pytest.mark.parametrize("side", [512, 1024, 1536])
def test_the_vae_takes_what_the_model_says(vae: AutoencoderKL, side: int) -> None:
    vae.use_tiling = side > 1024
    decoded = peak_bytes(lambda: vae.decode(empty(1, 16, side // 8, side // 8)))
    assert decode_bytes(vae.config, side * side, 2) == pytest.approx(decoded, rel=WITHIN_A_TENTH)
    encoded = peak_bytes(lambda: vae.encode(empty(1, 3, side, side)))
    if side <= 1024:
        said = encode_bytes(vae.config, side * side, 2)
        assert said == pytest.approx(encoded, rel=WITHIN_A_TENTH)
    else:
        # In tiles, besides its pixels: less than decoding it.
        assert encoded < decode_bytes(vae.config, side * side, 2)


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
@pytest.mark.parametrize("num_text", [256, 512])
def test_a_prompt_takes_what_the_model_says(num_text: int, num_ranks: int) -> None:
    """The peak is one layer's."""
    config = T5Config(**(T5_XXL | {"num_layers": 3}))
    model = build_empty(t5_of(config).build)
    split_in_bf16(model, T5_PLAN, num_ranks)
    measured = peak_bytes(lambda: model(empty(1, num_text, dtype=torch.int64)))
    said = prompt_bytes(config, num_text, num_ranks, 2)
    assert said == pytest.approx(measured, rel=WITHIN_A_TENTH)
