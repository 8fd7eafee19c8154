"""One rank: the process that holds the model, or its part of it, and the images being drawn."""

import logging
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from flux_ray.catalog import tier_for
from flux_ray.config import TierArgs
from flux_ray.errors import FluxError
from flux_ray.replica.process import card_here, free_memory, keep_memory, load_engine, out_of_memory
from flux_ray.replica.timer import GpuTimer, HostTimer, Launched, Timer, follows
from flux_ray.replica.transport import Address, RankServer, StageFailed
from flux_ray.replica.watchdog import LeaderWatch
from flux_ray.request import (
    DenoisedImage,
    Encoded,
    EncodedPrompt,
    ImageRequest,
    RgbImage,
    StageAnswer,
)

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from flux_ray.engine.api import Conditioning, ImageState
    from flux_ray.engine.encoding_cache import CachedEncoder
    from flux_ray.engine.registry import Adapter
    from flux_ray.parallel.mesh import Endpoint, Mesh

logger = logging.getLogger("ray.serve")

LOOPBACK = "127.0.0.1"
# A ping must be answered while a step runs, or Serve takes the replica for dead.
CONCURRENCY_GROUPS = {"control": 1}


@dataclass
class RankJob:
    """A job on this rank: what its images share, and the one being drawn.

    `encoded` is its prompt, where the shared text encoder encoded it; `seeds` are still to come.
    """

    request: ImageRequest
    encoded: EncodedPrompt | None
    seeds: list[int]
    conditioning: "Conditioning | None" = None
    seed: int = 0
    state: "ImageState | None" = None


def describe(error: Exception) -> str:
    """The error in one line."""
    from torch import OutOfMemoryError

    is_memory = isinstance(error, (MemoryError, OutOfMemoryError))
    return f"{'out of memory: ' if is_memory else ''}{type(error).__name__}: {error}"


def node_address() -> str:
    """Where the cluster's other nodes find this one."""
    host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return host


