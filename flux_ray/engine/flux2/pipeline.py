"""FLUX.2: our step loop over diffusers' parts, bit-equal to its pipelines.

Drawing a part of an image: what diffusers' inpainting does, and the rest put back at the end.

Flux2KleinInpaintPipeline noises the image's latents to where the image is after each step, and
puts them in the place of tokens outside of the mask. It decodes these too, which is close to the
image and not the image: here its own pixels are put back there.

A model's pixels as eight bits a channel, made on its own device.

Rotary tables that are computed once per image and passed to every step.

diffusers' FLUX.2 transformer takes position ids and builds its tables from them in fp64, in every
forward: about 150 small operations for values that depend only on the image's size, its references
and the length of its prompt.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from flux_ray.catalog.flops import MAX_WHOLE_PIXELS, TOKEN_SIDE
from flux_ray.catalog.tiers import Tier
from flux_ray.engine.api import (
    Conditioning,
    ImageSpec,
    ImageState,
    InpaintInput,
    PromptEmbeds,
    StepInputs,
)
from flux_ray.engine.flux2.family import open_checkpoint
from flux_ray.engine.flux2.text_encoder import FAMILIES, PromptEncoder, load_encoder
from flux_ray.engine.images import image_for, raster_for
from flux_ray.engine.loading import (
    IMAGE_PARTS,
    Placement,
    WeightSource,
    check_transformer,
    fetch,
    load_pipeline,
    load_transformer,
)
from flux_ray.errors import BadReference
from flux_ray.parallel.lora import lora_deltas
from flux_ray.request import Mask, RgbImage
from flux_ray.resizing import mask_image


def token_weights(mask: Mask, latents: Tensor) -> Tensor:
    """How far each of these tokens is drawn anew: as far as the mask marks its middle.

    Where it marks no token's middle, those that it touches are: no mask is without effect.
    """
    marks = torch.frombuffer(bytearray(mask.marks), dtype=torch.uint8)
    pixels = marks.view(1, 1, mask.height, mask.width).to(torch.float32) / 255
    size = (mask.height // TOKEN_SIDE, mask.width // TOKEN_SIDE)
    weights = functional.interpolate(pixels, size=size, mode="bilinear")
    if not weights.any():
        weights = functional.max_pool2d(pixels, TOKEN_SIDE)
    return weights.to(latents.device, latents.dtype).reshape(1, 1, -1).transpose(1, 2)


def keep_rest(state: ImageState, latents: Tensor) -> Tensor:
    """The latents after a step, with the image's outside of the mask, as noisy as they are."""
    edit = state.conditioning.edit
    assert edit is not None and state.noise is not None, "no image to keep anything of"
    sigma = state.sigmas[state.step + 1].to(latents.device, latents.dtype)
    kept = sigma * state.noise + (1.0 - sigma) * edit.latents
    return (1 - edit.weights) * kept + edit.weights * latents


def paste_rest(edit: InpaintInput, generated: Image.Image) -> Image.Image:
    """What was drawn where the mask says so, and the image's very pixels everywhere else."""
    return Image.composite(generated, image_for(edit.image), mask_image(edit.mask))


def raster_of(pixels: Tensor) -> RgbImage:
    """Return the raster of pixels [3, height, width] from 0 to 1.

    To the bit what diffusers makes of them on the CPU: in float32, and halves go to the even one.
    A quarter of the bytes leaves the device, and the CPU has nothing to compute.
    """
    eight_bit = pixels.permute(1, 2, 0).float().mul(255).round().to(torch.uint8)
    height, width, _ = eight_bit.shape
    return RgbImage(width, height, eight_bit.contiguous().cpu().numpy().tobytes())


