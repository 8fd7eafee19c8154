"""A client's fields under our own names: empty ones left out, other servers' names translated.

JSON bodies: untrusted bytes to an object, and where exactly they are wrong.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic_core import from_json

from flux_ray.errors import BadRequest
from flux_ray.gateway.fields.foreign import EXTRA_BODY, SAME, plain_name

MAX_JSON_VALUES = 100_000
# Some editors and PowerShell write it before the text; it means nothing in UTF-8.
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How other encodings of Unicode begin, where they say so.
OTHER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_HALF = re.compile("[\ud800-\udfff]")


def check_json(body: bytes) -> None:
    """Raises for a body of many small values: each becomes an object, a hundred times its bytes.

    Images in base64 have none of these signs, and a prompt is short.
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


MAX_FIELDS = 1000
# No word that is translated is as long; a text may be as long as a body.
MAX_WORD_CHARS = 80
# Words keep their spaces, and say by being empty that they are.
WORDS = frozenset({"prompt", "inputs", "negative_prompt"})
# As hosts of FLUX models call shapes.
SHAPES = {
    "square_hd": "1:1",
    "square": "1:1",
    "portrait_4_3": "3:4",
    "portrait_3_2": "2:3",
    "portrait_16_9": "9:16",
    "portrait_21_9": "9:21",
    "landscape_4_3": "4:3",
    "landscape_3_2": "3:2",
    "landscape_16_9": "16:9",
    "landscape_21_9": "21:9",
}
# That the answer is as large, or of the same shape, as its first reference is our default.
AS_IS = frozenset({"auto", "custom", "default", "match_input_image", "match_input"})
_SIZE = re.compile(r"([0-9]{1,5})\s*[x*\u00d7]\s*([0-9]{1,5})")
_RATIO = re.compile(r"([0-9]{1,5})\s*[:/x]\s*([0-9]{1,5})")
_MEGAPIXELS = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3})?")
_NAMED_AREA = re.compile(r"[0-9]{1,2}(\.[0-9]{1,2})?k", re.I)


class SentFields(NamedTuple):
    """Values by our names; `names` says what the caller calls those that have another one."""

    values: dict[str, Any]
    names: dict[str, str]


def heed(sent: Mapping[str, Any]) -> SentFields:
    """Translate what a client sent. BadRequest where two names of one field disagree."""
    sent = with_extra_body(sent)
    if len(sent) > MAX_FIELDS:
        raise BadRequest(f"the body has more than {MAX_FIELDS} fields")
    spelled: dict[str, str] = {}
    plain: dict[str, Any] = {}
    for name, value in sent.items():
        if not is_absent(name, value):
            known = plain_name(name)
            check_same(plain, known, value, (spelled.get(known, known), name))
            plain[known] = stripped(known, value)
            spelled[known] = name
    values, names = with_our_names(plain, spelled)
    for name, translate in TRANSLATIONS.items():
        if name in values and is_word(values[name]):
            replace_by(values, names, name, translate(values[name]))
    return SentFields(values, names)


def with_extra_body(sent: Mapping[str, Any]) -> Mapping[str, Any]:
    """Unpack the field that some clients mean for their library: it stands for what is in it."""
    found = next((name for name in sent if plain_name(name) == EXTRA_BODY), None)
    if found is None:
        return sent
    extra = sent[found]
    if isinstance(extra, str) and extra.strip():
        extra = parse_object(extra.encode())
    rest = {name: value for name, value in sent.items() if name != found}
    if is_absent(found, extra):
        return rest
    if not isinstance(extra, dict) or EXTRA_BODY in extra:
        raise BadRequest(f"{found}: must be an object of further fields", found)
    for name, value in extra.items():
        check_same(rest, name, value, (name, f"{found}.{name}"))
    return rest | extra


def is_word(value: Any) -> bool:
    """Whether the value may be one that is translated; else its field's own check refuses it."""
    return not isinstance(value, str) or len(value) <= MAX_WORD_CHARS


def is_absent(name: str, value: Any) -> bool:
    """Whether that is as no field: a null, or an empty text where none may be empty."""
    return value is None or (name not in WORDS and isinstance(value, str) and not value.strip())


