"""FLUX.2 klein, distilled: our step loop over diffusers' parts, bit-equal to Flux2KleinPipeline."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from flux_ray.catalog import Tier
from flux_ray.engine.loading import Placement, load_model_index, load_pipeline, source_for
from flux_ray.engine.pictures import image_for, raster_for
from flux_ray.engine.state import Canvas, Conditioning, ImageState
from flux_ray.errors import BadReference
from flux_ray.request import Raster

FULL_TIMESTEP = 1000


class Flux2Klein:
    """The stages of one loaded checkpoint.

    The pipeline lends its parts and those of its methods that keep nothing; its `__call__` is not
    used, because it draws an image from start to end and keeps the schedule in the scheduler.
    """

    def __init__(self, pipeline: Flux2KleinPipeline, tier: Tier) -> None:
        check_scheduler(pipeline.scheduler)
        self.pipeline = pipeline
        self.tier = tier
        self.device = pipeline.device

    @classmethod
    def load(cls, weights: str, placement: Placement, tier: Tier) -> "Flux2Klein":
        """The adapter of a checkpoint, refused before any weight is read if it is not klein."""
        source = source_for(weights)
        check_model_index(load_model_index(source), weights)
        return cls(load_pipeline(source, placement), tier)

    @torch.inference_mode()
    def encode(self, prompt: str, references: tuple[Raster, ...]) -> Conditioning:
        """Qwen3's hidden states for the prompt, the VAE's latents for the references."""
        embeds, text_ids = self.pipeline.encode_prompt(
            prompt, device=self.device, max_sequence_length=self.tier.text_length
        )
        given = Conditioning(embeds, text_ids, warnings=self.warnings_for(prompt))
        if not references:
            return given
        latents, ids = self.pipeline.prepare_image_latents(
            images=[self.reference_pixels(raster) for raster in references],
            batch_size=1,
            generator=None,
            device=self.device,
            dtype=self.pipeline.vae.dtype,
        )
        return replace(given, reference_latents=latents, reference_ids=ids)

    def warnings_for(self, prompt: str) -> tuple[str, ...]:
        """The pipeline cuts a prompt that is too long without a word."""
        text = self.pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        num_tokens = len(self.pipeline.tokenizer(text)["input_ids"])
        length = self.tier.text_length
        if num_tokens <= length:
            return ()
        return (f"the prompt has {num_tokens} tokens, and only the first {length} were heeded",)

    def reference_pixels(self, raster: Raster) -> Tensor:
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
    def prepare(self, conditioning: Conditioning, canvas: Canvas, seed: int) -> ImageState:
        """Noise from a CPU generator, so that the device never changes the picture."""
        latents, latent_ids = self.pipeline.prepare_latents(
            batch_size=1,
            num_latents_channels=self.pipeline.transformer.config.in_channels // 4,
            height=canvas.height,
            width=canvas.width,
            dtype=conditioning.prompt_embeds.dtype,
            device=self.device,
            generator=torch.Generator().manual_seed(seed),
        )
        scheduler = self.schedule(num_tokens=latents.shape[1], num_steps=canvas.num_steps)
        return ImageState(
            canvas, conditioning, latents, latent_ids, scheduler.timesteps, scheduler.sigmas
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
        """One Euler step along the transformer's velocity."""
        velocity = self.velocity(state)
        dt = state.sigmas[state.step + 1] - state.sigmas[state.step]
        latents = state.latents.to(torch.float32) + dt * velocity
        return replace(state, latents=latents.to(velocity.dtype), step=state.step + 1)

    def velocity(self, state: ImageState) -> Tensor:
        """What the transformer says about the image's tokens; the references' are dropped."""
        given, transformer = state.conditioning, self.pipeline.transformer
        latents, ids = state.latents, state.latent_ids
        if given.reference_latents is not None and given.reference_ids is not None:
            latents = torch.cat([latents, given.reference_latents], dim=1)
            ids = torch.cat([ids, given.reference_ids], dim=1)
        timestep = state.timesteps[state.step].expand(1).to(state.latents.dtype)
        tokens: Tensor = transformer(
            hidden_states=latents.to(transformer.dtype),
            timestep=timestep / FULL_TIMESTEP,
            guidance=None,
            encoder_hidden_states=given.prompt_embeds,
            txt_ids=given.text_ids,
            img_ids=ids,
            return_dict=False,
        )[0]
        return tokens[:, : state.latents.shape[1]]

    @torch.inference_mode()
    def decode(self, state: ImageState) -> Raster:
        """Undo packing and normalisation, then the VAE."""
        pipeline, vae = self.pipeline, self.pipeline.vae
        side = pipeline.vae_scale_factor * 2
        latents = pipeline._unpack_latents_with_ids(
            state.latents, state.latent_ids, state.canvas.height // side, state.canvas.width // side
        )
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)
        variance = vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps
        latents = latents * torch.sqrt(variance).to(latents.device, latents.dtype) + mean
        pixels = vae.decode(pipeline._unpatchify_latents(latents), return_dict=False)[0]
        return raster_for(pipeline.image_processor.postprocess(pixels, output_type="pil")[0])


def check_model_index(index: dict[str, Any], weights: str) -> None:
    """Only distilled klein: anything else would be drawn wrongly without a word."""
    if index.get("_class_name") != Flux2KleinPipeline.__name__:
        raise ValueError(
            f"weights {weights!r} are for {index.get('_class_name')}, not FLUX.2 klein"
        )
    if not index.get("is_distilled"):
        raise ValueError(
            f"weights {weights!r} are not step-distilled: they need classifier-free guidance,"
            " which the klein adapter does not do"
        )


def check_scheduler(scheduler: Any) -> None:
    """The step below is Euler's without noise; another scheduler needs another step."""
    if (
        not isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        or scheduler.config.stochastic_sampling
    ):
        raise ValueError(f"the klein adapter cannot step {type(scheduler).__name__}")
