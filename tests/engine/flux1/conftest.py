"""Small checkpoints of FLUX.1's kinds, each with its tier, its adapter and diffusers' pipeline."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from flux_ray.catalog.tiers import Tier
from flux_ray.engine.api import Placement
from flux_ray.engine.flux1 import FAMILIES
from flux_ray.engine.flux1.pipeline import Flux1
from tests.engine.small_flux1 import save_small_flux1

FAMILY = {"dev": "flux1", "schnell": "flux1", "kontext": "flux1-kontext"}
FAMILY |= {"fill": "flux1-fill", "control": "flux1-control"}


def tier_of(kind: str) -> Tier:
    """What the engine reads of a row of the catalogue."""
    return Tier(
        name=f"flux-1-{kind}",
        family=FAMILY[kind],
        license="apache-2.0",
        num_steps=4,
        guidance=3.5,
        is_guided=kind != "schnell",
        max_references=1,
        reference_tokens=4150 if kind == "kontext" else None,
        text_length=256 if kind == "schnell" else 512,
        default_side=1024,
        min_side=64,
        max_side=2048,
        max_pixels=2 * 1024 * 1024,
    )


@dataclass(frozen=True)
class SmallModel:
    """A checkpoint, and what two libraries make of it."""

    folder: Path
    tier: Tier
    adapter: Flux1
    pipeline: DiffusionPipeline


@pytest.fixture(scope="session")
def flux1_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`flux1_folder("dev")`: the folder of a small checkpoint of this kind."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            save_small_flux1(made[kind], kind)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def flux1(flux1_folder: Callable[[str], Path]) -> Callable[[str], SmallModel]:
    """`flux1("dev")`: the small model of this kind on one rank, in fp32."""
    made: dict[str, SmallModel] = {}

    def model(kind: str) -> SmallModel:
        if kind not in made:
            folder, tier = flux1_folder(kind), tier_of(kind)
            pipeline = DiffusionPipeline.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True
            )
            pipeline.set_progress_bar_config(disable=True)
            adapter = FAMILIES[tier.family].load(str(folder), Placement("float32", "cpu"), tier)
            assert isinstance(adapter, Flux1)
            made[kind] = SmallModel(folder, tier, adapter, pipeline)
        return made[kind]

    return model
