"""In each dialect: who asks for it gets an image of the new words, and is told them."""

import asyncio
import base64
import json
from urllib.parse import unquote

import httpx
import pytest
from openai import AsyncOpenAI

from flux_ray.gateway.api import build_api
from flux_ray.tracing import request_span
from tests.gateway.streaming import event_of, streamed
from tests.spans import by_name, kept_spans

DETAILED = "detailed: a ring"


@pytest.mark.parametrize("field", ["prompt_upsampling", "enhance_prompt", "enhancePrompt"])
async def test_the_words_come_back_with_the_image(ask, handles, llm, field):
    answer = await ask(**{field: True}, n=2)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert [each["revised_prompt"] for each in told["data"]] == [DETAILED] * 2
    assert [base64.b64decode(each["b64_json"])[:6] for each in told["data"]] == [b"image "] * 2
    assert told["warnings"] == []
    [request] = handles.requests
    assert request.prompt == DETAILED
    assert answer.headers["server-timing"].startswith("upsample;dur=")


async def test_words_and_seed_generate_the_image_again(ask, handles):
    told = (await ask(prompt_upsampling=True)).json()["data"][0]
    again = await ask(prompt=told["revised_prompt"], seed=told["seed"])
    assert "revised_prompt" not in again.json()["data"][0]
    first, second = handles.requests
    assert (first.prompt, first.seed) == (second.prompt, second.seed)


@pytest.mark.parametrize("sent", [{}, {"prompt_upsampling": False}, {"enhance_prompt": "off"}])
async def test_who_does_not_ask_is_left_alone(ask, handles, llm, sent):
    answer = await ask(**sent)
    assert answer.json()["warnings"] == []
    assert "revised_prompt" not in answer.text and "upsample" not in answer.headers["server-timing"]
    assert (handles.requests[0].prompt, llm.asked) == ("a ring", [])


async def test_words_that_look_like_the_answer_stay_words(ask, llm):
    tricky = 'a sign with "b64_json":"" on it'
    told = (await ask(prompt=tricky, prompt_upsampling=True, n=2)).json()["data"]
    assert [each["revised_prompt"] for each in told] == [f"detailed: {tricky}"] * 2
    assert all(base64.b64decode(each["b64_json"]).startswith(b"image ") for each in told)


async def test_openais_client_reads_them(api):
    http_client = httpx.AsyncClient(transport=httpx.ASGITransport(app=api))
    async with AsyncOpenAI(
        base_url="http://gateway/v1", api_key="any", http_client=http_client, max_retries=0
    ) as client:
        answer = await client.images.generate(
            model="tiny", prompt="a ring", extra_body={"prompt_upsampling": True}
        )
    assert answer.data[0].revised_prompt == DETAILED


async def test_an_edit_by_form_is_upsampled_as_an_edit(client, handles, llm, make_image):
    answer = await client.post(
        "/v1/images/edits",
        data={"model": "tiny", "prompt": "make it red", "prompt_upsampling": "true"},
        files={"image": ("a.png", make_image())},
    )
    assert answer.json()["data"][0]["revised_prompt"] == "detailed: make it red"
    assert "edits" in llm.asked[0]["messages"][0]["content"]


async def test_a_stream_has_them_in_its_events(api):
    body = {"model": "tiny", "prompt": "a ring", "stream": True, "prompt_upsampling": True}
    async with streamed(api, "/v1/images/generations", body | {"partial_images": 1}) as answer:
        await answer.head()
        events = [event_of(block)[1] for block in await answer.blocks()]
    assert len(events) == 2
    assert {each["revised_prompt"] for each in events} == {DETAILED}
    assert events[-1]["times"]["upsample_s"] > 0


async def test_hugging_faces_route_has_them_in_a_header(client, handles, llm):
    body = {"inputs": "ein größerer Ring, 100%", "parameters": {"enhance_prompt": True}}
    answer = await client.post("/models/tiny", json=body)
    assert answer.status_code == 200, answer.text
    written = answer.headers["x-flux-revised-prompt"]
    assert written.isascii() and " " in written
    assert unquote(written) == handles.requests[0].prompt == "detailed: ein größerer Ring, 100%"
    assert answer.headers["server-timing"].startswith("upsample;dur=")


async def test_what_is_too_long_for_a_header_is_left_out(client, llm):
    body = {"inputs": "ü" * 900, "parameters": {"enhance_prompt": True}}
    answer = await client.post("/models/tiny", json=body)
    assert answer.status_code == 200
    assert "x-flux-revised-prompt" not in answer.headers
    assert "too long for a header" in answer.headers["x-flux-warnings"]


async def test_the_words_go_as_they_are_when_the_llm_fails(ask, handles, llm):
    llm.status, llm.body = 500, b"oh"
    answer = await ask(enhance_prompt=True)
    assert answer.status_code == 200
    assert answer.json()["warnings"] == [
        "enhance_prompt had no effect, and the prompt was used as sent: the upsampler failed"
    ]
    assert "revised_prompt" not in answer.json()["data"][0]
    assert handles.requests[0].prompt == "a ring"


async def test_at_most_half_of_the_time_is_for_the_words(ask, llm, turns):
    llm.delay_s = 5
    answer = await ask({"x-flux-deadline-s": "1.5"}, prompt_upsampling=True)
    assert "took too long" in answer.json()["warnings"][0]
    [offer] = turns.submissions
    assert 0 < offer.deadline_in_s <= 0.75


async def test_a_client_that_leaves_ends_the_call(ask, llm, handles):
    """Serve cancels what it had asked for."""
    llm.delay_s = 30
    asking = asyncio.create_task(ask({"x-flux-deadline-s": "100"}, prompt_upsampling=True))
    await llm.came.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.wait_for(llm.left.wait(), 20)
    assert handles.requests == []


async def test_a_second_of_the_llm_may_have_a_price(router, args_with, turns, bill, llm, ask_of):
    llm.delay_s = 0.2
    priced = build_api(router, args_with(gpu_seconds_per_second=1000.0))
    body = {"model": "tiny", "prompt": "a ring", "stream": True, "prompt_upsampling": True}
    async with streamed(priced, "/v1/images/generations", body) as answer:
        await answer.head()
        events = [event_of(block)[1] for block in await answer.blocks()]
    assert events[-1]["times"]["gpu_s"] > 200
    assert dict(bill.spent)["drawn"] > 200
    # What was kept from then costs nothing.
    answer = await ask_of(priced, prompt_upsampling=True)
    assert answer.json()["data"][0]["revised_prompt"] == DETAILED
    assert dict(bill.spent)["drawn"] < 200


async def test_it_is_a_span_and_no_span_has_words(ask):
    with kept_spans() as spans:
        with request_span({}, {}):
            await ask(prompt_upsampling=True)
        made = by_name(spans)
    assert made["upsample"].attributes["flux.outcome"] == "done"
    assert made["upsample"].end_time <= made["generate"].start_time
    assert "ring" not in json.dumps([span.to_json() for span in made.values()])


async def test_no_log_has_words_or_keys(router, args_with, ask_of, llm, tmp_path, serve_log):
    (tmp_path / "key").write_text("s3cret")
    api = build_api(router, args_with(api_key_file=tmp_path / "key"))
    for status in (200, 500):
        llm.status = status
        await ask_of(api, prompt=f"a ring {status}", prompt_upsampling=True)
    assert llm.headers[0]["authorization"] == "bearer s3cret"
    assert "the upsampler failed" in serve_log.text
    assert "ring" not in serve_log.text and "s3cret" not in serve_log.text
