"""Images as text: every form that clients send is read, and what is too much is not decoded."""

import base64

import pytest

from flux_ray.config.gateway import Limits
from flux_ray.errors import BadReference
from flux_ray.gateway.images.sources import decode_base64, is_url

LIMITS = Limits(max_image_bytes=3000)
DATA = bytes(range(256)) * 4
PLAIN = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        f"data:image/png;base64,{PLAIN}",
        f"DATA:;charset=x;BASE64,{PLAIN}",
        base64.urlsafe_b64encode(DATA).decode(),
        PLAIN.rstrip("="),
        base64.encodebytes(DATA).decode(),
        base64.encodebytes(DATA).decode().replace("\n", "\r\n"),
    ],
)
def test_forms(text):
    assert not is_url(text)
    assert decode_base64(text, LIMITS, "image 1") == DATA


def test_line_breaks_do_not_count():
    text = base64.encodebytes(b"a" * 3000).decode().replace("\n", "\r\n")
    assert len(decode_base64(text, LIMITS, "image 1")) == 3000


def test_what_is_too_long_is_not_decoded():
    with pytest.raises(BadReference, match="larger than 3000 bytes"):
        decode_base64("!" * 5000, LIMITS, "image 1")


@pytest.mark.parametrize("url", ["http://a.test/b.png", "HTTPS://a.test", "file:///a", "s3://a/b"])
def test_urls(url):
    assert is_url(url)


async def test_too_many_are_counted_before_one_is_read(client):
    body = {"prompt": "a ring", "images": ["!!!!"] * 50}
    error = (await client.post("/v1/images/edits", json=body)).json()["error"]
    assert error["message"] == "tiny takes at most 2 images"
