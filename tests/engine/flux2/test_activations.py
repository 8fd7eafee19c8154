"""The activation model against what the modules' own code allocates, on the meta device."""

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Tensor, nn
from torchao.quantization import Float8Tensor, PerRow
from torchao.quantization.quantize_.common import KernelPreference

from flux_ray.config.tier import Parallel
from flux_ray.engine.api import Forward
from flux_ray.engine.empty_model import decoder_prompt_bytes
from flux_ray.engine.flux2.activations import (
    denoise_bytes,
    kept_bytes,
    kept_denoise_bytes,
)
from flux_ray.engine.flux2.empty_model import (
    DEV_TRANSFORMER,
    KLEIN_4B_TRANSFORMER,
    mistral,
    qwen3_4b,
)
from flux_ray.engine.flux2.klein_kv import ReferenceKeys
from flux_ray.engine.vae import decode_bytes, encode_bytes
from flux_ray.parallel.checkpoint import shards_for
from flux_ray.parallel.load import build_empty, finish_linears, place
from flux_ray.parallel.mesh import Axis
from flux_ray.parallel.precision import quantize
from flux_ray.parallel.sequence import split_sequence
from flux_ray.planner.candidate import UNPACKED_BYTES
from tests.engine.allocations import peak_bytes

GIB = 2**30
NUM_TEXT = 512
SHAPES = {"dev": DEV_TRANSFORMER, "klein-4b": KLEIN_4B_TRANSFORMER}
WITHIN_A_TENTH = 0.1


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def in_bf16(module: nn.Module) -> nn.Module:
    for name, parameter in list(module.named_parameters()):
        place(module, name, empty(*parameter.shape))
    return module


def rank_of(
    shape: dict, parallel: Parallel, keys: ReferenceKeys | None = None
) -> Flux2Transformer2DModel:
    """One rank's part of a transformer of that shape, with fewer blocks: the peak is one's."""
    few = {"num_layers": 2, "num_single_layers": 2}
    model = build_empty(lambda: Flux2Transformer2DModel(**(shape | few)))
    tensor = Axis(0, parallel.tensor)
    shards = shards_for(model, model._tp_plan, parallel.tensor)
    for name, parameter in list(model.named_parameters()):
        whole = parameter.shape
        local = shards[name].local_shape(whole, tensor) if name in shards else whole
        place(model, name, empty(*local))
    finish_linears(model, shards, tensor)
    if keys is not None:
        keys.install(model)
    split_sequence(model, Axis(0, parallel.sequence))
    return model


def measured_forward(
    model: Flux2Transformer2DModel, num_image: int, num_text: int = NUM_TEXT
) -> int:
    def forward() -> None:
        model(
            hidden_states=empty(1, num_image, 128),
            encoder_hidden_states=empty(1, num_text, model.config.joint_attention_dim),
            timestep=empty(1),
            guidance=empty(1, dtype=torch.float32),
            img_ids=empty(1, num_image, 4, dtype=torch.int64),
            txt_ids=empty(1, num_text, 4, dtype=torch.int64),
            return_dict=False,
        )

    return peak_bytes(forward)


@pytest.mark.parametrize("num_image", [4096, 16384 + 24576])
@pytest.mark.parametrize(
    ("tensor", "sequence"), [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (2, 4), (1, 8)]
)
@pytest.mark.parametrize("name", SHAPES)
def test_a_step_takes_what_the_model_says(
    name: str, tensor: int, sequence: int, num_image: int
) -> None:
    parallel = Parallel(tensor=tensor, sequence=sequence)
    model = rank_of(SHAPES[name], parallel)
    said = denoise_bytes(model.config, Forward(NUM_TEXT, num_image, parallel, 2))
    assert said == pytest.approx(measured_forward(model, num_image), rel=WITHIN_A_TENTH)


