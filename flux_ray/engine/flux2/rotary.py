"""Rotary tables that are computed once per image and passed to every step.

diffusers' FLUX.2 transformer takes position ids and builds its tables from them in fp64, in every
forward: about 150 small operations for values that depend only on the image's size, its references
and the length of its prompt.
"""

import torch
from torch import Tensor, nn


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
