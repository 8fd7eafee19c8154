"""What the ranks of a replica and its leader tell each other about a request's stages.

These values cross process borders, between the ranks, their leader and a tier's text encoder, which
are always of one version. They know neither torch nor Ray.
"""

from dataclasses import dataclass

from flux_ray.request import RgbImage


@dataclass(frozen=True)
class Encoded:
    """A rank's answer to the stage `encode`: its tensors stay on the rank.

    `warnings` tell the caller which part of the prompt was ignored. `is_cached`: the prompt or the
    references came from the rank's cache.
    """

    warnings: tuple[str, ...]
    is_cached: bool


@dataclass(frozen=True)
class StageAnswer:
    """A rank's answer to one stage of a request, and the seconds that the stage took there."""

    value: object
    seconds: float


@dataclass(frozen=True)
class PackedTensor:
    """A tensor on its way to another process: its bytes, shape and torch dtype."""

    data: bytes
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt encoded by a tier's shared text encoder, as tensors by the names of its family.

    `warnings` tell the caller which part of the prompt was ignored. `is_cached`: it came from the
    text encoder's cache.
    """

    tensors: tuple[tuple[str, PackedTensor], ...]
    warnings: tuple[str, ...] = ()
    is_cached: bool = False

    @property
    def num_bytes(self) -> int:
        """Return how many bytes the tensors take."""
        return sum(len(tensor.data) for _, tensor in self.tensors)


@dataclass(frozen=True)
class DenoisedImage:
    """One image as the ranks answer it: pixels, which the leader has still to make a file of."""

    raster: RgbImage
    seed: int
