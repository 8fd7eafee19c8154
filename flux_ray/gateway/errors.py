"""Answer every failure in the shape of the route's dialect, and show nothing of our internals.

The dialect is known from the path: OpenAI, BFL (FastAPI's shapes, with the `message` that BFL's own
client reads) or Hugging Face. `add_error_handlers` registers the handlers. Here are also the
headers that tell clients whether to retry and what is left of a limit, and the answer for paths
that do not exist, most often because the client's base URL is wrong.
"""

import logging
import math
import re
from typing import Literal, NamedTuple

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from flux_ray.errors import (
    BadRequest,
    DeadlineTooShort,
    FluxError,
    InvalidKey,
    QuotaSpent,
    RateLimited,
    WrongEncoding,
)
from flux_ray.gateway.callers import DEADLINE
from flux_ray.gateway.http import HEADER, READABLE
from flux_ray.gateway.model_names import unknown
from flux_ray.gateway.playground.pages import is_page
from flux_ray.gateway.probes import PROBES

# The only logger that Serve writes to its log files.
logger = logging.getLogger("ray.serve")
CLIENT_CLOSED_REQUEST = 499
# Fields that BFL's routes read from the query.
QUERY_FIELDS = ("id", "limit", "before", "status")
CODES = {404: "not_found", 405: "method_not_allowed"}
NOT_AUTHENTICATED = "Not authenticated"

Dialect = Literal["openai", "bfl", "hugging_face"]


class Failure(BaseModel):
    """What went wrong; `param` names the field, if one is to blame."""

    message: str
    type: str
    param: str | None = None
    code: str


class Envelope(BaseModel):
    """An error body as OpenAI sends it."""

    error: Failure


class ErrorEvent(Envelope):
    """An error in a stream of events, sent after the headers of a success."""

    retry_after_s: int | None = None


class HubFailure(BaseModel):
    """An error body as Hugging Face sends it."""

    error: str
    error_type: str


class FieldFailure(BaseModel):
    """An error in one field; `loc` says where the field is."""

    loc: list[str]
    msg: str
    type: str


class BflFailure(BaseModel):
    """BFL's error body; `detail` is a list if a field is wrong, else a text."""

    detail: str | list[FieldFailure]
    message: str


def add_error_handlers(api: FastAPI, *, proxy_sends_id: bool) -> None:
    """Register the handlers. Starlette raises unknown errors again once answered, for the log."""

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
    """Answer a FluxError, and log it unless it is the caller's fault or answers a probe.

    Probes come every second; `Health` logs only when their answer changes.
    """
    assert isinstance(error, FluxError)
    if not isinstance(error, BadRequest) and path_of(request.scope) not in PROBES:
        logger.warning("request %s: %s", request.state.request_id, error, exc_info=error.__cause__)
    return answer_for(request, error)


async def answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Answer Starlette's own errors: unknown routes, wrong methods, unreadable forms."""
    assert isinstance(error, HTTPException)
    dialect, message = dialect_of(request), error.detail
    if error.status_code in CODES:
        missed = Missed.of(request)
        model, names = model_in(request), request.app.state.names
        # Who posts to a page has the wrong base URL, and is told the right one.
        is_missed = error.status_code == 404 or is_page(path_of(request.scope))
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
    """Answer FastAPI's own validation of paths and queries."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field, reason = str(first["loc"][-1]), f"{first['msg'][0].lower()}{first['msg'][1:]}"
    told = f"{field} is required" if first["type"] == "missing" else f"{field}: {reason}"
    return answer_for(request, BadRequest(told, field))


async def answer_nobody(request: Request, error: Exception) -> Response:
    """End a request whose client left while it sent the body: nobody reads this answer."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def answer_for(request: Request, error: FluxError) -> JSONResponse:
    """Return the answer to an error in the dialect of the request's path."""
    return answer_in(dialect_of(request), error)


def answer_in(dialect: Dialect, error: FluxError) -> JSONResponse:
    """Return the answer to an error in `dialect`, with the headers that say whether to retry."""
    place = "query" if error.field in QUERY_FIELDS else "body"
    body = body_of(dialect, failure_of(error), bfl_failure(error, place))
    status = bfl_status(error) if dialect == "bfl" else error.status
    return JSONResponse(body.model_dump(), status, headers_for(error))


def body_of(dialect: Dialect, failure: Failure, as_bfl: BflFailure) -> BaseModel:
    """Return the failure in the dialect's shape."""
    if dialect == "hugging_face":
        return HubFailure(error=naming(failure.message, failure.param), error_type=failure.code)
    return as_bfl if dialect == "bfl" else Envelope(error=failure)


def naming(message: str, field: str | None) -> str:
    """Return the message with the field's name before it, unless it has that already."""
    if field is None or re.search(rf"(?<!\w){re.escape(field)}(?!\w)", message):
        return message
    return f"{field}: {message}"


def failure_of(error: FluxError) -> Failure:
    """Return what the caller reads of an error."""
    # The router does not know that the deadline came in a header.
    field = DEADLINE if isinstance(error, DeadlineTooShort) else error.field
    return Failure(message=error.shown, type=error.type, param=field, code=error.code)


def bfl_failure(error: FluxError, place: str) -> BflFailure:
    """Return BFL's error body; `place` is where its fields are sent, `body` or `query`."""
    if isinstance(error, InvalidKey):
        return BflFailure(detail=NOT_AUTHENTICATED, message=error.shown)
    if bfl_status(error) != 422 or error.field is None:
        return BflFailure(detail=error.shown, message=error.shown)
    failure = FieldFailure(loc=[place, error.field], msg=error.shown, type=error.code)
    return BflFailure(detail=[failure], message=error.shown)


