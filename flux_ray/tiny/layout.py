"""What the recipe must know of a model's layout: its parts, and how its pipeline joins them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from flux_ray.tiny.state import Run
from flux_ray.tiny.world import Canvas

Kind = Literal["text", "edit", "combine"]


@dataclass(frozen=True)
class Noised:
    """Images mixed with noise, as the transformer gets them.

    `tokens`: fp32 [n, tokens of the image and of its references, channels]; `sigmas`: the noise
    levels, fp32 [n].
    """

    tokens: torch.Tensor
    sigmas: torch.Tensor
    canvas: Canvas
    num_references: int


class Embedder(Protocol):
    """A layout's trained text encoders."""

    def embed(self, prompts: list[str], length: int) -> dict[str, torch.Tensor]:
        """Return what the transformer takes of prompts that are padded to `length`, by name.

        `embeds`: fp32 [n, length, width]. Others have one row a prompt.
        """


class Layout(Protocol):
    """A layout that the recipe can train: klein's or Kontext's.

    `kinds`: the kinds of tasks that its pipeline can do, each with its share of the batches.
    `empty_share`: of captions that are left out. `text_lengths`: padded text lengths and how often
    each is chosen. `steps`: of each stage, for the published checkpoint.
    """

    name: str
    steps: Mapping[str, int]
    kinds: tuple[tuple[Kind, float], ...]
    empty_share: float
    text_lengths: tuple[tuple[int, float], ...]

    def save_tokenizers(self, run: Run) -> None:
        """Make the tokenizers, and save them in the run's folder."""

    def train_text_encoders(self, run: Run, steps: int) -> None:
        """Train the text encoders to hold a prompt's parse."""

    def load_embedder(self, run: Run) -> Embedder:
        """Load the trained text encoders."""

    def build_vae(self) -> Any:
        """Build the untrained VAE."""

    def narrow_posterior(self, vae: Any) -> None:
        """Begin with a narrow posterior: at logvar 0, noise would drown the latents for long."""

    def set_statistics(self, vae: Any, images: torch.Tensor) -> None:
        """Make the latents that the transformer sees about unit normal, by uint8 [n, 3, h, w]."""

    def statistics(self, vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean and standard deviation that normalise patches, [1, channels, 1, 1]."""

    def build_transformer(self) -> torch.nn.Module:
        """Build the untrained transformer."""

    def velocity(
        self, model: torch.nn.Module, noised: Noised, given: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return what the transformer predicts for all tokens; `given` is what prompts gave."""

    def assemble(self, run: Run, vae: Any, transformer: torch.nn.Module) -> None:
        """Put all parts together in a checkpoint folder, `checkpoint` in the run's folder."""
