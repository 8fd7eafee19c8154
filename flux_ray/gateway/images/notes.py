"""What the caller is told of an image that was read: what of it could not be used."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

Read = TypeVar("Read")

# Of the image that is being read, in the thread that reads it.
_NOTES: ContextVar[list[str] | None] = ContextVar("image_notes", default=None)


def note(text: str) -> None:
    """Tell the caller of the image that is being read, if somebody collects that."""
    notes = _NOTES.get()
    if notes is not None:
        notes.append(text)


def with_notes(read: Callable[[], Read], name: str) -> tuple[Read, list[str]]:
    """Return what `read` returns, and what was noted meanwhile of the image called `name`."""
    notes: list[str] = []
    token = _NOTES.set(notes)
    try:
        value = read()
    finally:
        _NOTES.reset(token)
    return value, [f"{name}: {text}" for text in dict.fromkeys(notes)]
