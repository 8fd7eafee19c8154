"""Who asks, and until when: what the router needs to know of a request besides the picture."""

import hashlib
import math
from typing import Any

from starlette.requests import Request

from flux_ray.config import GatewayArgs, KeyClass
from flux_ray.errors import BadRequest
from flux_ray.router.caller import Caller

DEADLINE = "x-flux-deadline-s"
ALLOW_SPILL = "x-flux-allow-spill"
KEY_CHARS = 16
# What OpenAPI says of them.
PARAMETERS: list[dict[str, Any]] = [
    {
        "name": DEADLINE,
        "in": "header",
        "required": False,
        "description": "Seconds in which the answer is wanted; 429 at once if that cannot be.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
    {
        "name": ALLOW_SPILL,
        "in": "header",
        "required": False,
        "description": "Whether another tier of the model will do while its first is loaded.",
        "schema": {"type": "string", "enum": ["true", "false"]},
    },
]


class Callers:
    """Tells callers apart by their keys."""

    def __init__(self, args: GatewayArgs) -> None:
        self._classes = {key: each for each in args.key_classes.values() for key in each.keys}

    def caller_of(self, request: Request) -> Caller:
        """The caller. Requests with the same key share; the key itself goes no further."""
        token = token_of(request)
        key_class = self.class_of(request)
        deadline_s = deadline_of(request)
        if key_class is not None and deadline_s is None:
            deadline_s = key_class.deadline_s
        return Caller(
            key=sha256(token)[:KEY_CHARS] if token else "",
            weight=1.0 if key_class is None else key_class.weight,
            deadline_s=deadline_s,
            may_spill=may_spill(request),
        )

    def class_of(self, request: Request) -> KeyClass | None:
        """The class of its key; None for all others."""
        return self._classes.get(sha256(token_of(request)))

    def licenses_of(self, request: Request) -> tuple[str, ...] | None:
        """Those of the tiers that its key may use; None is all."""
        key_class = self.class_of(request)
        return None if key_class is None else key_class.licenses


def token_of(request: Request) -> str:
    """The API key, or whatever else is sent in its place."""
    sent = request.headers.get("authorization", "").strip()
    scheme, _, token = sent.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else sent


def sha256(text: str) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


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


def may_spill(request: Request) -> bool:
    """Whether the client says so."""
    sent = request.headers.get(ALLOW_SPILL, "false").strip().lower()
    if sent not in ("true", "false"):
        raise BadRequest(f"{ALLOW_SPILL} must be true or false", ALLOW_SPILL)
    return sent == "true"
