"""Reference images and masks wherever they come from: a file part, base64, or a URL."""

import asyncio
import binascii
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

from starlette.datastructures import UploadFile

from flux_ray.config.gateway import Limits
from flux_ray.errors import BadReference
from flux_ray.gateway.images.decode import (
    SentImage,
    decode,
    decode_reference,
    is_large,
    whole_image,
)
from flux_ray.gateway.images.fetch import Fetcher
from flux_ray.gateway.images.file_formats import DECODERS, timed
from flux_ray.gateway.images.masks import decode_mask
from flux_ray.gateway.images.normalize import with_notes
from flux_ray.gateway.model_names import ResolvedModel
from flux_ray.request import Mask, RgbImage

Read = TypeVar("Read")

_DATA_PREFIX = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
# What PNG, JPEG and WEBP begin with in base64; no prompt is one long word.
_IMAGE = re.compile(r"data:image/|(iVBORw0KGgo|/9j/|UklGR)\S{50}", re.IGNORECASE)
_LISTED = re.compile(r"\[[0-9]{0,3}\]$")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,30}:", re.IGNORECASE)
# Both alphabets, and no line breaks.
_ALPHABET = bytes.maketrans(b"-_", b"+/")
_BREAKS = b" \t\r\n"


class ImageSource(NamedTuple):
    """One image as it was sent, and the field that it was sent in."""

    field: str
    content: UploadFile | str

    @property
    def param(self) -> str:
        """The field as errors name it: `image[]` and `image[0]` are `image`."""
        return _LISTED.sub("", self.field)


class ImageSources(NamedTuple):
    """All that a request was sent: references in order, and a mask of the first."""

    references: list[ImageSource]
    mask: ImageSource | None = None


class RequestImages(NamedTuple):
    """The same, decoded, and references as the tiers take them.

    `notes` are for the caller: what of them could not be used.
    """

    references: tuple[SentImage, ...] = ()
    mask: Mask | None = None
    notes: tuple[str, ...] = ()


async def read_images(
    sources: ImageSources,
    target: ResolvedModel,
    limits: Limits,
    fetcher: Fetcher,
    read_mask: Callable[[bytes, Limits, str], Mask] = decode_mask,
) -> RequestImages:
    """The decoded images, one at a time, so that one only is in memory undecoded and unscaled.

    Under a mask the first is left as it is: its scaled size is not known yet. `read_mask`: what of
    a mask is marked differs by dialect.
    """
    reader = reader_for(target, limits, fetcher)
    if sources.mask is None:
        references = await reader.read_references(sources.references)
        return RequestImages(references, None, tuple(reader.notes))
    first, *others = sources.references
    image = whole_image(await reader.read(first, "image 1", decode), reader.max_pixels)
    references = (image, *await reader.read_references(others, first=2))
    mask = await reader.read(sources.mask, "mask", read_mask)
    return RequestImages(references, mask, tuple(reader.notes))


async def read_with_alpha(
    sources: ImageSources,
    target: ResolvedModel,
    limits: Limits,
    fetcher: Fetcher,
    decode_first: Callable[[bytes, Limits, str], tuple[RgbImage, Mask | None]],
) -> RequestImages:
    """The decoded images, where the first one's alpha channel may be its mask."""
    reader = reader_for(target, limits, fetcher)
    first, *others = sources.references
    raster, mask = await reader.read(first, "image 1", decode_first)
    image = whole_image(raster, reader.max_pixels)
    references = (image, *await reader.read_references(others, first=2))
    return RequestImages(references, mask, tuple(reader.notes))


def reader_for(target: ResolvedModel, limits: Limits, fetcher: Fetcher) -> "ImageReader":
    """Of one request, from now on."""
    now_s = asyncio.get_running_loop().time()
    max_pixels = {tier.max_reference_pixels for tier in target.tiers}
    until_s = now_s + fetcher.fetching.timeout_s
    return ImageReader(limits, fetcher, until_s, max_pixels, DECODERS.next_order(), [])


@dataclass
class ImageReader:
    """Reads images of one request, not after `until_s` of the loop's clock.

    `max_pixels`: what the tiers that may serve it scale references down to. `order`: of requests
    that decode, those that came before it come first. `notes`: what the caller is to be told of
    the images that were read.
    """

    limits: Limits
    fetcher: Fetcher
    until_s: float
    max_pixels: Collection[int]
    order: int
    notes: list[str]

    async def read_references(
        self, sources: list[ImageSource], first: int = 1
    ) -> tuple[SentImage, ...]:
        """The images, of which the first is called number `first`."""
        decode = partial(decode_reference, max_pixels=self.max_pixels)
        return tuple(
            [
                await self.read(source, f"image {number}", decode)
                for number, source in enumerate(sources, start=first)
            ]
        )

    async def read(
        self, source: ImageSource, name: str, decode: Callable[[bytes, Limits, str], Read]
    ) -> Read:
        """One image; decoding takes a while, so it is done off the event loop."""
        content, limits = source.content, self.limits
        if isinstance(content, str):
            # Some clients end lines before a data URL, too.
            content = content.strip()
        try:
            if isinstance(content, UploadFile):
                data = await content.read(limits.max_image_bytes + 1)
            elif is_url(content):
                until_s = self.until_s
                data = await self.fetcher.read(content, limits.max_image_bytes, name, until_s)
            else:
                data = await DECODERS.run(self.order, lambda: decode_base64(content, limits, name))
            large = await DECODERS.run(self.order, lambda: is_large(data, limits, name))
            (value, notes), seconds = await DECODERS.run(
                self.order,
                lambda: timed(lambda: with_notes(lambda: decode(data, limits, name), name)),
                is_large=large,
            )
            self.order = DECODERS.order_after(self.order, seconds)
        except BadReference as error:
            raise BadReference(error.message, source.param) from None
        self.notes.extend(notes)
        return value


def is_url(text: str) -> bool:
    """Base64 has no colon, but in its data prefix."""
    return bool(_SCHEME.match(text)) and text[:5].lower() != "data:"


def is_image(text: str) -> bool:
    """Whether that is base64 of an image, and not words."""
    return _IMAGE.match(text[:200].lstrip()) is not None


def decode_base64(text: str, limits: Limits, name: str) -> bytes:
    """The bytes of base64, with or without a data prefix, whose type is not believed.

    How many they are is known before any of them is made.
    """
    prefix = _DATA_PREFIX.match(text)
    start = prefix.end() if prefix else 0
    # Lines of 76 characters end in two more.
    if (len(text) - start) * 76 // 78 * 3 // 4 > limits.max_image_bytes + 3:
        raise BadReference(f"{name} is larger than {limits.max_image_bytes} bytes")
    try:
        packed = text[start:].encode("ascii").translate(_ALPHABET, _BREAKS).rstrip(b"=")
        return binascii.a2b_base64(packed + b"=" * (-len(packed) % 4), strict_mode=True)
    except ValueError:
        raise BadReference(f"{name} is neither base64 nor a URL") from None
