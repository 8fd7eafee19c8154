"""Tell who is asking and what they may have: identity, limits, deadline, retries.

The router needs this `Caller` beside the image request. A caller is known by the API key that was
let in, else by a digest of whatever was sent in its place. A request that comes again, from its
client or from a load balancer, is recognised by its idempotency key or its `x-request-id`.
"""

import asyncio
import math
import re
from dataclasses import replace
from hashlib import sha256
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request

from flux_ray.auth import Key, KeyClass, hash_secret
from flux_ray.config import GatewayArgs
from flux_ray.errors import BadRequest
from flux_ray.gateway.http import HEADER, is_ours
from flux_ray.gateway.model_names import UNLIMITED
from flux_ray.request import ImageRequest, Mask
from flux_ray.router.ledger.messages import Retry
from flux_ray.router.quotas import QuotaLimits
from flux_ray.router.quote import NO_CLASS, Caller

DEADLINE = "x-flux-deadline-s"
# Ray Serve's own header: its proxy gives the request up after so many seconds.
PROXY_TIMEOUT = "x-request-timeout-seconds"
ALLOW_SPILL = "x-flux-allow-spill"
KEY_CHARS = 16
# Schemes of the Authorization header that clients are known to send.
SCHEMES = ("bearer", "token", "key")
# Header parameters as OpenAPI describes them.
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
    """Makes the router's Caller from a request; the class of its key says what it may have."""

    def __init__(self, args: GatewayArgs) -> None:
        self._classes = args.key_classes

    def caller_of(self, request: Request) -> Caller:
        """Return the caller of a request. Raise BadRequest if one of its headers cannot be read.

        Requests with one key share its limits. The secret itself is not passed on.
        """
        key_class = self.class_of(request)
        deadline_s = deadline_of(request)
        return Caller(
            key=name_of(request),
            weight=key_class.weight,
            deadline_s=key_class.deadline_s if deadline_s is None else deadline_s,
            may_spill=may_spill(request),
            allowance=allowance_of(key_class),
            key_class=class_name_of(request) or NO_CLASS,
        )

    def class_of(self, request: Request) -> KeyClass:
        """Return the class of the request's key; UNLIMITED if it has no key or the key no class."""
        name = class_name_of(request)
        # Cannot fail: a keys file that names an unknown class is refused when it is read.
        return UNLIMITED if name is None else self._classes[name]


def allowance_of(key_class: KeyClass) -> QuotaLimits:
    """Return the limits of a key class as the ledger counts them."""
    return QuotaLimits(
        key_class.max_concurrent,
        key_class.requests_per_minute,
        key_class.gpu_seconds_per_day,
        key_class.megapixels_per_day,
    )


def key_of(request: Request) -> Key | None:
    """Return the key that ApiKeyMiddleware let in, or None if this gateway asks for no keys."""
    key: Key | None = getattr(request.state, "key", None)
    return key


def class_name_of(request: Request) -> str | None:
    """Return the name of the class of the request's key; None without key or class."""
    key = key_of(request)
    return None if key is None else key.key_class


def name_of(request: Request) -> str:
    """Return the caller's name, always the same for one caller; empty if it sent no key."""
    key = key_of(request)
    if key is not None:
        return key.name
    token = token_of(request.headers)
    return hash_secret(token)[:KEY_CHARS] if token else ""


def token_of(headers: Headers) -> str:
    """Return the secret that was sent, in whichever header, or an empty string."""
    sent = headers.get("authorization", "").strip()
    if not sent:
        # BFL's clients send `x-key`, ComfyUI's nodes `x-api-key`.
        return (headers.get("x-key") or headers.get("x-api-key", "")).strip()
    scheme, _, token = sent.partition(" ")
    return token.strip() if scheme.lower() in SCHEMES else sent


def deadline_of(request: Request) -> float | None:
    """Return in how many seconds the answer is wanted, or None if the client does not say.

    Raise BadRequest if the header is not a positive number.
    """
    sent = request.headers.get(DEADLINE)
    if sent is None:
        return proxy_timeout_of(request)
    try:
        seconds = float(sent)
    except ValueError:
        seconds = math.nan
    # NaN fails this comparison, too.
    if not 0 < seconds < math.inf:
        raise BadRequest(f"{DEADLINE} must be a number of seconds above 0", DEADLINE)
    return seconds


def proxy_timeout_of(request: Request) -> float | None:
    """Return after how many seconds Serve's proxy gives the request up, if its client set that.

    A request that cannot be done by then is refused here, in its dialect; the proxy's own answer
    would be plain text. As Serve does, ignore what is not a number, and take 0 for no limit.
    """
    try:
        seconds = float(request.headers.get(PROXY_TIMEOUT, ""))
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None


def may_spill(request: Request) -> bool:
    """Return whether the client accepts another tier of the model. BadRequest if unreadable."""
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
# The range from which seeds are chosen when the client sends none.
NUM_SEEDS = 2**32


def idempotency_key_of(http: Request) -> str | None:
    """Return the request's idempotency key, or None. BadRequest if it is not visible ASCII."""
    sent = http.headers.get(IDEMPOTENCY_KEY)
    if sent is not None and not re.fullmatch(r"[\x21-\x7e]{1,255}", sent):
        raise BadRequest("idempotency-key must be 1 to 255 visible characters", IDEMPOTENCY_KEY)
    return sent


async def retry_of(
    http: Request,
    model: str,
    request: ImageRequest,
    seed: int | None,
    *,
    is_upsampled: bool = False,
) -> Retry | None:
    """Return the name by which a repeat of this request is recognised, or None if it has none.

    `seed` is the one that the client sent, and so is the request's prompt: `is_upsampled` says
    whether it will get another. An idempotency key counts for good. An `x-request-id`
    counts only until the request is answered, and together with all that it asks: clients that
    number requests for their logs may use one number for several requests.
    """
    key = idempotency_key_of(http)
    number = http.headers.get(HEADER)
    if number is None or number != http.state.request_id or is_ours(number):
        number = None
    if key is None and number is None:
        return None
    # Hashing large images takes a while.
    fingerprint = await asyncio.to_thread(fingerprint_of, model, request, seed)
    if is_upsampled:
        fingerprint = digest_of(fingerprint, "upsampled")
    if key is not None:
        return Retry(digest_of(name_of(http), IDEMPOTENCY_KEY, key), fingerprint)
    name = digest_of(name_of(http), HEADER, str(number), fingerprint)
    return Retry(name, fingerprint, is_lasting=False)


def fingerprint_of(model: str, request: ImageRequest, seed: int | None) -> str:
    """Return a digest that is equal for requests for the same images.

    Whether they came as a form or as JSON makes no difference, nor does the form's boundary.
    """
    references = [each.digest.hex() for each in request.references]
    mask = digest_of(request.mask) if request.mask is not None else None
    words = replace(request, request_id="", seed=0, references=(), mask=None)
    return digest_of(model, words, seed, references, mask)


def seed_of(retry: Retry) -> int:
    """Return a seed that depends on the retry's name only.

    If everything else is lost, a repeat without a seed still gets the same images.
    """
    return int(sha256(retry.run.encode()).hexdigest(), 16) % NUM_SEEDS


def digest_of(*parts: object) -> str:
    """Return the SHA-256 of the parts' representations, which show where each part ends."""
    digest = sha256()
    for part in parts:
        # The representation of a mask would be megabytes of escapes.
        digest.update(part.marks if isinstance(part, Mask) else repr(part).encode())
    return digest.hexdigest()
