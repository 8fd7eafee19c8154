"""What a caller asks for and gets: `ImageRequest`, the events on its way, and `ImageResult`.

These values cross process borders, between gateways, the ledger, replicas and job rows, so all are
frozen. A `DeferredRequest` waits in the queue without its pixels, and loads them when a replica is
assigned. `EventStream` is what every layer from replica to gateway yields: events, then the result.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Literal, TypeVar

# The version of the values that gateways, the ledger, replicas and job rows tell each other. Raise
# it once for each release that changes one of them: code of two versions runs side by side while a
# cluster is upgraded.
PROTOCOL = 4

ImageFormat = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True)
class RgbImage:
    """A decoded image: `rgb` is height x width x 3 bytes, row by row, without padding."""

    width: int
    height: int
    rgb: bytes

    @cached_property
    def digest(self) -> bytes:
        """Return the SHA-256 of size and pixels: 2 ms a megapixel, computed once and kept."""
        digest = sha256(b"%dx%d " % (self.width, self.height))
        digest.update(self.rgb)
        return digest.digest()


@dataclass(frozen=True)
class Mask:
    """The pixels of an image to generate anew.

    `marks` is height x width bytes, row by row: 255 to generate the pixel anew, 0 to keep it.
    """

    width: int
    height: int
    marks: bytes

    @cached_property
    def digest(self) -> bytes:
        """Return the SHA-256 of size and marks, computed once and kept."""
        return sha256(b"%dx%d " % (self.width, self.height) + self.marks).digest()


@dataclass(frozen=True)
class Encoding:
    """How the pixels of an image become a file; `quality` (0..100) is for jpeg and webp only.

    `scaled_to`: the width and height in pixels to scale it to first, or None to keep the size in
    which it was generated. `cropped_to`: left, top, right and bottom in pixels of the part to keep,
    of an image that was generated on a larger canvas.
    """

    format: ImageFormat = "png"
    quality: int = 95
    scaled_to: tuple[int, int] | None = None
    cropped_to: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class ImageRequest:
    """What a caller asked for, complete: defaults are filled in and everything is checked.

    `width` and `height`: pixels of each generated image. `seed` is that of the first image. With a
    `mask`, the first reference is the image to edit: it is scaled to `width` x `height`, and stays
    as it is outside the mask; `strength` (0..1) is the share of its noise that is put in at the
    start. `num_previews`: how many previews to send of each image. `negative_prompt`: what to steer
    away from by `true_cfg_scale`, with a second forward in each step; None for one forward.
    `follows_reference`: the only reference has edges or depths that the image follows, and is
    scaled to its size. `allow_truncation`: a prompt that is JSON may be cut, as all others are.
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
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    strength: float = 1.0
    follows_reference: bool = False
    allow_truncation: bool = False

    @property
    def preview_steps(self) -> tuple[int, ...]:
        """Return the numbers of denoise steps after which an image is previewed, evenly spread.

        The last step is never among them. There are fewer than `num_previews` if an image has too
        few steps for so many.
        """
        share = self.num_steps_made / (self.num_previews + 1)
        steps = {round(number * share) for number in range(1, self.num_previews + 1)}
        return tuple(sorted(steps - {0, self.num_steps_made}))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return one seed for each image: `seed`, `seed` + 1, and so on."""
        return tuple(range(self.seed, self.seed + self.num_images))

    @property
    def num_denoise_steps(self) -> int:
        """Return the number of denoise steps of all its images together."""
        return self.num_steps_made * self.num_images

    @property
    def num_steps_made(self) -> int:
        """Return the denoise steps of each image: all, but for those that `strength` leaves out."""
        if self.mask is None:
            return self.num_steps
        return self.num_steps - first_step(self.num_steps, self.strength)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return what is encoded: the prompt, and the one to steer away from if there is one."""
        return (
            (self.prompt,) if self.negative_prompt is None else (self.prompt, self.negative_prompt)
        )

    @property
    def has_json(self) -> bool:
        """Return whether the prompt is a JSON object or array."""
        if not self.prompt.lstrip().startswith(("{", "[")):
            return False
        try:
            json.loads(self.prompt)
        except (ValueError, RecursionError):
            return False
        return True

    @property
    def num_forwards(self) -> int:
        """Return how often the transformer runs in each denoise step: once for each prompt."""
        return len(self.prompts)

    @property
    def prompt_name(self) -> str:
        """Return the name under which caches keep its encoded prompt."""
        return name_of_prompt(self.prompt)

    @property
    def references_name(self) -> str:
        """Return the name under which caches keep its encoded references.

        It is a digest of all references in their order, and of the size of one that is scaled
        before it is encoded: the same pixels have another encoding then.
        """
        digests = b"".join(reference.digest for reference in self.references)
        for raster, size in zip(self.references, self.reference_sizes, strict=True):
            if (raster.width, raster.height) != size:
                digests += b"%dx%d" % size
        return f"r:{sha256(digests).hexdigest()}"

    @property
    def reference_sizes(self) -> tuple[tuple[int, int], ...]:
        """Return width and height of each reference in pixels, as the model is given them."""
        sizes = tuple((each.width, each.height) for each in self.references)
        return ((self.width, self.height), *sizes[1:]) if self.fits_reference else sizes

    @property
    def fits_reference(self) -> bool:
        """Return whether the first reference is scaled to the size that is generated."""
        return self.mask is not None or self.follows_reference

    @property
    def output_size(self) -> tuple[int, int]:
        """Return width and height in pixels of the image files that the caller gets."""
        if self.encoding.cropped_to is not None:
            left, top, right, bottom = self.encoding.cropped_to
            return right - left, bottom - top
        return self.encoding.scaled_to or (self.width, self.height)

    @property
    def megapixels(self) -> float:
        """Return the generated megapixels of all its images together."""
        return self.width * self.height * self.num_images / 1e6


