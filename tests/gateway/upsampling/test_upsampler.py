"""An upsampler never fails a request, shares its calls, and leaves a server alone that is down."""

import asyncio
import time

import pytest

from flux_ray.gateway.upsampling.upsampler import CircuitBreaker, PromptCache, size_of
from flux_ray.request import ImageRequest, RgbImage
from tests.gateway.upsampling.chat_server import completion, prompt_of

LONG_S = 60.0


def request_of(prompt: str = "a ring", references: tuple[RgbImage, ...] = ()) -> ImageRequest:
    return ImageRequest("r", "tiny", prompt, 64, 64, 4, 1.0, 7, references=references)


def image(shade: int) -> RgbImage:
    return RgbImage(8, 8, bytes([shade]) * 192)


async def upsampled(upsampler, request=None, at_most_s=LONG_S):
    return await upsampler.upsample(request or request_of(), "gold", at_most_s)


async def test_a_prompt_is_upsampled_once(upsampler_with, llm, bill):
    upsampler = upsampler_with()
    first, again = await upsampled(upsampler), await upsampled(upsampler)
    assert first[:2] == ("detailed: a ring", "done")
    assert again[:2] == ("detailed: a ring", "cached")
    assert first.seconds > 0
    assert len(llm.asked) == 1
    assert bill.upsampled == [("tiny", "gold", "done"), ("tiny", "gold", "cached")]


async def test_equal_prompts_at_once_share_a_call(upsampler_with, llm):
    llm.delay_s = 0.2
    upsampler = upsampler_with()
    found = await asyncio.gather(*(upsampled(upsampler) for _ in range(4)))
    assert {each.prompt for each in found} == {"detailed: a ring"}
    assert sorted(each.outcome for each in found) == ["cached", "cached", "cached", "done"]
    assert len(llm.asked) == 1


async def test_what_an_answer_depends_on_is_in_its_name(upsampler_with, llm):
    upsampler = upsampler_with(sends_images=True)
    requests = [request_of(), request_of("a star"), request_of(references=(image(1),))]
    requests += [request_of(references=(image(2),)), request_of(references=(image(2), image(1)))]
    for request in requests * 2:
        assert (await upsampled(upsampler, request)).prompt == f"detailed: {request.prompt}"
    assert len(llm.asked) == len(requests)
    shown = [each["messages"][1]["content"] for each in llm.asked]
    assert [1 if isinstance(each, str) else len(each) for each in shown] == [1, 1, 2, 2, 3]


async def test_images_are_not_shown_to_the_blind(upsampler_with, llm):
    upsampler = upsampler_with()
    for shade in (1, 2):
        await upsampled(upsampler, request_of(references=(image(shade),)))
    [asked] = llm.asked
    assert prompt_of(asked) == "a ring"
    assert "edits" in asked["messages"][0]["content"]


async def test_the_words_are_those_of_the_tier(upsampler_with, llm):
    own = {"model": "own", "text_system_prompt": "as tiny wants it"}
    upsampler = upsampler_with(
        tiers={"tiny": own}, text_system_prompt="all", edit_system_prompt="all edits"
    )
    await upsampled(upsampler)
    await upsampled(upsampler, request_of(references=(image(1),)))
    assert [each["model"] for each in llm.asked] == ["own", "own"]
    told = [each["messages"][0]["content"] for each in llm.asked]
    assert told == ["as tiny wants it", "all edits"]


async def test_a_late_answer_is_not_waited_for(upsampler_with, llm):
    llm.delay_s = 5
    began = time.monotonic()
    found = await upsampled(upsampler_with(timeout_s=0.1))
    assert found[:2] == (None, "late")
    assert time.monotonic() - began < 3
    await llm.left.wait()


async def test_who_has_less_time_waits_less_and_blames_nobody(upsampler_with, llm):
    llm.delay_s = 5
    upsampler = upsampler_with(max_failures=1)
    assert (await upsampled(upsampler, at_most_s=0.1)).outcome == "late"
    await llm.left.wait()
    llm.delay_s = 0
    assert (await upsampled(upsampler)).outcome == "done"