class RankActor:
    """The engine's stages by job number. Only the step loop has them run."""

    _mesh: "Mesh"
    _adapter: "Adapter"
    _encoding: "CachedEncoder"
    _store: "TCPStore | None" = None
    _extension: RankServer

    def __init__(self, rank: int, args: TierArgs) -> None:
        if args.device == "cpu":
            keep_memory()
        # All ranks spend these seconds at once, before any has to wait for another.
        load_engine()
        self._rank = rank
        self._args = args
        self._generations: dict[int, RankJob] = {}
        self._mistakes: dict[int, FluxError] = {}
        self._num_calls = 0
        self._leader = LeaderWatch(repr(self))

    def __repr__(self) -> str:
        """What Ray writes before its lines in the logs, and shows in the dashboard."""
        return f"{self._args.tier} rank {self._rank}"

    @property
    def _host(self) -> str:
        """Where this rank listens. A group on one node is reached from nowhere else."""
        return LOOPBACK if self._args.parallel.num_nodes == 1 else node_address()

    def create_store(self) -> "Endpoint | None":
        """Where the others find this rank, the first; None where there are none."""
        if self._args.parallel.num_ranks == 1:
            return None
        from flux_ray.parallel.mesh import Endpoint, open_store

        self._store = open_store(self._host, self._args.load_timeout_s)
        return Endpoint(self._host, self._store.port)

    def load(self, endpoint: "Endpoint | None") -> None:
        """Join the other ranks and load this one's part of the model."""
        import torch

        from flux_ray.engine.encoding_cache import CachedEncoder
        from flux_ray.engine.loading import Placement
        from flux_ray.engine.registry import load_adapter
        from flux_ray.parallel.mesh import connect_store, join_mesh

        args, timeout_s = self._args, self._args.load_timeout_s
        if args.device == "cpu":
            torch.set_num_threads(args.num_threads)
        store = self._store
        if self._rank > 0 and endpoint is not None:
            store = connect_store(endpoint, timeout_s)
        # The ranks' own patience must outlast the slowest disk; that of a step is the leader's.
        self._mesh = join_mesh(store, self._rank, args.parallel, args.device, timeout_s)
        placement = Placement(
            args.dtype,
            args.device,
            self._mesh,
            args.quantization,
            args.encoder_quantization,
            args.loras,
            args.text_encoder,
        )
        self._adapter = load_adapter(tier_for(args.tier), args.weights, placement)
        self._encoding = CachedEncoder(self._adapter, args.cache_bytes, args.device)

    @ray.method(concurrency_group="control")
    def ping(self) -> int:
        """The process id. Whoever asks for it is the leader, and lives."""
        self._leader.hear()
        return os.getpid()

    @ray.method(concurrency_group="control")
    def card(self) -> str | None:
        """The row of its card in `catalog.gpus`, if there is one."""
        return card_here(self._args.device)

    def listen(self) -> Address:
        """Where the leader finds this rank."""
        self._extension = RankServer(self._host)
        return self._extension.address

    def work(self) -> None:
        """Answer the leader's calls until it is gone, on the thread that loaded the model.

        torch has a number of threads, and CUDA a card, for every thread.
        """
        self._leader.start()
        try:
            self._extension.answer(self.run, follows)
        except Exception:
            # The leader sees a closed line, and ends both.
            logger.exception("%r cannot answer", self)
            raise

    def run(
        self,
        job: int,
        stages: tuple[str, ...],
        request: ImageRequest | None = None,
        encoded: EncodedPrompt | None = None,
    ) -> list[StageAnswer] | Launched:
        """These stages of a job, one after the other; with the first call comes its request.

        Steps on a card are only launched: the next ones can be queued behind them.
        A caller's mistake is raised as it is, also by calls that were sent before it was heard of,
        and so is OutOfMemory; any other error as StageFailed.
        """
        try:
            self.check_lockstep(job, stages)
            if request is not None:
                self._generations[job] = RankJob(request, encoded, list(request.seeds))
            return self.run_all(job, stages)
        except FluxError as error:
            self._mistakes[job] = error
            raise
        except Exception as error:
            lacking = out_of_memory(error, self._args.tier)
            if lacking is None:
                # As it is, an error of torch's would load torch where it arrives: seconds, in which
                # the leader answers nobody.
                raise StageFailed(describe(error)) from error
        # The error is gone by now, and what it held.
        self.make_room(job)
        self._mistakes[job] = lacking
        raise lacking

    def make_room(self, job: int) -> None:
        """Forget a job that took too much memory, and whatever can be made again.

        Among several ranks that is of no use: their group ends, out of step as they are.
        """
        self._generations.pop(job, None)
        if self._args.parallel.num_ranks == 1:
            self._encoding.forget()
            free_memory(self._args.device)

    def run_all(self, job: int, stages: tuple[str, ...]) -> list[StageAnswer] | Launched:
        """The stages; on a card, none waits for the one before it."""
        is_on_card = self._args.device == "cuda"
        timer: Timer = GpuTimer() if is_on_card else HostTimer()
        timer.mark()
        values = []
        for stage in stages:
            values.append(getattr(self, stage)(job))
            timer.mark()
        launched = Launched(values, timer, describe)
        return launched if is_on_card and follows(job, stages) else launched.answers()

    def check_lockstep(self, job: int, stages: tuple[str, ...]) -> None:
        """Raise LockstepBroken unless all ranks are here, for this job, after as many calls.

        One loop makes all calls, to every rank in the same order, so they do agree, and on who was
        cancelled too: that is a call that comes to none of them. If it ever were otherwise, the
        model itself would not notice, and mix two users' tensors.
        """
        from flux_ray.parallel.mesh import assert_same

        self._num_calls += 1
        # Short enough for its square to fit.
        assert_same(
            self._mesh.world, zlib.crc32(f"{self._num_calls} {job} {stages}".encode()) % 2**24
        )

    def generation(self, job: int) -> RankJob:
        """A job that was taken on."""
        if job in self._mistakes:
            raise self._mistakes[job]
        return self._generations[job]

    def encode(self, job: int) -> Encoded:
        """Encode a job's prompt and its references, where they are not known."""
        generation = self.generation(job)
        generation.conditioning, is_cached = self._encoding.encode(
            generation.request, generation.encoded
        )
        generation.encoded = None
        return Encoded(generation.conditioning.warnings, is_cached)

    def prepare(self, job: int) -> None:
        """Begin the job's next image."""
        from flux_ray.engine.api import ImageSpec

        generation = self.generation(job)
        request = generation.request
        canvas = ImageSpec(
            request.width,
            request.height,
            request.num_steps,
            request.guidance,
            has_previews=bool(request.preview_steps),
        )
        assert generation.conditioning is not None, "prepare before encode"
        generation.seed = generation.seeds.pop(0)
        generation.state = self._adapter.prepare(generation.conditioning, canvas, generation.seed)

    def denoise(self, job: int) -> None:
        """One step of the job's image."""
        generation = self.generation(job)
        assert generation.state is not None, "denoise before prepare"
        generation.state = self._adapter.denoise(generation.state)

    def preview(self, job: int) -> DenoisedImage | None:
        """What the job's image will be like, from rank 0."""
        return self.pixels(self.generation(job), self._adapter.preview)

    def decode(self, job: int) -> DenoisedImage | None:
        """The job's image, from rank 0. With its last one the job is over."""
        generation = self.generation(job)
        image = self.pixels(generation, self._adapter.decode)
        if not generation.seeds:
            self.drop(job)
        return image

    def pixels(
        self, generation: RankJob, generate: "Callable[[ImageState], RgbImage]"
    ) -> DenoisedImage | None:
        """The job's image as this draws it. The leader makes a file of it."""
        assert generation.state is not None, "pixels before prepare"
        if self._rank != 0:
            return None
        return DenoisedImage(generate(generation.state), generation.seed)

    def drop(self, job: int) -> None:
        """Forget a job, whatever became of it."""
        self._generations.pop(job, None)
        self._mistakes.pop(job, None)
