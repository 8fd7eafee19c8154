"""One rank: the process that holds the model, or its part of it, and the images in progress.

`RankActor` is created and loaded through Ray. Then the leader calls its stages over a socket of
its own (`transport.py`), and Ray only carries pings.
"""

import logging
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from flux_ray.catalog import tier_for
from flux_ray.config import TierArgs, use_gpu
from flux_ray.errors import FluxError
from flux_ray.replica.process import card_here, free_memory, keep_memory, load_engine, out_of_memory
from flux_ray.replica.timer import GpuTimer, HostTimer, Launched, Timer, follows
from flux_ray.replica.transport import Address, RankServer, StageFailed
from flux_ray.replica.watchdog import LeaderWatch
from flux_ray.request import ImageRequest, RgbImage
from flux_ray.stages import DenoisedImage, Encoded, EncodedPrompt, StageAnswer
from flux_ray.weights.start import parts_of_ranks, prepare_weights

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from flux_ray.engine.api import Adapter, Conditioning, ImageState
    from flux_ray.engine.encoding_cache import CachedEncoder
    from flux_ray.parallel.mesh import Endpoint, Mesh

logger = logging.getLogger("ray.serve")

LOOPBACK = "127.0.0.1"
# Pings have a thread of their own: they must be answered while a step runs, or Serve takes the
# replica for dead.
CONCURRENCY_GROUPS = {"control": 1}


@dataclass
class RankJob:
    """A job on this rank: what its images share, and the state of the current image.

    `encoded`: its prompts, if the tier's shared text encoder encoded them; empty once used.
    `seeds`: those of the images still to come. `seed` and `state` are the current image's.
    """

    request: ImageRequest
    encoded: tuple[EncodedPrompt, ...]
    seeds: list[int]
    conditioning: "Conditioning | None" = None
    seed: int = 0
    state: "ImageState | None" = None


def describe(error: Exception) -> str:
    """Return an error's type and message, with `out of memory: ` in front if it is that."""
    from torch import OutOfMemoryError

    is_memory = isinstance(error, (MemoryError, OutOfMemoryError))
    return f"{'out of memory: ' if is_memory else ''}{type(error).__name__}: {error}"


def node_address() -> str:
    """Return the address at which the cluster's other nodes reach this one."""
    host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return host


