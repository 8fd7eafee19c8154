"""By what a request is known when its client, or a balancer, sends it again."""

import asyncio
import re
from dataclasses import replace
from hashlib import sha256
from typing import Any

from starlette.requests import Request

from flux_ray.errors import BadRequest
from flux_ray.gateway.callers import name_of
from flux_ray.gateway.request_id import HEADER, is_ours
from flux_ray.request import ImageRequest, Mask
from flux_ray.router.ledger.retries import Retry

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
    # Of large pictures it takes a while.
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
