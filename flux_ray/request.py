"""The values that cross process borders: a request for images, and its result.

Requests whose images are elsewhere until it is their turn; until then sizes and digests do.

Events of a request and then its result, as one stream of values.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Literal

# Of the values that gateways, the ledger, replicas and job rows tell each other. Raise it with
# every change of one of them: code of two numbers runs side by side while a cluster is upgraded.
PROTOCOL = 3

ImageFormat = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True)
class RgbImage:
    """Decoded pixels: `rgb` is height x width x 3 bytes, row by row."""

    width: int
    height: int
    rgb: bytes

    @cached_property
    def digest(self) -> bytes:
        """Of its pixels; two milliseconds a megapixel, once."""
        digest = sha256(b"%dx%d " % (self.width, self.height))
        digest.update(self.rgb)
        return digest.digest()


@dataclass(frozen=True)
class Mask:
    """Which pixels of an image to draw anew: `marks` has a byte for each, 255 there, else 0."""

    width: int
    height: int
    marks: bytes


@dataclass(frozen=True)
class Encoding:
    """How an image becomes bytes; `quality` (0..100) counts for jpeg and webp.

    `scaled_to`: width and height to which it is scaled first, where that is not how it is drawn.
    """

    format: ImageFormat = "png"
    quality: int = 95
    scaled_to: tuple[int, int] | None = None


@dataclass(frozen=True)
class ImageRequest:
    """What a caller asked for, complete: defaults filled in, everything checked.

    With a `mask`, the first reference is the image that is edited: it is scaled to the size that
    is drawn, and the rest of it stays. `num_previews` is of each image, while it is drawn.
    """

    request_id: str
    tier: str
    prompt: str
    width: int
    height: int
    num_steps: int
    guidance: float
    seed: int
    num_images: int = 1
    references: tuple[RgbImage, ...] = ()
    encoding: Encoding = Encoding()
    mask: Mask | None = None
    num_previews: int = 0

    @property
    def preview_steps(self) -> tuple[int, ...]:
        """After how many steps of an image it is previewed: evenly spread, never after the last.

        They are fewer than `num_previews` where there are too few steps.
        """
        share = self.num_steps / (self.num_previews + 1)
        steps = {round(number * share) for number in range(1, self.num_previews + 1)}
        return tuple(sorted(steps - {0, self.num_steps}))

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed an image: seed, seed + 1, ..."""
        return tuple(range(self.seed, self.seed + self.num_images))

    @property
    def num_denoise_steps(self) -> int:
        """Of all its images."""
        return self.num_steps * self.num_images

    @property
    def prompt_name(self) -> str:
        """What caches call its prompt: the same words, the same name."""
        return f"p:{sha256(self.prompt.encode()).hexdigest()}"

    @property
    def references_name(self) -> str:
        """What caches call its references as they are encoded, all of them in their order."""
        digests = b"".join(reference.digest for reference in self.references)
        for raster, size in zip(self.references, self.reference_sizes, strict=True):
            if (raster.width, raster.height) != size:
                digests += b"%dx%d" % size
        return f"r:{sha256(digests).hexdigest()}"

    @property
    def reference_sizes(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each, as the model is given them."""
        sizes = tuple((each.width, each.height) for each in self.references)
        return sizes if self.mask is None else ((self.width, self.height), *sizes[1:])

    @property
    def output_size(self) -> tuple[int, int]:
        """Return width and height of its images as they are encoded."""
        return self.encoding.scaled_to or (self.width, self.height)

    @property
    def megapixels(self) -> float:
        """Of all its images."""
        return self.width * self.height * self.num_images / 1e6


@dataclass(frozen=True)
class Encoded:
    """What a rank says of an encoded request: its warnings, and whether it knew any of it."""

    warnings: tuple[str, ...]
    is_cached: bool


@dataclass(frozen=True)
class StageAnswer:
    """What a rank says of one stage of a request, and the seconds that it took."""

    value: object
    seconds: float


@dataclass(frozen=True)
class EncodedPrompt:
    """What a shared text encoder says of a prompt: a tensor's bytes, its shape and torch dtype.

    `warnings` are for the caller: what of the prompt was not heeded. `is_cached`: it was known.
    """

    data: bytes
    shape: tuple[int, ...]
    dtype: str
    warnings: tuple[str, ...] = ()
    is_cached: bool = False


@dataclass(frozen=True)
class DenoisedImage:
    """One image as the ranks answer it: pixels, of which a file is still to be made."""

    raster: RgbImage
    seed: int


@dataclass(frozen=True)
class GeneratedImage:
    """One image as encoded bytes."""

    data: bytes
    seed: int


@dataclass(frozen=True)
class Progress:
    """How many denoise steps of a request are done, of all that its images take.

    It begins anew where a second replica draws what the first did not live to finish.
    """

    num_done: int
    num_steps: int

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.num_done / self.num_steps


@dataclass(frozen=True)
class Preview:
    """What an image of a request will look like; `number` counts its previews, from 0."""

    tier: str
    image: GeneratedImage
    number: int


@dataclass(frozen=True)
class Finished:
    """An image of a request that has more to come; `index` counts its images, from 0.

    The last one comes with the result. A second replica begins anew, with the same images.
    """

    tier: str
    image: GeneratedImage
    index: int


@dataclass(frozen=True)
class QueuePosition:
    """Where a waiting request stands: 0 is next, and in so many seconds it is done.

    `expected_s` is the ledger's forecast of now; None where no replica is up.
    """

    position: int
    expected_s: float | None


@dataclass(frozen=True)
class RanksDone:
    """The replica is free for another request: only files are still made of this one's images."""


# What is heard of a request before its result, in the caller's own event loop.
RequestEvent = QueuePosition | Progress | Preview | Finished | RanksDone
OnEvent = Callable[[RequestEvent], None]


@dataclass(frozen=True)
class StageTimes:
    """Seconds that a request spent in the stages of its replica; previews count as decoding.

    `is_cached`: part of what is encoded was known, so that `encode_s` says nothing of another's.
    `file_s` is of the threads that make files of the images, while the ranks do something else.
    """

    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    is_cached: bool = False
    file_s: float = 0.0

    @property
    def replica_s(self) -> float:
        """Seconds in which its ranks worked on it, and on nothing else."""
        return self.encode_s + self.denoise_s + self.decode_s


@dataclass(frozen=True)
class ImageResult:
    """The images of one request, and what it took.

    `layout` is what the replica that drew them calls its layout in its `describe`.
    """

    request_id: str
    tier: str
    images: tuple[GeneratedImage, ...]
    times: StageTimes
    warnings: tuple[str, ...] = ()
    layout: str = ""


Load = Callable[[], Awaitable[ImageRequest]]


@dataclass(frozen=True)
class DeferredRequest(ImageRequest):
    """A request that has outlines for references: enough to price it, and to name it in caches.

    `load` brings the whole one. Call it when a replica is granted, not before: of all requests
    that wait together, a gateway could not hold the pixels.
    """

    load: Load = field(kw_only=True, compare=False, repr=False)


def outline_of(width: int, height: int, digest: bytes) -> RgbImage:
    """Return a raster without pixels, which caches name as the one that it stands for."""
    outline = RgbImage(width, height, b"")
    # Where the cached property would keep it.
    outline.__dict__["digest"] = digest
    return outline


async def loaded(request: ImageRequest) -> ImageRequest:
    """Return the request with all its pixels. Raises what its `load` raises."""
    return await request.load() if isinstance(request, DeferredRequest) else request


# Events of a request and, as its last value, the result. Close it to leave.
EventStream = AsyncGenerator[RequestEvent | ImageResult, None]
Generate = Callable[[OnEvent], Awaitable[ImageResult]]


def ignore_event(event: RequestEvent) -> None:
    """Where only the result counts."""


async def last_of(events: EventStream, on_event: OnEvent = ignore_event) -> ImageResult:
    """Return the result that a stream ends with; what comes before it goes to `on_event`."""
    result: ImageResult | None = None
    async with aclosing(events):
        async for event in events:
            if isinstance(event, ImageResult):
                result = event
            else:
                on_event(event)
    assert result is not None, "a stream ends with the images or an error"
    return result


async def stream_events(generate: Generate) -> EventStream:
    """Yield what `generate` tells, then what it returns; raise its errors. Close it to leave."""
    heard: asyncio.Queue[RequestEvent | None] = asyncio.Queue()
    generation = asyncio.ensure_future(generate(heard.put_nowait))
    generation.add_done_callback(lambda _: heard.put_nowait(None))
    try:
        while (news := await heard.get()) is not None:
            yield news
        yield await generation
    finally:
        generation.cancel()
        await asyncio.gather(generation, return_exceptions=True)
