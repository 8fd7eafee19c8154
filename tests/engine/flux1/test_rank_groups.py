"""A rank group generates what one rank does: of each kind, in each layout, with fewer bits too."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file

from flux_ray.config.tier import Lora, Parallel
from flux_ray.engine.api import ImageSpec, Placement
from flux_ray.engine.encoding_cache import CachedEncoder
from flux_ray.engine.flux1 import FAMILIES
from flux_ray.engine.flux1.pipeline import Flux1
from flux_ray.parallel import load as loading
from flux_ray.parallel.load import build_empty
from flux_ray.parallel.mesh import Axis, Mesh
from flux_ray.parallel.precision import held_parts
from flux_ray.planner.candidate import weight_bytes
from flux_ray.request import ImageRequest, Mask
from tests.engine.flux1.conftest import tier_of
from tests.engine.generation import finish, reference
from tests.ranks import Ranks

PROMPT = "a red circle on the blue background"
# Enough for the prompt; with an odd number of tokens two ranks need a pad.
TEXT_LENGTH = 47
LAYOUTS = {
    "TP2": Parallel(tensor=2),
    "TP4": Parallel(tensor=4),
    "SP2": Parallel(sequence=2),
    "TP2 x SP2": Parallel(tensor=2, sequence=2),
}


def request(**options: Any) -> ImageRequest:
    """35 tokens of an image: another pad."""
    return ImageRequest("id", "flux-1", PROMPT, 112, 80, 2, 3.5, 7, **options)


LEFT = Mask(112, 80, (b"\xff" * 56 + bytes(56)) * 80)
IMAGE = (reference(112, 80, 3),)
JOBS = {
    "dev": (
        request(),
        request(negative_prompt="green star", true_cfg_scale=2.5),
        request(references=IMAGE, mask=LEFT),
    ),
    "schnell": (request(),),
    "kontext": (request(references=(reference(96, 64, 1),)),),
    "fill": (request(references=IMAGE, mask=LEFT),),
    "control": (request(references=IMAGE, follows_reference=True),),
}


@dataclass(frozen=True)
class Generated:
    """What a rank generated, and how much of the transformer's weights it had for that."""

    latents: list[Any]
    images: list[Any]
    num_bytes: int


def generate(adapter: Flux1, asked: ImageRequest) -> tuple[Any, Any]:
    """As a rank does."""
    given, _ = CachedEncoder(adapter, 2**20, "cpu").encode(asked, ())
    canvas = ImageSpec(
        asked.width,
        asked.height,
        asked.num_steps,
        asked.guidance,
        true_cfg_scale=asked.true_cfg_scale,
    )
    state = finish(adapter, adapter.prepare(given, canvas, asked.seed))
    image = np.frombuffer(adapter.decode(state).rgb, np.uint8).astype(int)
    return state.latents.numpy(), image


def generate_all(mesh: Mesh, folders: dict[str, str], **options: Any) -> dict[str, Generated]:
    from diffusers.pipelines.flux import pipeline_flux_kontext

    torch.set_num_threads(1)
    # Of a megapixel the CPU would take half a minute.
    pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS = [(96, 64), (64, 96)]
    generated = {}
    for kind, folder in folders.items():
        tier = replace(tier_of(kind), text_length=TEXT_LENGTH)
        placement = Placement("float32", "cpu", mesh, **options)
        adapter = FAMILIES[tier.family].load(folder, placement, tier)
        assert isinstance(adapter, Flux1)
        parameters = adapter.pipeline.transformer.parameters()
        # Before the first step, in which bitsandbytes may pack NF4 anew for the CPU.
        num_bytes = sum(part.nbytes for each in parameters for part in held_parts(each))
        results = [generate(adapter, asked) for asked in JOBS[kind]]
        generated[kind] = Generated(
            [latents for latents, _ in results], [image for _, image in results], num_bytes
        )
    return generated


@pytest.fixture(scope="module")
def folders(flux1_folder: Callable[[str], Path]) -> dict[str, str]:
    return {kind: str(flux1_folder(kind)) for kind in JOBS}


@pytest.fixture(scope="module")
def alone(folders: dict[str, str]) -> dict[str, Generated]:
    from diffusers.pipelines.flux import pipeline_flux_kontext

    sizes = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    try:
        return generate_all(Mesh(), folders)
    finally:
        pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS = sizes


