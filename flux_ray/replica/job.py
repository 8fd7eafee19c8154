"""One request inside its replica: `ReplicaJob`, its output and its timings.

`JobOutput` collects what the ranks answer and tells the client's event queue. `Files` makes files
of the images on threads of the leader, while the ranks go on with the next request. All of it but
those threads runs on the leader's event loop.
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
from flux_ray.stages import DenoisedImage, Encoded, EncodedPrompt
from flux_ray.tracing import StageSpans

# One thread keeps up with any GPU; the second is for files that take long, such as a large webp.
NUM_THREADS = 2
# Images without a file yet, running or waiting. The ranks wait if there would be more: the pixels
# of one image are megabytes.
MAX_WAITING = 8

Encode = Callable[[RgbImage, Encoding], bytes]
# The image, and the seconds that its thread took to make the file.
Made = tuple[GeneratedImage, float]


class Files:
    """A pool of threads that make image files, about in the order in which they are asked for.

    Threads suffice, since Pillow and ISA-L release the GIL.
    """

    def __init__(self, encode: Encode = encode_image) -> None:
        self._encode = encode
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="files")
        self._room = asyncio.Semaphore(MAX_WAITING)

    async def start(self, image: DenoisedImage, encoding: Encoding) -> "asyncio.Future[Made]":
        """Wait for room, then start to make the image's file and return its future.

        Whoever does not want the file any more cancels the future.
        """
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
    """A request in this replica, made by `StepLoop.stream` for its client.

    The client leaves by cancelling `result`; nothing else cancels it. `number` names the job on
    the ranks. `began_at`: when the encoding of its prompt began, by `time.perf_counter`; the ranks
    may still work on the job before it then.
    """

    number: int
    request: ImageRequest
    result: asyncio.Future[ImageResult]
    # A None ends the events: the result is there, or the client has left.
    events: asyncio.Queue[RequestEvent | None] = field(default_factory=asyncio.Queue)
    queued_at: float = field(default_factory=time.perf_counter)
    spans: StageSpans = field(init=False)
    began_at: float = 0.0
    encoded: tuple[EncodedPrompt, ...] = ()
    is_on_ranks: bool = False

    def __post_init__(self) -> None:
        # Made here, where the client's span is the current one.
        self.spans = StageSpans(self.queued_at)

    @property
    def has_left(self) -> bool:
        """Return whether nobody waits for the result any more."""
        return self.result.done()

    def tell(self, event: RequestEvent) -> None:
        """Send the client an event, if it is still there."""
        if not self.has_left:
            self.events.put_nowait(event)

    def finish(self, outcome: ImageResult | BaseException) -> None:
        """Give the client the result or the error, if it is still there."""
        if self.has_left:
            return
        if isinstance(outcome, BaseException):
            self.result.set_exception(outcome)
        else:
            self.result.set_result(outcome)


class StageTimer:
    """The seconds that a job spent in each stage; `observe` is called with each one as it comes."""

    def __init__(self, observe: Observe) -> None:
        self._observe = observe
        self._seconds: dict[str, float] = defaultdict(float)

    def add(self, stage: str, seconds: float) -> None:
        """Add the seconds of one run of a stage."""
        self._seconds[stage] += seconds
        self._observe(stage, seconds)

    def wait(self, seconds: float) -> None:
        """Add seconds in which the ranks were idle, waiting for this job's prompt."""
        self._seconds["wait"] += seconds

    def total(self, queue_s: float, is_cached: bool) -> StageTimes:
        """Return the times of the request; waiting and preparing noise count as encoding."""
        spent = self._seconds
        decode_s = spent["preview"] + spent["decode"]
        encode_s = spent["wait"] + spent["encode"] + spent["prepare"]
        return StageTimes(queue_s, encode_s, spent["denoise"], decode_s, is_cached, spent["file"])


class JobOutput:
    """What the ranks have answered for one job, passed on to its client as events.

    `files` holds the futures of its images' files, in the order of the images. `previews` holds
    those of previews that have not been sent. Files may be done in any order, but are sent in this
    one.
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
        """Take in the ranks' answer to a stage; wait while too many images have no file yet."""
        if isinstance(value, Encoded):
            self.said = value
        elif stage == "denoise":
            self._num_done += 1
        elif isinstance(value, DenoisedImage) and not self._job.has_left:
            file = await self._files.start(value, self._job.request.encoding)
            file.add_done_callback(self._trace)
            if stage == "preview":
                self.previews.append(file)
                file.add_done_callback(lambda _: self._tell_previews())
            else:
                self.files.append(file)
                file.add_done_callback(lambda _: self._tell_finished())

    def tell_progress(self) -> None:
        """Send the client the number of steps done, if it has changed.

        Called once for each answered call: if each step of a call were sent on its own, all but the
        last would look as if they took no time.
        """
        if self._num_done > self._num_told:
            self._num_told = self._num_done
            self._job.tell(Progress(self._num_done, self._job.request.num_denoise_steps))

    def _tell_previews(self) -> None:
        """Send the previews whose files are made, up to the first that is missing."""
        while self.previews and self.previews[0].done():
            file = self.previews.popleft()
            # A preview without a file is left out: it must not fail the request.
            if not file.cancelled() and file.exception() is None:
                image, _ = file.result()
                self._job.tell(Preview(self._job.request.tier, image, self._num_previews))
                self._num_previews += 1

    def _tell_finished(self) -> None:
        """Send the images whose files are made, in their order, up to the first that is missing.

        The last image is not sent: it would come at the same moment as the result.
        """
        request = self._job.request
        last = min(len(self.files), request.num_images - 1)
        while self._num_finished < last and self.files[self._num_finished].done():
            file = self.files[self._num_finished]
            if file.cancelled() or file.exception() is not None:
                return
            self._job.tell(Finished(request.tier, file.result()[0], self._num_finished))
            self._num_finished += 1

    def _trace(self, file: "asyncio.Future[Made]") -> None:
        if not file.cancelled() and file.exception() is None:
            now = time.perf_counter()
            self._job.spans.add("file", now - file.result()[1], now)

    def _give_up(self) -> None:
        """Cancel the files that no thread has begun: nobody waits for them."""
        for file in (*self.files, *self.previews):
            file.cancel()

    async def deliver(self, times: StageTimer, queue_s: float) -> None:
        """Finish the job when all its files are made; the ranks work on the next job meanwhile."""
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
    """Return the client's error for an image that was generated but cannot be made a file."""
    failed = FluxError(f"no file could be made of the image: {error}")
    failed.__cause__ = error
    return failed
