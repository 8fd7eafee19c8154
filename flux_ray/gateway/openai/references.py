"""The fields in which clients of OpenAI's routes, and of its kin, send pictures and masks."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from starlette.datastructures import FormData, UploadFile

from flux_ray.errors import BadReference, BadRequest
from flux_ray.gateway.fields.foreign import (
    is_image_name,
    is_mask_name,
    number_of,
    plain_name,
)
from flux_ray.gateway.images.sources import ImageSource, ImageSources
from flux_ray.gateway.model_names import ResolvedModel

# What OpenAPI shows of the names that gateway/fields/foreign.py knows.
REFERENCE_NAMES = ("image", "images", "url", "ref_images", "reference_image", "image_url")
MASK_NAMES = ("mask", "mask_image")
# How a picture may be wrapped: OpenAI's images are {"image_url": ...}, its chat's {"url": ...}.
WRAPPERS = ("image_url", "url", "b64_json", "image", "data", "base64")
MAX_DEPTH = 4


def sources_in_json(fields: Mapping[str, Any], target: ResolvedModel) -> ImageSources:
    """The pictures of a JSON body, by their numbers, then in its order."""

    def of(is_wanted: Callable[[str], bool]) -> Iterator[ImageSource]:
        names = sorted(filter(is_wanted, fields), key=number_of)
        return (source for name in names for source in unwrapped(name, fields[name]))

    return checked(of(is_image_name), of(is_mask_name), target)


def is_picture_name(name: str) -> bool:
    """Whether a form's part of that name is a reference or a mask."""
    name = plain_name(name)
    return is_image_name(name) or is_mask_name(name)


def take_sources(fields: dict[str, Any], target: ResolvedModel) -> ImageSources:
    """The same, which the fields then have no more: they are kept for longer than the pictures."""
    sources = sources_in_json(fields, target)
    for name in [each for each in fields if is_image_name(each) or is_mask_name(each)]:
        del fields[name]
    return sources


def sources_in_form(form: FormData, target: ResolvedModel) -> ImageSources:
    """The pictures of a form, as files or as text, by their numbers, then in its order."""
    parts = [(name, value) for name, value in form.multi_items() if not is_unfilled(value)]

    def of(is_wanted: Callable[[str], bool]) -> Iterator[ImageSource]:
        wanted = [part for part in parts if is_wanted(plain_name(part[0]))]
        wanted.sort(key=lambda part: number_of(part[0]))
        return (ImageSource(name, value) for name, value in wanted)

    return checked(of(is_image_name), of(is_mask_name), target)


def is_unfilled(value: UploadFile | str) -> bool:
    """Whether nothing was chosen: browsers then send a file without a name and without bytes."""
    if isinstance(value, UploadFile):
        return not value.filename and not value.size
    return not value.strip()


def unwrapped(field: str, value: Any, depth: int = MAX_DEPTH) -> Iterator[ImageSource]:
    """The texts in a field's value: one, a list of them, or objects with one."""
    if isinstance(value, str):
        # Some clients send every field that they know.
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
    references: Iterator[ImageSource], masks: Iterator[ImageSource], target: ResolvedModel
) -> ImageSources:
    """As many as there may be: of masks one, and none without a picture."""
    sources = ImageSources(counted(references, target), next(masks, None))
    if sources.mask is not None and next(masks, None) is not None:
        raise BadRequest("there can be one mask only", sources.mask.param)
    if sources.mask is not None and not sources.references:
        raise BadRequest("a mask comes with the image that it is of", sources.mask.param)
    return sources


def counted(sources: Iterator[ImageSource], target: ResolvedModel) -> list[ImageSource]:
    """As many as any of the tiers takes; what is beyond is not looked at."""
    taken: list[ImageSource] = []
    for source in sources:
        if len(taken) == target.max_references:
            message = f"{target.name} takes at most {target.max_references} images"
            raise BadReference(message, source.param)
        taken.append(source)
    return taken
