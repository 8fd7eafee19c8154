"""Every failure in the words of the route's dialect; nothing of our insides is shown.

Errors as BFL answers them: FastAPI's shapes, with a `message` that its own client reads.

Which dialect a path is of: its errors have that dialect's shape.

What is left of a limit, in the headers that clients know.

What to say to who asks for a route that is not there: most often its base URL is wrong.
"""

import logging
import math
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
from flux_ray.gateway.probes import PROBES

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


Dialect = Literal["openai", "bfl", "hugging_face"]
# Hugging Face's raw endpoint.
HUB = "/models/"
# ComfyUI's nodes send to BFL through their maker's server: `/proxy/bfl/<model>/generate`.
COMFY = "/proxy/bfl/"
GENERATE = "/generate"
# OpenAI's other routes of one word: who asks for them wants to read that in its words.
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


# BFL's own, where no model is named.
BFLS = {"get_result", "cancel", "jobs", "credits", "my_finetunes"}


def path_of(scope: Scope) -> str:
    """As the routes know it: without what Serve's route prefix adds."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def dialect_of(request: Request, path: str | None = None) -> Dialect:
    """OpenAI's where it is no other's; `app.state.bfl_paths` are BFL's.

    `path`: instead of the request's own.
    """
    path = path_of(request.scope) if path is None else path
    if path.startswith(HUB):
        return "hugging_face"
    bfl_paths = request.app.state.bfl_paths
    # A model that is not served: its client has to read why.
    return "bfl" if path in bfl_paths or (bfl_paths and model_in(request)) else "openai"


def model_in(request: Request) -> str | None:
    """The model of which a path of BFL's is, whether or not it is served; None of other paths."""
    return model_at(request.method, path_of(request.scope))


def dialect_at(method: str, path: str) -> Dialect:
    """Of a path where it is not known which models are served, and whether there are jobs."""
    if path.startswith(HUB):
        return "hugging_face"
    is_bfls = path.removeprefix("/v1/") in BFLS or model_at(method, path) is not None
    return "bfl" if is_bfls else "openai"


def model_at(method: str, path: str) -> str | None:
    """As model_in."""
    if method != "POST":
        return None
    if path.startswith(COMFY) and path.endswith(GENERATE):
        return path.removeprefix(COMFY).removesuffix(GENERATE)
    name = path.removeprefix("/v1/")
    return None if name == path or "/" in name or name in OPENAIS else name


def limit_headers(limit: float, left: float, reset_s: float) -> dict[str, str]:
    """`reset_s` in whole seconds: never too early."""
    return {
        "x-ratelimit-limit": f"{limit:.6g}",
        "x-ratelimit-remaining": f"{left:.6g}",
        "x-ratelimit-reset": str(max(1, math.ceil(reset_s))),
    }


VERSION = "v1"
# Below these, the rest of a path is a model's name.
OF_MODELS = (("POST", HUB), ("GET", "/v1/models/"))
MAX_PATH_CHARS = 200
WHERE_TO_LOOK = f"GET /{VERSION}/models lists the models, GET /openapi.json all routes"


class Missed(NamedTuple):
    """A path that is no route: the route that was meant, if any, and the answer."""

    meant: str | None
    dialect: Dialect
    message: str

    @classmethod
    def of(cls, request: Request) -> "Missed":
        """Say what was asked for, and with which base URL it would be there."""
        path, method = path_of(request.scope), request.method[:20]
        meant = meant_by(method, path, request.app.state.paths)
        message = f"there is no {method} {path[:MAX_PATH_CHARS]} here"
        if meant is not None:
            message += f", but {meant[:MAX_PATH_CHARS]}"
        message += f"; the base URL of clients is {base_url_of(request)}; {WHERE_TO_LOOK}"
        return cls(meant, dialect_of(request, meant), message)


def base_url_of(request: Request) -> str:
    """Return the base URL as it is configured: it is never made of what a client sends."""
    public_url: str | None = request.app.state.public_url
    if public_url is None:
        return f"this server's address followed by /{VERSION}"
    server = public_url.rstrip("/")
    return f"{server}/{VERSION}, or {server} for clients that add /{VERSION} themselves"


def meant_by(method: str, path: str, known: frozenset[tuple[str, str]]) -> str | None:
    """Return the longest route in which this path ends, whatever stands before it.

    `known`: methods and paths of the routes without parameters.
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
