"""A request that comes again, to any gateway, has the images of the first one, and nobody else."""

import pytest

from flux_ray.gateway.http import new_request_id
from flux_ray.request import Mask
from tests.gateway.streaming import event_of, streamed

PATH = "/v1/images/generations"
EDITS = "/v1/images/edits"
REQUEST = {"prompt": "a ring"}
NAMED = {"idempotency-key": "mine"}
NUMBERED = {"x-request-id": "7c9e6679-7425-40de-944b-e07fc1f90ae7"}


def seeds_of(answer) -> list[int]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-flux-seed"] == str(answer.json()["data"][0]["seed"])
    return [image["seed"] for image in answer.json()["data"]]


@pytest.mark.parametrize("headers", [NAMED, NUMBERED])
@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"seed": 5}, {"output_format": "webp"}])
async def test_its_images_are_those_of_the_first(client, handles, turns, headers, fields):
    first = await client.post(PATH, json=REQUEST | fields, headers=headers)
    # As of a gateway that has died.
    turns.done.clear()
    again = await client.post(PATH, json=REQUEST | fields, headers=headers)
    assert again.json()["data"] == first.json()["data"]
    assert seeds_of(again) == seeds_of(first)
    assert (len(handles.requests), len(turns.submissions)) == (1, 1), "it had its turn"


async def test_without_a_name_it_is_another_request(client, handles):
    for _ in range(2):
        assert (await client.post(PATH, json=REQUEST)).status_code == 200
    assert len({request.seed for request in handles.requests}) == 2


async def test_what_was_lost_is_generated_again_and_is_the_same(client, handles, turns):
    """With its replica, or with the ledger too."""
    seeds = [seeds_of(await client.post(PATH, json=REQUEST, headers=NAMED))]
    handles.generated.clear()
    seeds.append(seeds_of(await client.post(PATH, json=REQUEST, headers=NAMED)))
    turns.submissions.clear()
    seeds.append(seeds_of(await client.post(PATH, json=REQUEST, headers=NAMED)))
    assert len(handles.requests) == 3
    assert seeds[0] == seeds[1] == seeds[2]


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "a star"},
        {"n": 2},
        {"size": "64x64"},
        {"seed": 7},
        {"output_format": "jpeg"},
        {"allow_truncation": True},
    ],
)
async def test_a_key_of_another_request_is_refused(client, handles, other):
    await client.post(PATH, json=REQUEST, headers=NAMED)
    answer = await client.post(PATH, json=REQUEST | other, headers=NAMED)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (422, "false")
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("idempotency_key_reused", "idempotency-key")
    assert len(handles.requests) == 1


async def test_a_number_for_the_logs_names_nothing_that_was_answered(client, handles):
    """Whoever draws several variants of one thing may number them alike."""
    for _ in range(2):
        assert (await client.post(PATH, json=REQUEST, headers=NUMBERED)).status_code == 200
    assert len({request.seed for request in handles.requests}) == 2


async def test_a_number_for_the_logs_may_be_that_of_other_requests(client, handles):
    await client.post(PATH, json=REQUEST, headers=NUMBERED)
    answer = await client.post(PATH, json={"prompt": "a star"}, headers=NUMBERED)
    assert answer.status_code == 200
    assert [request.prompt for request in handles.requests] == ["a ring", "a star"]


@pytest.mark.parametrize("headers", [NAMED, NUMBERED])
async def test_another_caller_has_other_images(client, handles, headers):
    for secret in ("one", "two", ""):
        sent = headers | ({"authorization": f"Bearer {secret}"} if secret else {})
        assert (await client.post(PATH, json=REQUEST, headers=sent)).status_code == 200
    assert len({request.seed for request in handles.requests}) == 3


@pytest.mark.parametrize(
    "number",
    [new_request_id(), "two words", "ü".encode(), "x" * 129],
    ids=["ours", "two words", "no ASCII", "too long"],
)
async def test_numbers_that_are_not_the_clients_or_no_good_name_nothing(client, turns, number):
    """Serve's proxies number what comes without; each would have its client wait for the ledger."""
    await client.post(PATH, json=REQUEST, headers={"x-request-id": number})
    assert turns.submissions[0].retry is None


async def test_the_key_comes_before_the_number(client, handles):
    for number in ("1", "2"):
        sent = NAMED | {"x-request-id": number}
        assert (await client.post(PATH, json=REQUEST, headers=sent)).status_code == 200
    assert len(handles.requests) == 1


@pytest.mark.parametrize("key", ["", "two words", "x" * 256, "\x7f"])
async def test_a_key_that_is_none_is_named(client, handles, key):
    answer = await client.post(PATH, json=REQUEST, headers={"idempotency-key": key})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "idempotency-key")
    assert handles.requests == []


async def test_a_form_is_known_whatever_its_boundary(client, handles, make_image):
    """An application that tries again makes the form anew."""
    seeds = []
    for name in ("a.png", "b.png"):
        files = {"image": (name, make_image())}
        answer = await client.post(EDITS, data=REQUEST, files=files, headers=NAMED)
        seeds.append(seeds_of(answer))
    assert seeds[0] == seeds[1]
    assert len(handles.requests) == 1
    files = {"image": ("a.png", make_image(color="blue"))}
    answer = await client.post(EDITS, data=REQUEST, files=files, headers=NAMED)
    assert answer.status_code == 422


async def test_a_mask_is_a_part_of_it(client, handles, make_image):
    for marked, status in ((make_image(color="white"), 200), (make_image(color="white"), 200)):
        files = {"image": ("a.png", make_image()), "mask": ("m.png", marked)}
        answer = await client.post(EDITS, data=REQUEST, files=files, headers=NAMED)
        assert answer.status_code == status
    [request] = handles.requests
    assert isinstance(request.mask, Mask)
    answer = await client.post(
        EDITS, data=REQUEST, files={"image": ("a.png", make_image())}, headers=NAMED
    )
    assert answer.status_code == 422


async def test_hugging_faces_route_knows_them_too(client, handles):
    bodies = [
        (await client.post("/models/tiny", json={"inputs": "a ring"}, headers=NAMED)).content
        for _ in range(2)
    ]
    assert bodies[0] == bodies[1]
    assert len(handles.requests) == 1


async def test_a_stream_that_was_cut_is_told_to_its_end(api, handles):
    seeds = set()
    body = REQUEST | {"stream": True}
    for _ in range(2):
        async with streamed(api, PATH, body, headers=NAMED) as answer:
            await answer.head()
            event, data = event_of((await answer.blocks())[-1])
        assert event == "image_generation.completed"
        seeds |= {data["seed"], int(answer.headers["x-flux-seed"])}
    assert len(seeds) == len(handles.requests) == 1


async def test_a_key_is_described(client):
    paths = (await client.get("/openapi.json")).json()["paths"]
    for path in (PATH, EDITS, "/models/{model}"):
        names = [each["name"] for each in paths[path]["post"]["parameters"]]
        assert "idempotency-key" in names
