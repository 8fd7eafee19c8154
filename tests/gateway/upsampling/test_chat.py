"""What is asked of an LLM, and how little of its answer is believed."""

import base64
import io
import json

import pytest
from PIL import Image

from flux_ray.config import Upsampling
from flux_ray.gateway.upsampling.chat import (
    EDIT_SYSTEM_PROMPT,
    MAX_ANSWER_BYTES,
    MAX_SHOWN_PIXELS,
    TEXT_SYSTEM_PROMPT,
    ChatClient,
    UpsamplingFailed,
    is_json,
    messages_for,
    prompt_in,
    said_in,
)
from flux_ray.request import RgbImage
from tests.gateway.upsampling.chat_server import completion

ASKED = messages_for("system", "a ring", ())


def client_of(llm, **settings) -> ChatClient:
    return ChatClient(Upsampling(**({"url": llm.url, "model": "scribe"} | settings)))


async def test_the_server_is_asked_as_its_own_clients_would(llm):
    assert await client_of(llm).ask("scribe", ASKED) == "detailed: a ring"
    assert llm.paths == ["/v1/chat/completions"]
    assert "authorization" not in llm.headers[0]
    assert llm.asked == [
        {
            "model": "scribe",
            "messages": [
                {"role": "system", "content": "system"},
                {"role": "user", "content": "a ring"},
            ],
            "max_tokens": 1024,
            "temperature": 0.0,
            "stream": False,
        }
    ]


async def test_further_fields_are_the_operators(llm):
    thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    client = client_of(llm, extra_body=thinking | {"max_tokens": None, "temperature": 0.5})
    await client.ask("scribe", ASKED)
    [asked] = llm.asked
    assert asked["chat_template_kwargs"] == {"enable_thinking": False}
    assert (asked["temperature"], "max_tokens" in asked) == (0.5, False)


async def test_the_key_is_that_of_the_file_now(llm, tmp_path):
    path = tmp_path / "key"
    client = client_of(llm, api_key_file=path)
    with pytest.raises(UpsamplingFailed, match="api_key_file cannot be read"):
        await client.ask("scribe", ASKED)
    for secret in ("s3cret", "another"):
        path.write_text(f"{secret}\n")
        await client.ask("scribe", ASKED)
        assert llm.headers[-1]["authorization"] == f"bearer {secret}"
    path.write_text("two\nlines")
    with pytest.raises(UpsamplingFailed, match="has no key"):
        await client.ask("scribe", ASKED)


@pytest.mark.parametrize(
    ("status", "is_down"), [(500, True), (503, True), (429, True), (401, True), (404, True)]
)
async def test_a_server_that_fails_is_down(llm, status, is_down):
    llm.status, llm.body = status, b"secret of the other server"
    with pytest.raises(UpsamplingFailed, match=f"^the server answered {status}$") as caught:
        await client_of(llm).ask("scribe", ASKED)
    assert caught.value.is_down == is_down


async def test_a_prompt_that_is_refused_says_nothing_of_the_server(llm):
    llm.status = 400
    with pytest.raises(UpsamplingFailed) as caught:
        await client_of(llm).ask("scribe", ASKED)
    assert not caught.value.is_down


async def test_redirects_are_not_followed(llm):
    llm.status, llm.more_headers = 307, (f"location: {llm.url}/elsewhere",)
    with pytest.raises(UpsamplingFailed, match="answered 307"):
        await client_of(llm).ask("scribe", ASKED)
    assert len(llm.asked) == 1


async def test_nobody_there(llm):
    llm.port = 1
    with pytest.raises(UpsamplingFailed, match=r"^ConnectError$"):
        await client_of(llm).ask("scribe", ASKED)


async def test_an_answer_has_a_largest_size(llm):
    llm.body = completion("x" * MAX_ANSWER_BYTES)
    with pytest.raises(UpsamplingFailed, match="too long"):
        await client_of(llm).ask("scribe", ASKED)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"{}", b"null", b"\xff", b"[" * 100_000),
        *(b'{"choices": []}', b'{"choices": [1]}', b'{"choices": [{"message": null}]}'),
        *(completion(None), completion(["a"])),
    ],
)
def test_what_is_no_completion_is_refused(body):
    with pytest.raises(UpsamplingFailed):
        said_in(body)


def test_an_answer_that_was_cut_is_refused():
    assert said_in(completion("a ring")) == "a ring"
    with pytest.raises(UpsamplingFailed, match="max_tokens") as caught:
        said_in(completion("a ri", "length"))
    assert not caught.value.is_down


@pytest.mark.parametrize(
    ("said", "prompt"),
    [
        ("  a golden ring\n", "a golden ring"),
        ("<think>\nHm, a ring.\n</think>\n\na golden ring", "a golden ring"),
        ('"a golden ring"', "a golden ring"),
        ('"Hi" is written on a "ring"', '"Hi" is written on a "ring"'),
        ("```\na golden ring\n```", "a golden ring"),
        ("a ring, 👩‍🚀 and größe", "a ring, 👩‍🚀 and größe"),
    ],
)
def test_the_prompt_is_taken_out_of_what_is_said(said, prompt):
    assert prompt_in(said, "a ring", 100) == prompt


@pytest.mark.parametrize("said", ["", "  ", "<think>x</think>", "a\0ring", "\ud800", "x" * 101])
def test_what_cannot_be_a_prompt_is_refused(said):
    with pytest.raises(UpsamplingFailed) as caught:
        prompt_in(said, "a ring", 100)
    assert not caught.value.is_down


def test_a_json_prompt_stays_one():
    sent = json.dumps({"subject": "a ring"})
    fuller = json.dumps({"subject": "a golden ring"}, indent=1)
    assert prompt_in(f"```json\n{fuller}\n```", sent, 100) == fuller
    with pytest.raises(UpsamplingFailed, match="is JSON"):
        prompt_in("a golden ring", sent, 100)
    assert not is_json("[a ring] in brackets") and is_json(' ["a ring"]') and not is_json("7")


def test_images_are_shown_scaled_down_and_in_order():
    small, large = RgbImage(2, 3, bytes(18)), RgbImage(2000, 1000, bytes(6_000_000))
    _, user = messages_for("system", "both", (small, large))
    *images, text = user["content"]
    assert text == {"type": "text", "text": "both"}
    sizes = []
    for each in images:
        head, _, data = each["image_url"]["url"].partition(",")
        assert head == "data:image/jpeg;base64"
        sizes.append(Image.open(io.BytesIO(base64.b64decode(data))).size)
    assert sizes[0] == (2, 3)
    width, height = sizes[1]
    assert 0.99 * MAX_SHOWN_PIXELS < width * height <= MAX_SHOWN_PIXELS
    assert width / height == pytest.approx(2, rel=0.01)


def test_the_defaults_say_what_matters():
    for words in (TEXT_SYSTEM_PROMPT, EDIT_SYSTEM_PROMPT):
        assert "JSON of the same structure" in words
        assert "letter by letter" in words
    assert "image 1, image 2" in EDIT_SYSTEM_PROMPT
