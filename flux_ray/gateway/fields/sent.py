"""Parse a client's fields and translate them to our names and values.

`parse_object` reads JSON from untrusted bytes, and says exactly where it is wrong. `heed` leaves
out empty fields, and translates the names and values of other servers.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from pydantic_core import from_json

from flux_ray.errors import BadRequest
from flux_ray.gateway.fields.foreign import EXTRA_BODY, SAME, is_nothing, plain_name

MAX_JSON_VALUES = 100_000
# Some editors and PowerShell write a byte order mark before the text; in UTF-8 it means nothing.
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Byte order marks of other Unicode encodings.
OTHER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# Lone surrogates: half of a character that UTF-16 writes in two units.
_HALF = re.compile("[\ud800-\udfff]")


def check_json(body: bytes) -> None:
    """Raise BadRequest for a body of many small values.

    Each becomes a Python object of a hundred times its bytes. Base64 has none of these signs, and
    prompts are short, so that honest bodies stay far below the limit.
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
    """Return the error for `text`, `num_skipped` bytes into the body, that is not JSON."""
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
    """Return the first field whose text has a lone surrogate, which UTF-8 cannot express."""
    if b"\\u" not in text:
        return None
    try:
        # Python's own parser accepts lone surrogates, so they can be found.
        sent = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(sent, dict):
        return None
    return next(filter(None, names_with_halves(sent)), None)


def names_with_halves(sent: dict[str, Any]) -> Iterator[str]:
    """Yield the names of texts with lone surrogates; "" for a name that has one itself."""
    # A stack of our own: bodies may be nested more deeply than Python can recurse.
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
# Longer texts are not translated: no known word is as long, and a text may be as long as a body.
MAX_WORD_CHARS = 80
# Texts for the model: their white space stays, and empty ones count as sent.
WORDS = frozenset({"prompt", "inputs", "negative_prompt"})
# Names of shapes at other hosts of FLUX models.
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
# Words for "as large as, or of the shape of, the first reference", which is our default.
AS_IS = frozenset({"auto", "custom", "default", "match_input_image", "match_input"})
_SIZE = re.compile(r"([0-9]{1,5})\s*[x*\u00d7]\s*([0-9]{1,5})")
_RATIO = re.compile(r"([0-9]{1,5})\s*[:/x]\s*([0-9]{1,5})")
_MEGAPIXELS = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3})?")
_NAMED_AREA = re.compile(r"[0-9]{1,2}(\.[0-9]{1,2})?k", re.I)


class SentFields(NamedTuple):
    """Values by our names; `names` has the caller's own name where it differs."""

    values: dict[str, Any]
    names: dict[str, str]


def heed(sent: Mapping[str, Any]) -> SentFields:
    """Translate what a client sent. BadRequest if two names of one field disagree."""
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
    """Return the fields with those inside of `extra_body` moved out of it.

    OpenAI's Python library takes `extra_body` and sends its content; some clients send it as a
    field.
    """
    found = next((name for name in sent if plain_name(name) == EXTRA_BODY), None)
    if found is None:
        return sent
    extra = sent[found]
    if isinstance(extra, str) and extra.strip():
        # Its own error would speak of the body.
        with suppress(BadRequest):
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
    """Return whether a value is short enough to translate; its field's own check refuses others."""
    return not isinstance(value, str) or len(value) <= MAX_WORD_CHARS


def is_absent(name: str, value: Any) -> bool:
    """Return whether a value counts as not sent: null, or an empty text not for the model."""
    return value is None or (name not in WORDS and isinstance(value, str) and not value.strip())


def stripped(name: str, value: Any) -> Any:
    """Return a text without white space around it, unless it is for the model."""
    return value.strip() if isinstance(value, str) and name not in WORDS else value


def check_same(values: Mapping[str, Any], name: str, value: Any, called: tuple[str, str]) -> None:
    """Raise BadRequest if the field has another value; `called` are its two names."""
    if name in values and comparable(values[name]) != comparable(value):
        raise BadRequest(f"{called[0]} and {called[1]} disagree", called[0])


def comparable(value: Any) -> Any:
    """Return a value that is equal for 7, 7.0 and `7`."""
    if isinstance(value, str) and len(value) <= 40:
        try:
            return float(value)
        except ValueError:
            return value.strip()
    return value


def with_our_names(plain: dict[str, Any], spelled: dict[str, str]) -> SentFields:
    """Move every field to our name for it; note the caller's name, or ours if both were sent."""
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
    """Replace a field by the fields that it means, under the caller's name for it."""
    called = names.get(name, name)
    del values[name]
    for field, value in meant.items():
        check_same(values, field, value, (names.get(field, field), called))
        values[field] = value
        names.setdefault(field, called)


def size_meant(value: Any) -> dict[str, Any]:
    """Translate `512x768`, `landscape_16_9`, `2K`, `auto`, or an object with both sides."""
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
    """Translate `16:9`, `16/9`, `landscape_16_9` or `auto`."""
    if not isinstance(value, str):
        return {"aspect_ratio": value}
    word = value.lower()
    match = _RATIO.fullmatch(word)
    if match is not None:
        return {"aspect_ratio": f"{match[1]}:{match[2]}"}
    return {} if word in AS_IS else {"aspect_ratio": SHAPES.get(word, value)}


def resolution_meant(value: Any) -> dict[str, Any]:
    """Translate `2k`, `1 MP`, a number of megapixels, or `512x768`."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        # Clamped: no area is larger, and a number of hundreds of digits cannot be formatted.
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
    """Drop -1, by which many clients ask for a random seed."""
    return {} if not isinstance(value, bool) and comparable(value) == -1 else {"seed": value}


def format_meant(value: Any) -> dict[str, Any]:
    """Translate `jpg`, `JPEG`, `.jpg` and `image/jpeg` to `jpeg`."""
    if not isinstance(value, str):
        return {"output_format": value}
    word = value.lower().removeprefix("image/").removeprefix(".")
    return {"output_format": "jpeg" if word in ("jpg", "pjpeg") else word}


def upsampling_meant(value: Any) -> dict[str, Any]:
    """Translate `auto`, which leaves it to us, and the words for no."""
    if isinstance(value, str) and value.lower() == "auto":
        return {}
    return {"prompt_upsampling": False if is_nothing(value) else value}


# The order matters: a resolution may turn out to be a size, and a size to be a shape.
TRANSLATIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "resolution": resolution_meant,
    "size": size_meant,
    "aspect_ratio": ratio_meant,
    "seed": seed_meant,
    "output_format": format_meant,
    "prompt_upsampling": upsampling_meant,
}
