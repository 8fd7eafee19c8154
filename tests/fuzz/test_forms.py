"""Forms of any kind: an image is drawn from them, or they are refused by an error of ours, soon."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.mutations import FUZZ, mutated, within_budget
from tests.gateway.images.image_files import noise, saved

pytestmark = pytest.mark.slow

EDITS = "/v1/images/edits"
PNG = saved(noise(64, 64), "PNG")
NAMES = ["prompt", "image", "image[]", "image[0]", "mask", "n", "size", "seed", "stream", "", "a\0"]
HEADERS = [
    b"content-type: image/png",
    b"content-type: text/plain; charset=punycode",
    b"content-type: text/plain; charset=utf-7",
    b"content-transfer-encoding: base64",
    b"content-disposition: form-data",
    b"content-disposition: form-data; name*=utf-16''a; filename*=punycode''b",
    b"x: " + b"y" * 9000,
    b": ",
    b"\0\xff",
]
TYPES = [
    "multipart/form-data; boundary=b",
    'multipart/form-data; boundary="b"',
    "multipart/form-data; boundary=b; charset=utf-8",
    "multipart/form-data; boundary=b; charset=punycode",
    "multipart/form-data; charset*=x''y; boundary=b",
    "multipart/form-data; boundary=",
    "multipart/form-data",
    "multipart/mixed; boundary=b",
    "multipart/form-data; boundary=" + "b" * 200,
    "application/x-www-form-urlencoded",
]
VALUES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([PNG, base64.b64encode(PNG), b"a ring", b"64x64", b"1", b"-1", b"\x89PNG"]),
)


@st.composite
def parts(draw: st.DrawFn) -> bytes:
    """One part, with a name and, it may be, a file name and other headers."""
    name = draw(st.sampled_from(NAMES)).encode()
    says = b'content-disposition: form-data; name="' + name + b'"'
    if draw(st.booleans()):
        says += b'; filename="' + draw(st.sampled_from([b"a.png", b"", b"../a", b"\xff\0"])) + b'"'
    lines = [says, *draw(st.lists(st.sampled_from(HEADERS), max_size=3))]
    return b"\r\n".join([*draw(st.permutations(lines)), b"", draw(VALUES)])


FORMS = st.builds(
    lambda texts, end: b"".join(b"--b\r\n" + text + b"\r\n" for text in texts) + end,
    st.lists(parts(), max_size=5),
    st.sampled_from([b"--b--\r\n", b"--b--", b"--b", b""]),
)
GOOD = [
    b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\na ring\r\n'
    b'--b\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n'
    b"content-type: image/png\r\n\r\n" + PNG + b"\r\n--b--\r\n",
    b'--b\r\ncontent-disposition: form-data; name="n"\r\n\r\n1\r\n'
    b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\na ring\r\n--b--\r\n',
]


@FUZZ
@given(FORMS, st.one_of(st.just(TYPES[0]), st.sampled_from(TYPES)))
async def test_forms(client, form, content_type):
    for _ in within_budget():
        answer = await client.post(EDITS, content=form, headers={"content-type": content_type})
    assert answer.status_code < 500, answer.text


@FUZZ
@given(mutated(GOOD), mutated([each.encode() for each in TYPES[:5]]))
async def test_broken_forms(client, form, content_type):
    headers = [(b"content-type", content_type)]
    for _ in within_budget():
        answer = await client.post(EDITS, content=form, headers=headers)
    assert answer.status_code < 500, answer.text


@FUZZ
@given(mutated(GOOD), st.lists(st.integers(1, 300), min_size=1, max_size=5))
async def test_pieces(client, form, sizes):
    """Of any length: a border of two of them may be anywhere."""

    async def pieces():
        at = 0
        while at < len(form):
            for size in sizes:
                yield form[at : at + size]
                at += size

    headers = {"content-type": TYPES[0]}
    whole = await client.post(EDITS, content=form, headers=headers)
    for _ in within_budget():
        cut = await client.post(EDITS, content=pieces(), headers=headers)
    assert cut.status_code == whole.status_code < 500
