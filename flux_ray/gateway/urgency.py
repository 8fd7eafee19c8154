"""Who asks and until when: what the router needs to know of a request besides the picture."""

import hashlib
import math

from starlette.requests import Request

from flux_ray.errors import BadRequest

DEADLINE = "x-flux-deadline-s"
KEY_CHARS = 16
# What OpenAPI says of it.
DEADLINE_PARAMETER = {
    "name": DEADLINE,
    "in": "header",
    "required": False,
    "description": "Seconds in which the answer is wanted; 429 at once if that cannot be.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}


def deadline_of(request: Request) -> float | None:
    """Seconds from now in which the answer is wanted; None where the client does not say."""
    sent = request.headers.get(DEADLINE)
    if sent is None:
        return None
    try:
        seconds = float(sent)
    except ValueError:
        seconds = math.nan
    # Not a number is not above 0 either.
    if not 0 < seconds < math.inf:
        raise BadRequest(f"{DEADLINE} must be a number of seconds above 0", DEADLINE)
    return seconds


def key_of(request: Request) -> str:
    """Requests with the same credentials share what there is. The credentials go no further."""
    sent = request.headers.get("authorization", "")
    return hashlib.sha256(sent.encode()).hexdigest()[:KEY_CHARS] if sent else ""
