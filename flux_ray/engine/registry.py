"""The stages that every model family implements, and the choice of the adapter for a tier."""

from collections.abc import Callable
from typing import Protocol

from flux_ray.catalog import Tier
from flux_ray.engine.api import Conditioning, ImageSpec, ImageState, PromptEmbeds
from flux_ray.engine.flux2.pipeline import Flux2
from flux_ray.engine.loading import Placement, weights_of
from flux_ray.request import Mask, RgbImage


class Adapter(Protocol):
    """One loaded model, or one rank's part of it; a rank calls its stages from one thread.

    Stages share only the values that they take and return, so that the steps of several images can
    take turns. `encode_prompt` and `denoise` exchange tensors with the replica's other ranks, so
    all of them must call the same stages in the same order.
    """

    def encode_prompt(self, prompt: str) -> PromptEmbeds:
        """Encode a prompt; not available if the tier has a shared text encoder."""

    def encode(self, prompt: PromptEmbeds, references: tuple[RgbImage, ...]) -> Conditioning:
        """Encode the references, and join them with the prompt, once for all images of a request.

        Raise BadReference if a reference has a size that the model cannot take.
        """

    def edit(self, given: Conditioning, image: RgbImage, mask: Mask) -> Conditioning:
        """Return `given` extended by the image to inpaint and its mask.

        `image` is the first reference, scaled to the size that is generated, and so is `mask`.
        """

    def prepare(self, conditioning: Conditioning, canvas: ImageSpec, seed: int) -> ImageState:
        """Return an image of pure noise with its schedule.

        The noise comes from a CPU generator: the same seed gives the same image on every device.
        """

    def denoise(self, state: ImageState) -> ImageState:
        """Return the state after one more denoise step; all ranks of a replica step together."""

    def preview(self, state: ImageState) -> RgbImage:
        """Return an estimate of the finished pixels from an unfinished image; needs one rank."""

    def decode(self, state: ImageState) -> RgbImage:
        """Return the pixels of a finished image; needs only one rank."""


ADAPTERS: dict[str, Callable[[str, Placement, Tier], Adapter]] = {
    "flux2-klein": Flux2.load,
    "flux2-dev": Flux2.load,
}


def load_adapter(tier: Tier, weights: str | None, placement: Placement) -> Adapter:
    """Load the tier's model from the operator's `weights`, or from the catalogue's if None.

    Raise ValueError if the weights do not fit the tier or cannot be split as `placement` says.
    """
    return ADAPTERS[tier.family](weights_of(tier, weights), placement, tier)
