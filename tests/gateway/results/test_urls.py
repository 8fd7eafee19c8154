"""Signed URLs of images: what they open, and what they never open."""

import re
import uuid
from pathlib import Path

import httpx
import pytest

from flux_ray.auth.keys import KeyFile, write_keys
from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from flux_ray.gateway.results import ResultUrls
from flux_ray.jobs.job import JobSubmission, StoredImage
from flux_ray.jobs.service import JobService
from flux_ray.request import Encoding, ImageRequest, RgbImage
from tests.conftest import LIMITS
from tests.jobs.painter import image_for, paint
from tests.jobs.waiting import wait_until

PUBLIC = "https://images.example/flux"
SECRET = b"s" * 32
NAME = f"{uuid.UUID(int=1)}/1-0.png"
OTHER = f"{uuid.UUID(int=2)}/1-0.png"
GONE = {
    "error": {
        "message": "there is no such image, or its URL is not valid any more",
        "type": "invalid_request_error",
        "param": None,
        "code": "result_not_found",
    }
}


def image_named(name):
    return StoredImage(name, 7, 3, "0" * 64)


class Clock:
    now_s = 1000.5

    def __call__(self):
        return self.now_s


def parts_of(url):
    return re.fullmatch(r".*/results/(.*)\?exp=(.*)&sig=(.*)", url).groups()


def test_a_url_is_absolute_and_ends():
    clock = Clock()
    urls = ResultUrls(PUBLIC + "/", SECRET, 600, clock)
    url = urls.url_of(image_named(NAME))
    assert url.startswith(f"{PUBLIC}/results/{NAME}?exp=1600&sig=")
    assert urls.allows(*parts_of(url))
    clock.now_s = 1599.9
    assert ResultUrls("http://x", SECRET, 5, clock).allows(*parts_of(url)), "of another gateway"
    clock.now_s = 1600
    assert not urls.allows(*parts_of(url))


SIGNATURE = parts_of(ResultUrls(PUBLIC, SECRET, 600, Clock()).url_of(image_named(NAME)))[2]


@pytest.mark.parametrize(
    ("name", "expiry", "signature"),
    [
        (OTHER, "1600", SIGNATURE),
        (NAME, "1601", SIGNATURE),
        (NAME, "01600", SIGNATURE),
        (NAME, "1600 ", SIGNATURE),
        (NAME, "+1600", SIGNATURE),
        (NAME, "-1600", SIGNATURE),
        (NAME, "1_600", SIGNATURE),
        (NAME, "\u0661600", SIGNATURE),
        (NAME, "1600.0", SIGNATURE),
        (NAME, "1e99", SIGNATURE),
        (NAME, "9" * 5000, SIGNATURE),
        (NAME, "inf", SIGNATURE),
        (NAME, "", SIGNATURE),
        (NAME, "1600", ""),
        (NAME, "1600", SIGNATURE.upper()),
        (NAME, "1600", SIGNATURE[:-1]),
        (NAME, "1600", SIGNATURE + "\n"),
        (NAME, "1600", "\xe9" * 64),
        (NAME, "1600", "0" * 64),
        (NAME + "\n", "1600", SIGNATURE),
        ("\ud800", "1600", SIGNATURE),
    ],
)
def test_no_other_is_allowed(name, expiry, signature):
    assert not ResultUrls(PUBLIC, SECRET, 600, Clock()).allows(name, expiry, signature)


def test_each_secret_has_its_own():
    urls = ResultUrls(PUBLIC, b"t" * 32, 600, Clock())
    assert not urls.allows(NAME, "1600", SIGNATURE)


@pytest.fixture
def gateway_args(tmp_path, job_args):
    write_keys(tmp_path / "keys.yaml", KeyFile())
    return GatewayArgs(
        tiers=("tiny",),
        limits=LIMITS,
        jobs=job_args,
        public_url=PUBLIC,
        keys_file=tmp_path / "keys.yaml",
    )


@pytest.fixture
def api(router, gateway_args, desk):
    return build_api(router, gateway_args, job_service=desk)


@pytest.fixture
def generate(desk):
    """`draw(format)`: a request and its job, which is ready."""

    async def generate(format="png", seed=7):
        reference = RgbImage(64, 64, b"\0" * 64 * 64 * 3)
        request = ImageRequest(
            "r", "tiny", "a ring", 64, 64, 4, 1.0, seed, 2, (reference,), Encoding(format)
        )
        job = await desk.accept(JobSubmission("anna", request))

        async def is_ready():
            return (await desk.find("anna", job.job_id)).status == "ready"

        await wait_until(is_ready)
        return request, await desk.find("anna", job.job_id)

    return generate


