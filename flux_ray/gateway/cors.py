"""Lets pages of other origins speak to this gateway from a browser, as far as its args say."""

from typing import Any

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
