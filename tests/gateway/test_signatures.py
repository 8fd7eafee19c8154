"""Signatures of webhooks, held against what others verify them with."""

import base64
import hashlib
import hmac
import time

import pytest
from openai import InvalidWebhookSignatureError, OpenAI
from standardwebhooks import Webhook, WebhookVerificationError

from flux_ray.gateway.webhooks import headers_for, key_of

BODY = '{"id": "1", "prompt": "ein rotes Fähnchen 🖼"}'.encode()
KEY = bytes(range(32))
ENCODED = "whsec_" + base64.b64encode(KEY).decode()
SECRETS = ("plain words", "ключ", ENCODED, "a\r\nx-evil: 1")


def headers(secret: str | None, body: bytes = BODY) -> dict[str, str]:
    return headers_for(secret, "job-1", body, time.time())


def verify_as_openai(body: bytes, headers: dict[str, str], secret: str) -> None:
    client = OpenAI(api_key="none", webhook_secret=secret)
    client.webhooks.verify_signature(body, headers)


@pytest.mark.parametrize("secret", SECRETS)
def test_openais_client_verifies(secret):
    verify_as_openai(BODY, headers(secret), secret)
    with pytest.raises(InvalidWebhookSignatureError):
        verify_as_openai(BODY, headers(secret), "another")
    with pytest.raises(InvalidWebhookSignatureError):
        verify_as_openai(BODY + b" ", headers(secret), secret)


@pytest.mark.parametrize(
    ("secret", "verifier"),
    [
        (ENCODED, Webhook(ENCODED)),
        (ENCODED.rstrip("="), Webhook(ENCODED)),
        ("plain words", Webhook(b"plain words")),
    ],
)
def test_standard_webhooks_verifies(secret, verifier):
    assert verifier.verify(BODY, headers(secret))["id"] == "1"
    with pytest.raises(WebhookVerificationError):
        verifier.verify(BODY.replace(b"1", b"2"), headers(secret))
    old = headers_for(secret, "job-1", BODY, time.time() - 3600)
    with pytest.raises(WebhookVerificationError, match="too old"):
        verifier.verify(BODY, old)


@pytest.mark.parametrize("secret", SECRETS)
def test_bfls_is_of_the_raw_body_by_the_secret_as_it_is(secret):
    expected = hmac.new(secret.encode(), BODY, hashlib.sha256).hexdigest()
    assert headers(secret)["x-bfl-signature"] == f"sha256={expected}"


@pytest.mark.parametrize("secret", SECRETS)
def test_no_header_holds_the_secret(secret):
    told = str(headers(secret))
    assert secret not in told and "evil" not in told and "\\r" not in told


@pytest.mark.parametrize("secret", [None, ""])
def test_without_a_secret_a_repeat_is_still_known(secret):
    assert headers_for(secret, "job-1", BODY, 1700000000.9) == {
        "webhook-id": "job-1",
        "webhook-timestamp": "1700000000",
    }


@pytest.mark.parametrize("secret", ["whsec_", "whsec_!!!", "whsec_ab cd", "whsec_a", "\ud800"])
def test_what_is_no_key(secret):
    with pytest.raises(ValueError):
        key_of(secret)
