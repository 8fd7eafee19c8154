"""The FLUX.2 adapter: the engine's stages over the parts of diffusers' pipelines.

Images are equal to those of the pipelines, bit for bit (tests/engine/flux2). What is different:

- The caller makes each denoise step, so that the steps of several images can take turns.
- Rotary tables are computed once per image.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn

from flux_ray.catalog import TOKEN_SIDE, Tier
from flux_ray.engine.api import (
    Conditioning,
    ImageSpec,
    ImageState,
    InpaintInput,
    Placement,
    PromptEmbeds,
    PromptEncoder,
)
from flux_ray.engine.flow import guided, step_along, straight_end, transformer_timestep
from flux_ray.engine.flux2.checkpoint import open_checkpoint
from flux_ray.engine.flux2.text_encoder import KINDS, load_encoder
from flux_ray.engine.images import image_for, raster_for
from flux_ray.engine.inpainting import keep_rest, noised_image, paste_rest, token_weights
from flux_ray.engine.loading import check_transformer, load_parts
from flux_ray.engine.rotary import TableEmbedder
from flux_ray.engine.vae import raster_of, tiles_above
from flux_ray.errors import BadReference
from flux_ray.request import Mask, RgbImage, first_step


class Flux2:
    """The stages of one loaded checkpoint, or of one rank's part of it.

    A rank calls them from one thread. Of the diffusers pipeline it uses the parts and the methods
    without state; `__call__` is not used, because it generates an image from start to end and keeps
    the schedule in its scheduler. `prompts` is None if the tier has a shared text encoder.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, prompts: PromptEncoder | None, tier: Tier
    ) -> None:
        self.pipeline = pipeline
        self.prompts = prompts
        self.tier = tier
        self.device = pipeline.vae.device
        # The transformer passes on what it gets as ids, so that `velocity` can pass it tables.
        self.rotary = TableEmbedder(pipeline.transformer.pos_embed)
        pipeline.transformer.pos_embed = self.rotary

    @classmethod
    def load(cls, weights: str, placement: Placement, tier: Tier) -> Self:
        """Load the adapter of a checkpoint.

        Raise ValueError before any weight is read if the checkpoint is of another kind or cannot
        be split and quantized as `placement` says: reading would take minutes.
        """
        return cls.load_changed(weights, placement, tier, None)

    @classmethod
    def load_changed(
        cls,
        weights: str,
        placement: Placement,
        tier: Tier,
        change: Callable[[nn.Module], None] | None,
    ) -> Self:
        """Load the adapter of a checkpoint, with `change` done to the transformer."""
        kind = KINDS[tier.family]
        source, folder = open_checkpoint(kind, weights)
        check_transformer(folder, placement)
        prompts = None
        if placement.text_encoder == "colocated":
            prompts = load_encoder(kind, source, tier, placement)
        parts = load_parts(Flux2Transformer2DModel, source, placement, kind.pipeline, change)
        return cls(parts, prompts, tier)

    def encode_prompt(self, prompt: str) -> PromptEmbeds:
        """Encode a prompt with the replica's own text encoder; all its ranks call it together."""
        assert self.prompts is not None, "the text encoder is shared: it has the prompt's embeds"
        return self.prompts.encode_prompt(prompt)

    @torch.inference_mode()
    def encode(self, prompt: PromptEmbeds, references: tuple[RgbImage, ...]) -> Conditioning:
        """Return the prompt joined with the references' latents, [1, tokens, channels]."""
        if not references:
            return Conditioning(prompt)
        latents, ids = self.pipeline.prepare_image_latents(
            images=[self.reference_pixels(raster) for raster in references],
            batch_size=1,
            generator=None,
            device=self.device,
            dtype=self.pipeline.vae.dtype,
        )
        return Conditioning(prompt, {"latents": latents, "ids": ids})

    def reference_pixels(self, raster: RgbImage) -> Tensor:
        """Return a reference as the VAE takes it, fp32 [1, 3, height, width] from -1 to 1.

        It is scaled down to the tier's `max_reference_pixels` (the pipeline's own limit, 1 MP) and
        cropped to sides that the VAE can take. Raise BadReference if it is too small or too narrow.
        """
        processor = self.pipeline.image_processor
        image = image_for(raster)
        try:
            processor.check_image_input(image)
        except ValueError as error:
            raise BadReference(str(error), "image") from None
        image = processor._resize_if_exceeds_area(image, self.tier.max_reference_pixels)
        multiple = processor.config.vae_scale_factor
        width, height = (side // multiple * multiple for side in image.size)
        pixels: Tensor = processor.preprocess(image, height=height, width=width, resize_mode="crop")
        return pixels

    @torch.inference_mode()
    def edit(self, given: Conditioning, image: RgbImage, mask: Mask) -> Conditioning:
        """Return `given` extended by the image to inpaint, its latents and its token weights.

        `image` is the first reference, scaled to the size that is generated.
        """
        assert given.references, "a mask without the image that it is of"
        is_small = image.width * image.height <= self.tier.max_reference_pixels
        if is_small and "latents" in given.references:
            # `encode` took it in this very size: its tokens are the first of all references.
            num_tokens = image.width // TOKEN_SIDE * (image.height // TOKEN_SIDE)
            latents = given.references["latents"][:, :num_tokens]
        else:
            latents = self.large_latents(image)
        weights = token_weights(mask, latents)
        tensors = {"latents": latents, "weights": weights}
        return replace(given, edit=InpaintInput(image, mask, tensors))

    def large_latents(self, image: RgbImage) -> Tensor:
        """Encode an image above `max_reference_pixels`: [1, tokens, channels] in the VAE's dtype.

        Above 1 MP the VAE works in tiles.
        """
        vae = self.pipeline.vae
        pixels = self.pipeline.image_processor.preprocess(image_for(image))
        with tiles_above(vae, image.width, image.height):
            latents, _ = self.pipeline.prepare_image_latents(
                [pixels], batch_size=1, generator=None, device=self.device, dtype=vae.dtype
            )
        packed: Tensor = latents
        return packed

    @torch.inference_mode()
    def prepare(self, conditioning: Conditioning, canvas: ImageSpec, seed: int) -> ImageState:
        """Return an image of pure noise with its schedule, or one that has some steps done.

        With a `strength` below 1, the first steps are left out, and the image to inpaint is mixed
        with as much noise as they would have left. The noise is made by a CPU generator: a GPU's
        generator gives other numbers for the seed.
        """
        noise, latent_ids = self.pipeline.prepare_latents(
            batch_size=1,
            num_latents_channels=self.pipeline.transformer.config.in_channels // 4,
            height=canvas.height,
            width=canvas.width,
            dtype=conditioning.prompt.tensors["embeds"].dtype,
            device=self.device,
            generator=torch.Generator().manual_seed(seed),
        )
        scheduler = self.schedule(num_tokens=noise.shape[1], num_steps=canvas.num_steps)
        state = ImageState(
            canvas,
            conditioning,
            noise,
            scheduler.timesteps,
            scheduler.sigmas,
            self.step_inputs(conditioning, canvas, latent_ids),
        )
        if conditioning.edit is None:
            return state
        step = first_step(canvas.num_steps, canvas.strength)
        state = replace(state, step=step, noise=noise)
        return replace(state, latents=noised_image(state, step))

    def step_inputs(
        self, given: Conditioning, canvas: ImageSpec, latent_ids: Tensor
    ) -> dict[str, Tensor]:
        """Compute the transformer's inputs that stay the same for all steps of an image.

        `text_rotary` and `image_rotary`: fp32 [1, tokens, 2 x head_dim], the rotary tables of the
        text and of the image with its references; `negative_text_rotary` that of a negative prompt.
        `guidance`: fp32 [1]. `latent_ids`: int64 [1, tokens, 4], the positions of the image's
        tokens.
        """
        ids = latent_ids
        if "ids" in given.references:
            ids = torch.cat([ids, given.references["ids"]], dim=1)
        fixed = {
            "text_rotary": self.rotary.table(given.prompt.tensors["text_ids"]),
            "image_rotary": self.rotary.table(ids),
            "guidance": torch.full([1], canvas.guidance, dtype=torch.float32, device=self.device),
            "latent_ids": latent_ids,
        }
        if given.negative is not None:
            negative_ids = given.negative.tensors["text_ids"]
            fixed["negative_text_rotary"] = self.rotary.table(negative_ids)
        return fixed

    def schedule(self, *, num_tokens: int, num_steps: int) -> FlowMatchEulerDiscreteScheduler:
        """Return a new scheduler that holds the timesteps and sigmas for so many steps.

        It is used for nothing else: a shared scheduler would mix the schedules of two images. More
        tokens shift the schedule towards noise, as in the pipeline.
        """
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(
            num_steps,
            self.device,
            sigmas=np.linspace(1.0, 1 / num_steps, num_steps),
            mu=compute_empirical_mu(image_seq_len=num_tokens, num_steps=num_steps),
        )
        return scheduler

    @torch.inference_mode()
    def denoise(self, state: ImageState) -> ImageState:
        """Return the state after one Euler step along the transformer's velocity.

        When inpainting, tokens outside of the mask are then replaced by the image's own.
        """
        after = step_along(state, self.velocity(state))
        if state.conditioning.edit is None:
            return after
        return replace(after, latents=keep_rest(state, after.latents))

    def velocity(self, state: ImageState) -> Tensor:
        """Return the velocity for the image's tokens, [1, tokens, channels].

        With a negative prompt it is that prompt's prediction, and from there `true_cfg_scale` times
        the way to the prompt's own (classifier-free guidance): two forwards, one after the other.
        """
        given, fixed = state.conditioning, state.fixed
        velocity = self.predict(state, given.prompt, fixed["text_rotary"])
        if given.negative is None:
            return velocity
        negative = self.predict(state, given.negative, fixed["negative_text_rotary"])
        return guided(velocity, negative, state.canvas.true_cfg_scale)

    def predict(self, state: ImageState, prompt: PromptEmbeds, text_rotary: Tensor) -> Tensor:
        """Return the transformer's prediction for the image's tokens, [1, tokens, channels].

        The references go through the transformer behind the image; their outputs are dropped.
        """
        fixed, latents, embeds = state.fixed, state.latents, prompt.tensors["embeds"]
        references = state.conditioning.references
        if "latents" in references:
            latents = torch.cat([latents, references["latents"]], dim=1)
        tokens: Tensor = self.pipeline.transformer(
            hidden_states=latents.to(embeds.dtype),
            timestep=transformer_timestep(state),
            # A model that was distilled without guidance has no embedding for it and ignores it.
            guidance=fixed["guidance"],
            encoder_hidden_states=embeds,
            txt_ids=text_rotary,
            img_ids=fixed["image_rotary"],
            return_dict=False,
        )[0]
        return tokens[:, : state.latents.shape[1]]

    @torch.inference_mode()
    def preview(self, state: ImageState) -> RgbImage:
        """Return an estimate of the finished image, by going on with the last step's velocity."""
        return self.decode(straight_end(state))

    @torch.inference_mode()
    def decode(self, state: ImageState) -> RgbImage:
        """Return the pixels: undo the packing and normalisation, then run the VAE's decoder.

        Above 1 MP the VAE works in tiles. When inpainting, the kept pixels are then pasted back.
        """
        pipeline, vae = self.pipeline, self.pipeline.vae
        latents = unpack_latents(state)
        # FLUX.2 keeps the mean and variance of its latents in a BatchNorm of the VAE.
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)
        variance = vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps
        latents = latents * torch.sqrt(variance).to(latents.device, latents.dtype) + mean
        latents = pipeline._unpatchify_latents(latents)
        with tiles_above(vae, state.canvas.width, state.canvas.height):
            pixels = vae.decode(latents, return_dict=False)[0]
        raster = raster_of(pipeline.image_processor.postprocess(pixels, output_type="pt")[0])
        edit = state.conditioning.edit
        return raster if edit is None else raster_for(paste_rest(edit, image_for(raster)))


def unpack_latents(state: ImageState) -> Tensor:
    """Return the latents as a map, [1, channels, rows, columns], each token at its position.

    The method of klein's pipeline serves all of FLUX.2, and takes the size. Others find the largest
    ids on the device, and the CPU has to wait for it twice.
    """
    rows, columns = (side // TOKEN_SIDE for side in (state.canvas.height, state.canvas.width))
    unpacked: Tensor = Flux2KleinPipeline._unpack_latents_with_ids(
        state.latents, state.fixed["latent_ids"], rows, columns
    )
    return unpacked