class TableEmbedder(nn.Module):
    """Stands in for a transformer's `pos_embed`: takes ids as before, or what `table` returned.

    Ids are whole numbers and a table is not, so that the pipeline which lends the transformer can
    still be called by itself.
    """

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder

    def table(self, ids: Tensor) -> Tensor:
        """Return cosines and sines beside each other, [1, tokens, 2 x head_dim], of [1, tokens, 4].

        The tokens stand where they stand in the ids: sequence parallel cuts both alike.
        """
        return torch.cat(self.embedder(ids[0]), dim=-1).unsqueeze(0)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each [tokens, head_dim]. The transformer drops the batch."""
        if not ids.is_floating_point():
            cosines, sines = self.embedder(ids)
            return cosines, sines
        cosines, sines = ids.chunk(2, dim=-1)
        return cosines, sines


FULL_TIMESTEP = 1000


class Flux2:
    """The stages of one loaded checkpoint, or of one rank's part of it.

    The pipeline lends its parts and those of its methods that keep nothing; its `__call__` is not
    used, because it draws an image from start to end and keeps the schedule in the scheduler.
    `prompts` is None where the text encoder is shared.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, prompts: PromptEncoder | None, tier: Tier
    ) -> None:
        self.pipeline = pipeline
        self.prompts = prompts
        self.tier = tier
        self.device = pipeline.vae.device
        self.rotary = TableEmbedder(pipeline.transformer.pos_embed)
        pipeline.transformer.pos_embed = self.rotary

    @classmethod
    def load(cls, weights: str, placement: Placement, tier: Tier) -> "Flux2":
        """The adapter of a checkpoint, refused before any weight is read if it does not fit."""
        family = FAMILIES[tier.family]
        source, folder = open_checkpoint(family, weights)
        check_transformer(folder, placement)
        prompts = None
        if placement.text_encoder == "colocated":
            prompts = load_encoder(family, source, tier, placement)
        return cls(load_parts(source, placement), prompts, tier)

    def encode_prompt(self, prompt: str) -> PromptEmbeds:
        """The text encoder's hidden states for the prompt."""
        assert self.prompts is not None, "the text encoder is shared: it has the prompt's embeds"
        return self.prompts.encode_prompt(prompt)

    @torch.inference_mode()
    def encode(self, prompt: PromptEmbeds, references: tuple[RgbImage, ...]) -> Conditioning:
        """The prompt with the VAE's latents for the references."""
        if not references:
            return Conditioning(prompt)
        latents, ids = self.pipeline.prepare_image_latents(
            images=[self.reference_pixels(raster) for raster in references],
            batch_size=1,
            generator=None,
            device=self.device,
            dtype=self.pipeline.vae.dtype,
        )
        return Conditioning(prompt, reference_latents=latents, reference_ids=ids)

    def reference_pixels(self, raster: RgbImage) -> Tensor:
        """The reference as the VAE takes it: scaled to the tier's limit, sides cut to a multiple.

        The limit of the FLUX.2 tiers is the pipeline's own, a megapixel.
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
        """The same, to draw only a part of an image: its first reference, in the size drawn."""
        assert given.reference_latents is not None, "a mask without the image that it is of"
        if image.width * image.height <= self.tier.max_reference_pixels:
            num_tokens = image.width // TOKEN_SIDE * (image.height // TOKEN_SIDE)
            latents = given.reference_latents[:, :num_tokens]
        else:
            latents = self.large_latents(image)
        weights = token_weights(mask, latents)
        return replace(given, edit=InpaintInput(image, mask, latents, weights))

    def large_latents(self, image: RgbImage) -> Tensor:
        """Of an image that is larger than a reference may be, above a megapixel tile by tile."""
        vae = self.pipeline.vae
        pixels = self.pipeline.image_processor.preprocess(image_for(image))
        vae.use_tiling = image.width * image.height > MAX_WHOLE_PIXELS
        try:
            latents, _ = self.pipeline.prepare_image_latents(
                [pixels], batch_size=1, generator=None, device=self.device, dtype=vae.dtype
            )
        finally:
            vae.use_tiling = False
        packed: Tensor = latents
        return packed

    @torch.inference_mode()
    def prepare(self, conditioning: Conditioning, canvas: ImageSpec, seed: int) -> ImageState:
        """Noise from a CPU generator, so that the device never changes the image."""
        latents, latent_ids = self.pipeline.prepare_latents(
            batch_size=1,
            num_latents_channels=self.pipeline.transformer.config.in_channels // 4,
            height=canvas.height,
            width=canvas.width,
            dtype=conditioning.prompt.embeds.dtype,
            device=self.device,
            generator=torch.Generator().manual_seed(seed),
        )
        scheduler = self.schedule(num_tokens=latents.shape[1], num_steps=canvas.num_steps)
        return ImageState(
            canvas,
            conditioning,
            latents,
            latent_ids,
            scheduler.timesteps,
            scheduler.sigmas,
            self.step_inputs(conditioning, canvas, latent_ids),
            noise=None if conditioning.edit is None else latents,
        )

    def step_inputs(self, given: Conditioning, canvas: ImageSpec, latent_ids: Tensor) -> StepInputs:
        """Compute what the transformer is given alike at every step of an image."""
        ids = latent_ids
        if given.reference_ids is not None:
            ids = torch.cat([ids, given.reference_ids], dim=1)
        return StepInputs(
            text_rotary=self.rotary.table(given.prompt.text_ids),
            image_rotary=self.rotary.table(ids),
            guidance=torch.full([1], canvas.guidance, dtype=torch.float32, device=self.device),
        )

    def schedule(self, *, num_tokens: int, num_steps: int) -> FlowMatchEulerDiscreteScheduler:
        """A fresh scheduler, for its timesteps and sigmas."""
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
        """One Euler step along the transformer's velocity; what is kept of an image, comes too."""
        velocity = self.velocity(state)
        dt = state.sigmas[state.step + 1] - state.sigmas[state.step]
        latents = (state.latents.to(torch.float32) + dt * velocity).to(velocity.dtype)
        if state.conditioning.edit is not None:
            latents = keep_rest(state, latents)
        kept = velocity if state.canvas.has_previews else None
        return replace(state, latents=latents, step=state.step + 1, velocity=kept)

    def velocity(self, state: ImageState) -> Tensor:
        """What the transformer says about the image's tokens; the references' are dropped."""
        given, fixed, latents = state.conditioning, state.fixed, state.latents
        if given.reference_latents is not None:
            latents = torch.cat([latents, given.reference_latents], dim=1)
        timestep = state.timesteps[state.step].expand(1).to(state.latents.dtype)
        tokens: Tensor = self.pipeline.transformer(
            hidden_states=latents.to(given.prompt.embeds.dtype),
            timestep=timestep / FULL_TIMESTEP,
            # A model that was distilled without it has no embedding for it, and drops it.
            guidance=fixed.guidance,
            encoder_hidden_states=given.prompt.embeds,
            txt_ids=fixed.text_rotary,
            img_ids=fixed.image_rotary,
            return_dict=False,
        )[0]
        return tokens[:, : state.latents.shape[1]]

    @torch.inference_mode()
    def preview(self, state: ImageState) -> RgbImage:
        """The image at the end of the last step's velocity: a flow is nearly straight."""
        assert state.velocity is not None, "a preview that the canvas does not speak of"
        latents = state.latents.to(torch.float32) - state.sigmas[state.step] * state.velocity
        return self.decode(replace(state, latents=latents.to(state.latents.dtype)))

    @torch.inference_mode()
    def decode(self, state: ImageState) -> RgbImage:
        """Undo packing and normalisation, then the VAE: above a megapixel tile by tile."""
        pipeline, vae = self.pipeline, self.pipeline.vae
        latents = unpack_latents(state)
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)
        variance = vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps
        latents = latents * torch.sqrt(variance).to(latents.device, latents.dtype) + mean
        latents = pipeline._unpatchify_latents(latents)
        # Only for what is that large: an encoder in tiles says other things of a reference.
        vae.use_tiling = state.canvas.width * state.canvas.height > MAX_WHOLE_PIXELS
        try:
            pixels = vae.decode(latents, return_dict=False)[0]
        finally:
            vae.use_tiling = False
        raster = raster_of(pipeline.image_processor.postprocess(pixels, output_type="pt")[0])
        edit = state.conditioning.edit
        return raster if edit is None else raster_for(paste_rest(edit, image_for(raster)))


