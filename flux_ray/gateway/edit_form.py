"""The multipart body of an edit: how it is read, and its text parts."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from flux_ray.errors import BadReference, BadRequest
from flux_ray.gateway.openai_references import PICTURE_FIELDS, listed
from flux_ray.gateway_config import Limits

MAX_FORM_FILES = 32
MAX_FORM_FIELDS = 64


@asynccontextmanager
async def open_form(request: Request, limits: Limits) -> AsyncIterator[FormData]:
    """The parts of the body; its files are closed in the end."""
    try:
        form = await request.form(
            max_files=MAX_FORM_FILES,
            max_fields=MAX_FORM_FIELDS,
            # Text may be as long as in JSON: a field's own check then names the field.
            max_part_size=limits.max_body_bytes,
        )
    except HTTPException as error:
        raise form_fault(error.detail) from None
    try:
        yield form
    finally:
        await form.close()


def form_fault(detail: str) -> BadRequest:
    """Starlette tells its form faults apart by words only."""
    if detail.startswith("Too many files"):
        return BadReference(f"a form may have at most {MAX_FORM_FILES} images", "image")
    if detail.startswith("Too many fields"):
        return BadRequest(f"a form may have at most {MAX_FORM_FIELDS} text parts")
    return BadRequest("the form cannot be read")


def text_parts(form: FormData) -> dict[str, str]:
    """The parts that are no pictures, each name once."""
    parts: dict[str, str] = {}
    for name, value in form.multi_items():
        if listed(name) in PICTURE_FIELDS:
            continue
        if isinstance(value, UploadFile):
            raise BadRequest(f"{name[:80]} is no picture that is read here", name[:80])
        if name in parts:
            raise BadRequest(f"{name[:80]} was sent twice", name[:80])
        parts[name] = value
    return parts
