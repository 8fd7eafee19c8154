"""Who asks, and until when: what the router needs to know of a request besides the image.

By what a request is known when its client, or a balancer, sends it again.
"""

import asyncio
import math
import re
from dataclasses import replace
from hashlib import sha256
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request

from flux_ray.auth.keys import Key, KeyClass, hash_secret
from flux_ray.config.gateway import GatewayArgs
from flux_ray.errors import BadRequest
from flux_ray.gateway.http import HEADER, is_ours
from flux_ray.gateway.model_names import UNLIMITED
from flux_ray.request import ImageRequest, Mask
from flux_ray.router.ledger.messages import Retry
from flux_ray.router.quotas import QuotaLimits
from flux_ray.router.quote import Caller

DEADLINE = "x-flux-deadline-s"
# Ray Serve's own.
PROXY_TIMEOUT = "x-request-timeout-seconds"
ALLOW_SPILL = "x-flux-allow-spill"
KEY_CHARS = 16
# As they occur on the wire.
SCHEMES = ("bearer", "token", "key")
# What OpenAPI says of them.
SPILL: dict[str, Any] = {
    "name": ALLOW_SPILL,
    "in": "header",
    "required": False,
    "description": "Whether another tier of the model will do while its first is loaded.",
    "schema": {"type": "string", "enum": ["true", "false"]},
}
PARAMETERS: list[dict[str, Any]] = [
    {
        "name": DEADLINE,
        "in": "header",
        "required": False,
        "description": "Seconds in which the answer is wanted; 429 at once if that cannot be.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
    SPILL,
]


class Callers:
    """Tells callers apart by their keys, whose classes say what they may."""

    def __init__(self, args: GatewayArgs) -> None:
        self._classes = args.key_classes

    def caller_of(self, request: Request) -> Caller:
        """The caller. Requests with the same key share; the secret itself goes no further."""
        key_class = self.class_of(request)
        deadline_s = deadline_of(request)
        return Caller(
            key=name_of(request),
            weight=key_class.weight,
            deadline_s=key_class.deadline_s if deadline_s is None else deadline_s,
            may_spill=may_spill(request),
            allowance=allowance_of(key_class),
        )

    def class_of(self, request: Request) -> KeyClass:
        """The class of its key; without one nothing is limited."""
        key = key_of(request)
        if key is None or key.key_class is None:
            return UNLIMITED
        # A file that names other classes is not read.
        return self._classes[key.key_class]


def allowance_of(key_class: KeyClass) -> QuotaLimits:
    """What the class lets a caller have."""
    return QuotaLimits(
        key_class.max_concurrent,
        key_class.requests_per_minute,
        key_class.gpu_seconds_per_day,
        key_class.megapixels_per_day,
    )


def key_of(request: Request) -> Key | None:
    """The key that the door let in; None where there is no door."""
    key: Key | None = getattr(request.state, "key", None)
    return key


def name_of(request: Request) -> str:
    """Whose the request is: of the same caller it is always the same."""
    key = key_of(request)
    if key is not None:
        return key.name
    token = token_of(request.headers)
    return hash_secret(token)[:KEY_CHARS] if token else ""


def token_of(headers: Headers) -> str:
    """The API key, or whatever else is sent in its place."""
    sent = headers.get("authorization", "").strip()
    if not sent:
        # BFL's clients, and ComfyUI's nodes.
        return (headers.get("x-key") or headers.get("x-api-key", "")).strip()
    scheme, _, token = sent.partition(" ")
    return token.strip() if scheme.lower() in SCHEMES else sent


def deadline_of(request: Request) -> float | None:
    """Seconds from now in which the answer is wanted; None where the client does not say."""
    sent = request.headers.get(DEADLINE)
    if sent is None:
        return proxy_timeout_of(request)
    try:
        seconds = float(sent)
    except ValueError:
        seconds = math.nan
    # Not a number is not above 0 either.
    if not 0 < seconds < math.inf:
        raise BadRequest(f"{DEADLINE} must be a number of seconds above 0", DEADLINE)
    return seconds


def proxy_timeout_of(request: Request) -> float | None:
    """Return after how many seconds Serve's proxy ends the request, if its client says so.

    What cannot be done by then is refused in the words of the dialect; the proxy's own answer is
    plain text. Serve takes what is no number for nothing, and 0 for no limit.
    """
    try:
        seconds = float(request.headers.get(PROXY_TIMEOUT, ""))
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None


def may_spill(request: Request) -> bool:
    """Whether the client says so."""
    sent = request.headers.get(ALLOW_SPILL, "false").strip().lower()
    if sent not in ("true", "false"):
        raise BadRequest(f"{ALLOW_SPILL} must be true or false", ALLOW_SPILL)
    return sent == "true"


IDEMPOTENCY_KEY = "idempotency-key"
PARAMETER: dict[str, Any] = {
    "name": IDEMPOTENCY_KEY,
    "in": "header",
    "required": False,
    "description": "A name of the caller's own: the same request again has the same images.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}
# As many as are drawn where neither a seed nor a name is sent.
NUM_SEEDS = 2**32


def idempotency_key_of(http: Request) -> str | None:
    """The caller's own name for its request; None where it sends none."""
    sent = http.headers.get(IDEMPOTENCY_KEY)
    if sent is not None and not re.fullmatch(r"[\x21-\x7e]{1,255}", sent):
        raise BadRequest("idempotency-key must be 1 to 255 visible characters", IDEMPOTENCY_KEY)
    return sent


async def retry_of(
    http: Request, model: str, request: ImageRequest, seed: int | None
) -> Retry | None:
    """By what it is known, if its client named it. `seed`: that the client sent.

    Whoever numbers requests for the logs may number several alike: such a number counts for the
    very same request only, and until it is answered.
    """
    key = idempotency_key_of(http)
    number = http.headers.get(HEADER)
    if number is None or number != http.state.request_id or is_ours(number):
        number = None
    if key is None and number is None:
        return None
    # Of large images it takes a while.
    fingerprint = await asyncio.to_thread(fingerprint_of, model, request, seed)
    if key is not None:
        return Retry(digest_of(name_of(http), IDEMPOTENCY_KEY, key), fingerprint)
    name = digest_of(name_of(http), HEADER, str(number), fingerprint)
    return Retry(name, fingerprint, is_lasting=False)


def fingerprint_of(model: str, request: ImageRequest, seed: int | None) -> str:
    """The same for all that asks for the same images: a form and JSON, with any boundary."""
    references = [each.digest.hex() for each in request.references]
    mask = digest_of(request.mask) if request.mask is not None else None
    words = replace(request, request_id="", seed=0, references=(), mask=None)
    return digest_of(model, words, seed, references, mask)


def seed_of(retry: Retry) -> int:
    """Where none is sent: whatever is lost, the images are equal when they are drawn again."""
    return int(sha256(retry.run.encode()).hexdigest(), 16) % NUM_SEEDS


def digest_of(*parts: object) -> str:
    """Of their representations, which tell where each ends."""
    digest = sha256()
    for part in parts:
        # A mask has megabytes.
        digest.update(part.marks if isinstance(part, Mask) else repr(part).encode())
    return digest.hexdigest()
