"""Nobody without a key gets further than here, whatever the route, but for the open ones.

Lets pages of other origins speak to this gateway from a browser, as far as its args say.
"""

from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from flux_ray.auth.keys import Key
from flux_ray.errors import InvalidKey
from flux_ray.gateway.callers import token_of
from flux_ray.gateway.errors import answer_for, path_of
from flux_ray.gateway.probes import PROBES
from flux_ray.gateway.results import PREFIX

# A page reads no header of an answer that is not named here.
SHOWN_HEADERS = (
    "retry-after",
    "server-timing",
    "x-flux-model",
    "x-flux-seed",
    "x-flux-warnings",
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
    "x-request-id",
    "x-should-retry",
)
PREFLIGHT_VALID_S = 600


def cors_options(origins: tuple[str, ...]) -> dict[str, Any]:
    """Return the options of Starlette's CORSMiddleware.

    Clients send headers of their own making (`x-stainless-os`), so that any may be sent. Cookies
    are not spoken of: keys are in headers that only the page itself can set.
    """
    return {
        "allow_origins": origins,
        "allow_methods": ("GET", "HEAD", "POST"),
        "allow_headers": ("*",),
        "expose_headers": SHOWN_HEADERS,
        "max_age": PREFLIGHT_VALID_S,
        # A public page may ask a gateway on the reader's own machine, if its operator says so.
        "allow_private_network": True,
    }


# Probes have no keys, and the description holds no secrets.
OPEN = PROBES | {"/openapi.json"}
# Below these, the URL itself is the right to read.
OPEN_BELOW = (PREFIX,)
# One text for all that may be wrong with a key.
REFUSAL = "send a valid API key, as `Authorization: Bearer`, `x-key` or `x-api-key`"


class Keys(Protocol):
    """Who knows the keys."""

    async def find(self, secret: str) -> Key | None:
        """The live key with that secret."""


class ApiKeyMiddleware:
    """Middleware: the key that was let in is in `request.state.key`."""

    def __init__(self, app: ASGIApp, *, keys: Keys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or is_open(path_of(scope)):
            await self.app(scope, receive, send)
            return
        key = await self.keys.find(token_of(Headers(scope=scope)))
        if key is None:
            # Not raised: errors from here are past the handlers.
            await answer_for(Request(scope), InvalidKey(REFUSAL))(scope, receive, send)
            return
        scope.setdefault("state", {})["key"] = key
        await self.app(scope, receive, send)


def is_open(path: str) -> bool:
    """Whether that route asks for no key."""
    return path in OPEN or path.startswith(OPEN_BELOW)
