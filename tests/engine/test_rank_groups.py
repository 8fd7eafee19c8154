"""A rank group draws what one rank draws, whatever the layout."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.tier import Lora, Parallel
from flux_ray.engine.api import ImageSpec, Placement
from flux_ray.engine.registry import load_adapter
from flux_ray.parallel.mesh import Mesh
from flux_ray.request import Mask, RgbImage
from tests.engine.generation import generate, reference, save_lora
from tests.engine.kleins import BASE, DISTILLED, KV, negative_of
from tests.ranks import Ranks

LAYOUTS = {
    "TP2": Parallel(tensor=2),
    "SP2": Parallel(sequence=2),
    "TP2 x SP2": Parallel(tensor=2, sequence=2),
}
# 35, 24 + 16 and 35 + 16 + 35 tokens of images and references: with and without a pad.
# The last has a mask of its left half.
JOBS: list[tuple[ImageSpec, tuple[RgbImage, ...], Mask | None]] = [
    (ImageSpec(112, 80, 2, guidance=4.0), (), None),
    (ImageSpec(96, 64, 2, guidance=4.0), (reference(64, 64, 1),), None),
    (ImageSpec(112, 80, 2, guidance=4.0), (reference(64, 64, 1), reference(112, 80, 2)), None),
    (ImageSpec(96, 64, 2), (reference(96, 64, 3),), Mask(96, 64, (b"\xff" * 48 + bytes(48)) * 64)),
]
PROMPT = "a red circle on a blue background"


@dataclass(frozen=True)
class Generated:
    """What a rank drew, and how much of the transformer's weights and tokens it had for that."""

    latents: list[Any]
    images: list[Any]
    num_bytes: int
    num_tokens: list[int]


TIERS = {
    "tiny": DISTILLED,
    "klein base": BASE,
    "klein KV": KV,
    "flux-2-dev": tier_for("flux-2-dev"),
}


def generate_all(mesh: Mesh, name: str, weights: str, **options: Any) -> Generated:
    torch.set_num_threads(1)
    tier = TIERS[name]
    adapter = load_adapter(tier, weights, Placement("float32", "cpu", mesh, **options))
    transformer = adapter.pipeline.transformer
    num_tokens: list[int] = []
    transformer.x_embedder.register_forward_pre_hook(
        lambda _, inputs: num_tokens.append(inputs[0].shape[1])
    )
    generated = [
        generate(
            adapter,
            PROMPT,
            replace(canvas, true_cfg_scale=tier.true_cfg_scale),
            references,
            mask,
            negative_of(tier),
        )
        for canvas, references, mask in JOBS
    ]
    return Generated(
        [latents.numpy() for latents, _ in generated],
        [np.frombuffer(image.rgb, np.uint8).astype(int) for _, image in generated],
        sum(parameter.nbytes for parameter in transformer.parameters()),
        num_tokens,
    )


@pytest.fixture(scope="module")
def weights(small_dev: Path, kleins: dict[str, Path]) -> dict[str, str]:
    folders = {name: kleins[tier.family] for name, tier in TIERS.items() if name != "flux-2-dev"}
    return {name: str(folder) for name, folder in (folders | {"flux-2-dev": small_dev}).items()}


@pytest.fixture(scope="module")
def alone(weights: dict[str, str]) -> Callable[[str], Generated]:
    """What one rank draws."""
    return cache(lambda name: generate_all(Mesh(), name, weights[name]))


# Ranks of tiny take long to load; of its layouts the one with both axes has all that may differ.
FAST = {("TP2 x SP2", "tiny")}


@pytest.mark.parametrize(
    ("parallel", "tier"),
    [
        pytest.param(
            layout,
            tier,
            id=f"{name}-{tier}",
            marks=() if tier == "flux-2-dev" or (name, tier) in FAST else pytest.mark.slow,
        )
        for name, layout in LAYOUTS.items()
        for tier in TIERS
    ],
)
def test_every_rank_has_the_latents_and_the_image_of_one_rank(
    run_ranks: Ranks,
    weights: dict[str, str],
    alone: Callable[[str], Generated],
    parallel: Parallel,
    tier: str,
) -> None:
    one = alone(tier)
    for rank in run_ranks(parallel, generate_all, tier, weights[tier]):
        for latents, expected in zip(rank.latents, one.latents, strict=True):
            assert abs(latents - expected).max() <= 1e-5 * abs(expected).max()
        for image, expected in zip(rank.images, one.images, strict=True):
            assert abs(image - expected).max() <= 1
        assert rank.num_bytes < one.num_bytes * (0.7 if parallel.tensor == 2 else 1.01)
        assert rank.num_tokens == [-(-num // parallel.sequence) for num in one.num_tokens]


@pytest.mark.parametrize("setting", ["fp8", "lora"])
@pytest.mark.parametrize(
    "tier",
    [
        "flux-2-dev",
        pytest.param("klein base", marks=pytest.mark.slow),
        pytest.param("klein KV", marks=pytest.mark.slow),
    ],
)
def test_a_group_with_fewer_bits_or_a_lora_generates_what_one_rank_does(
    run_ranks: Ranks,
    weights: dict[str, str],
    alone: Callable[[str], Generated],
    tmp_path: Path,
    tier: str,
    setting: str,
) -> None:
    save_lora(tmp_path / "style.safetensors", 64 if tier == "flux-2-dev" else 128)
    lora = Lora(path=str(tmp_path / "style.safetensors"), scale=0.1)
    settings: dict[str, dict[str, Any]] = {
        "fp8": {"quantization": "fp8", "encoder_quantization": "fp8"},
        "lora": {"loras": (lora,)},
    }

    def generate_so(mesh: Mesh, folder: str) -> Generated:
        return generate_all(mesh, tier, folder, **settings[setting])

    one = generate_so(Mesh(), weights[tier])
    for rank in run_ranks(Parallel(tensor=2), generate_so, weights[tier]):
        for latents, expected in zip(rank.latents, one.latents, strict=True):
            assert abs(latents - expected).max() <= 1e-5 * abs(expected).max()
    plain = alone(tier).latents[0]
    assert abs(one.latents[0] - plain).max() > 0.01 * abs(plain).max()
