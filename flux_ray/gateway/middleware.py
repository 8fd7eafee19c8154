"""Let in requests with a valid API key, and say which web pages may call this gateway.

`ApiKeyMiddleware` stands in front of all routes but the open ones. `cors_options` are what
Starlette's CORS middleware is told.
"""

from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from flux_ray.auth import Key
from flux_ray.errors import InvalidKey
from flux_ray.gateway.callers import token_of
from flux_ray.gateway.errors import answer_for, path_of
from flux_ray.gateway.playground.pages import is_page
from flux_ray.gateway.probes import PROBES
from flux_ray.gateway.request_log import note_key
from flux_ray.gateway.results import PREFIX

# The answer's headers that a page's script may read; browsers hide all others.
SHOWN_HEADERS = (
    "retry-after",
    "server-timing",
    "x-flux-model",
    "x-flux-revised-prompt",
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

    Any request header is allowed, as clients send their own (`x-stainless-os`). Cookies are not:
    keys travel in headers that only the page itself can set, so another site cannot use them.
    """
    return {
        "allow_origins": origins,
        "allow_methods": ("GET", "HEAD", "POST"),
        "allow_headers": ("*",),
        "expose_headers": SHOWN_HEADERS,
        "max_age": PREFLIGHT_VALID_S,
        # Browsers ask before a public page may reach the reader's own machine; the operator has
        # allowed it.
        "allow_private_network": True,
    }


# Probes have no keys, and the API's description holds no secrets.
OPEN = PROBES | {"/openapi.json"}
# Below this prefix, URLs are signed, and the signature is the right to read.
OPEN_BELOW = (PREFIX,)
# One text for everything that may be wrong with a key: it must not tell guessers how close they
# are.
REFUSAL = "send a valid API key, as `Authorization: Bearer`, `x-key` or `x-api-key`"


class Keys(Protocol):
    """The keys that are valid now."""

    async def find(self, secret: str) -> Key | None:
        """Return the valid key with that secret, or None."""


class ApiKeyMiddleware:
    """Middleware that refuses requests without a valid key; it sets `request.state.key`.

    `has_pages`: the gateway serves the playground, whose files need no key either.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys, has_pages: bool = False) -> None:
        self.app = app
        self.keys = keys
        self.has_pages = has_pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_open(path_of(scope)):
            await self.app(scope, receive, send)
            return
        key = await self.keys.find(token_of(Headers(scope=scope)))
        if key is None:
            # Answered, not raised: the error handlers are further inside.
            await answer_for(Request(scope), InvalidKey(REFUSAL))(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["key"] = key
        note_key(state.get("request_id", ""), key.name)
        await self.app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return is_open(path) or (self.has_pages and is_page(path))


def is_open(path: str) -> bool:
    """Return whether that path needs no key."""
    return path in OPEN or path.startswith(OPEN_BELOW)