def unpack_latents(state: ImageState) -> Tensor:
    """Put the tokens back in their places, [1, channels, rows, columns].

    klein's method is that of all FLUX.2 pipelines, and takes the size: without it the device has to
    be waited for twice, to learn the largest ids.
    """
    rows, columns = (side // TOKEN_SIDE for side in (state.canvas.height, state.canvas.width))
    unpacked: Tensor = Flux2KleinPipeline._unpack_latents_with_ids(
        state.latents, state.latent_ids, rows, columns
    )
    return unpacked


def load_parts(source: WeightSource, placement: Placement) -> DiffusionPipeline:
    """The checkpoint's pipeline with the rank's part of the transformer."""
    folder = fetch(source, IMAGE_PARTS)
    pipeline = load_pipeline(folder, placement)
    check_scheduler(pipeline.scheduler)
    deltas = lora_deltas(placement.loras, type(pipeline), placement.device)
    transformer = load_transformer(Flux2Transformer2DModel, folder, placement, deltas)
    pipeline.register_modules(transformer=transformer)
    return pipeline


def check_scheduler(scheduler: Any) -> None:
    """The step above is Euler's without noise; another scheduler needs another step."""
    if (
        not isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        or scheduler.config.stochastic_sampling
    ):
        raise ValueError(f"the FLUX.2 adapter cannot step {type(scheduler).__name__}")
