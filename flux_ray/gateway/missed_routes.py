"""What to say to who asks for a route that is not there: most often its base URL is wrong."""

from typing import NamedTuple

from starlette.requests import Request

from flux_ray.gateway.dialects import HUB, Dialect, dialect_of, path_of

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
