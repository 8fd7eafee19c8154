"""Who asks and until when, as the router hears of it."""

import pytest

from flux_ray.errors import DeadlineTooShort, Overloaded

PATH = "/v1/images/generations"
REQUEST = {"prompt": "a ring"}


async def test_a_deadline_is_passed_on(client, turns):
    await client.post(PATH, json=REQUEST, headers={"x-flux-deadline-s": "2.5"})
    assert turns.submissions[0].deadline_in_s == 2.5


@pytest.mark.parametrize("sent", ["", "soon", "0", "-1", "nan", "inf"])
async def test_a_deadline_that_is_none_is_named(client, turns, sent):
    answer = await client.post(PATH, json=REQUEST, headers={"x-flux-deadline-s": sent})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-flux-deadline-s"
    assert turns.submissions == []


@pytest.mark.parametrize(
    ("sent", "expected_s"), [("20", 20), ("0.5", 0.5), ("0", 5), ("-1", 5), ("soon", 5), ("nan", 5)]
)
async def test_the_proxys_timeout_is_a_deadline_too(client, turns, sent, expected_s):
    """What cannot be done by then is refused in the dialect's words, before the proxy gives up.

    Serve takes 0 for no limit, and other words for nothing; then this gateway's own 5 seconds hold.
    """
    await client.post(PATH, json=REQUEST, headers={"x-request-timeout-seconds": sent})
    assert turns.submissions[0].deadline_in_s == min(expected_s, 5)


async def test_a_deadline_comes_before_the_proxys_timeout(client, turns):
    headers = {"x-request-timeout-seconds": "4", "x-flux-deadline-s": "2"}
    await client.post(PATH, json=REQUEST, headers=headers)
    assert turns.submissions[0].deadline_in_s == 2


async def test_a_refusal_is_a_429_that_says_when_to_come_back(client, turns):
    turns.refusals = [Overloaded("it could not be done by its deadline", None, 7)]
    answer = await client.post(PATH, json=REQUEST)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert answer.json()["error"] == {
        "message": "it could not be done by its deadline",
        "type": "rate_limit_error",
        "param": None,
        "code": "overloaded",
    }


async def test_a_deadline_shorter_than_the_work_is_the_callers_to_change(client, turns):
    """To come back would not help: it is no 429."""
    turns.refusals = [DeadlineTooShort("the deadline is shorter than the work")]
    answer = await client.post(PATH, json=REQUEST, headers={"x-flux-deadline-s": "0.001"})
    assert answer.status_code == 400
    assert "retry-after" not in answer.headers
    assert answer.json()["error"]["param"] == "x-flux-deadline-s"


async def test_the_same_credentials_share_and_are_not_passed_on(client, turns):
    for sent in ("Bearer one", "Bearer one", "Bearer two", None):
        headers = {} if sent is None else {"authorization": sent}
        await client.post(PATH, json=REQUEST, headers=headers)
    first, again, other, nobody = (offer.key for offer in turns.submissions)
    assert first == again != other
    assert nobody == ""
    assert "one" not in first


async def test_openapi_knows_the_deadline(client):
    paths = (await client.get("/openapi.json")).json()["paths"]
    for path in (PATH, "/v1/images/edits"):
        names = {parameter["name"] for parameter in paths[path]["post"]["parameters"]}
        assert names == {"x-flux-deadline-s", "x-flux-allow-spill", "idempotency-key"}
