"""One thread for torch, as a rank on a laptop has: more of them only wait for each other here."""

from pathlib import Path

import pytest
import torch

from flux_ray.catalog.tiers import tier_for
from flux_ray.engine.api import Placement
from flux_ray.engine.flux2.pipeline import Flux2
from tests.engine.kleins import BASE, DISTILLED, KV, save_klein
from tests.engine.small_dev import save_small_dev

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small checkpoint in dev's layout."""
    folder = tmp_path_factory.mktemp("small_dev")
    save_small_dev(folder)
    return folder


@pytest.fixture(scope="session")
def kleins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the embedded checkpoint as each kind of klein, by their families."""
    return {
        tier.family: save_klein(tier, tmp_path_factory.mktemp(tier.family))
        for tier in (DISTILLED, BASE, KV)
    }


@pytest.fixture(scope="session")
def klein_adapter() -> Flux2:
    """The embedded checkpoint on one rank, in fp32."""
    return Flux2.load("embedded", Placement("float32", "cpu"), tier_for("tiny"))
