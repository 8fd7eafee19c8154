"""The FLUX.3 adapter: the engine's stages over the parts of diffusers' modular pipelines.

Images are equal to those of Flux3AutoBlocks (base) and Flux3DistilledAutoBlocks, bit for bit
(tests/engine/flux3). What is different: the caller makes each denoise step, rotary tables are
computed once per image, and above 1 MP the VAE works in tiles. The prompt upsampler, their first
block, is none of the engine's business.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
from diffusers.modular_pipelines.flux3.image_processor import Flux3ImageProcessor
from torch import Tensor
from torch.nn import functional

from flux_ray.catalog import TOKEN_SIDE, Tier, scaled_size
from flux_ray.engine.api import (
    Conditioning,
    ImageSpec,
    ImageState,
    Placement,
    PromptEmbeds,
    PromptEncoder,
)
from flux_ray.engine.flow import FULL_TIMESTEP, guided, step_along, straight_end
from flux_ray.engine.flux3.checkpoint import KINDS, open_checkpoint
from flux_ray.engine.flux3.text_encoder import load_encoder
from flux_ray.engine.flux3.transformer import check_sequence, load_split_transformer
from flux_ray.engine.images import image_for
from flux_ray.engine.loading import check_transformer, fetch
from flux_ray.engine.vae import raster_of, tiles_above
from flux_ray.errors import BadReference
from flux_ray.request import Mask, RgbImage
from flux_ray.weights.source import IMAGE_PARTS

# How far the schedule leans towards noise, whatever the size: part of the model's recipe.
SHIFT = 6.93
# Rows and columns count half, as in training.
POSITION_SCALE = 0.5


class Flux3:
    """The stages of one loaded checkpoint, or of one rank's part of it.

    A rank calls them from one thread. `prompts` is None if the tier has a shared text encoder.
    """

    def __init__(
        self, transformer: Any, vae: Any, prompts: PromptEncoder | None, tier: Tier
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.prompts = prompts
        self.tier = tier
        self.images = Flux3ImageProcessor()
        self.device = vae.device

    @classmethod
    def load(cls, weights: str, placement: Placement, tier: Tier) -> "Flux3":
        """Load the adapter of a checkpoint.

        Raise ValueError before any weight is read if the checkpoint is of another kind or cannot
        be split and quantized as `placement` says: reading would take minutes.
        """
        source, folder = open_checkpoint(KINDS[tier.family], weights)
        check_sequence(placement.mesh.sequence.size)
        check_transformer(folder, placement)
        prompts = None
        if placement.text_encoder == "colocated":
            prompts = load_encoder(source, tier, placement)
        folder = fetch(source, IMAGE_PARTS)
        vae = load_vae(folder, placement)
        return cls(load_split_transformer(folder, placement), vae, prompts, tier)

    def encode_prompt(self, prompt: str) -> PromptEmbeds:
        """Encode a prompt with the replica's own text encoder; all its ranks call it together."""
        assert self.prompts is not None, "the text encoder is shared: it has the prompt's embeds"
        return self.prompts.encode_prompt(prompt)

    @torch.inference_mode()
    def encode(self, prompt: PromptEmbeds, references: tuple[RgbImage, ...]) -> Conditioning:
        """Return the prompt joined with the references.

        `latents`: [1, tokens, channels], all references one after the other; `ids`: fp32
        [tokens, 4], their positions, told apart on the last axis by -1, -2 and so on.
        """
        if not references:
            return Conditioning(prompt)
        is_alone = len(references) == 1
        maps = [self.latents_of(self.pixels_of(raster, is_alone)) for raster in references]
        latents = torch.cat([tokens_of(each) for each in maps], dim=1)
        ids = torch.cat(
            [grid(each.shape[2], each.shape[3], -number) for number, each in enumerate(maps, 1)]
        )
        return Conditioning(prompt, {"latents": latents, "ids": ids.to(self.device)})

    def pixels_of(self, raster: RgbImage, is_alone: bool) -> Tensor:
        """Return a reference as the VAE takes it, fp32 [1, 3, height, width] from -1 to 1.

        A reference that is alone is kept whole: up to 4 MP, and reflected at its sides to
        multiples of 16. Several are scaled down to 1 MP each and cropped to multiples of 16. Raise
        BadReference if nothing is left of a side.
        """
        size = (raster.width, raster.height)
        # diffusers would crop to no pixels at all, and fail somewhere behind.
        if not is_alone and min(scaled_size(*size, self.tier.max_reference_pixels)) < TOKEN_SIDE:
            raise BadReference("a reference of {}x{} is too narrow".format(*size), "image")
        mode = "fill" if is_alone else "crop"
        pixels: Tensor = self.images.preprocess(image_for(raster), resize_mode=mode)[0]
        return pixels

    def latents_of(self, pixels: Tensor) -> Tensor:
        """Encode pixels into normalised latents, [1, channels, rows, columns] of tokens."""
        vae = self.vae
        with tiles_above(vae, pixels.shape[-1], pixels.shape[-2]):
            encoded = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
        # Each token is 2 x 2 latents, one channel after the other.
        packed = encoded.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
        mean, deviation = self.statistics(vae.dtype)
        normalised: Tensor = (packed - mean) / deviation
        return normalised

    def statistics(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the VAE's latents, [1, channels, 1, 1]."""
        norm, epsilon = self.vae.bn, self.vae.config.batch_norm_eps
        variance = norm.running_var.view(1, -1, 1, 1)
        mean = norm.running_mean.view(1, -1, 1, 1)
        return mean.to(dtype), torch.sqrt(variance + epsilon).to(dtype)

    def edit(self, given: Conditioning, image: RgbImage, mask: Mask) -> Conditioning:
        """Raise NotImplementedError: FLUX.3 has no inpainting, and its tiers take no masks."""
        raise NotImplementedError("FLUX.3 has no inpainting")

    @torch.inference_mode()
    def prepare(self, conditioning: Conditioning, canvas: ImageSpec, seed: int) -> ImageState:
        """Return an image of pure noise with its schedule.

        The noise is made by a CPU generator: a GPU's generator gives other numbers for the seed.
        """
        rows, columns = rows_and_columns(canvas)
        noise = torch.randn(
            (1, self.transformer.config.in_channels, rows, columns),
            generator=torch.Generator().manual_seed(seed),
        )
        dtype = conditioning.prompt.tensors["embeds"].dtype
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        scheduler.set_timesteps(
            device=self.device, sigmas=np.linspace(1.0, 1 / canvas.num_steps, canvas.num_steps)
        )
        return ImageState(
            canvas,
            conditioning,
            tokens_of(noise.to(self.device, dtype)),
            scheduler.timesteps,
            scheduler.sigmas,
            self.step_inputs(conditioning, rows, columns),
        )

    def step_inputs(self, given: Conditioning, rows: int, columns: int) -> Mapping[str, Tensor]:
        """Compute the transformer's inputs that stay the same for all steps of an image.

        They are the rotary tables of the image, the text, the references and the negative prompt,
        each fp32 [tokens, 2 x head_dim].
        """
        ids = {"image": grid(rows, columns, 0), "text": text_ids(given.prompt)}
        if given.references:
            ids["references"] = given.references["ids"]
        if given.negative is not None:
            ids["negative"] = text_ids(given.negative)
        table = self.transformer.pos_embed.table
        return {name: table(each.to(self.device)) for name, each in ids.items()}

    @torch.inference_mode()
    def denoise(self, state: ImageState) -> ImageState:
        """Return the state after one Euler step along the transformer's velocity."""
        return step_along(state, self.velocity(state))

    def velocity(self, state: ImageState) -> Tensor:
        """Return the transformer's prediction, [1, tokens, channels].

        With a negative prompt it is that of classifier-free guidance, of two forwards.
        """
        given = state.conditioning
        velocity = self.forward(state, given.prompt, state.fixed["text"])
        if given.negative is None:
            return velocity
        away = self.forward(state, given.negative, state.fixed["negative"])
        return guided(velocity, away, state.canvas.true_cfg_scale)

    def forward(self, state: ImageState, prompt: PromptEmbeds, table: Tensor) -> Tensor:
        """Return what one forward of the transformer predicts for the image's tokens."""
        dtype = state.latents.dtype
        # After the last step there is no timestep: it jumps to 0.
        timesteps = functional.pad(state.timesteps[state.step : state.step + 2], (0, 1))
        timesteps = (timesteps / FULL_TIMESTEP).to(dtype)
        inputs: dict[str, Any] = {}
        if self.transformer.config.flow_map:
            inputs["target_timestep"] = timesteps[1:2]
        if state.conditioning.references:
            inputs["image_cond_hidden_states"] = state.conditioning.references["latents"].to(dtype)
            inputs["image_cond_ids"] = state.fixed["references"]
        predicted: Tensor = self.transformer(
            hidden_states=state.latents,
            encoder_hidden_states=prompt.tensors["embeds"],
            timestep=timesteps[:1],
            img_ids=state.fixed["image"],
            txt_ids=table,
            return_dict=False,
            **inputs,
        )[0]
        return predicted

    @torch.inference_mode()
    def preview(self, state: ImageState) -> RgbImage:
        """Return an estimate of the finished image, by going on with the last step's velocity."""
        return self.decode(straight_end(state))

    @torch.inference_mode()
    def decode(self, state: ImageState) -> RgbImage:
        """Return the pixels: undo the normalisation and the packing, then run the VAE's decoder.

        Above 1 MP the VAE works in tiles.
        """
        vae = self.vae
        rows, columns = rows_and_columns(state.canvas)
        packed = state.latents.transpose(1, 2).reshape(1, -1, rows, columns)
        mean, deviation = self.statistics(packed.dtype)
        latents = packed * deviation + mean
        latents = latents.reshape(1, -1, 2, 2, rows, columns).permute(0, 1, 4, 2, 5, 3)
        latents = latents.flatten(4, 5).flatten(2, 3)
        with tiles_above(vae, state.canvas.width, state.canvas.height):
            pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return raster_of(self.images.postprocess(pixels, output_type="pt")[0])


def rows_and_columns(canvas: ImageSpec) -> tuple[int, int]:
    """Return how many tokens an image has along its height and its width."""
    return canvas.height // TOKEN_SIDE, canvas.width // TOKEN_SIDE


def tokens_of(latents: Tensor) -> Tensor:
    """Return latents [1, channels, rows, columns] as tokens [1, rows x columns, channels]."""
    return latents.flatten(2).transpose(1, 2)


def grid(rows: int, columns: int, last: int) -> Tensor:
    """Return the positions of an image's tokens, fp32 [tokens, 4]: 0, row, column and `last`."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    ids = torch.stack([0 * row, row, column, torch.full_like(row, last)], dim=-1).float()
    return ids.flatten(0, 1) * torch.tensor([1, POSITION_SCALE, POSITION_SCALE, 1])


def text_ids(prompt: PromptEmbeds) -> Tensor:
    """Return the positions of a prompt's tokens, fp32 [tokens, 4]: they count on the last axis."""
    ids = torch.zeros(prompt.tensors["embeds"].shape[1], 4)
    ids[:, 3] = torch.arange(len(ids))
    return ids


def load_vae(folder: Path, placement: Placement) -> AutoencoderKLFlux2:
    """Load the VAE, whole on every rank."""
    vae = AutoencoderKLFlux2.from_pretrained(
        folder / "vae", dtype=placement.torch_dtype, use_safetensors=True, local_files_only=True
    )
    return vae.to(placement.device).eval()