def stripped(name: str, value: Any) -> Any:
    """Take white space off a text's ends, but for words."""
    return value.strip() if isinstance(value, str) and name not in WORDS else value


def check_same(values: Mapping[str, Any], name: str, value: Any, called: tuple[str, str]) -> None:
    """Raise BadRequest if the field is there with another value; `called` are its two names."""
    if name in values and comparable(values[name]) != comparable(value):
        raise BadRequest(f"{called[0]} and {called[1]} disagree", called[0])


def comparable(value: Any) -> Any:
    """Return the same for 7, 7.0 and `7`."""
    if isinstance(value, str) and len(value) <= 40:
        try:
            return float(value)
        except ValueError:
            return value.strip()
    return value


def with_our_names(plain: dict[str, Any], spelled: dict[str, str]) -> SentFields:
    """Give each field of several names one; the first that was sent, ours before all, names it."""
    values, names = dict(plain), {known: name for known, name in spelled.items() if known != name}
    for ours, others in SAME.items():
        sent = [name for name in (ours, *others) if name in plain]
        for other in sent[1:]:
            check_same(plain, sent[0], plain[other], (spelled[sent[0]], spelled[other]))
        for other in sent:
            del values[other]
        if sent:
            values[ours] = plain[sent[0]]
            names[ours] = spelled[sent[0]]
    return SentFields(values, names)


def replace_by(
    values: dict[str, Any], names: dict[str, str], name: str, meant: dict[str, Any]
) -> None:
    """Put in place of a field what it means, under the caller's name for it."""
    called = names.get(name, name)
    del values[name]
    for field, value in meant.items():
        check_same(values, field, value, (names.get(field, field), called))
        values[field] = value
        names.setdefault(field, called)


def size_meant(value: Any) -> dict[str, Any]:
    """Read `512x768`, `landscape_16_9`, `2K`, `auto`, and an object with both sides."""
    if isinstance(value, dict) and value.keys() == {"width", "height"}:
        return dict(value)
    if not isinstance(value, str):
        return {"size": value}
    word = value.lower()
    if word in SHAPES:
        return {"aspect_ratio": SHAPES[word]}
    if _NAMED_AREA.fullmatch(word):
        return {"resolution": word}
    return {} if word in AS_IS else {"size": value}


def ratio_meant(value: Any) -> dict[str, Any]:
    """Read `16:9`, `16/9`, `landscape_16_9` and `auto`."""
    if not isinstance(value, str):
        return {"aspect_ratio": value}
    word = value.lower()
    match = _RATIO.fullmatch(word)
    if match is not None:
        return {"aspect_ratio": f"{match[1]}:{match[2]}"}
    return {} if word in AS_IS else {"aspect_ratio": SHAPES.get(word, value)}


def resolution_meant(value: Any) -> dict[str, Any]:
    """Read `2k`, `1 MP`, a number of megapixels, and `512x768`."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        # No area is larger; numbers of hundreds of digits are none that can be written so.
        return {"resolution": f"{max(-1e9, min(value, 1e9)):g}mp"}
    if not isinstance(value, str):
        return {"resolution": value}
    word = value.lower().replace(" ", "")
    if _MEGAPIXELS.fullmatch(word):
        word += "mp"
    size = _SIZE.fullmatch(word)
    if size is not None:
        return {"size": f"{size[1]}x{size[2]}"}
    return {} if word in AS_IS else {"resolution": word}


def seed_meant(value: Any) -> dict[str, Any]:
    """Leave out -1, by which many clients ask for any."""
    return {} if not isinstance(value, bool) and comparable(value) == -1 else {"seed": value}


def format_meant(value: Any) -> dict[str, Any]:
    """Read `jpg`, `JPEG`, `.jpg` and `image/jpeg` as `jpeg`."""
    if not isinstance(value, str):
        return {"output_format": value}
    word = value.lower().removeprefix("image/").removeprefix(".")
    return {"output_format": "jpeg" if word in ("jpg", "pjpeg") else word}


# In this order: a size may be a shape, and a resolution a size.
TRANSLATIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "resolution": resolution_meant,
    "size": size_meant,
    "aspect_ratio": ratio_meant,
    "seed": seed_meant,
    "output_format": format_meant,
}
