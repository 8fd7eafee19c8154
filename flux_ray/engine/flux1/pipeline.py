"""The FLUX.1 adapter: the engine's stages over the parts of diffusers' pipelines.

Images are equal to those of the pipelines, bit for bit (tests/engine/flux1). What is different:

- The caller makes each denoise step, so that the steps of several images can take turns.
- Rotary tables are computed once per image.
- What the pipelines sample from the VAE is sampled when an image is prepared, from its own seed and
  in the pipelines' order: the images of a request share the encoded distribution.
- Pixels outside of a mask are exactly the image's, pasted back at the end.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional

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
from flux_ray.engine.flux1.checkpoint import open_checkpoint
from flux_ray.engine.flux1.text_encoder import load_encoder
from flux_ray.engine.images import image_for, raster_for
from flux_ray.engine.inpainting import keep_rest, noised_image, paste_rest
from flux_ray.engine.loading import check_transformer, load_parts
from flux_ray.engine.rotary import TableEmbedder
from flux_ray.engine.vae import raster_of, tiles_above
from flux_ray.request import Mask, RgbImage, first_step
from flux_ray.resizing import mask_image


@dataclass(frozen=True)
class SeededInputs:
    """What the seed of an image decides, each [1, tokens, channels] in the model's dtype.

    `kept`: the latents of an image to inpaint, whose unmasked ones each step restores. `channels`:
    what the transformer takes beside the latents of each token.
    """

    noise: Tensor
    kept: Tensor | None = None
    channels: Tensor | None = None


class Flux1:
    """The stages of one loaded checkpoint, or of one rank's part of it: dev, Krea, schnell, pro.

    A rank calls them from one thread. Of the diffusers pipeline it uses the parts and the methods
    without state. `prompts` is None if the tier has a shared text encoder.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, prompts: PromptEncoder | None, tier: Tier
    ) -> None:
        self.pipeline = pipeline
        self.prompts = prompts
        self.tier = tier
        self.vae = pipeline.vae
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
        source, folder = open_checkpoint(tier, weights)
        check_transformer(folder, placement)
        prompts = None
        if placement.text_encoder == "colocated":
            prompts = load_encoder(source, tier, placement)
        return cls(load_parts(FluxTransformer2DModel, source, placement), prompts, tier)

    def encode_prompt(self, prompt: str) -> PromptEmbeds:
        """Encode a prompt with the replica's own text encoders; all its ranks call it together."""
        assert self.prompts is not None, "the text encoder is shared: it has the prompt's embeds"
        return self.prompts.encode_prompt(prompt)

    def encode(self, prompt: PromptEmbeds, references: tuple[RgbImage, ...]) -> Conditioning:
        """Return the prompt alone: a reference can only be the image to inpaint, for `edit`."""
        return Conditioning(prompt)

    @torch.inference_mode()
    def edit(self, given: Conditioning, image: RgbImage, mask: Mask) -> Conditioning:
        """Return `given` extended by the image to inpaint, as FluxInpaintPipeline takes it.

        `moments`: the encoded image; `weights`: [1, tokens, channels], 1 where a latent is
        generated anew. Above 1 MP the VAE works in tiles.
        """
        pixels = self.pipeline.image_processor.preprocess(image_for(image))
        with tiles_above(self.vae, image.width, image.height):
            moments = self.moments(pixels)
        tensors = {"moments": moments, "weights": self.pack(latent_weights(mask, moments))}
        return replace(given, edit=InpaintInput(image, mask, tensors))

    def moments(self, pixels: Tensor) -> Tensor:
        """Encode pixels [1, 3, height, width], from -1 to 1.

        The result are the means and log variances of the latents, [1, 2 x channels, rows, columns].
        The layout of `pixels` in memory decides the last bits, and is kept.
        """
        encoded = self.vae.encode(pixels.to(self.device, self.vae.dtype))
        moments: Tensor = encoded.latent_dist.parameters
        return moments

    def latents(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample latents from encoded moments, or take their mode; packed [1, tokens, channels]."""
        posterior = DiagonalGaussianDistribution(moments)
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        config = self.vae.config
        return self.pack((latents - config.shift_factor) * config.scaling_factor)

    def pack(self, latents: Tensor) -> Tensor:
        """Pack a map [1, channels, rows, columns] into tokens of 2 x 2, [1, tokens, 4 channels]."""
        packed: Tensor = self.pipeline._pack_latents(latents, *latents.shape)
        return packed

    @torch.inference_mode()
    def prepare(self, conditioning: Conditioning, canvas: ImageSpec, seed: int) -> ImageState:
        """Return an image of noise with its schedule; when inpainting, mixed with the image.

        With a `strength` below 1, the first steps are left out then. The noise is made by a CPU
        generator: a GPU's generator gives other numbers for the seed.
        """
        generator = torch.Generator().manual_seed(seed)
        seeded = self.seeded_inputs(conditioning, canvas, generator)
        scheduler = self.schedule(num_tokens=seeded.noise.shape[1], num_steps=canvas.num_steps)
        fixed = self.step_inputs(conditioning, canvas)
        if seeded.channels is not None:
            fixed["channels"] = seeded.channels
        state = ImageState(
            canvas, conditioning, seeded.noise, scheduler.timesteps, scheduler.sigmas, fixed
        )
        if seeded.kept is None or conditioning.edit is None:
            return state
        tensors = {**conditioning.edit.tensors, "latents": seeded.kept}
        edit = replace(conditioning.edit, tensors=tensors)
        step = first_step(canvas.num_steps, canvas.strength)
        own = replace(conditioning, edit=edit)
        state = replace(state, conditioning=own, noise=seeded.noise, step=step)
        return replace(state, latents=noised_image(state, step))

    def seeded_inputs(
        self, given: Conditioning, canvas: ImageSpec, generator: torch.Generator
    ) -> SeededInputs:
        """Take from the generator what an image needs, in the order of FluxInpaintPipeline."""
        kept = None
        if given.edit is not None:
            kept = self.latents(given.edit.tensors["moments"], generator)
        return SeededInputs(self.noise(given, canvas, generator), kept=kept)

    def noise(self, given: Conditioning, canvas: ImageSpec, generator: torch.Generator) -> Tensor:
        """Return random latents in the prompt's dtype, packed: [1, tokens, channels]."""
        dtype = given.prompt.tensors["embeds"].dtype
        shape = self.latent_shape(canvas)
        return self.pack(randn_tensor(shape, generator, device=self.device, dtype=dtype))

    def latent_shape(self, canvas: ImageSpec) -> tuple[int, int, int, int]:
        """Return the shape of an image's latents before they are packed."""
        sides = (2 * (side // TOKEN_SIDE) for side in (canvas.height, canvas.width))
        return (1, self.vae.config.latent_channels, *sides)  # type: ignore[return-value]

    def step_inputs(self, given: Conditioning, canvas: ImageSpec) -> dict[str, Tensor]:
        """Compute the transformer's inputs that stay the same for all steps of an image.

        `text_rotary` and `image_rotary`: fp32 [tokens, 2 x head_dim]; `guidance`: fp32 [1], only
        for models that were distilled with it, because others refuse it.
        """
        # All text is at the origin, a negative prompt too.
        text_ids = torch.zeros(given.prompt.tensors["embeds"].shape[1], 3, device=self.device)
        image_ids = self.position_ids(canvas.width, canvas.height)
        if "ids" in given.references:
            image_ids = torch.cat([image_ids, given.references["ids"]])
        tables = {"text_rotary": text_ids, "image_rotary": image_ids}
        inputs = {name: self.rotary.table(ids) for name, ids in tables.items()}
        if self.pipeline.transformer.config.guidance_embeds:
            inputs["guidance"] = torch.full([1], canvas.guidance, device=self.device)
        return inputs

    def position_ids(self, width: int, height: int) -> Tensor:
        """Return the positions of an image's tokens, fp32 [tokens, 3]: 0, row, column."""
        ids: Tensor = self.pipeline._prepare_latent_image_ids(
            1, height // TOKEN_SIDE, width // TOKEN_SIDE, self.device, torch.float32
        )
        return ids

    def schedule(self, *, num_tokens: int, num_steps: int) -> FlowMatchEulerDiscreteScheduler:
        """Return a new scheduler that holds the timesteps and sigmas for so many steps.

        It is used for nothing else: a shared scheduler would mix the schedules of two images. More
        tokens shift the schedule towards noise, except schnell's.
        """
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        config = scheduler.config
        mu = calculate_shift(
            num_tokens,
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        scheduler.set_timesteps(num_steps, self.device, sigmas=sigmas, mu=mu)
        return scheduler

    @torch.inference_mode()
    def denoise(self, state: ImageState) -> ImageState:
        """Return the state after one Euler step along the transformer's velocity.

        When inpainting, latents outside of the mask are then replaced by the image's own.
        """
        given = state.conditioning
        velocity = self.velocity(state, given.prompt)
        if given.negative is not None:
            negative = self.velocity(state, given.negative)
            velocity = guided(velocity, negative, state.canvas.true_cfg_scale)
        after = step_along(state, velocity)
        if given.edit is None or "latents" not in given.edit.tensors:
            return after
        return replace(after, latents=keep_rest(state, after.latents))

    def velocity(self, state: ImageState, prompt: PromptEmbeds) -> Tensor:
        """Return the transformer's prediction for the image's tokens, [1, tokens, channels].

        References go through the transformer behind the image; their outputs are dropped.
        """
        fixed, latents = state.fixed, state.latents
        if "channels" in fixed:
            latents = torch.cat([latents, fixed["channels"]], dim=2)
        if "latents" in state.conditioning.references:
            latents = torch.cat([latents, state.conditioning.references["latents"]], dim=1)
        tokens: Tensor = self.pipeline.transformer(
            hidden_states=latents,
            timestep=transformer_timestep(state),
            guidance=fixed.get("guidance"),
            pooled_projections=prompt.tensors["pooled"],
            encoder_hidden_states=prompt.tensors["embeds"],
            txt_ids=fixed["text_rotary"],
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
        """Return the pixels: unpack the latents and run the VAE's decoder, above 1 MP in tiles.

        When inpainting, the kept pixels are then pasted back.
        """
        pipeline, config, canvas = self.pipeline, self.vae.config, state.canvas
        latents = pipeline._unpack_latents(
            state.latents, canvas.height, canvas.width, pipeline.vae_scale_factor
        )
        latents = latents / config.scaling_factor + config.shift_factor
        with tiles_above(self.vae, canvas.width, canvas.height):
            pixels = self.vae.decode(latents, return_dict=False)[0]
        raster = raster_of(pipeline.image_processor.postprocess(pixels, output_type="pt")[0])
        edit = state.conditioning.edit
        return raster if edit is None else raster_for(paste_rest(edit, image_for(raster)))


def latent_weights(mask: Mask, moments: Tensor) -> Tensor:
    """Return which latents are generated anew, [1, channels, rows, columns] of 0 and 1.

    A latent counts as marked by the pixel in its upper left corner, as in FluxInpaintPipeline. A
    mask so small that it marks no such pixel marks each latent that it touches, so that every mask
    has an effect. `moments` decides the shape, dtype and device.
    """
    _, double_channels, rows, columns = moments.shape
    marks = torch.from_numpy(np.asarray(mask_image(mask)) > 0)[None, None].float()
    weights = functional.interpolate(marks, size=(rows, columns))
    if not weights.any():
        weights = functional.max_pool2d(marks, mask.height // rows)
    return weights.to(moments.device, moments.dtype).repeat(1, double_channels // 2, 1, 1)