def assert_alike(made: Generated, one: Generated) -> None:
    for latents, expected in zip(made.latents, one.latents, strict=True):
        assert abs(latents - expected).max() <= 1e-5 * abs(expected).max()
    for image, expected in zip(made.images, one.images, strict=True):
        assert abs(image - expected).max() <= 1


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        # Dev on both axes tells the most in the shortest time.
        pytest.param("TP2 x SP2", ("dev",), id="TP2 x SP2-dev"),
        *(pytest.param(name, tuple(JOBS), id=name, marks=pytest.mark.slow) for name in LAYOUTS),
    ],
)
def test_every_rank_has_the_latents_and_the_image_of_one_rank(
    run_ranks: Ranks,
    folders: dict[str, str],
    alone: dict[str, Generated],
    name: str,
    kinds: tuple[str, ...],
) -> None:
    parallel = LAYOUTS[name]
    asked = {kind: folders[kind] for kind in kinds}
    for rank in run_ranks(parallel, generate_all, asked):
        for kind, made in rank.items():
            assert_alike(made, alone[kind])
            # The modulations are whole on every rank: more than a quarter of the model.
            assert made.num_bytes < alone[kind].num_bytes * (0.8 if parallel.tensor > 1 else 1.01)


def save_lora(file: Path) -> None:
    """Of rank 2: a layer split along rows, one along columns, one along packed ones, one whole."""
    dice = torch.Generator().manual_seed(3)
    sizes = {
        "transformer_blocks.0.attn.to_q": (64, 64),
        "transformer_blocks.1.attn.to_out.0": (64, 64),
        "transformer_blocks.1.norm1.linear": (384, 64),
        "single_transformer_blocks.1.proj_out": (64, 320),
    }
    tensors = {}
    for name, (num_out, num_in) in sizes.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(2, num_in, generator=dice)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(num_out, 2, generator=dice)
    save_file(tensors, file)


def test_a_group_with_a_lora_generates_what_the_pipeline_does_fused(
    run_ranks: Ranks, folders: dict[str, str], alone: dict[str, Generated], tmp_path: Path
) -> None:
    save_lora(tmp_path / "style.safetensors")
    loras = (Lora(path=str(tmp_path / "style.safetensors"), scale=0.1),)
    only_dev = {"dev": folders["dev"]}

    def generate_so(mesh: Mesh) -> dict[str, Generated]:
        return generate_all(mesh, only_dev, loras=loras)

    pipeline = FluxPipeline.from_pretrained(folders["dev"], dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path, weight_name="style.safetensors")
    pipeline.fuse_lora(lora_scale=0.1)
    (asked, *_) = JOBS["dev"]
    expected = pipeline(
        asked.prompt,
        width=asked.width,
        height=asked.height,
        num_inference_steps=asked.num_steps,
        guidance_scale=asked.guidance,
        generator=torch.Generator().manual_seed(asked.seed),
        max_sequence_length=TEXT_LENGTH,
        output_type="latent",
    ).images.numpy()
    assert abs(expected - alone["dev"].latents[0]).max() > 0.1
    for rank in run_ranks(Parallel(tensor=2), generate_so):
        error = abs(rank["dev"].latents[0] - expected).max()
        assert error <= 1e-5 * abs(expected).max()


@pytest.mark.parametrize("part", ["quantization", "encoder_quantization"])
def test_nf4_over_tensor_ranks_is_refused_before_anything_is_read(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(loading, "read_local", lambda *_: pytest.fail("read"))
    placement = Placement("float32", "cpu", Mesh(Axis(0, 2), Axis(0, 2)), **{part: "nf4"})
    with pytest.raises(ValueError, match=r"quantization nf4 .* parallel\.tensor is 2"):
        Flux1.load(folders["dev"], placement, tier_of("dev"))


# The largest difference of the latents from those in fp32, of their largest value: measured 0.10,
# 0.024 and 0.30, of random weights, for which quantization is at its worst.
@pytest.mark.parametrize(
    ("quantization", "layout", "error"),
    [("fp8", "TP2", 0.2), ("int8", "TP2", 0.05), ("nf4", "SP2", 0.45)],
)
def test_a_group_with_fewer_bits_generates_what_one_rank_does(
    run_ranks: Ranks,
    folders: dict[str, str],
    alone: dict[str, Generated],
    quantization: Any,
    layout: str,
    error: float,
) -> None:
    """And holds the bytes that a plan counts. NF4 weights are whole on every rank."""
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    parallel, only_dev = LAYOUTS[layout], {"dev": folders["dev"]}

    def generate_so(mesh: Mesh) -> dict[str, Generated]:
        return generate_all(
            mesh, only_dev, quantization=quantization, encoder_quantization=quantization
        )

    one = generate_so(Mesh())["dev"]
    config = FluxTransformer2DModel.load_config(Path(folders["dev"]) / "transformer")
    model = build_empty(lambda: FluxTransformer2DModel.from_config(config))
    axis = Axis(0, parallel.tensor)
    planned = weight_bytes(model, model._tp_plan, axis, torch.float32, quantization)
    for rank in run_ranks(parallel, generate_so):
        assert_alike(rank["dev"], one)
        assert rank["dev"].num_bytes == planned
    # Without true CFG, which multiplies the error of both prompts.
    plain = alone["dev"].latents[0]
    assert 0.01 < abs(one.latents[0] - plain).max() / abs(plain).max() < error
