"""Read the images of a request, wherever they come from: a file part, base64, or a URL.

`read_images` is the entry point; it downloads and decodes one image after the other.
"""

import asyncio
import binascii
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

from starlette.datastructures import UploadFile

from flux_ray.catalog import ReferenceLimit
from flux_ray.config import Limits
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
from flux_ray.gateway.images.masks import decode_erased, decode_mask
from flux_ray.gateway.images.normalize import with_notes
from flux_ray.gateway.model_names import ResolvedModel
from flux_ray.request import Mask, RgbImage

Read = TypeVar("Read")

_DATA_PREFIX = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
# What PNG, JPEG and WEBP begin with in base64. A prompt has no word of that length.
_IMAGE = re.compile(r"data:image/|(iVBORw0KGgo|/9j/|UklGR)\S{50}", re.IGNORECASE)
_LISTED = re.compile(r"\[[0-9]{0,3}\]$")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,30}:", re.IGNORECASE)
# Translates base64's URL alphabet to the usual one.
_ALPHABET = bytes.maketrans(b"-_", b"+/")
# Line breaks and spaces, which many encoders put into base64.
_BREAKS = b" \t\r\n"


class ImageSource(NamedTuple):
    """One image as it was sent, and the field in which it was sent."""

    field: str
    content: UploadFile | str

    @property
    def param(self) -> str:
        """Return the field's name as errors give it: `image` for `image[]` and `image[0]`."""
        return _LISTED.sub("", self.field)


class ImageSources(NamedTuple):
    """All images of a request: references in order, and a mask for the first of them.

    `is_control`: the only reference is a control image.
    """

    references: list[ImageSource]
    mask: ImageSource | None = None
    is_control: bool = False


class RequestImages(NamedTuple):
    """The decoded images of a request.

    `references` are scaled as the tiers take them. `notes` tell the caller what of the images could
    not be used. `is_control`: the only reference is a control image. `mask_name`: the field in
    which the mask was sent.
    """

    references: tuple[SentImage, ...] = ()
    mask: Mask | None = None
    notes: tuple[str, ...] = ()
    is_control: bool = False
    mask_name: str = "mask"


# Decodes an image together with a mask from its alpha channel, if that is one.
DecodeErased = Callable[[bytes, Limits, str], tuple[RgbImage, Mask | None]]


async def read_images(
    sources: ImageSources,
    target: ResolvedModel,
    limits: Limits,
    fetcher: Fetcher,
    read_mask: Callable[[bytes, Limits, str], Mask] = decode_mask,
    read_erased: DecodeErased | None = None,
) -> RequestImages:
    """Return the decoded images of a request. Raise BadReference or Overloaded.

    They are read one at a time, so that only one is in memory undecoded and unscaled. An image
    under a mask and a control image are not scaled, as their size is only known later. `read_mask`
    decodes the mask by the dialect's rule. Without a mask, `read_erased` decodes the first image if
    that may have one in its alpha channel; it always may where the tiers require a mask.
    """
    reader = reader_for(target, limits, fetcher)
    if read_erased is None and target.requires_mask:
        read_erased = decode_erased
    is_whole = sources.mask is not None or sources.is_control or read_erased is not None
    if not sources.references or not is_whole:
        references = await reader.read_references(sources.references)
        return RequestImages(references, None, tuple(reader.notes))
    first, *others = sources.references
    mask, is_control = None, sources.is_control
    if sources.mask is None and read_erased is not None and not is_control:
        raster, mask = await reader.read(first, "image 1", read_erased)
    else:
        raster = await reader.read(first, "control image" if is_control else "image 1", decode)
    image = whole_image(raster, reader.scales)
    references = (image, *await reader.read_references(others, first=2))
    mask_name = "mask"
    if sources.mask is not None:
        mask = await reader.read(sources.mask, "mask", read_mask)
        mask_name = sources.mask.param
    return RequestImages(references, mask, tuple(reader.notes), is_control, mask_name)


def reader_for(target: ResolvedModel, limits: Limits, fetcher: Fetcher) -> "ImageReader":
    """Return a reader for one request; its time to fetch URLs begins now."""
    now_s = asyncio.get_running_loop().time()
    scales = {tier.reference_limit(num) for tier in target.tiers for num in (1, 2)}
    until_s = now_s + fetcher.fetching.timeout_s
    return ImageReader(limits, fetcher, until_s, scales, DECODERS.next_order(), [])


@dataclass
class ImageReader:
    """Reads the images of one request.

    `until_s`: when URLs must have been read, by the loop's clock. `scales`: to what
    the tiers scale references down. `order`: the request's place among those that decode; the
    lowest comes first. `notes`: what the caller is to be told of the images.
    """

    limits: Limits
    fetcher: Fetcher
    until_s: float
    scales: Collection[ReferenceLimit]
    order: int
    notes: list[str]

    async def read_references(
        self, sources: list[ImageSource], first: int = 1
    ) -> tuple[SentImage, ...]:
        """Return the references; errors number them from `first`."""
        decode = partial(decode_reference, scales=self.scales)
        return tuple(
            [
                await self.read(source, f"image {number}", decode)
                for number, source in enumerate(sources, start=first)
            ]
        )

    async def read(
        self, source: ImageSource, name: str, decode: Callable[[bytes, Limits, str], Read]
    ) -> Read:
        """Return one image. Fetching is awaited; decoding runs on the threads of DECODERS."""
        content, limits = source.content, self.limits
        if isinstance(content, str):
            # Some clients put line breaks even before a data URL.
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
    """Return whether the text is a URL: base64 has no colon, except in its data prefix."""
    return bool(_SCHEME.match(text)) and text[:5].lower() != "data:"


def is_image(text: str) -> bool:
    """Return whether the text is an image in base64, and not a prompt."""
    return _IMAGE.match(text[:200].lstrip()) is not None


def decode_base64(text: str, limits: Limits, name: str) -> bytes:
    """Return the bytes of base64, with or without a data prefix, whose type is ignored.

    Raise BadReference if they are too many, which is known before any of them is made.
    """
    prefix = _DATA_PREFIX.match(text)
    start = prefix.end() if prefix else 0
    # With line breaks, 76 characters take 78.
    if (len(text) - start) * 76 // 78 * 3 // 4 > limits.max_image_bytes + 3:
        raise BadReference(f"{name} is larger than {limits.max_image_bytes} bytes")
    try:
        packed = text[start:].encode("ascii").translate(_ALPHABET, _BREAKS).rstrip(b"=")
        return binascii.a2b_base64(packed + b"=" * (-len(packed) % 4), strict_mode=True)
    except ValueError:
        raise BadReference(f"{name} is neither base64 nor a URL") from None
