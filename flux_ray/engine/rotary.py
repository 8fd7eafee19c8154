"""Compute a transformer's rotary tables once per image instead of in every forward."""

import torch
from torch import Tensor, nn


class TableEmbedder(nn.Module):
    """A replacement for a transformer's `pos_embed`: it takes position ids, or a finished table.

    The transformer itself would build its tables from ids in fp64 in every forward, about 150
    small operations for values that never change. It takes ids too, so that the diffusers pipeline
    that owns the transformer still works when it is called by itself. The width tells them apart:
    ids have one column for each axis.
    """

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder

    @property
    def num_axes(self) -> int:
        """Return how many numbers the id of a position has."""
        return len(self.embedder.axes_dim)

    def table(self, ids: Tensor) -> Tensor:
        """Return the cosines and sines for ids [..., tokens, axes]: fp32 [..., tokens, 2 x head].

        Tokens are along the same dimension as in the ids, where sequence parallel cuts them.
        """
        table = torch.cat(self.embedder(ids.flatten(0, -2)), dim=-1)
        return table.unflatten(0, ids.shape[:-1])

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each fp32 [tokens, head_dim], for ids or a table of `table`.

        `ids` is [tokens, axes] or [tokens, 2 x head_dim].
        """
        if ids.shape[-1] == self.num_axes:
            cosines, sines = self.embedder(ids)
            return cosines, sines
        cosines, sines = ids.chunk(2, dim=-1)
        return cosines, sines
