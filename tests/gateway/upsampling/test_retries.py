"""A request that comes again has the words of the first time, at any gateway."""

import pytest

from flux_ray.gateway.api import build_api
from flux_ray.router.ledger import messages
from flux_ray.router.ledger.messages import Place, Places, Retry
from tests.gateway.upsampling.chat_server import completion

NAMED = {"idempotency-key": "mine"}


@pytest.fixture
def gateways(router, args_with):
    """Two gateways that share ledger and replicas, but no cache."""
    return [build_api(router, args_with()) for _ in range(2)]


async def asked(ask_of, api, **fields):
    answer = await ask_of(api, NAMED, prompt_upsampling=True, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["warnings"] == []
    return answer.json()["data"][0]


async def test_another_gateway_tells_the_first_words(gateways, ask_of, llm, handles):
    llm.body = completion("a golden ring")
    first = await asked(ask_of, gateways[0])
    llm.body = completion("a silver ring")
    assert await asked(ask_of, gateways[1]) == first
    assert (first["revised_prompt"], len(llm.asked)) == ("a golden ring", 1)
    assert len(handles.requests) == 1


async def test_what_was_lost_is_generated_from_the_first_words(gateways, ask_of, llm, handles):
    llm.body = completion("a golden ring")
    first = await asked(ask_of, gateways[0])
    llm.body = completion("a silver ring")
    handles.generated.clear()
    again = await asked(ask_of, gateways[1])
    assert (again["revised_prompt"], again["seed"]) == ("a golden ring", first["seed"])
    assert [each.prompt for each in handles.requests] == ["a golden ring"] * 2
    handles.generated.clear()
    assert (await asked(ask_of, gateways[1]))["revised_prompt"] == "a golden ring"


async def test_what_went_as_it_was_stays_so(gateways, ask_of, llm, handles):
    llm.status = 500
    await ask_of(gateways[0], NAMED, prompt_upsampling=True)
    llm.status = 200
    handles.generated.clear()
    answer = await ask_of(gateways[1], NAMED, prompt_upsampling=True)
    assert "gave none when the request came first" in answer.json()["warnings"][0]
    assert [each.prompt for each in handles.requests] == ["a ring"] * 2


async def test_it_is_another_request_with_its_words_as_they_are(gateways, ask_of):
    await ask_of(gateways[0], NAMED, prompt_upsampling=True)
    assert (await ask_of(gateways[0], NAMED)).status_code == 422


async def test_who_comes_again_meanwhile_joins_the_first(gateways, ask_of, llm, turns, handles):
    """Both gateways ask the LLM; the one that hears it later takes the words of the other."""
    llm.body = completion("a golden ring")
    first = turns.places

    async def late_places(retry):
        turns.places = first
        # While this one asks the LLM, the same request has its turn through the other gateway.
        places = await first(retry)
        await asked(ask_of, gateways[1])
        llm.body = completion("a silver ring")
        return places

    turns.places = late_places
    assert (await asked(ask_of, gateways[0]))["revised_prompt"] == "a golden ring"
    assert (len(llm.asked), len(handles.requests)) == (2, 1)


def test_the_ledger_keeps_so_many_words(monkeypatch):
    monkeypatch.setattr(messages, "MAX_KEPT_CHARS", 100)
    places = Places()
    for number in range(5):
        retry = Retry(f"n{number}", "f", prompt="x" * 30)
        place = Place(f"t{number}", "tiny", "r", "f", 1, retry.prompt)
        places.assign(retry, place)
        places.assign(retry, place)
        places.end(f"t{number}", 0.0, is_done=True)
    kept = [bool(places.find(f"n{number}", 1.0)) for number in range(5)]
    assert kept == [False, False, True, True, True]
    assert "xxx" not in repr(Retry("n", "f", prompt="xxx"))
