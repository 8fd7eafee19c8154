"""The fields in which clients of OpenAI's routes, and of its kin, send pictures and masks."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.datastructures import FormData

from flux_ray.errors import BadReference, BadRequest
from flux_ray.gateway.sources import Source, Sources
from flux_ray.gateway.targets import Target

NAMES = ("image", "images", "url", "ref_images", "reference_image")
REFERENCE_FIELDS = {*NAMES, *(f"{name}[]" for name in NAMES)}
# OpenAI's, and its kin's.
MASK_NAMES = ("mask", "mask_image")
MASK_FIELDS = {*MASK_NAMES, *(f"{name}[]" for name in MASK_NAMES)}
PICTURE_FIELDS = REFERENCE_FIELDS | MASK_FIELDS
# How a picture may be wrapped: OpenAI's images are {"image_url": ...}, its chat's {"url": ...}.
WRAPPERS = ("image_url", "url", "b64_json")
MAX_DEPTH = 4
_NUMBERED = re.compile(r"\[[0-9]{1,3}\]$")


def sources_in_json(fields: Mapping[str, Any], target: Target) -> Sources:
    """The pictures of a JSON body, in its order."""

    def of(wanted: set[str]) -> Iterator[Source]:
        names = [name for name in fields if name in wanted]
        return (source for name in names for source in unwrapped(name, fields[name]))

    return checked(of(REFERENCE_FIELDS), of(MASK_FIELDS), target)


def take_sources(fields: dict[str, Any], target: Target) -> Sources:
    """The same, which the fields then have no more: they are kept for longer than the pictures."""
    sources = sources_in_json(fields, target)
    for name in PICTURE_FIELDS & fields.keys():
        del fields[name]
    return sources


def listed(name: str) -> str:
    """A form's `image[0]` is its `image[]`: some clients number them."""
    return _NUMBERED.sub("[]", name)


def sources_in_form(form: FormData, target: Target) -> Sources:
    """The pictures of a form, as files or as text, in its order."""

    def of(wanted: set[str]) -> Iterator[Source]:
        parts = ((listed(name), value) for name, value in form.multi_items())
        parts = ((name, value) for name, value in parts if name in wanted)
        return (Source(name, value) for name, value in parts if value)

    return checked(of(REFERENCE_FIELDS), of(MASK_FIELDS), target)


def unwrapped(field: str, value: Any, depth: int = MAX_DEPTH) -> Iterator[Source]:
    """The texts in a field's value: one, a list of them, or objects with one."""
    if isinstance(value, str):
        # Some clients send every field that they know.
        if value:
            yield Source(field, value)
        return
    if depth and isinstance(value, list):
        for each in value:
            yield from unwrapped(field, each, depth - 1)
        return
    wrapped = [value[name] for name in WRAPPERS if name in value] if isinstance(value, dict) else []
    if not depth or not wrapped:
        raise BadReference(f"{field} must be base64 or URLs", field)
    yield from unwrapped(field, wrapped[0], depth - 1)


def checked(references: Iterator[Source], masks: Iterator[Source], target: Target) -> Sources:
    """As many as there may be: of masks one, and none without a picture."""
    sources = Sources(counted(references, target), next(masks, None))
    if sources.mask is not None and next(masks, None) is not None:
        raise BadRequest("there can be one mask only", sources.mask.param)
    if sources.mask is not None and not sources.references:
        raise BadRequest("a mask comes with the image that it is of", sources.mask.param)
    return sources


def counted(sources: Iterator[Source], target: Target) -> list[Source]:
    """As many as any of the tiers takes; what is beyond is not looked at."""
    taken: list[Source] = []
    for source in sources:
        if len(taken) == target.max_references:
            message = f"{target.name} takes at most {target.max_references} images"
            raise BadReference(message, source.param)
        taken.append(source)
    return taken