async def test_who_leaves_takes_the_call_along(upsampler_with, llm):
    llm.delay_s = 5
    upsampler = upsampler_with()
    asking = asyncio.create_task(upsampled(upsampler))
    await llm.came.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await llm.left.wait()
    llm.delay_s = 0
    assert (await upsampled(upsampler)).outcome == "done"


async def test_a_call_goes_on_while_another_waits_for_it(upsampler_with, llm):
    llm.delay_s = 0.3
    upsampler = upsampler_with()
    leaving, staying = (asyncio.create_task(upsampled(upsampler)) for _ in range(2))
    await llm.came.wait()
    leaving.cancel()
    assert (await staying).prompt == "detailed: a ring"
    assert (len(llm.asked), llm.left.is_set()) == (1, False)


async def test_calls_at_once_are_limited(upsampler_with, llm):
    llm.delay_s = 0.1
    upsampler = upsampler_with(max_concurrent=2)
    requests = [request_of(f"ring {number}") for number in range(6)]
    found = await asyncio.gather(*(upsampled(upsampler, each) for each in requests))
    assert {each.outcome for each in found} == {"done"}
    assert llm.most_open == 2


async def test_who_gets_no_turn_is_told_so(upsampler_with, llm):
    upsampler = upsampler_with(max_concurrent=1, timeout_s=0.1, max_failures=1)
    async with upsampler._room:
        assert (await upsampled(upsampler)).outcome == "busy"
    assert llm.asked == []
    assert upsampler._breaker.allows(), "the server is not to blame"


async def test_a_server_that_is_down_is_left_alone(upsampler_with, llm, serve_log):
    llm.status, llm.body = 500, b"secret"
    now = [0.0]
    upsampler = upsampler_with()
    upsampler._breaker = CircuitBreaker(2, 30.0, lambda: now[0])
    outcomes = [
        (await upsampled(upsampler, request_of(f"ring {number}"))).outcome for number in range(4)
    ]
    assert outcomes == ["failed", "failed", "skipped", "skipped"]
    assert len(llm.asked) == 2
    now[0] = 31.0
    assert (await upsampled(upsampler)).outcome == "failed", "it is tried again, once"
    assert (await upsampled(upsampler)).outcome == "skipped"
    llm.status, llm.body = 200, None
    now[0] = 62.0
    assert [(await upsampled(upsampler, request_of(each))).outcome for each in "abc"] == [
        "done"
    ] * 3
    assert "answered 500" in serve_log.text
    assert "ring" not in serve_log.text and "secret" not in serve_log.text


async def test_answers_that_are_no_prompts_do_not_count_as_down(upsampler_with, llm):
    llm.body = completion("")
    upsampler = upsampler_with(max_failures=1)
    for _ in range(2):
        assert (await upsampled(upsampler)).outcome == "failed"
    assert len(llm.asked) == 2, "and are not kept either"


async def test_a_mistake_of_ours_is_no_end_either(upsampler_with, monkeypatch, serve_log):
    upsampler = upsampler_with()

    async def break_down(*told: object) -> str:
        raise RuntimeError("oh")

    monkeypatch.setattr(upsampler._chat, "ask", break_down)
    assert (await upsampled(upsampler))[:2] == (None, "failed")
    assert "could not be asked" in serve_log.text


def test_the_cache_forgets_what_was_used_longest_ago():
    room = size_of("a", "word")
    cache = PromptCache(2 * room)
    cache.put("a", "word")
    cache.put("b", "word")
    assert cache.get("a") == "word"
    cache.put("c", "word")
    assert [cache.get(name) for name in "abc"] == ["word", None, "word"]
    cache.put("c", "x" * room)
    assert [cache.get(name) for name in "abc"] == [None, None, None], "it is too large by itself"
    PromptCache(0).put("a", "word")


def test_a_breaker_allows_one_call_in_a_pause():
    now = [0.0]
    breaker = CircuitBreaker(2, 10.0, lambda: now[0])
    breaker.fail()
    assert breaker.allows()
    breaker.succeed()
    breaker.fail()
    assert breaker.allows(), "failures have to follow each other"
    breaker.fail()
    assert not breaker.allows()
    now[0] = 10.0
    assert [breaker.allows(), breaker.allows()] == [True, False]
    now[0] = 19.9
    assert not breaker.allows()
    now[0] = 20.0
    assert breaker.allows()
    breaker.succeed()
    assert breaker.allows()