def first_step(num_steps: int, strength: float) -> int:
    """Return how many steps of a schedule are left out at the start for a `strength` below 1.

    The last step is never left out. It is rounded as diffusers does it.
    """
    return min(int(num_steps - num_steps * strength), num_steps - 1)


def name_of_prompt(words: str) -> str:
    """Return the name under which caches keep an encoded prompt: a digest of its words."""
    return f"p:{sha256(words.encode()).hexdigest()}"


@dataclass(frozen=True)
class GeneratedImage:
    """One generated image: the bytes of its file, and the seed that generates it again."""

    data: bytes
    seed: int


@dataclass(frozen=True)
class Progress:
    """How many denoise steps of a request are done, out of those of all its images.

    It starts again at 0 if the replica dies and a second one generates the images.
    """

    num_done: int
    num_steps: int

    @property
    def share(self) -> float:
        """Return the fraction that is done, from 0 to 1."""
        return self.num_done / self.num_steps


@dataclass(frozen=True)
class Preview:
    """What an image of a request will look like; `number` counts the request's previews from 0."""

    tier: str
    image: GeneratedImage
    number: int


@dataclass(frozen=True)
class Finished:
    """A finished image of a request that has more to come; `index` counts its images from 0.

    The last image comes only with the result. If the replica dies and a second one takes over, the
    same images come again from index 0.
    """

    tier: str
    image: GeneratedImage
    index: int


@dataclass(frozen=True)
class QueuePosition:
    """The place of a waiting request in its tier's queue; at `position` 0 it is the next.

    `expected_s`: the ledger's forecast of the seconds until it is done, or None if no replica is
    up.
    """

    position: int
    expected_s: float | None


@dataclass(frozen=True)
class RanksDone:
    """The event that the ranks are free for another request: only files are still to be made."""


# What a request's stream yields before its result. `OnEvent` is called in the event loop of whoever
# passed it.
RequestEvent = QueuePosition | Progress | Preview | Finished | RanksDone
OnEvent = Callable[[RequestEvent], None]


@dataclass(frozen=True)
class StageTimes:
    """Seconds that a request spent in the stages of its replica; previews count as decoding.

    `is_cached`: part of the encoding came from a cache, so `encode_s` must not be used to price
    other requests. `file_s`: seconds of the threads that make files of the images, while the ranks
    work on the next request.
    """

    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    is_cached: bool = False
    file_s: float = 0.0

    @property
    def replica_s(self) -> float:
        """Return the replica seconds it used: those in which the ranks worked on nothing else."""
        return self.encode_s + self.denoise_s + self.decode_s


@dataclass(frozen=True)
class ImageResult:
    """The images of one request, and the seconds that they took.

    `warnings` tell the caller which part of the request was ignored. `layout`: the name by which
    the replica that generated them describes its layout, so that prices learn from the right one.
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
    """A request whose references are outlines without pixels: enough to price and route it.

    `load` returns the complete request. Call it only once a replica is assigned: the pixels of all
    waiting requests together would not fit into a gateway's memory.
    """

    load: Load = field(kw_only=True, compare=False, repr=False)


Outline = TypeVar("Outline", bound=RgbImage | Mask)


def outline_of(outline: Outline, digest: bytes) -> Outline:
    """Return an image or mask without pixels, with the digest of the one it stands for.

    `references_name` is therefore the same for both, and the router finds their cached encoding.
    """
    # The cached property is read from here; it would otherwise hash the pixels that are missing.
    outline.__dict__["digest"] = digest
    return outline


async def loaded(request: ImageRequest) -> ImageRequest:
    """Return the request with all its pixels; raise what its `load` raises."""
    return await request.load() if isinstance(request, DeferredRequest) else request


# The events of a request and, as the last value, its result. Closing it cancels the request.
EventStream = AsyncGenerator[RequestEvent | ImageResult, None]
Generate = Callable[[OnEvent], Awaitable[ImageResult]]


def ignore_event(event: RequestEvent) -> None:
    """Ignore an event: the default for callers that want only the result."""


async def last_of(events: EventStream, on_event: OnEvent = ignore_event) -> ImageResult:
    """Return the result at the end of a stream, and call `on_event` with each event before it."""
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
    """Yield the events that `generate` reports, then the result it returns; raise its errors.

    `generate` runs in a task of its own, which is cancelled when this stream is closed.
    """
    heard: asyncio.Queue[RequestEvent | None] = asyncio.Queue()
    generation = asyncio.ensure_future(generate(heard.put_nowait))
    generation.add_done_callback(lambda _: heard.put_nowait(None))
    try:
        while (news := await heard.get()) is not None:
            yield news
        yield await generation
    finally:
        generation.cancel()
        # Await it even if it failed: asyncio complains of errors that nobody retrieved.
        await asyncio.gather(generation, return_exceptions=True)
