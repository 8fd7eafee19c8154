"""One rank: the process that holds the model, or its part of it, and the images being drawn."""

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from flux_ray.catalog import tier_for
from flux_ray.config import TierArgs
from flux_ray.request import GeneratedImage, ImageRequest

if TYPE_CHECKING:
    from flux_ray.engine.state import Conditioning, ImageState

# A ping must be answered while a step runs, or Serve takes the replica for dead.
CONCURRENCY_GROUPS = {"control": 1, "watch": 1}


@dataclass
class Drawing:
    """A job on this rank: what its images share, and the one being drawn."""

    request: ImageRequest
    conditioning: "Conditioning"
    seed: int = 0
    state: "ImageState | None" = None


class RankActor:
    """The engine's stages as actor calls, by job number. Only the step loop calls them."""

    def __init__(self, rank: int, args: TierArgs) -> None:
        # Imported here, in the process that has the GPU: leader and gateway never load torch.
        from flux_ray.engine.adapter import load_adapter
        from flux_ray.engine.loading import Placement

        self._rank = rank
        self._adapter = load_adapter(
            tier_for(args.tier), args.weights, Placement(args.dtype, args.device)
        )
        self._drawings: dict[int, Drawing] = {}

    @ray.method(concurrency_group="control")
    def ping(self) -> int:
        """The process id."""
        return os.getpid()

    @ray.method(concurrency_group="watch")
    def live(self) -> None:
        """Never returns: the call ends when the rank does."""
        threading.Event().wait()

    def encode(self, job: int, request: ImageRequest) -> tuple[str, ...]:
        """Take on a job: encode its prompt and its references; warnings for the caller."""
        prompt = self._adapter.encode_prompt(request.prompt)
        conditioning = self._adapter.encode(prompt, request.references)
        self._drawings[job] = Drawing(request, conditioning)
        return conditioning.warnings

    def prepare(self, job: int, seed: int) -> None:
        """Begin the job's image of this seed."""
        from flux_ray.engine.state import Canvas

        drawing = self._drawings[job]
        request = drawing.request
        canvas = Canvas(request.width, request.height, request.num_steps, request.guidance)
        drawing.seed = seed
        drawing.state = self._adapter.prepare(drawing.conditioning, canvas, seed)

    def denoise(self, job: int) -> None:
        """One step of the job's image."""
        drawing = self._drawings[job]
        assert drawing.state is not None, "denoise before prepare"
        drawing.state = self._adapter.denoise(drawing.state)

    def decode(self, job: int) -> GeneratedImage | None:
        """The job's image as bytes, from rank 0."""
        from flux_ray.engine.pictures import encode_picture

        drawing = self._drawings[job]
        assert drawing.state is not None, "decode before prepare"
        if self._rank != 0:
            return None
        raster = self._adapter.decode(drawing.state)
        return GeneratedImage(encode_picture(raster, drawing.request.encoding), drawing.seed)

    def drop(self, job: int) -> None:
        """Forget a job, whatever became of it."""
        self._drawings.pop(job, None)