@pytest.mark.parametrize(("num_image", "num_reference"), [(4096, 16384), (16384, 4096)])
@pytest.mark.parametrize(("tensor", "sequence"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_a_step_of_klein_kv_takes_what_the_model_says(
    tensor: int, sequence: int, num_image: int, num_reference: int
) -> None:
    """Or the forward that computes keys and values, at the end of which all of them are there."""
    parallel, keys = Parallel(tensor=tensor, sequence=sequence), ReferenceKeys()
    model = rank_of(KLEIN_4B_TRANSFORMER, parallel, keys)
    with keys.recorded() as kept:
        measured = measured_forward(model, num_reference, num_text=0)
    num_bytes = sum(tensor.nbytes for tensor in kept.values())
    with keys.inserted(kept, NUM_TEXT):
        measured = max(measured, measured_forward(model, num_image) + num_bytes)
    num_all = num_image + num_reference
    forward = Forward(NUM_TEXT, num_all, parallel, 2, num_reference=num_reference)
    assert kept_bytes(model.config, forward) == num_bytes
    assert kept_denoise_bytes(model.config, forward) == pytest.approx(measured, rel=WITHIN_A_TENTH)


@pytest.mark.parametrize(
    ("name", "num_image", "peaks"),
    [
        ("dev", 4096, (1.12, 0.65, 0.41)),
        ("dev", 16384, (4.10, 2.36, 1.49)),
        ("klein-4b", 4096, (0.57, 0.33, 0.21)),
        ("klein-4b", 16384, (2.07, 1.20, 0.76)),
    ],
)
def test_a_step_takes_what_was_measured_before(
    name: str, num_image: int, peaks: tuple[float, ...]
) -> None:
    """Where one rank has an eighth the earlier measure was of other code: see the test above."""
    config = build_empty(lambda: Flux2Transformer2DModel(**SHAPES[name])).config
    for tensor, peak in zip((1, 2, 4), peaks, strict=True):
        forward = Forward(NUM_TEXT, num_image, Parallel(tensor=tensor), 2)
        assert denoise_bytes(config, forward) / GIB == pytest.approx(peak, rel=WITHIN_A_TENTH)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLFlux2:
    return in_bf16(build_empty(AutoencoderKLFlux2))


@pytest.mark.parametrize("side", [512, 1024, 1536])
def test_decoding_takes_what_the_model_says(vae: AutoencoderKLFlux2, side: int) -> None:
    vae.use_tiling = side > 1024
    measured = peak_bytes(lambda: vae.decode(empty(1, 32, side // 8, side // 8)))
    assert decode_bytes(vae.config, side * side, 2) == pytest.approx(measured, rel=WITHIN_A_TENTH)


@pytest.mark.parametrize(("side", "gib"), [(512, 0.38), (1024, 1.50), (2048, 1.53)])
def test_decoding_takes_what_was_measured_before(
    vae: AutoencoderKLFlux2, side: int, gib: float
) -> None:
    assert decode_bytes(vae.config, side * side, 2) / GIB == pytest.approx(gib, rel=WITHIN_A_TENTH)


def test_encoding_a_reference_takes_what_the_model_says(vae: AutoencoderKLFlux2) -> None:
    measured = peak_bytes(lambda: vae.encode(empty(1, 3, 1024, 1024)))
    assert encode_bytes(vae.config, 1024 * 1024, 2) == pytest.approx(measured, rel=WITHIN_A_TENTH)


def test_encoding_a_large_image_under_a_mask_takes_no_more(vae: AutoencoderKLFlux2) -> None:
    """In tiles, besides its pixels: less than decoding it."""
    vae.use_tiling = True
    measured = peak_bytes(lambda: vae.encode(empty(1, 3, 2048, 2048)))
    vae.use_tiling = False
    assert measured < decode_bytes(vae.config, 2048 * 2048, 2)


@pytest.mark.parametrize(("text_model", "num_layers"), [(mistral, 30), (qwen3_4b, 27)])
def test_a_prompt_takes_what_the_model_says(text_model, num_layers: int) -> None:
    model = in_bf16(build_empty(text_model(num_layers).build))
    measured = peak_bytes(
        lambda: model(
            input_ids=empty(1, NUM_TEXT, dtype=torch.int64),
            # Four dimensions: a mask of tokens would be looked at, and these have no values.
            attention_mask=empty(1, 1, NUM_TEXT, NUM_TEXT),
            output_hidden_states=True,
            use_cache=False,
        )
    )
    assert decoder_prompt_bytes(model.config, NUM_TEXT, 1, 2) == pytest.approx(
        measured, rel=WITHIN_A_TENTH
    )


def test_making_fp8_of_activations_takes_six_and_a_half_of_them() -> None:
    """The model's factor: torchao goes by way of fp32."""
    activations = torch.randn(256, 512).to(torch.bfloat16)
    measured = peak_bytes(
        lambda: Float8Tensor.from_hp(
            activations,
            torch.float8_e4m3fn,
            PerRow(),
            hp_value_lb=1e-12,
            kernel_preference=KernelPreference.TORCH,
        )
    )
    assert measured / activations.nbytes == pytest.approx(6.5, rel=WITHIN_A_TENTH)


def test_an_fp8_weight_is_unpacked_by_way_of_fp32() -> None:
    weight = torch.randn(256, 512).to(torch.bfloat16)
    held = quantize(weight, "fp8", torch.bfloat16, Axis())
    with torch.profiler.profile(profile_memory=True) as profile, torch.inference_mode():
        nn.functional.linear(weight[:1], held)
    now, peak = 0, 0
    events = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak / weight.numel() == pytest.approx(UNPACKED_BYTES["fp8"], rel=WITHIN_A_TENTH)


def test_fp8_products_keep_more_than_bf16_ones() -> None:
    config = build_empty(lambda: Flux2Transformer2DModel(**DEV_TRANSFORMER)).config
    for tensor in (1, 2, 4, 8):
        plain = Forward(NUM_TEXT, 4096, Parallel(tensor=tensor), 2)
        fp8 = Forward(NUM_TEXT, 4096, Parallel(tensor=tensor), 2, quantizes_activations=True)
        assert denoise_bytes(config, fp8) > denoise_bytes(config, plain)