def bfl_status(error: FluxError) -> int:
    """Return BFL's status: 422 for a wrong field, 403 for no key, 402 for no credits."""
    if isinstance(error, InvalidKey):
        return 403
    if isinstance(error, QuotaSpent):
        return 402
    return 422 if error.status == 400 and error.field is not None else error.status


def headers_for(error: FluxError) -> dict[str, str]:
    """Return an error's headers: whether and when to retry, limits, how to authenticate."""
    # Retries would fail until tomorrow; clients would use up their attempts for nothing.
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


def limit_headers(limit: float, left: float, reset_s: float) -> dict[str, str]:
    """Return the rate limit headers; `reset_s` is rounded up, so that nobody is too early."""
    return {
        "x-ratelimit-limit": f"{limit:.6g}",
        "x-ratelimit-remaining": f"{left:.6g}",
        "x-ratelimit-reset": str(max(1, math.ceil(reset_s))),
    }


# The path prefix of Hugging Face's raw endpoint.
HUB = "/models/"
# ComfyUI's nodes reach BFL through their maker's server: `/proxy/bfl/<model>/generate`.
COMFY = "/proxy/bfl/"
GENERATE = "/generate"
# OpenAI's other routes of one word. They are not served, but they look like BFL's `/v1/<model>`:
# without this list their callers would get an error in BFL's shape.
OPENAIS = {
    "assistants",
    "batches",
    "completions",
    "containers",
    "conversations",
    "embeddings",
    "evals",
    "files",
    "images",
    "models",
    "moderations",
    "responses",
    "threads",
    "uploads",
    "vector_stores",
    "videos",
}
# BFL's routes that name no model.
BFLS = {"get_result", "cancel", "jobs", "credits", "my_finetunes"}


def path_of(scope: Scope) -> str:
    """Return the request's path as the routes know it, without Serve's route prefix."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def dialect_of(request: Request, path: str | None = None) -> Dialect:
    """Return the dialect of `path`, by default the request's own; OpenAI's if it is no other's."""
    path = path_of(request.scope) if path is None else path
    if path.startswith(HUB):
        return "hugging_face"
    bfl_paths = request.app.state.bfl_paths
    # Also for a model that is not served: BFL's client can only read errors of its own shape.
    return "bfl" if path in bfl_paths or (bfl_paths and model_in(request)) else "openai"


def model_in(request: Request) -> str | None:
    """Return the model that a BFL path names, served or not; None for any other path."""
    return model_at(request.method, path_of(request.scope))


def dialect_at(method: str, path: str) -> Dialect:
    """Return the dialect of a path. For the proxies, which do not know what models are served."""
    if path.startswith(HUB):
        return "hugging_face"
    is_bfls = path.removeprefix("/v1/") in BFLS or model_at(method, path) is not None
    return "bfl" if is_bfls else "openai"


def model_at(method: str, path: str) -> str | None:
    """Return the model that a BFL path names, served or not; None for any other path."""
    if method != "POST":
        return None
    if path.startswith(COMFY) and path.endswith(GENERATE):
        return path.removeprefix(COMFY).removesuffix(GENERATE)
    name = path.removeprefix("/v1/")
    return None if name == path or "/" in name or name in OPENAIS else name


VERSION = "v1"
# Below these prefixes, the rest of the path is a model's name.
OF_MODELS = (("POST", HUB), ("GET", "/v1/models/"))
MAX_PATH_CHARS = 200
WHERE_TO_LOOK = f"GET /{VERSION}/models lists the models, GET /openapi.json all routes"


class Missed(NamedTuple):
    """A path that is no route: the route that was probably meant, and what to answer."""

    meant: str | None
    dialect: Dialect
    message: str

    @classmethod
    def of(cls, request: Request) -> "Missed":
        """Find what the client probably meant, and word the answer, with the base URL to use."""
        path, method = path_of(request.scope), request.method[:20]
        meant = meant_by(method, path, request.app.state.paths)
        message = f"there is no {method} {path[:MAX_PATH_CHARS]} here"
        if meant is not None:
            message += f", but {meant[:MAX_PATH_CHARS]}"
        message += f"; the base URL of clients is {base_url_of(request)}; {WHERE_TO_LOOK}"
        return cls(meant, dialect_of(request, meant), message)


def base_url_of(request: Request) -> str:
    """Return the configured base URL. It is never built from what the client sends."""
    public_url: str | None = request.app.state.public_url
    if public_url is None:
        return f"this server's address followed by /{VERSION}"
    server = public_url.rstrip("/")
    return f"{server}/{VERSION}, or {server} for clients that add /{VERSION} themselves"


def meant_by(method: str, path: str, known: frozenset[tuple[str, str]]) -> str | None:
    """Return the longest known route that this path ends with, or None.

    `known` has (method, path) of the routes without path parameters. Clients with a wrong base URL
    put a prefix in front, or leave out or repeat `/v1`.
    """
    parts = [part for part in path.split("/") if part]
    for start in range(min(len(parts), 20)):
        tail = "/".join(part for part in parts[start:] if part != VERSION)
        for candidate in (f"/{VERSION}/{tail}", f"/{tail}"):
            is_known = (method, candidate) in known or any(
                method == by and candidate.startswith(below) for by, below in OF_MODELS
            )
            if tail and is_known and candidate != path:
                return candidate
    return None
