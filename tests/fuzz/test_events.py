"""Server-sent events: whatever text is in one, a reader by the standard finds that very event."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from flux_ray.gateway.http import comment_text, event_text
from tests.fuzz.mutations import FUZZ

pytestmark = pytest.mark.slow


class Told(BaseModel):
    """What may be in an event."""

    text: str
    texts: list[str] = []
    number: float | None = None


# Ends of lines by somebody's rules: the standard's, Python's, JavaScript's.
ENDS = ["\r", "\n", "\r\n", "\n\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029", "\0", "data: x"]
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.one_of(st.sampled_from(ENDS), st.text(max_size=5)), max_size=8).map("".join),
)
EVENTS = st.builds(
    lambda name, text, texts, number: (name, Told(text=text, texts=texts, number=number)),
    st.sampled_from(["image_generation.completed", "error"]),
    TEXTS,
    st.lists(TEXTS, max_size=3),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
)


def read_by_the_standard(stream: bytes) -> list[tuple[str, object]]:
    """Names and data by https://html.spec.whatwg.org/#event-stream-interpretation."""
    events, name, data = [], "", []
    lines = stream.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert lines[-1] == "", "it ends within a line"
    for line in lines[:-1]:
        if not line:
            if data:
                events.append((name, json.loads("\n".join(data))))
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        else:
            assert field == "", f"{field!r} is no field of ours"
    assert not data, "the last event has no end"
    return events


@FUZZ
@given(st.lists(EVENTS, max_size=4), st.sampled_from(["waiting", "50 %"]))
def test_events(events, words):
    written = comment_text(words).join(event_text(name, told) for name, told in events)
    expected = [(name, told.model_dump(exclude_none=True)) for name, told in events]
    assert read_by_the_standard(written.encode()) == expected


@FUZZ
@given(EVENTS)
def test_no_rule_of_line_ends_cuts_an_event(event):
    """Clients cut lines as their language does, and Python's by ten other signs."""
    assert len(event_text(*event).splitlines()) == 3
