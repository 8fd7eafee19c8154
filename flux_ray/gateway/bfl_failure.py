"""Errors as BFL answers them: FastAPI's shapes, with a `message` that its own client reads."""

from pydantic import BaseModel

from flux_ray.errors import FluxError, InvalidKey, QuotaSpent

NOT_AUTHENTICATED = "Not authenticated"


class FieldFailure(BaseModel):
    """What is wrong with a field; `loc` is where it is."""

    loc: list[str]
    msg: str
    type: str


class BflFailure(BaseModel):
    """The body of every answer that is no success: of wrong fields, `detail` is a list."""

    detail: str | list[FieldFailure]
    message: str


def bfl_status(error: FluxError) -> int:
    """Of BFL's own: a wrong field is 422, no key 403, and no credits 402."""
    if isinstance(error, InvalidKey):
        return 403
    if isinstance(error, QuotaSpent):
        return 402
    return 422 if error.status == 400 and error.field is not None else error.status


def bfl_failure(error: FluxError, place: str) -> BflFailure:
    """`place` is where its fields are: `body` or `query`."""
    if isinstance(error, InvalidKey):
        return BflFailure(detail=NOT_AUTHENTICATED, message=error.shown)
    if bfl_status(error) != 422 or error.field is None:
        return BflFailure(detail=error.shown, message=error.shown)
    failure = FieldFailure(loc=[place, error.field], msg=error.shown, type=error.code)
    return BflFailure(detail=[failure], message=error.shown)
