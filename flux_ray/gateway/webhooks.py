"""Check the webhooks that callers name, sign their messages, and post them.

Messages are signed in two ways: as BFL does it, and as the Standard Webhooks specification says.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx

from flux_ray import __version__
from flux_ray.config import Webhooks
from flux_ray.errors import BadRequest
from flux_ray.gateway.images.fetch import (
    AddressRefused,
    Guard,
    Resolve,
    is_reachable,
    literal,
    place_of,
    resolver,
)
from flux_ray.jobs.job import Webhook
from flux_ray.jobs.webhooks import NotTaken

# In Standard Webhooks, a secret with this prefix is a key in base64.
PREFIX = "whsec_"


def headers_for(secret: str | None, message_id: str, body: bytes, now_s: float) -> dict[str, str]:
    """Return the headers of one message: id and time, and with a secret its signatures.

    Receivers recognise a repeated message by `webhook-id`, so it is sent without a secret, too.
    """
    timestamp = str(int(now_s))
    headers = {"webhook-id": message_id, "webhook-timestamp": timestamp}
    if secret:
        signed = f"{message_id}.{timestamp}.".encode() + body
        standard = base64.b64encode(digest(key_of(secret), signed)).decode()
        headers["webhook-signature"] = f"v1,{standard}"
        headers["x-bfl-signature"] = f"sha256={digest(secret.encode(), body).hex()}"
    return headers


def digest(key: bytes, data: bytes) -> bytes:
    """Return the HMAC-SHA256 of the data."""
    return hmac.digest(key, data, hashlib.sha256)


def key_of(secret: str) -> bytes:
    """Return the key of a Standard Webhooks secret. Raise ValueError if it is not base64."""
    if not secret.startswith(PREFIX):
        return secret.encode()
    text = secret.removeprefix(PREFIX).rstrip("=")
    try:
        # Some senders leave out the padding.
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        key = b""
    if not key:
        raise ValueError(f"what follows {PREFIX} is not base64")
    return key


# Threads apart from those that resolve references: slow name servers, which a caller chooses there,
# would delay webhooks.
RESOLVERS = ThreadPoolExecutor(8, thread_name_prefix="resolve-webhooks")
MAX_URL_CHARS = 2083
MAX_SECRET_CHARS = 1024
# So much of an answer is read, and ignored, that its server can finish sending it undisturbed.
MAX_ANSWER_BYTES = 4096
MAX_ANSWER_S = 1.0
# After so many seconds the host's next address is tried.
CONNECT_S = 5.0
HEADERS = {
    "content-type": "application/json",
    "accept": "*/*",
    "accept-encoding": "identity",
    "user-agent": f"flux-ray/{__version__}",
}


def check_webhook_url(url: str, args: Webhooks) -> None:
    """Raise BadRequest unless messages may be posted to the URL.

    Host names are resolved, and their addresses checked, only when a message is posted.
    """
    if not args.enabled:
        raise BadRequest("this gateway posts no webhooks", "webhook_url")
    if not 1 <= len(url) <= MAX_URL_CHARS:
        message = f"webhook_url has 1 to {MAX_URL_CHARS} characters"
        raise BadRequest(message, "webhook_url")
    try:
        address = literal(place_of(url, args).host)
        if address is not None and not is_reachable(address, args):
            raise AddressRefused
    except AddressRefused:
        ports = " or ".join(map(str, args.ports))
        message = (
            f"webhook_url is to be the {' or '.join(args.schemes)} URL of a public host,"
            f" on port {ports}, without a user name"
        )
        raise BadRequest(message, "webhook_url") from None


def check_webhook_secret(secret: str) -> None:
    """Raise BadRequest unless the secret can be stored and signed with; never quote it."""
    if not 1 <= len(secret) <= MAX_SECRET_CHARS:
        message = f"webhook_secret has 1 to {MAX_SECRET_CHARS} characters"
        raise BadRequest(message, "webhook_secret")
    try:
        key_of(secret)
    except ValueError:
        is_usable = False
    else:
        is_usable = "\0" not in secret
    if not is_usable:
        message = "webhook_secret is plain text, or whsec_ and base64"
        raise BadRequest(message, "webhook_secret")


def webhook_of(url: str | None, secret: str | None, args: Webhooks) -> Webhook | None:
    """Return the checked webhook, or None without a URL; an empty secret counts as none."""
    if url is None:
        return None
    check_webhook_url(url, args)
    if secret:
        check_webhook_secret(secret)
    return Webhook(url, secret or None)


class Poster:
    """Posts messages to public hosts, and to others only if `args` allow them."""

    def __init__(
        self,
        args: Webhooks,
        resolve: Resolve | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.guard = Guard(args, resolve or resolver(RESOLVERS))
        self._args = args
        self._clock = clock

    async def post(self, webhook: Webhook, message_id: str, body: bytes) -> None:
        """Post the message once. Raise NotTaken unless a 2xx came in time.

        NotTaken quotes neither the message nor the answer, as its text is logged.
        """
        headers = HEADERS | headers_for(webhook.secret, message_id, body, self._clock())
        try:
            async with asyncio.timeout(self._args.timeout_s), self.guard.client(headers) as client:
                client.timeout = httpx.Timeout(self._args.timeout_s, connect=CONNECT_S)
                status = await self._status_of(client, webhook.url, body)
        except AddressRefused:
            reason = "its URL is none that may be posted to"
        except (TimeoutError, httpx.TimeoutException):
            reason = "no answer in time"
        except (httpx.RequestError, httpx.InvalidURL) as error:
            reason = type(error).__name__
        else:
            if 200 <= status < 300:
                return
            reason = f"status {status}"
        raise NotTaken(reason)

    async def _status_of(self, client: httpx.AsyncClient, url: str, body: bytes) -> int:
        # Checked as written, before httpx normalizes it; the operator may have changed the args
        # since the URL was accepted.
        check_now(url, self._args)
        async with client.stream("POST", url, content=body) as answer:
            with contextlib.suppress(TimeoutError, httpx.RequestError):
                async with asyncio.timeout(MAX_ANSWER_S):
                    await read_some(answer)
            return answer.status_code


def check_now(url: str, args: Webhooks) -> None:
    """Raise AddressRefused if the URL may not be posted to any more."""
    if not args.enabled:
        raise AddressRefused
    place_of(url, args)


async def read_some(answer: httpx.Response) -> None:
    """Read the answer up to MAX_ANSWER_BYTES, more than any well-meant answer has."""
    num_bytes = 0
    async for chunk in answer.aiter_raw():
        num_bytes += len(chunk)
        if num_bytes > MAX_ANSWER_BYTES:
            return
