"""What crosses process borders, between code of one version and of others."""

import pickle
from dataclasses import dataclass, field, make_dataclass, replace
from typing import Any

import pytest
from pydantic import TypeAdapter

from flux_ray import errors, request, wire
from flux_ray.errors import BadReference, FluxError, OutOfMemory, Overloaded, ProtocolMismatch
from flux_ray.request import (
    PROTOCOL,
    Encoding,
    GeneratedImage,
    ImageRequest,
    ImageResult,
    Mask,
    Preview,
    Progress,
    RgbImage,
    StageTimes,
)
from flux_ray.wire import (
    Description,
    answer_from,
    description_from,
    pack_answer,
    pack_recall,
    pack_request,
    packed,
    request_from,
)

PLAIN = ImageRequest("id", "tiny", "a ring", 128, 96, 4, 1.0, seed=7)
WHOLE = replace(
    PLAIN,
    num_images=2,
    references=(RgbImage(2, 1, b"abcdef"), RgbImage(1, 1, b"ghi")),
    encoding=Encoding("jpeg", 80, (256, 192)),
    mask=Mask(2, 1, b"\x00\xff"),
    num_previews=3,
    negative_prompt="a ring",
    true_cfg_scale=4.5,
    strength=0.8,
    follows_reference=True,
    allow_truncation=True,
)
RESULT = ImageResult(
    "id", "tiny", (GeneratedImage(b"png", 7),), StageTimes(0.1, 0.2, 0.3, 0.4), ("cut",), "laid out"
)


def over_the_border(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("asked", [PLAIN, WHOLE])
def test_a_request_arrives_as_it_was(asked: ImageRequest) -> None:
    assert request_from(over_the_border(pack_request(asked))) == asked


def test_what_is_said_by_default_is_not_sent() -> None:
    call = pack_request(PLAIN)
    assert call["protocol"] == PROTOCOL
    assert call["request"].keys() == {
        *("request_id", "tier", "prompt", "width", "height", "num_steps", "guidance", "seed")
    }


def test_pixels_are_not_copied() -> None:
    """An image may have 60 MB."""
    arrived = request_from(pack_request(WHOLE))
    assert arrived.references[0].rgb is WHOLE.references[0].rgb
    assert arrived.mask is not None and WHOLE.mask is not None
    assert arrived.mask.marks is WHOLE.mask.marks
    assert answer_from(pack_answer(RESULT)).images[0].data is RESULT.images[0].data  # type: ignore[union-attr]


def test_older_code_takes_a_recall_for_no_request() -> None:
    """It does not know the key, and draws nothing."""
    with pytest.raises(ProtocolMismatch):
        request_from(over_the_border(pack_recall("tiny", "id", "mine")))
    assert "run" not in pack_request(PLAIN)
    assert request_from(pack_request(PLAIN, "mine")) == PLAIN, "and of a run it hears nothing"


def of_classes_of_ours(value: Any) -> bool:
    return b"flux_ray" in pickle.dumps(value)


def test_only_plain_values_cross() -> None:
    """Whatever classes the other side has."""
    described = packed(Description(1, "a", "b", {"tier": "tiny"}, None, 0.0))
    for value in (pack_request(WHOLE), pack_answer(RESULT), described):
        assert not of_classes_of_ours(value)


NEWER_REQUEST = make_dataclass(
    "ImageRequest", [("sharpness", float, field(default=0.0))], bases=(ImageRequest,), frozen=True
)


def newer(**fields: Any) -> Any:
    """A request of code that knows one field more."""
    return NEWER_REQUEST("id", "tiny", "a ring", 128, 96, 4, 1.0, seed=7, **fields)


def test_a_newer_request_that_says_nothing_new_is_served() -> None:
    assert request_from(pack_request(newer())) == PLAIN


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sharpness": 0.5}, "sharpness"),
        ({"encoding": {"format": "jpeg", "is_progressive": True}}, "encoding.is_progressive"),
        ({"encoding": {"format": "avif"}}, "encoding.format"),
        ({"references": ({"width": 1, "height": 1, "rgb": b"abc", "alpha": b"a"},)}, "alpha"),
        ({"mask": {"width": 1, "height": 1, "marks": b"a", "feather": 2}}, "feather"),
        ({"lora": {"path": "x"}}, "lora"),
    ],
    ids=["a field", "of its encoding", "a word", "of a reference", "of its mask", "a class"],
)
def test_what_a_replica_does_not_know_is_never_ignored(change: dict[str, Any], named: str) -> None:
    call = pack_request(PLAIN)
    call["request"] |= change
    with pytest.raises(ProtocolMismatch, match=named) as caught:
        request_from(call)
    assert (caught.value.protocol, caught.value.status) == (PROTOCOL, 503)
    assert caught.value.retry_after_s


