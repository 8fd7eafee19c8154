"""The stages that every model family offers, and which adapter offers them for a tier."""

from collections.abc import Callable
from typing import Protocol

from flux_ray.catalog.tiers import Tier
from flux_ray.engine.api import Conditioning, ImageSpec, ImageState, PromptEmbeds
from flux_ray.engine.flux2.pipeline import Flux2
from flux_ray.engine.loading import Placement, weights_of
from flux_ray.request import Mask, RgbImage


class Adapter(Protocol):
    """One loaded model. Stages share nothing but the values they take and return."""

    def encode_prompt(self, prompt: str) -> PromptEmbeds:
        """The words of a request; not offered where the text encoder is shared."""

    def encode(self, prompt: PromptEmbeds, references: tuple[RgbImage, ...]) -> Conditioning:
        """The words and reference images of a request, once for all of its images."""

    def edit(self, given: Conditioning, image: RgbImage, mask: Mask) -> Conditioning:
        """The same, to draw only a part of an image: its first reference, in the size drawn."""

    def prepare(self, conditioning: Conditioning, canvas: ImageSpec, seed: int) -> ImageState:
        """An image of pure noise, drawn on the CPU from the seed, with its schedule."""

    def denoise(self, state: ImageState) -> ImageState:
        """One step further. All ranks of a group take it together."""

    def preview(self, state: ImageState) -> RgbImage:
        """What the pixels of an unfinished image will be like; one rank is enough."""

    def decode(self, state: ImageState) -> RgbImage:
        """The pixels of a finished image; one rank is enough."""


ADAPTERS: dict[str, Callable[[str, Placement, Tier], Adapter]] = {
    "flux2-klein": Flux2.load,
    "flux2-dev": Flux2.load,
}


def load_adapter(tier: Tier, weights: str | None, placement: Placement) -> Adapter:
    """The tier's model, from the operator's weights or the catalogue's."""
    return ADAPTERS[tier.family](weights_of(tier, weights), placement, tier)
