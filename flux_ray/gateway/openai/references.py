"""The images and masks in a request's body, JSON or multipart form, and the reading of forms.

`sources_in_json` and `sources_in_form` find them under all names that clients use, and count them
before any is decoded. `open_form` reads a form, and refuses one that was cut off.
"""

import io
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import chain
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from flux_ray.config import Limits
from flux_ray.errors import BadReference, BadRequest, WrongContentType
from flux_ray.gateway.fields.foreign import (
    has_pixels,
    is_control_name,
    is_image_name,
    is_mask_name,
    number_of,
    plain_name,
)
from flux_ray.gateway.fields.sent import WORDS
from flux_ray.gateway.images.sources import ImageSource, ImageSources
from flux_ray.gateway.model_names import ResolvedModel

# Of the names that gateway/fields/foreign.py knows, those that OpenAPI shows.
REFERENCE_NAMES = ("image", "images", "url", "ref_images", "reference_image", "image_url")
MASK_NAMES = ("mask", "mask_image")
CONTROL_NAMES = ("control_image", "preprocessed_image")
# How an image may be wrapped: OpenAI's images are {"image_url": ...}, its chat's {"url": ...}.
WRAPPERS = ("image_url", "url", "b64_json", "image", "data", "base64")
MAX_DEPTH = 4
# The kinds of images in a request, by their names.
KINDS = (is_image_name, is_mask_name, is_control_name)


def sources_in_json(fields: Mapping[str, Any], target: ResolvedModel) -> ImageSources:
    """Return the images of a JSON body, by the numbers in their names, then in its order.

    Raises BadReference, BadRequest.
    """
    return checked(target, *(named_in(fields, is_kind) for is_kind in KINDS))


def named_in(fields: Mapping[str, Any], is_wanted: Callable[[str], bool]) -> Iterator[ImageSource]:
    """Yield the images of the fields whose names are wanted, in the order of `sources_in_json`."""
    for name in sorted(filter(is_wanted, fields), key=number_of):
        yield from unwrapped(name, fields[name])


def is_image_part(name: str) -> bool:
    """Return whether a form's part of that name is an image or a mask."""
    return has_pixels(plain_name(name))


def take_sources(fields: dict[str, Any], target: ResolvedModel) -> ImageSources:
    """Return the images of a JSON body as above, and delete them from `fields`.

    The fields live until the answer: the encoded images would take memory all that time.
    """
    sources = sources_in_json(fields, target)
    for name in list(filter(has_pixels, fields)):
        del fields[name]
    return sources


def sources_in_form(form: FormData, target: ResolvedModel) -> ImageSources:
    """Return the images of a form, files or text, ordered as those of a JSON body.

    Raises BadReference, BadRequest.
    """
    parts = [(name, value) for name, value in form.multi_items() if not is_unfilled(value)]

    def of(is_wanted: Callable[[str], bool]) -> Iterator[ImageSource]:
        wanted = [part for part in parts if is_wanted(plain_name(part[0]))]
        wanted.sort(key=lambda part: number_of(plain_name(part[0])))
        return (ImageSource(name, value) for name, value in wanted)

    return checked(target, *map(of, KINDS))


def is_unfilled(value: UploadFile | str) -> bool:
    """Return whether a part is empty, as browsers send it if no file was chosen."""
    if isinstance(value, UploadFile):
        return not value.filename and not value.size
    return not value.strip()


def unwrapped(field: str, value: Any, depth: int = MAX_DEPTH) -> Iterator[ImageSource]:
    """Yield each text in a field's value: a text, a list of them, or objects with one."""
    if isinstance(value, str):
        # Some clients send every field that they know, empty if unused.
        if value.strip():
            yield ImageSource(field, value)
        return
    if depth and isinstance(value, list):
        for each in value:
            yield from unwrapped(field, each, depth - 1)
        return
    wrapped = [value[name] for name in WRAPPERS if name in value] if isinstance(value, dict) else []
    if not depth or not wrapped:
        raise BadReference(f"{field} must be base64 or URLs", field)
    yield from unwrapped(field, wrapped[0], depth - 1)


def checked(
    target: ResolvedModel,
    references: Iterator[ImageSource],
    masks: Iterator[ImageSource],
    controls: Iterator[ImageSource],
) -> ImageSources:
    """Return the sources. Raise BadReference or BadRequest for what no request may have.

    That is more than one mask or control image, a mask without an image, a control image with
    others, and a kind of image that none of the tiers heeds. To tiers that take nothing else, a
    control image may be sent under the name of any image.
    """
    if target.requires_control:
        references, controls = iter(()), chain(controls, references)
    taken, mask, control = counted(references, target), next(masks, None), next(controls, None)
    for kind, source, more in (("mask", mask, masks), ("control_image", control, controls)):
        if source is None:
            continue
        target.check_heeded(kind, source.param)
        if next(more, None) is not None:
            raise BadRequest(f"there can be one {kind.replace('_', ' ')} only", source.param)
    if mask is not None and not taken:
        raise BadRequest("a mask comes with the image that it is of", mask.param)
    if control is None:
        return ImageSources(taken, mask)
    if taken:
        raise BadRequest("a control image comes without other images", control.param)
    return ImageSources([control], is_control=True)


