"""JSON bodies: untrusted bytes to an object, and where exactly they are wrong."""

import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

from flux_ray.errors import BadRequest

MAX_JSON_VALUES = 100_000
# Some editors and PowerShell write it before the text; it means nothing in UTF-8.
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How other encodings of Unicode begin, where they say so.
OTHER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_HALF = re.compile("[\ud800-\udfff]")


def check_json(body: bytes) -> None:
    """Raises for a body of many small values: each becomes an object, a hundred times its bytes.

    Pictures in base64 have none of these signs, and a prompt is short.
    """
    if sum(body.count(sign) for sign in (b"[", b"{", b",")) > MAX_JSON_VALUES:
        raise BadRequest("the body has too many values")


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the fields of a JSON object. BadRequest says what is wrong with it, and where."""
    check_json(body)
    text = body.removeprefix(BYTE_ORDER_MARK)
    try:
        sent = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise json_fault(text, len(body) - len(text), str(error)) from None
    if not isinstance(sent, dict):
        raise BadRequest("the body must be a JSON object")
    return sent


def json_fault(text: bytes, num_skipped: int, reason: str) -> BadRequest:
    """Say why `text`, which follows so many bytes of the body, is no JSON."""
    if not text.strip():
        return BadRequest("the body is empty: send a JSON object")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        of = next((f", but {name}" for mark, name in OTHER_MARKS.items() if text[:2] == mark), "")
        at = error.start + num_skipped
        return BadRequest(f"the body is not UTF-8{of}, at byte {at}: send JSON as UTF-8")
    field = field_with_half(text)
    if field is not None:
        return BadRequest(
            f"{field[:80]}: has half of a surrogate pair (\\ud800 to \\udfff) without its other"
            " half: the text was cut within a character, such as an emoji",
            field[:80],
        )
    return BadRequest(f"the body is not valid JSON: {reason}")


def field_with_half(text: bytes) -> str | None:
    """Return the first field whose text has a lone surrogate, which no UTF-8 can say."""
    if b"\\u" not in text:
        return None
    try:
        # This one reads them.
        sent = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(sent, dict):
        return None
    return next(filter(None, names_with_halves(sent)), None)


def names_with_halves(sent: dict[str, Any]) -> Iterator[str]:
    """Yield the innermost names of texts with lone surrogates; nothing where a name has one."""
    # Names and values that are still to be looked at: bodies may be deeper than Python's stack.
    waiting: list[tuple[str, Any]] = list(reversed(sent.items()))
    while waiting:
        name, value = waiting.pop()
        if _HALF.search(name):
            yield ""
        elif isinstance(value, str) and _HALF.search(value):
            yield name
        elif isinstance(value, dict):
            waiting += reversed(value.items())
        elif isinstance(value, list):
            waiting += ((name, each) for each in reversed(value))