@pytest.fixture
async def urls(desk):
    return ResultUrls("", await desk.url_secret())


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
async def test_the_image_is_answered_without_a_key(client, generate, urls, format):
    request, job = await generate(format)
    for number, image in enumerate(job.result.images):
        answer = await client.get(urls.url_of(image))
        assert answer.status_code == 200, answer.text
        assert answer.content == image_for(request, 7 + number)
        assert answer.headers["content-type"] == f"image/{format}"
        assert answer.headers["cache-control"] == "private, no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-disposition"] == "inline"
    head = await client.head(urls.url_of(image))
    assert {**head.headers} | {"x-request-id": ""} == {**answer.headers} | {"x-request-id": ""}


async def test_a_key_is_tolerated_and_not_logged(client, generate, urls, serve_log):
    _, job = await generate()
    url = urls.url_of(job.result.images[0])
    headers = {"authorization": "Bearer fr-nonsense", "x-key": "fr-nonsense"}
    assert (await client.get(url, headers=headers)).status_code == 200
    assert (await client.get(url[:-1] + "x", headers=headers)).status_code == 404
    assert "nonsense" not in serve_log.text and url[-64:] not in serve_log.text


async def test_the_host_is_of_no_matter(client, generate, urls):
    _, job = await generate()
    url = urls.url_of(job.result.images[0])
    for host in ("evil.example", "x/?", "a@b"):
        assert (await client.get(url, headers={"host": host})).status_code == 200


async def test_whatever_is_wrong_looks_the_same(client, generate, urls):
    _, job = await generate()
    _, other = await generate(seed=9)
    image = job.result.images[0]
    name, expiry, signature = parts_of(urls.url_of(image))
    query = f"?exp={expiry}&sig={signature}"
    expired = ResultUrls("", urls._secret, -1).url_of(image)
    bad = [
        f"/results/{name}",
        f"/results/{name}?exp={expiry}",
        f"/results/{name}?sig={signature}",
        f"/results/{name}?exp={expiry}&sig={'0' * 64}",
        f"/results/{name}?exp={int(expiry) + 1}&sig={signature}",
        f"/results/{name}?exp=never&sig={signature}",
        f"/results/{name}?exp=-1&sig={signature}",
        f"/results/{name}?exp={'9' * 5000}&sig={signature}",
        f"/results/{name}?exp={expiry}&sig=%ff%00%C3%A9",
        f"/results/{name}{query}&exp=1",
        expired,
        f"/results/{other.result.images[0].name}{query}",
        f"/results/{name.replace('1-0', '1-1')}{query}",
        f"/results/{name.replace('/', '%252F')}{query}",
        f"/results/..%2F..%2Fetc%2Fpasswd{query}",
        f"/results/{job.job_id}/..%2F{name}{query}",
        f"/results/{job.job_id}/%00{query}",
        f"/results/{job.job_id}/{query}",
        f"/results/{query}",
        f"/results//{name}{query}",
        f"/results/{name.upper()}{query}",
        # Signed by us, and yet not to be had.
        urls.url_of(image_named(f"{job.job_id}/reference-0")),
        urls.url_of(image_named(NAME)),
        urls.url_of(image_named(f"{job.job_id}/2-0.png")),
        urls.url_of(image_named("../results/x")),
    ]
    for url in bad:
        answer = await client.get(url)
        assert (answer.status_code, answer.json()) == (404, GONE), url
        assert answer.headers["cache-control"] == "private, no-store"
        assert (await client.head(url)).status_code == 404
    assert (await client.get(f"/results/{name}{query}")).status_code == 200


def spoil(folder: Path, gone: str, changed: str) -> None:
    (folder / gone).unlink()
    (folder / changed).write_bytes(b"<script>")


async def test_an_image_that_is_gone_or_changed(client, generate, urls, tmp_path):
    _, job = await generate()
    first, second = job.result.images
    spoil(tmp_path / "results", first.name, second.name)
    for image in (first, second):
        answer = await client.get(urls.url_of(image))
        assert (answer.status_code, answer.json()) == (404, GONE)


async def test_nothing_is_written_there(client, generate, urls):
    _, job = await generate()
    url = urls.url_of(job.result.images[0])
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert (await client.request(method, url)).status_code == 405


async def test_stores_that_are_away_are_no_answer(client, generate, urls, gateway_args, router):
    _, job = await generate()
    away = JobService(
        gateway_args.jobs.model_copy(update={"database": "sqlite:////proc/no/such"}), paint
    )
    transport = httpx.ASGITransport(app=build_api(router, gateway_args, job_service=away))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as other:
        answer = await other.get(urls.url_of(job.result.images[0]))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["code"] == "store_unavailable"
    await away.close()


async def test_without_jobs_there_is_no_such_route(router):
    api = build_api(router, GatewayArgs(tiers=("tiny",), limits=LIMITS))
    assert not [path for path in api.openapi()["paths"] if "results" in path]
