"""A request in its replica: what the ranks answer to it, and its images on their way to files.

Image files, made on threads of the leader's own while the ranks go on with the next request.
"""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from flux_ray.engine.images import encode_image
from flux_ray.errors import FluxError
from flux_ray.request import (
    DenoisedImage,
    Encoded,
    EncodedPrompt,
    Encoding,
    Finished,
    GeneratedImage,
    ImageRequest,
    ImageResult,
    Preview,
    Progress,
    RequestEvent,
    RgbImage,
    StageTimes,
)

# One keeps up with any card; the second is for a file that takes long, such as a large webp.
NUM_THREADS = 2
# Images of which no file is made yet. Beyond them the ranks wait: pixels are many bytes.
MAX_WAITING = 8

Encode = Callable[[RgbImage, Encoding], bytes]
# And the seconds that its thread took.
Made = tuple[GeneratedImage, float]


class Files:
    """Makes files in about the order in which they are asked for. Pillow and ISA-L free the GIL."""

    def __init__(self, encode: Encode = encode_image) -> None:
        self._encode = encode
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="files")
        self._room = asyncio.Semaphore(MAX_WAITING)

    async def start(self, image: DenoisedImage, encoding: Encoding) -> "asyncio.Future[Made]":
        """Begin with the image's file, once there is room for it; cancel what is not wanted."""
        await self._room.acquire()
        loop = asyncio.get_running_loop()
        file = loop.run_in_executor(self._threads, self._make, image, encoding)
        file.add_done_callback(lambda _: self._room.release())
        return file

    def _make(self, image: DenoisedImage, encoding: Encoding) -> Made:
        began = time.perf_counter()
        data = self._encode(image.raster, encoding)
        return GeneratedImage(data, image.seed), time.perf_counter() - began


Observe = Callable[[str, float], None]


@dataclass(eq=False)
class ReplicaJob:
    """A request in this replica. A client that leaves cancels `result`; nothing else does.

    `began_at`: when its prompt was begun with, which may be before the ranks are free.
    """

    number: int
    request: ImageRequest
    result: asyncio.Future[ImageResult]
    # None at the end: then the result is there.
    events: asyncio.Queue[RequestEvent | None] = field(default_factory=asyncio.Queue)
    queued_at: float = field(default_factory=time.perf_counter)
    began_at: float = 0.0
    encoded: EncodedPrompt | None = None
    is_on_ranks: bool = False

    @property
    def has_left(self) -> bool:
        """Whether nobody waits for the result any more."""
        return self.result.done()

    def tell(self, event: RequestEvent) -> None:
        """Let the client hear, if it is still there."""
        if not self.has_left:
            self.events.put_nowait(event)

    def finish(self, outcome: ImageResult | BaseException) -> None:
        """Tell the client, if it is still there."""
        if self.has_left:
            return
        if isinstance(outcome, BaseException):
            self.result.set_exception(outcome)
        else:
            self.result.set_result(outcome)


class StageTimer:
    """Seconds by stage, and each of them told to `observe`."""

    def __init__(self, observe: Observe) -> None:
        self._observe = observe
        self._seconds: dict[str, float] = defaultdict(float)

    def add(self, stage: str, seconds: float) -> None:
        """One more of them."""
        self._seconds[stage] += seconds
        self._observe(stage, seconds)

    def wait(self, seconds: float) -> None:
        """So long the ranks had nothing to do but to wait for the prompt."""
        self._seconds["wait"] += seconds

    def total(self, queue_s: float, is_cached: bool) -> StageTimes:
        """The times of a request; preparing noise counts as encoding."""
        spent = self._seconds
        decode_s = spent["preview"] + spent["decode"]
        encode_s = spent["wait"] + spent["encode"] + spent["prepare"]
        return StageTimes(queue_s, encode_s, spent["denoise"], decode_s, is_cached, spent["file"])


class JobOutput:
    """What the ranks have answered of a job; its client hears of it.

    Files are made meanwhile, and are `files` in their order; those of previews are heard of in it.
    """

    def __init__(self, job: ReplicaJob, files: Files) -> None:
        self._job = job
        self._files = files
        self.said = Encoded((), is_cached=False)
        self.files: list[asyncio.Future[Made]] = []
        self.previews: deque[asyncio.Future[Made]] = deque()
        self._num_previews = self._num_finished = self._num_done = self._num_told = 0
        job.result.add_done_callback(lambda _: self._give_up())

    async def take(self, stage: str, value: object) -> None:
        """One more answer. It waits while too many images have no file yet."""
        if isinstance(value, Encoded):
            self.said = value
        elif stage == "denoise":
            self._num_done += 1
        elif isinstance(value, DenoisedImage) and not self._job.has_left:
            file = await self._files.start(value, self._job.request.encoding)
            if stage == "preview":
                self.previews.append(file)
                file.add_done_callback(lambda _: self._tell_previews())
            else:
                self.files.append(file)
                file.add_done_callback(lambda _: self._tell_finished())

    def tell_progress(self) -> None:
        """How far it is now. Steps that are answered at once would look as if they took no time."""
        if self._num_done > self._num_told:
            self._num_told = self._num_done
            self._job.tell(Progress(self._num_done, self._job.request.num_denoise_steps))

    def _tell_previews(self) -> None:
        """Those whose file is made, and no earlier one's is missing."""
        while self.previews and self.previews[0].done():
            file = self.previews.popleft()
            if not file.cancelled() and file.exception() is None:
                image, _ = file.result()
                self._job.tell(Preview(self._job.request.tier, image, self._num_previews))
                self._num_previews += 1

    def _tell_finished(self) -> None:
        """Images whose file is made, in their order; the last one is in the result anyway."""
        request = self._job.request
        last = min(len(self.files), request.num_images - 1)
        while self._num_finished < last and self.files[self._num_finished].done():
            file = self.files[self._num_finished]
            if file.cancelled() or file.exception() is not None:
                return
            self._job.tell(Finished(request.tier, file.result()[0], self._num_finished))
            self._num_finished += 1

    def _give_up(self) -> None:
        """Begin with no file that nobody waits for."""
        for file in (*self.files, *self.previews):
            file.cancel()

    async def deliver(self, times: StageTimer, queue_s: float) -> None:
        """Answer with the files when they are made; the ranks draw the next job meanwhile."""
        await asyncio.wait([*self.files, *self.previews])
        files = [file for file in self.files if not file.cancelled()]
        errors = [error for error in map(asyncio.Future.exception, files) if error is not None]
        if errors:
            self._job.finish(file_error(errors[0]))
        if self._job.has_left:
            return
        made = [file.result() for file in files]
        for _, seconds in made:
            times.add("file", seconds)
        request = self._job.request
        self._job.finish(
            ImageResult(
                request.request_id,
                request.tier,
                tuple(image for image, _ in made),
                times.total(queue_s, self.said.is_cached),
                self.said.warnings,
            )
        )


def file_error(error: BaseException) -> FluxError:
    """What a client is told of an image that was drawn and cannot be a file."""
    failed = FluxError(f"no file could be made of the image: {error}")
    failed.__cause__ = error
    return failed
