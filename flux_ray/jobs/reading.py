"""Whether this release reads of a job's row the request that was packed, nothing left out."""

from dataclasses import is_dataclass
from typing import Any

from pydantic import ValidationError

from flux_ray.jobs.serialization import BLOB, MASK, REQUEST
from flux_ray.request import Mask, RgbImage

# What stands in a row for a picture.
PICTURE_FIELDS = frozenset({BLOB, "width", "height", "kind", "digest"})


class Unreadable(ValueError):
    """The row says what this release does not know: done by it, it would be another picture."""


def check_readable(row: dict[str, Any]) -> None:
    """Raise Unreadable, naming the fields, never what they hold. No picture is looked at."""
    try:
        request = REQUEST.validate_python(outlined(row))
    except ValidationError as error:
        names = {".".join(map(str, each["loc"])) for each in error.errors(include_input=False)}
        raise unreadable(names) from None
    if names := set(unread(row, request)):
        raise unreadable(names)


def unreadable(names: set[str]) -> Unreadable:
    """Say which fields."""
    return Unreadable(f"a newer flux-ray packed this request: {sorted(names)}")


def outlined(value: Any) -> Any:
    """The row's values, with pictures that have no pixels."""
    if isinstance(value, dict) and BLOB in value:
        return outline_in(value)
    if isinstance(value, dict):
        return {name: outlined(each) for name, each in value.items()}
    if isinstance(value, list):
        return tuple(map(outlined, value))
    return value


def outline_in(row: dict[str, Any]) -> RgbImage | Mask:
    """A picture or a mask of the row's size."""
    names = row.keys() - PICTURE_FIELDS
    if names or row.get("kind", MASK) != MASK:
        raise unreadable(set(names) or {"kind"})
    return (Mask if "kind" in row else RgbImage)(row["width"], row["height"], b"")


def unread(row: Any, value: Any, name: str = "") -> list[str]:
    """Names of what the row says and the value does not."""
    if isinstance(value, (RgbImage, Mask)):
        return []
    if isinstance(row, dict) and is_dataclass(value):
        fields = value.__dataclass_fields__
        return [
            missing
            for key, each in row.items()
            for missing in (
                unread(each, getattr(value, key), f"{name}{key}.")
                if key in fields
                else [f"{name}{key}"]
            )
        ]
    if isinstance(row, list) and isinstance(value, tuple) and len(row) == len(value):
        pairs = zip(row, value, strict=True)
        return [missing for each, part in pairs for missing in unread(each, part, name)]
    return [] if row == value else [name.rstrip(".")]