class RankActor:
    """The Ray actor that runs the engine's stages on one GPU, or on CPUs, for its leader.

    `load_ranks` calls `create_store` on the first rank, then `load`, `listen` and `work` on each.
    From then on `run` executes the stages by name, all on the thread of `work`, as only the
    leader's step loop asks for them; `ping` and `card` run on the thread for control.
    """

    _mesh: "Mesh"
    _adapter: "Adapter"
    _encoding: "CachedEncoder"
    _store: "TCPStore | None" = None
    _server: RankServer

    def __init__(self, rank: int, args: TierArgs, gpu_id: str | None = None) -> None:
        """Import the engine. `gpu_id`: the GPU to use, None for what Ray gives the actor."""
        if gpu_id is not None:
            use_gpu(gpu_id)
        if args.device == "cpu":
            keep_memory()
        # Here and not in `load`: the ranks spend these seconds at the same time, before one has to
        # wait for another.
        load_engine()
        self._rank = rank
        self._args = args
        self._jobs: dict[int, RankJob] = {}
        self._mistakes: dict[int, FluxError] = {}
        self._num_calls = 0
        self._leader = LeaderWatch(repr(self))

    def __repr__(self) -> str:
        """Name the rank as Ray should show it before its log lines and in the dashboard."""
        return f"{self._args.tier} rank {self._rank}"

    @property
    def _host(self) -> str:
        """Return the address to listen at: loopback unless the replica's ranks use two nodes."""
        return LOOPBACK if self._args.parallel.num_nodes == 1 else node_address()

    def create_store(self) -> "Endpoint | None":
        """Open the store in which the ranks meet, on the first rank, and return its endpoint.

        Return None if the replica has only one rank.
        """
        if self._args.parallel.num_ranks == 1:
            return None
        from flux_ray.parallel.mesh import Endpoint, open_store

        self._store = open_store(self._host, self._args.load_timeout_s)
        return Endpoint(self._host, self._store.port)

    def load(self, endpoint: "Endpoint | None") -> None:
        """Join the other ranks and load this one's part of the model.

        The leader has seen to the weights of its own node; a rank on another one does so here.
        """
        prepare_weights(self._args, parts_of_ranks(self._args))
        import torch

        from flux_ray.engine.api import Placement
        from flux_ray.engine.encoding_cache import CachedEncoder
        from flux_ray.engine.registry import load_adapter
        from flux_ray.parallel.mesh import connect_store, join_mesh

        args, timeout_s = self._args, self._args.load_timeout_s
        # On GPUs too: Ray goes by the actor's processors, and its leader has taken them.
        torch.set_num_threads(args.num_threads)
        store = self._store
        if self._rank > 0 and endpoint is not None:
            store = connect_store(endpoint, timeout_s)
        # Collectives wait as long as loading may take, since the slowest disk must not fail them.
        # The leader's watchdog limits the time of a step.
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
        """Return the process id. Only the leader calls this, so it shows that the leader lives."""
        self._leader.hear()
        return os.getpid()

    @ray.method(concurrency_group="control")
    def card(self) -> str | None:
        """Return the name of this rank's GPU in `catalog.gpus`, or None if it is unknown there."""
        return card_here(self._args.device)

    def listen(self) -> Address:
        """Listen for the leader, and return the address and token with which it connects."""
        self._server = RankServer(self._host)
        return self._server.address

    def work(self) -> None:
        """Answer the leader's calls until it is gone.

        This has to run on the thread that called `load`: torch's number of threads and CUDA's
        current device are set for each thread.
        """
        self._leader.start()
        try:
            self._server.answer(self.run, follows)
        except Exception:
            # The leader sees the closed connection, and ends the whole replica.
            logger.exception("%r cannot answer", self)
            raise

    def run(
        self,
        number: int,
        stages: tuple[str, ...],
        request: ImageRequest | None = None,
        encoded: tuple[EncodedPrompt, ...] = (),
    ) -> list[StageAnswer] | Launched:
        """Run these stages of a job one after the other; the first call of a job has its request.

        Return an answer for each stage. Denoise steps on a GPU are only launched, so that the next
        call can be queued behind them. Raise a FluxError as it is: a caller's mistake, or
        OutOfMemory. Calls for the job that were already on their way raise it again. Raise any
        other error as StageFailed.
        """
        try:
            self.check_lockstep(number, stages)
            if request is not None:
                self._jobs[number] = RankJob(request, encoded, list(request.seeds))
            return self.run_all(number, stages)
        except FluxError as error:
            self._mistakes[number] = error
            raise
        except Exception as error:
            lacking = out_of_memory(error, self._args.tier)
            if lacking is None:
                # Unpickling an error of torch would import torch in the leader: for seconds, it
                # would answer nobody.
                raise StageFailed(describe(error)) from error
        # Only here, outside of `except`, are the error and the tensors in its traceback free.
        self.make_room(number)
        self._mistakes[number] = lacking
        raise lacking

    def make_room(self, number: int) -> None:
        """Forget a job that took too much memory, and the encoding cache with it.

        Several ranks are out of step after this, so their group ends anyway, and only the job is
        forgotten.
        """
        self._jobs.pop(number, None)
        if self._args.parallel.num_ranks == 1:
            self._encoding.forget()
            free_memory(self._args.device)

    def run_all(self, number: int, stages: tuple[str, ...]) -> list[StageAnswer] | Launched:
        """Run the stages and time them; on a GPU, none waits until the one before it is done."""
        is_on_card = self._args.device == "cuda"
        timer: Timer = GpuTimer() if is_on_card else HostTimer()
        timer.mark()
        values = []
        for stage in stages:
            values.append(getattr(self, stage)(number))
            timer.mark()
        launched = Launched(values, timer, describe)
        return launched if is_on_card and follows(number, stages) else launched.answers()

    def check_lockstep(self, number: int, stages: tuple[str, ...]) -> None:
        """Raise LockstepBroken unless all ranks are at the same call, of the same job and stages.

        They are, since one loop sends all calls to all ranks in the same order, and a cancelled job
        only means that none of them gets another call. But if a bug ever broke this, the model
        would not notice: the collectives would mix two users' tensors.
        """
        from flux_ray.parallel.mesh import assert_same

        self._num_calls += 1
        # 24 bits: `assert_same` sums squares of the number, which must fit into an int64.
        assert_same(
            self._mesh.world, zlib.crc32(f"{self._num_calls} {number} {stages}".encode()) % 2**24
        )

    def job_of(self, number: int) -> RankJob:
        """Return the job of that number; raise again the error that it failed with."""
        if number in self._mistakes:
            raise self._mistakes[number]
        return self._jobs[number]

    def encode(self, number: int) -> Encoded:
        """Encode a job's prompt and references, or take them from the cache."""
        job = self.job_of(number)
        job.conditioning, is_cached = self._encoding.encode(job.request, job.encoded)
        job.encoded = ()
        return Encoded(job.conditioning.warnings, is_cached)

    def prepare(self, number: int) -> None:
        """Start the job's next image: take its seed and make its noise."""
        from flux_ray.engine.api import ImageSpec

        job = self.job_of(number)
        request = job.request
        canvas = ImageSpec(
            request.width,
            request.height,
            request.num_steps,
            request.guidance,
            has_previews=bool(request.preview_steps),
            true_cfg_scale=request.true_cfg_scale,
            strength=request.strength,
        )
        assert job.conditioning is not None, "prepare before encode"
        job.seed = job.seeds.pop(0)
        job.state = self._adapter.prepare(job.conditioning, canvas, job.seed)

    def denoise(self, number: int) -> None:
        """Run one denoise step of the job's current image."""
        job = self.job_of(number)
        assert job.state is not None, "denoise before prepare"
        job.state = self._adapter.denoise(job.state)

    def preview(self, number: int) -> DenoisedImage | None:
        """Return an estimate of the job's current image on rank 0, None on the other ranks."""
        return self.pixels(self.job_of(number), self._adapter.preview)

    def decode(self, number: int) -> DenoisedImage | None:
        """Return the job's finished image on rank 0, None on the other ranks.

        After the last image the job is forgotten.
        """
        job = self.job_of(number)
        image = self.pixels(job, self._adapter.decode)
        if not job.seeds:
            self.drop(number)
        return image

    def pixels(
        self, job: RankJob, generate: "Callable[[ImageState], RgbImage]"
    ) -> DenoisedImage | None:
        """Return the job's current image as `generate` makes its pixels; None except on rank 0.

        The leader makes a file of it, so that the GPU does not wait for that.
        """
        assert job.state is not None, "pixels before prepare"
        if self._rank != 0:
            return None
        return DenoisedImage(generate(job.state), job.seed)

    def drop(self, number: int) -> None:
        """Forget a job and its error, however it ended."""
        self._jobs.pop(number, None)
        self._mistakes.pop(number, None)