def counted(sources: Iterator[ImageSource], target: ResolvedModel) -> list[ImageSource]:
    """Return the sources; raise BadReference if they are more than any of the tiers takes."""
    taken: list[ImageSource] = []
    for source in sources:
        target.check_heeded("image", source.param)
        if len(taken) == target.max_references:
            message = f"{target.name} takes at most {target.max_references} images"
            raise BadReference(message, source.param)
        taken.append(source)
    return taken


MAX_FORM_FILES = 32
MAX_FORM_FIELDS = 64
UTF_8 = ("utf-8", "utf8")
IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8")


class WholeFormParser(MultiPartParser):
    """A parser of multipart forms that notes in `is_whole` whether the closing delimiter came.

    A part with an image's bytes becomes a file even without a file name: some clients send none.
    """

    is_whole = False

    def on_part_end(self) -> None:
        """Keep the bytes of an image: decoded as text they would be damaged."""
        part = self._current_part
        if part.file is None and is_image_part(part.field_name) and is_binary(part.data):
            file = UploadFile(io.BytesIO(part.data), size=len(part.data), filename="unnamed")
            self.items.append((part.field_name, file))
            return
        if part.file is None:
            check_utf_8(part.field_name[:80], part.data)
        super().on_part_end()

    def close_files(self) -> None:
        """Close all temporary files, also one in the middle of which the body ended."""
        for file in self._files_to_close_on_error:
            file.close()

    def on_end(self) -> None:
        """Note the closing delimiter, which Starlette does not check."""
        self.is_whole = True


def check_utf_8(name: str, text: bytearray) -> None:
    """Raise BadRequest for a text that is not UTF-8: Starlette would read it as Latin-1."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        message = f"{name}: is not UTF-8, at byte {error.start}: send the form as UTF-8"
        raise BadRequest(message, name) from None


def is_binary(data: bytearray) -> bool:
    """Return whether the data are a file's bytes and not base64 or a URL."""
    return data.startswith(IMAGE_STARTS) or not data[:64].isascii()


@asynccontextmanager
async def open_form(request: Request, limits: Limits) -> AsyncIterator[FormData]:
    """Read the form in the body, and close its files at the end.

    Raises BadRequest if it cannot be read or was cut off, BadReference if it has too many files,
    and WrongContentType if it is not in UTF-8.
    """
    check_charset(request)
    parser = WholeFormParser(
        request.headers,
        request.stream(),
        max_files=MAX_FORM_FILES,
        max_fields=MAX_FORM_FIELDS,
        # As long as in JSON: the check of the field itself has the better message.
        max_part_size=limits.max_body_bytes,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise form_fault(error.message) from None
    try:
        if not parser.is_whole:
            raise BadRequest(
                "the form is not whole: the closing delimiter, the boundary between two pairs"
                " of dashes, is missing at its end"
            )
        yield form
    finally:
        await form.close()
        parser.close_files()


def check_charset(request: Request) -> None:
    """Raise WrongContentType unless the charset is UTF-8 or not given.

    Starlette would decode with any codec of the client's choice, and some take hours.
    """
    _, options = parse_options_header(request.headers.get("content-type"))
    charset = options.get(b"charset")
    if charset is not None and charset.decode("latin-1").strip().lower() not in UTF_8:
        raise WrongContentType("send the form as UTF-8: no other charset is read")


def form_fault(detail: str) -> BadRequest:
    """Return our error for one of Starlette's, which differ only in their messages."""
    if detail.startswith("Too many files"):
        return BadReference(f"a form may have at most {MAX_FORM_FILES} images", "image")
    if detail.startswith("Too many fields"):
        return BadRequest(f"a form may have at most {MAX_FORM_FIELDS} text parts")
    if detail.startswith("Missing boundary"):
        return BadRequest("the form cannot be read: its content-type names no boundary")
    return BadRequest("the form cannot be read")


def text_parts(form: FormData) -> dict[str, str]:
    """Return the non-empty text parts by name. Raises BadRequest if a name comes twice."""
    parts: dict[str, str] = {}
    for name, value in form.multi_items():
        if is_image_part(name) or (is_unfilled(value) and name not in WORDS):
            continue
        if isinstance(value, UploadFile):
            raise BadRequest(f"{name[:80]} is no image that is read here", name[:80])
        if name in parts:
            raise BadRequest(f"{name[:80]} was sent twice", name[:80])
        parts[name] = value
    return parts
