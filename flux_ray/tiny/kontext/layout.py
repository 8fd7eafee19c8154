"""The layout of FLUX.1 Kontext."""

from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer, T5Tokenizer

from flux_ray.tiny.kontext import models, text_encoders
from flux_ray.tiny.kontext.text_encoders import TextEncoders
from flux_ray.tiny.layout import Kind, Noised
from flux_ray.tiny.state import Run
from flux_ray.tiny.train_vae import encode
from flux_ray.tiny.world import Canvas

# The model learns to give the same image whatever the guidance in this range.
GUIDANCE = (1.0, 5.0)


class Kontext:
    """FLUX.1 Kontext: CLIP and T5, a VAE of 16 channels, one reference at the most."""

    name = "kontext"
    steps: Mapping[str, int] = {
        "text_encoders": 1200,
        "vae": 1500,
        "transformer": 8000,
        "decoder": 1000,
    }
    kinds: tuple[tuple[Kind, float], ...] = (("text", 0.55), ("edit", 0.45))
    empty_share = 0.04
    # 512 is the pipeline's default, and no mask hides the padding.
    text_lengths: tuple[tuple[int, float], ...] = ((20, 0.6), (48, 0.3), (128, 0.07), (512, 0.03))

    def save_tokenizers(self, run: Run) -> None:
        """Make CLIP's and T5's tokenizers, and save them in the run's folder."""
        models.build_clip_tokenizer().save_pretrained(run.folder / "tokenizer")
        models.build_t5_tokenizer().save_pretrained(run.folder / "tokenizer_2")

    def untrained(self, run: Run) -> TextEncoders:
        """Return new text encoders with the run's tokenizers."""
        return TextEncoders(
            models.build_clip(),
            CLIPTokenizer.from_pretrained(run.folder / "tokenizer"),
            models.build_t5(),
            T5Tokenizer.from_pretrained(run.folder / "tokenizer_2"),
        )

    def train_text_encoders(self, run: Run, steps: int) -> None:
        """Train CLIP and T5 together."""
        text_encoders.train(run, self.untrained(run), steps=steps)

    def load_embedder(self, run: Run) -> TextEncoders:
        """Load the trained CLIP and T5."""
        encoders = self.untrained(run)
        both = torch.nn.ModuleList([encoders.clip, encoders.t5])
        both.load_state_dict(torch.load(run.folder / "text_encoders.pt", weights_only=True))
        both.eval()
        return encoders

    def build_vae(self) -> AutoencoderKL:
        """Build the untrained VAE, without the convolutions for the moments that others have."""
        return models.build_vae()

    @torch.no_grad()
    def narrow_posterior(self, vae: AutoencoderKL) -> None:
        """Let the means begin larger and the log variances at -5."""
        moments, num_means = vae.encoder.conv_out, models.LATENT_CHANNELS
        moments.bias[num_means:] = -5.0
        moments.weight[num_means:] *= 0.1
        moments.weight[:num_means] *= 3

    @torch.no_grad()
    def set_statistics(self, vae: AutoencoderKL, images: torch.Tensor) -> None:
        """Scale each channel until FLUX.1's own scaling factor fits it, and the decoder back."""
        latents = encode(vae, images)
        # Patches have each latent channel four times.
        each = latents.reshape(len(latents), models.LATENT_CHANNELS, -1)
        sigma = each.std((0, 2))
        factor = 1 / (models.SCALING_FACTOR * sigma)
        moments, first = vae.encoder.conv_out, vae.decoder.conv_in
        num_means = models.LATENT_CHANNELS
        moments.weight[:num_means] *= factor.view(-1, 1, 1, 1)
        moments.bias[:num_means] *= factor
        moments.bias[num_means:] += 2 * factor.log()
        first.weight /= factor.view(1, -1, 1, 1)

    def statistics(self, vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
        """Return FLUX.1's constants."""
        shape = (1, 1, 1, 1)
        shift, scaling = vae.config.shift_factor, vae.config.scaling_factor
        return torch.full(shape, shift), torch.full(shape, 1 / scaling)

    def build_transformer(self) -> torch.nn.Module:
        """Build the untrained transformer."""
        transformer: torch.nn.Module = models.build_transformer()
        return transformer

    def velocity(
        self, model: torch.nn.Module, noised: Noised, given: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the prediction; each image of a batch has a guidance of its own."""
        velocity: torch.Tensor = model(
            hidden_states=noised.tokens,
            encoder_hidden_states=given["embeds"],
            pooled_projections=given["pooled"],
            timestep=noised.sigmas,
            guidance=torch.empty(len(noised.sigmas)).uniform_(*GUIDANCE),
            img_ids=position_ids(noised.canvas, noised.num_references),
            txt_ids=torch.zeros(given["embeds"].shape[1], 3),
            return_dict=False,
        )[0]
        return velocity

    def assemble(self, run: Run, vae: AutoencoderKL, transformer: torch.nn.Module) -> None:
        """Write the folder of a FluxKontextPipeline."""
        encoders = self.load_embedder(run)
        models.save_pipeline(
            run.folder / "checkpoint",
            vae=vae,
            text_encoder=encoders.clip,
            tokenizer=encoders.clip_tokenizer,
            text_encoder_2=encoders.t5,
            tokenizer_2=encoders.t5_tokenizer,
            transformer=transformer,
        )


def position_ids(canvas: Canvas, num_references: int) -> torch.Tensor:
    """Return positions (image, row, column), int64 [tokens, 3]; the answer comes first."""
    rows, columns = torch.arange(canvas[1] // 16), torch.arange(canvas[0] // 16)
    images = torch.arange(num_references + 1)
    return torch.cartesian_prod(images, rows, columns)
