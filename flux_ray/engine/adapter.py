"""The stages that every model family offers, and which adapter offers them for a tier."""

from collections.abc import Callable
from typing import Protocol

from flux_ray.catalog import Tier
from flux_ray.engine.flux2_klein import Flux2Klein
from flux_ray.engine.loading import Placement
from flux_ray.engine.state import Canvas, Conditioning, ImageState
from flux_ray.request import Raster


class Adapter(Protocol):
    """One loaded model. Stages share nothing but the values they take and return."""

    def encode(self, prompt: str, references: tuple[Raster, ...]) -> Conditioning:
        """The words and reference images of a request, once for all of its images."""

    def prepare(self, conditioning: Conditioning, canvas: Canvas, seed: int) -> ImageState:
        """An image of pure noise, drawn on the CPU from the seed, with its schedule."""

    def denoise(self, state: ImageState) -> ImageState:
        """One step further."""

    def decode(self, state: ImageState) -> Raster:
        """The pixels of a finished image."""


ADAPTERS: dict[str, Callable[[str, Placement, Tier], Adapter]] = {
    "flux2-klein": Flux2Klein.load,
}


def load_adapter(tier: Tier, weights: str | None, placement: Placement) -> Adapter:
    """The tier's model, from the operator's weights or the catalogue's."""
    source = weights or tier.weights
    if source is None:
        raise ValueError(f"tier {tier.name} needs weights")
    return ADAPTERS[tier.family](source, placement, tier)
