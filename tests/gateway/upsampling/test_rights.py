"""For which tiers and keys prompts are upsampled, and what all others are told."""

from datetime import UTC, datetime

import httpx
import pytest
from pydantic import ValidationError

from flux_ray.auth import KeyClass
from flux_ray.auth.keys import KeyFile, new_key, write_keys
from flux_ray.config import GatewayArgs, Upsampling
from flux_ray.gateway.api import build_api
from flux_ray.gateway.upsampling.rewriting import PromptRewriter, Rewriting, UpsamplingWish
from flux_ray.gateway.upsampling.upsampler import Upsampled
from flux_ray.request import ImageRequest
from flux_ray.router.quotas import LimitStatus
from flux_ray.router.quote import Caller

URL = "http://llm.invalid/v1"
NO_EFFECT = ["prompt_upsampling has no effect on tiny"]


async def test_without_an_upsampler_it_has_no_effect(router, gateway_args, ask_of):
    api = build_api(router, gateway_args)
    assert (await ask_of(api, prompt_upsampling=True)).json()["warnings"] == NO_EFFECT
    assert (await ask_of(api, prompt_upsampling=False)).json()["warnings"] == []


async def test_a_tier_may_want_it_by_default(router, args_with, ask_of, handles, llm):
    api = build_api(router, args_with(tiers={"tiny": {"by_default": True}}))
    for sent in ({}, {"prompt_upsampling": "auto"}):
        answer = await ask_of(api, **sent)
        assert answer.json()["data"][0]["revised_prompt"] == "detailed: a ring"
    assert "revised_prompt" not in (await ask_of(api, prompt_upsampling=False)).text
    transport = httpx.ASGITransport(app=api)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        assert (await client.get("/v1/models/tiny")).json()["prompt_upsampling"] == "default"
    llm.status = 500
    said = (await ask_of(api, prompt="a star")).json()["warnings"]
    assert said[0].startswith("prompt_upsampling had no effect, and the prompt was used as sent")


async def test_a_class_of_keys_may_have_no_part(router, args_with, ask_of, handles, llm, tmp_path):
    keys, classes = {}, {"gold": KeyClass(), "free": KeyClass(upsampling=False)}
    made = [new_key(name, name, datetime.now(UTC)) for name in classes]
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=tuple(each.key for each in made)))
    keys = {each.key.name: {"x-key": each.secret} for each in made}
    keyed = {"keys_file": tmp_path / "keys.yaml", "key_classes": classes}
    args = args_with(tiers={"tiny": {"by_default": True}}).model_copy(update=keyed)
    api = build_api(router, args)
    assert (await ask_of(api, keys["free"])).json()["warnings"] == []
    answer = await ask_of(api, keys["free"], prompt_upsampling=True)
    assert answer.json()["warnings"] == NO_EFFECT
    assert llm.asked == []
    assert "revised_prompt" in (await ask_of(api, keys["gold"])).text


async def test_who_is_over_a_limit_for_long_does_not_keep_the_llm_busy(
    router, args_with, ask_of, llm, monkeypatch
):
    api = build_api(router, args_with(timeout_s=10))
    for reset_s, num_asked in ((3600.0, 0), (2.0, 1)):
        standing = LimitStatus(10, 0, reset_s)
        monkeypatch.setattr(router, "standing", lambda caller, standing=standing: standing)
        await ask_of(api, prompt_upsampling=True)
        assert len(llm.asked) == num_asked


def test_one_answer_serves_all_tiers_of_an_alias_that_want_it():
    rewriting = Rewriting(UpsamplingWish(True, "enhance_prompt"), frozenset({"tiny"}))
    rewriting = rewriting._replace(upsampled=Upsampled("a golden ring", "done", 1.0), gpu_s=2.0)
    of_tiers = [ImageRequest("r", t, "a ring", 64, 64, 4, 1.0, 7) for t in ("tiny", "tiny-tp2")]
    assert [rewriting.rewritten(each).prompt for each in of_tiers] == ["a golden ring", "a ring"]
    assert rewriting.notes_on("tiny") == []
    assert rewriting.notes_on("tiny-tp2") == ["enhance_prompt has no effect on tiny-tp2"]
    caller = rewriting.charged(Caller())
    assert (caller.spent_s, caller.spent_gpu_s) == (1.0, 2.0)


def test_tiers_are_those_that_are_named(router, gateway_args):
    upsampling = Upsampling(url=URL, model="scribe", tiers={"tiny": {}})
    args = gateway_args.model_copy(update={"upsampling": upsampling})
    rewriter = PromptRewriter(router, args)
    both = ("tiny", "tiny-tp2")
    assert rewriter.plan(both, UpsamplingWish(True)).tiers == {"tiny"}
    assert rewriter.plan(both, UpsamplingWish(None)).tiers == set()
    assert rewriter.plan(both, UpsamplingWish(False)).tiers == set()
    assert rewriter.plan(both, UpsamplingWish(True), is_allowed=False).tiers == set()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "ftp://llm/v1"}, "url"),
        ({"url": "http://me:secret@llm/v1"}, "url"),
        ({"url": "http://llm/v1?key=x"}, "url"),
        ({"model": ""}, "model"),
        ({"modle": "x"}, "modle"),
        ({"tiers": {}}, "tiers"),
        ({"tiers": {"tiny-tp2": {}}}, "upsampling.tiers.tiny-tp2: tiny-tp2 is not among tiers"),
        ({"timeout_s": 600}, "leaves nothing of request_timeout_s 600"),
    ],
)
def test_a_config_that_cannot_be_is_refused_at_deploy(settings, words):
    upsampling = {"url": URL, "model": "scribe"} | settings
    with pytest.raises(ValidationError, match=words):
        GatewayArgs.model_validate({"tiers": ["tiny"], "upsampling": upsampling})
