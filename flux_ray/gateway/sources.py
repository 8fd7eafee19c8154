"""Reference pictures wherever they come from: a file part, base64, or a URL."""

import asyncio
import binascii
import re
from collections.abc import Iterable
from typing import NamedTuple

from starlette.datastructures import UploadFile

from flux_ray.errors import BadReference
from flux_ray.gateway.fetch import Fetcher
from flux_ray.gateway.references import decode
from flux_ray.gateway_config import Limits
from flux_ray.request import Raster

_DATA_PREFIX = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,30}:", re.IGNORECASE)
# Both alphabets, and no line breaks.
_ALPHABET = bytes.maketrans(b"-_", b"+/")
_BREAKS = b" \t\r\n"


class Source(NamedTuple):
    """One picture as it was sent, and the field that it was sent in."""

    field: str
    content: UploadFile | str

    @property
    def param(self) -> str:
        """The field as errors name it: `image[]` is `image`."""
        return self.field.removesuffix("[]")


async def read_references(
    sources: Iterable[Source], limits: Limits, fetcher: Fetcher
) -> tuple[Raster, ...]:
    """The decoded pictures in order, one at a time, so that one only is in memory undecoded."""
    until_s = asyncio.get_running_loop().time() + fetcher.fetching.timeout_s
    references = []
    for number, source in enumerate(sources, start=1):
        try:
            raster = await read_reference(source, f"image {number}", limits, fetcher, until_s)
        except BadReference as error:
            raise BadReference(error.message, source.param) from None
        references.append(raster)
    return tuple(references)


async def read_reference(
    source: Source, name: str, limits: Limits, fetcher: Fetcher, until_s: float
) -> Raster:
    """One picture; decoding takes a while, so it is done off the event loop."""
    content = source.content
    if isinstance(content, UploadFile):
        data = await content.read(limits.max_image_bytes + 1)
    elif is_url(content):
        data = await fetcher.read(content, limits.max_image_bytes, name, until_s)
    else:
        return await asyncio.to_thread(decode_text, content, limits, name)
    return await asyncio.to_thread(decode, data, limits, name)


def is_url(text: str) -> bool:
    """Base64 has no colon, but in its data prefix."""
    return bool(_SCHEME.match(text)) and text[:5].lower() != "data:"


def decode_text(text: str, limits: Limits, name: str) -> Raster:
    """The picture in base64, with or without a data prefix, whose type is not believed."""
    return decode(decode_base64(text, limits, name), limits, name)


def decode_base64(text: str, limits: Limits, name: str) -> bytes:
    """Its bytes; how many they are is known before any of them is made."""
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
