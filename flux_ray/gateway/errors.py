"""Every failure in the words of the route's dialect; nothing of our insides is shown."""

import logging

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from flux_ray.errors import (
    BadRequest,
    DeadlineTooShort,
    FluxError,
    InvalidKey,
    QuotaSpent,
    RateLimited,
    WrongEncoding,
)
from flux_ray.gateway.bfl_failure import BflFailure, bfl_failure, bfl_status
from flux_ray.gateway.callers import DEADLINE
from flux_ray.gateway.dialects import Dialect, dialect_of, model_in, path_of
from flux_ray.gateway.limit_headers import limit_headers
from flux_ray.gateway.missed_routes import Missed
from flux_ray.gateway.model_names import unknown
from flux_ray.gateway.probes import PROBES
from flux_ray.gateway.request_id import HEADER
from flux_ray.gateway.unpacking import READABLE

# The only logger that Serve writes to its log files.
logger = logging.getLogger("ray.serve")

CLIENT_CLOSED_REQUEST = 499
# Of BFL's routes.
QUERY_FIELDS = ("id", "limit", "before", "status")
CODES = {404: "not_found", 405: "method_not_allowed"}


class Failure(BaseModel):
    """What went wrong; `param` names the field where a field is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str


class Envelope(BaseModel):
    """OpenAI's body of every answer that is no success."""

    error: Failure


class ErrorEvent(Envelope):
    """An error after the headers, which were those of a success."""

    retry_after_s: int | None = None


class HubFailure(BaseModel):
    """Hugging Face's."""

    error: str
    error_type: str


def add_error_handlers(api: FastAPI, *, proxy_sends_id: bool) -> None:
    """After the last one answered, Starlette raises the exception again, for the logs."""

    async def answer_unknown(request: Request, error: Exception) -> JSONResponse:
        request_id: str = request.state.request_id
        logger.error("request %s failed", request_id, exc_info=error)
        message = f"the server failed; ask its operator about request {request_id}"
        answer = answer_for(request, FluxError(message))
        if not proxy_sends_id:
            # This handler runs outside the middleware that sets the header.
            answer.headers[HEADER] = request_id
        return answer

    api.add_exception_handler(FluxError, answer_flux_error)
    api.add_exception_handler(HTTPException, answer_http_exception)
    api.add_exception_handler(RequestValidationError, answer_invalid)
    api.add_exception_handler(ClientDisconnect, answer_nobody)
    api.add_exception_handler(Exception, answer_unknown)


async def answer_flux_error(request: Request, error: Exception) -> JSONResponse:
    """Answer an error of our tree, and log it unless it is the caller's or a probe's.

    Of probes only a change is worth a line, which `Health` writes.
    """
    assert isinstance(error, FluxError)
    if not isinstance(error, BadRequest) and path_of(request.scope) not in PROBES:
        logger.warning("request %s: %s", request.state.request_id, error, exc_info=error.__cause__)
    return answer_for(request, error)


async def answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own: no such route, wrong method, a body that is no multipart."""
    assert isinstance(error, HTTPException)
    dialect, message = dialect_of(request), error.detail
    if error.status_code in CODES:
        missed = Missed.of(request)
        model, names = model_in(request), request.app.state.names
        is_missed = error.status_code == 404
        if is_missed and missed.meant is None and dialect == "bfl" and model not in (None, *names):
            return answer_for(request, unknown(str(model), names))
        if is_missed or missed.meant is not None:
            dialect, message = missed.dialect, missed.message
    failure = Failure(
        message=message,
        type=BadRequest.type if error.status_code < 500 else FluxError.type,
        code=CODES.get(error.status_code, BadRequest.code),
    )
    as_bfl = BflFailure(detail=failure.message, message=failure.message)
    body = body_of(dialect, failure, as_bfl)
    return JSONResponse(body.model_dump(), error.status_code, dict(error.headers or {}))


async def answer_invalid(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's own check of paths and queries."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return answer_for(request, BadRequest(first["msg"], str(first["loc"][-1])))


async def answer_nobody(request: Request, error: Exception) -> Response:
    """The client left in the middle of its upload: no fault of ours, and nobody reads this."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def answer_for(request: Request, error: FluxError) -> JSONResponse:
    """The body of an error in the words of the route's dialect, whether to come back, and when."""
    return answer_in(dialect_of(request), error)


def answer_in(dialect: Dialect, error: FluxError) -> JSONResponse:
    """The same, wherever the dialect is known from."""
    place = "query" if error.field in QUERY_FIELDS else "body"
    body = body_of(dialect, failure_of(error), bfl_failure(error, place))
    status = bfl_status(error) if dialect == "bfl" else error.status
    return JSONResponse(body.model_dump(), status, headers_for(error))


def body_of(dialect: Dialect, failure: Failure, as_bfl: BflFailure) -> BaseModel:
    """A failure in the dialect's shape."""
    if dialect == "hugging_face":
        return HubFailure(error=failure.message, error_type=failure.code)
    return as_bfl if dialect == "bfl" else Envelope(error=failure)


def headers_for(error: FluxError) -> dict[str, str]:
    """Whether to come back and when, what there is of a limit, and how to say who one is."""
    # Until tomorrow clients would try in vain.
    may_retry = error.retry_after_s is not None and not isinstance(error, QuotaSpent)
    headers = {"x-should-retry": "true" if may_retry else "false"}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, RateLimited):
        headers |= limit_headers(error.limit, error.left, error.retry_after_s or 0)
    if isinstance(error, WrongEncoding):
        headers["accept-encoding"] = READABLE
    if isinstance(error, InvalidKey):
        headers["www-authenticate"] = "Bearer"
    return headers


def failure_of(error: FluxError) -> Failure:
    """What the caller reads of it."""
    # The router knows of no headers.
    field = DEADLINE if isinstance(error, DeadlineTooShort) else error.field
    return Failure(message=error.shown, type=error.type, param=field, code=error.code)
