"""How webhooks are signed: as BFL does it, and as Standard Webhooks says."""

import base64
import binascii
import hashlib
import hmac

# What follows is the key, in base64.
PREFIX = "whsec_"


def headers_for(secret: str | None, message_id: str, body: bytes, now_s: float) -> dict[str, str]:
    """Of one posting; those that tell a repeat are there without a secret too."""
    timestamp = str(int(now_s))
    headers = {"webhook-id": message_id, "webhook-timestamp": timestamp}
    if secret:
        signed = f"{message_id}.{timestamp}.".encode() + body
        standard = base64.b64encode(digest(key_of(secret), signed)).decode()
        headers["webhook-signature"] = f"v1,{standard}"
        headers["x-bfl-signature"] = f"sha256={digest(secret.encode(), body).hex()}"
    return headers


def digest(key: bytes, data: bytes) -> bytes:
    """HMAC with SHA-256."""
    return hmac.digest(key, data, hashlib.sha256)


def key_of(secret: str) -> bytes:
    """Of Standard Webhooks. ValueError: it says that it is base64, and is none."""
    if not secret.startswith(PREFIX):
        return secret.encode()
    text = secret.removeprefix(PREFIX).rstrip("=")
    try:
        # Some leave the padding out.
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        key = b""
    if not key:
        raise ValueError(f"what follows {PREFIX} is not base64")
    return key
