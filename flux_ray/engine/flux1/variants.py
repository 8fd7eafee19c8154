"""Kontext, Fill and Control: what they give FLUX.1's transformer beside the noisy latents."""

from dataclasses import replace

import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.utils.torch_utils import randn_tensor
from torch.nn import functional

from flux_ray.catalog import TOKEN_SIDE
from flux_ray.engine.api import Conditioning, ImageSpec, InpaintInput, PromptEmbeds
from flux_ray.engine.flux1.pipeline import Flux1, SeededInputs
from flux_ray.engine.images import image_for
from flux_ray.engine.vae import tiles_above
from flux_ray.errors import BadReference
from flux_ray.request import Mask, RgbImage
from flux_ray.resizing import mask_image


class Flux1Kontext(Flux1):
    """Kontext: the tokens of a reference image follow those of the image that is generated."""

    @torch.inference_mode()
    def encode(self, prompt: PromptEmbeds, references: tuple[RgbImage, ...]) -> Conditioning:
        """Return the prompt joined with the reference, scaled to one of Kontext's sizes.

        A tier whose row does not say how many tokens that is keeps the reference's own size.
        `latents`: [1, tokens, channels]; `ids`: fp32 [tokens, 3], the positions.
        """
        if not references:
            return Conditioning(prompt)
        if len(references) > 1:
            raise BadReference("FLUX.1 Kontext takes one reference image", "image")
        width, height = whole_tokens(references[0])
        if self.tier.reference_tokens is not None:
            width, height = preferred_size(width, height)
        processor = self.pipeline.image_processor
        image = processor.resize(image_for(references[0]), height, width)
        latents = self.latents(self.moments(processor.preprocess(image, height, width)), None)
        ids = self.position_ids(width, height)
        # Time 1 tells the reference from the image, which is at time 0.
        ids[:, 0] = 1
        return Conditioning(prompt, {"latents": latents, "ids": ids})

    def seeded_inputs(
        self, given: Conditioning, canvas: ImageSpec, generator: torch.Generator
    ) -> SeededInputs:
        """Take the noise from the generator; an image to inpaint is not sampled."""
        kept = None
        if given.edit is not None:
            kept = self.latents(given.edit.tensors["moments"], None)
        return SeededInputs(self.noise(given, canvas, generator), kept=kept)


class Flux1Fill(Flux1):
    """Fill: each token has channels for the image around the mask, and for the mask's pixels."""

    @torch.inference_mode()
    def edit(self, given: Conditioning, image: RgbImage, mask: Mask) -> Conditioning:
        """Return `given` extended by the image with a grey hole where the mask is.

        `moments`: that image, encoded; `mask`: [1, tokens, channels], the pixels of each token.
        """
        pixels = self.pipeline.image_processor.preprocess(image_for(image))
        marks = self.pipeline.mask_processor.preprocess(mask_image(mask))
        with tiles_above(self.vae, image.width, image.height):
            moments = self.moments(pixels * (1 - marks))
        side = self.pipeline.vae_scale_factor
        # The pixels under a latent become its channels.
        cells = functional.pixel_unshuffle(marks, side)
        tensors = {"moments": moments, "mask": self.pack(cells).to(moments.device, moments.dtype)}
        return replace(given, edit=InpaintInput(image, mask, tensors))

    def seeded_inputs(
        self, given: Conditioning, canvas: ImageSpec, generator: torch.Generator
    ) -> SeededInputs:
        """Take from the generator what the pipeline takes, in its order."""
        if given.edit is None:
            raise BadReference("FLUX.1 Fill needs an image and a mask", "mask")
        # The pipeline first samples the image itself, and then replaces all of it by noise. Only
        # the numbers that this takes from the generator count.
        randn_tensor(self.latent_shape(canvas), generator, dtype=self.vae.dtype)
        noise = self.noise(given, canvas, generator)
        masked = self.latents(given.edit.tensors["moments"], generator)
        channels = torch.cat([masked, given.edit.tensors["mask"]], dim=-1)
        return SeededInputs(noise, channels=channels)


class Flux1Control(Flux1):
    """Depth and Canny: each token has channels for the control image."""

    @torch.inference_mode()
    def encode(self, prompt: PromptEmbeds, references: tuple[RgbImage, ...]) -> Conditioning:
        """Return the prompt joined with the control image, as large as what is generated.

        `moments`: the encoded image. Above 1 MP the VAE works in tiles.
        """
        if len(references) != 1:
            raise BadReference(f"{self.tier.name} needs one control image", "control_image")
        (image,) = references
        pixels = self.pipeline.image_processor.preprocess(image_for(image))
        with tiles_above(self.vae, image.width, image.height):
            # Contiguous as in the pipeline: the VAE's last bits depend on it.
            return Conditioning(prompt, {"moments": self.moments(pixels.contiguous())})

    def seeded_inputs(
        self, given: Conditioning, canvas: ImageSpec, generator: torch.Generator
    ) -> SeededInputs:
        """Take from the generator what the pipeline takes, in its order."""
        if not given.references:
            raise BadReference(f"{self.tier.name} needs a control image", "control_image")
        channels = self.latents(given.references["moments"], generator)
        return SeededInputs(self.noise(given, canvas, generator), channels=channels)


def whole_tokens(reference: RgbImage) -> tuple[int, int]:
    """Return the width and height of the tokens that fit into a reference, in pixels.

    Raise BadReference if the image is too small for one.
    """
    width, height = (
        side // TOKEN_SIDE * TOKEN_SIDE for side in (reference.width, reference.height)
    )
    if not width or not height:
        raise BadReference(
            f"a reference image needs at least {TOKEN_SIDE} x {TOKEN_SIDE} pixels", "image"
        )
    return width, height


def preferred_size(width: int, height: int) -> tuple[int, int]:
    """Return the width and height, of those that Kontext was trained on, nearest in aspect."""
    sizes = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    _, width, height = min((abs(width / height - w / h), w, h) for w, h in sizes)
    return width, height