@pytest.mark.parametrize("call", [{}, {"protocol": 9, "request": None}, {"request": {"tier": "a"}}])
def test_a_call_that_is_no_request_is_refused(call: dict[str, Any]) -> None:
    with pytest.raises(ProtocolMismatch):
        request_from(call)


def test_an_older_request_means_what_it_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its gateway does not know has its default."""
    monkeypatch.setattr(wire, "REQUEST", TypeAdapter(NEWER_REQUEST))
    assert request_from(pack_request(PLAIN)) == newer()


@pytest.mark.parametrize(
    "value", [RESULT, Progress(2, 4), Preview("tiny", GeneratedImage(b"png", 7), 1)]
)
def test_an_answer_arrives_as_it_was(value: Any) -> None:
    assert answer_from(over_the_border(pack_answer(value))) == value


def test_what_is_new_in_an_answer_is_left_out() -> None:
    answer = pack_answer(RESULT)
    answer["value"] |= {"watermark": "none"}
    answer["value"]["times"] |= {"upscale_s": 0.5}
    answer["value"]["images"][0]["alpha"] = b"a"
    assert answer_from(answer) == RESULT
    assert answer_from({"protocol": 9, "kind": "Upscaled", "value": {}}) is None


def test_an_answer_without_what_is_needed_here_is_refused() -> None:
    answer = pack_answer(RESULT)
    del answer["value"]["times"]
    with pytest.raises(ProtocolMismatch):
        answer_from(answer | {"protocol": 3})


def test_a_newer_description_is_understood_as_far_as_it_goes() -> None:
    description = Description(9, "a", "b", {"tier": "tiny", "later": 1}, "cpu", 5.0)
    answer = packed(description) | {"num_streams": 2}
    assert description_from(over_the_border(answer)) == description


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemory("too large"),
        BadReference("no image", "image"),
        Overloaded("later", None, 7),
        ProtocolMismatch("what?", None, 3),
    ],
)
def test_an_error_arrives_as_it_was(error: FluxError) -> None:
    arrived = over_the_border(error)
    assert (type(arrived), arrived.args, vars(arrived)) == (type(error), error.args, vars(error))


def test_an_error_of_a_class_that_is_not_known_here_is_the_nearest_that_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class StillTooBusy(Overloaded):
        """Of a later version, with more to say."""

        def __init__(self, message: str, when: str, where: str, why: str) -> None:
            super().__init__(message)
            self.args = (message, when, where, why)

    sent = pickle.dumps(StillTooBusy("come later", "now", "here", "because"))
    arrived = pickle.loads(sent)
    assert (type(arrived), arrived.message) == (Overloaded, "come later")
    unknown = pickle.dumps(OutOfMemory("too large"))
    monkeypatch.delattr(errors, "OutOfMemory")
    arrived = pickle.loads(unknown)
    assert (type(arrived), arrived.message) == (FluxError, "too large")


@dataclass(frozen=True)
class Unlike:
    """With nothing in common."""

    name: str = "none"


def test_every_field_of_a_request_is_told_by_its_name() -> None:
    """A field that is renamed is one that the other side does not know."""
    assert packed(Unlike("some")) == {"name": "some"}
    assert set(packed(WHOLE)) == {each for each in request.ImageRequest.__dataclass_fields__}
