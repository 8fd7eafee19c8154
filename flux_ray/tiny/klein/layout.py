"""The layout of FLUX.2 klein."""

from collections.abc import Mapping

import torch
from diffusers import AutoencoderKLFlux2
from transformers import Qwen2Tokenizer

from flux_ray.tiny.klein import models, text_encoder
from flux_ray.tiny.klein.text_encoder import SmallTextEncoder
from flux_ray.tiny.layout import Kind, Noised
from flux_ray.tiny.state import Run
from flux_ray.tiny.train_vae import encode
from flux_ray.tiny.world import Canvas


class Klein:
    """FLUX.2 klein: Qwen3, a VAE of 8 channels (FLUX.2's has 32), several references."""

    name = "klein"
    steps: Mapping[str, int] = {
        "text_encoders": 1500,
        "vae": 1500,
        "transformer": 7700,
        "decoder": 1000,
    }
    kinds: tuple[tuple[Kind, float], ...] = (("text", 0.45), ("edit", 0.4), ("combine", 0.15))
    empty_share = 0.0
    # 512 is the pipeline's default, and no mask hides the padding.
    text_lengths: tuple[tuple[int, float], ...] = ((32, 0.45), (48, 0.4), (128, 0.1), (512, 0.05))

    def save_tokenizers(self, run: Run) -> None:
        """Make the tokenizer, and save it in the run's folder."""
        models.build_tokenizer().save_pretrained(run.folder / "tokenizer")

    def load_tokenizer(self, run: Run) -> Qwen2Tokenizer:
        """Load the tokenizer of the first stage."""
        tokenizer: Qwen2Tokenizer = Qwen2Tokenizer.from_pretrained(run.folder / "tokenizer")
        return tokenizer

    def train_text_encoders(self, run: Run, steps: int) -> None:
        """Train a net of nine layers."""
        text_encoder.train(run, self.load_tokenizer(run), steps=steps)

    def load_embedder(self, run: Run) -> SmallTextEncoder:
        """Load the trained net of nine layers."""
        small = models.build_text_encoder(text_encoder.NUM_TRAINED_LAYERS)
        small.load_state_dict(torch.load(run.folder / "text_encoders.pt", weights_only=True))
        small.eval()  # type: ignore[no-untyped-call]
        return SmallTextEncoder(small, self.load_tokenizer(run))

    def build_vae(self) -> AutoencoderKLFlux2:
        """Build the untrained VAE."""
        return models.build_vae()

    @torch.no_grad()
    def narrow_posterior(self, vae: AutoencoderKLFlux2) -> None:
        """Let the means begin larger and the log variances at -5."""
        num_means = models.LATENT_CHANNELS
        vae.quant_conv.bias[num_means:] = -5.0
        vae.quant_conv.weight[num_means:] *= 0.1
        vae.quant_conv.weight[:num_means] *= 3

    @torch.no_grad()
    def set_statistics(self, vae: AutoencoderKLFlux2, images: torch.Tensor) -> None:
        """Set the mean and variance of the latents, which FLUX.2's VAE keeps in a BatchNorm."""
        latents = encode(vae, images)
        vae.bn.running_mean.copy_(latents.mean((0, 2, 3)))
        vae.bn.running_var.copy_(latents.var((0, 2, 3)))

    def statistics(self, vae: AutoencoderKLFlux2) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the statistics of the BatchNorm."""
        sigma = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        return vae.bn.running_mean.view(1, -1, 1, 1), sigma.view(1, -1, 1, 1)

    def build_transformer(self) -> torch.nn.Module:
        """Build the untrained transformer."""
        transformer: torch.nn.Module = models.build_transformer()
        return transformer

    def velocity(
        self, model: torch.nn.Module, noised: Noised, given: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the prediction of the transformer, which has no embedding of a guidance."""
        one = torch.arange(1)
        velocity: torch.Tensor = model(
            hidden_states=noised.tokens,
            encoder_hidden_states=given["embeds"],
            timestep=noised.sigmas,
            img_ids=position_ids(noised.canvas, noised.num_references),
            txt_ids=torch.cartesian_prod(one, one, one, torch.arange(given["embeds"].shape[1])),
            return_dict=False,
        )[0]
        return velocity

    def assemble(self, run: Run, vae: AutoencoderKLFlux2, transformer: torch.nn.Module) -> None:
        """Write the folder of a Flux2KleinPipeline, with a text encoder of all 28 layers."""
        embedder = self.load_embedder(run)
        models.save_pipeline(
            run.folder / "checkpoint",
            vae=vae,
            text_encoder=text_encoder.spread(embedder.small),
            tokenizer=embedder.tokenizer,
            transformer=transformer,
        )


def position_ids(canvas: Canvas, num_references: int) -> torch.Tensor:
    """Return FLUX.2's positions (t, h, w, l), int64 [tokens, 4].

    The answer comes first, with t = 0; the references follow with t = 10 and 20.
    """
    rows, columns = torch.arange(canvas[1] // 16), torch.arange(canvas[0] // 16)
    images = 10 * torch.arange(num_references + 1)
    return torch.cartesian_prod(images, rows, columns, torch.arange(1))
