"""Webhooks of the gateway: what is taken, what is posted, and what is never connected to."""

import asyncio
import json
import ssl

import pytest
import trustme
from standardwebhooks import Webhook as Verifier

from flux_ray.config.gateway import JobArgs, Webhooks
from flux_ray.errors import BadRequest
from flux_ray.gateway.webhooks import Poster, check_webhook_secret, check_webhook_url
from flux_ray.jobs.job import Idempotency, Job, JobSubmission, Webhook
from flux_ray.jobs.service import JobService
from flux_ray.jobs.webhooks import Mail, NotTaken
from flux_ray.request import ImageRequest
from tests.gateway.images.test_hostile_urls import HOME, MALFORMED, PRIVATE, Names
from tests.jobs.painter import paint
from tests.jobs.waiting import wait_until
from tests.webhook_receiver import receiving

SECRET = "s3cr3t"


@pytest.fixture
async def receiver():
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
def names():
    return Names()


def args_for(port: int, **rest) -> Webhooks:
    """By http too. Nothing takes so long but what has no end."""
    options = {"schemes": ("http", "https"), "ports": (80, 443, port), "timeout_s": 30}
    return Webhooks.model_validate(options | {"networks": HOME} | rest)


async def post(poster: Poster, url: str, secret: str | None = SECRET) -> None:
    await poster.post(Webhook(url, secret), "job-1", b'{"id": "job-1"}')


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/hook",
        "https://example.org:443/hook?token=1#part",
        "HTTPS://EXAMPLE.ORG",
        "https://8.8.8.8/",
        "https://[2606:4700::1111]/",
        "https://example.org/" + "a" * 2063,
    ],
)
def test_urls_that_are_taken(url):
    check_webhook_url(url, Webhooks())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org",
        "http://example.org/hook",
        "ftp://example.org/",
        "https://example.org:8443/",
        "https://anna@example.org/",
        "https://anna:word@example.org/",
        "https://example.org/a b",
        "https://example.org/\r\nx-evil: 1",
        "https://example.org\\@127.0.0.1/",
        "https://exämple.org/",
        "https://127.0.0.1/",
        "https://2130706433/",
        "https://0x7f.1/",
        "https://[::1]/",
        "https://[::ffff:10.0.0.1]/",
        "https://169.254.169.254/latest",
        "https://10.0.0.1/",
        "https://example.org/" + "a" * 2064,
    ],
)
def test_urls_that_are_not(url):
    with pytest.raises(BadRequest) as raised:
        check_webhook_url(url, Webhooks())
    assert raised.value.field == "webhook_url"
    assert "evil" not in raised.value.message and "word" not in raised.value.message


def test_what_the_operator_says_of_urls():
    with pytest.raises(BadRequest, match="posts no webhooks"):
        check_webhook_url("https://example.org/", Webhooks(enabled=False))
    with pytest.raises(BadRequest):
        check_webhook_url("https://example.org/", Webhooks(hosts=("ours.example",)))
    args = args_for(8080)
    check_webhook_url("http://127.0.0.1:8080/hook", args)
    with pytest.raises(BadRequest, match="on port 80 or 443 or 8080"):
        check_webhook_url("http://127.0.0.1:8081/hook", args)


@pytest.mark.parametrize("secret", ["x", "whsec_YWJj", "whsec_YWI", "ключ", "a" * 1024])
def test_secrets_that_are_taken(secret):
    check_webhook_secret(secret)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!", "a\0b", "\ud800", "a" * 1025])
def test_secrets_that_are_not(secret):
    with pytest.raises(BadRequest) as raised:
        check_webhook_secret(secret)
    assert raised.value.field == "webhook_secret"
    assert "!" not in raised.value.message and "\0" not in raised.value.message


@pytest.mark.parametrize("path", ["/good", "/empty", "/endless", "/slow-body"])
async def test_what_is_taken(receiver, names, path):
    """By its status, whatever the rest of the answer is."""
    poster = Poster(args_for(receiver.port), names.resolve)
    await post(poster, f"http://home.test:{receiver.port}{path}?token=1")
    [came] = receiver.posts
    assert (came.path, came.body) == (f"{path}?token=1", b'{"id": "job-1"}')
    assert came.headers["host"] == f"home.test:{receiver.port}"
    assert came.headers["content-type"] == "application/json"
    assert came.headers["webhook-id"] == "job-1"
    assert Verifier(SECRET.encode()).verify(came.body, came.headers) == {"id": "job-1"}


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/failing", "status 500"),
        ("/gone", "status 410"),
        ("/redirect", "status 307"),
        ("/away", "status 302"),
        ("/closes", "RemoteProtocolError"),
        ("/babble", "RemoteProtocolError"),
        ("/hangs", "no answer in time"),
        ("/slow-head", "no answer in time"),
    ],
)
async def test_what_is_not(receiver, names, path, reason):
    in_time = {"timeout_s": 0.5} if reason == "no answer in time" else {}
    poster = Poster(args_for(receiver.port, **in_time), names.resolve)
    with pytest.raises(NotTaken) as raised:
        await post(poster, f"http://home.test:{receiver.port}{path}?token=1")
    assert str(raised.value) == reason
    # Nobody is followed.
    assert len(receiver.posts) == 1


async def test_a_host_that_takes_no_connection(names):
    async with receiving() as receiver:
        port = receiver.port
    with pytest.raises(NotTaken, match="ConnectError"):
        await post(Poster(args_for(port), names.resolve), f"http://home.test:{port}/good")


@pytest.mark.parametrize("url", PRIVATE)
async def test_private_places_are_not_posted_to(receiver, names, url):
    """Whatever was taken in when the job was."""
    poster = Poster(args_for(receiver.port, networks=()), names.resolve)
    with pytest.raises(NotTaken, match="none that may be posted to"):
        await post(poster, url.format(port=receiver.port))
    assert receiver.posts == []


@pytest.mark.parametrize("url", MALFORMED)
async def test_malformed_urls_are_not_posted_to(receiver, names, url):
    poster = Poster(args_for(receiver.port), names.resolve)
    with pytest.raises(NotTaken, match="none that may be posted to"):
        await post(poster, url.format(port=receiver.port))
    assert receiver.posts == []


async def test_a_name_is_resolved_once(receiver, names):
    poster = Poster(args_for(receiver.port), names.resolve)
    await post(poster, f"http://rebound.test:{receiver.port}/good")
    with pytest.raises(NotTaken):
        await post(poster, f"http://evil-rebound.test:{receiver.port}/good")
    assert names.asked == ["rebound.test", "evil-rebound.test"]
    assert len(receiver.posts) == 1


@pytest.mark.parametrize("options", [{"enabled": False}, {"schemes": ("https",)}])
async def test_what_the_operator_forbids_later(receiver, names, options):
    poster = Poster(args_for(receiver.port, **options), names.resolve)
    with pytest.raises(NotTaken):
        await post(poster, f"http://home.test:{receiver.port}/good")
    assert (receiver.posts, names.asked) == ([], [])


@pytest.mark.parametrize("host", ["home.test", "other.test"])
async def test_the_certificate_is_the_hosts(host):
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("home.test").configure_cert(tls)

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    async with receiving(tls) as receiver:
        poster = Poster(args_for(receiver.port, schemes=("https",)), resolve)
        poster.guard.trusted = ssl.create_default_context()
        authority.configure_trust(poster.guard.trusted)
        url = f"https://{host}:{receiver.port}/good"
        if host == "home.test":
            await post(poster, url)
        else:
            with pytest.raises(NotTaken, match="ConnectError"):
                await post(poster, url)
        assert len(receiver.posts) == (host == "home.test")


async def message_of(job: Job) -> bytes:
    return json.dumps({"id": job.job_id, "status": job.status, **job.memo}).encode()


def offer_for(url: str) -> JobSubmission:
    request = ImageRequest("r", "tiny", "a prompt", 64, 48, 4, 1.0, 7)
    return JobSubmission(
        "anna", request, Idempotency("k", "f"), Webhook(url, SECRET), {"words": "memo"}
    )


@pytest.mark.parametrize(("path", "num_posts"), [("/third", 3), ("/failing", 4)])
async def test_from_the_job_to_its_receiver(
    receiver, names, tmp_path, serve_log, caplog, path, num_posts
):
    caplog.set_level("DEBUG")
    args = JobArgs(
        database=f"sqlite:///{tmp_path}/jobs.sqlite3",
        results=str(tmp_path / "results"),
        webhook_retries_s=(0.05, 0.05, 0.05),
    )
    poster = Poster(args_for(receiver.port), names.resolve)
    desk = JobService(args, paint, mail=Mail(message_of, poster.post))
    await desk.open()
    job = await desk.accept(offer_for(f"http://home.test:{receiver.port}{path}?token=1"))

    async def have_come() -> bool:
        return len(receiver.posts) == num_posts

    await wait_until(have_come)
    await asyncio.sleep(0.7)
    await desk.close()
    assert len(receiver.posts) == num_posts
    for came in receiver.posts:
        told = Verifier(SECRET.encode()).verify(came.body, came.headers)
        assert told == {"id": job.job_id, "status": "ready", "words": "memo"}
        assert came.headers["webhook-id"] == job.job_id
    assert ("is given up: status 500" in serve_log.text) == (path == "/failing")
    for secret in (SECRET, "token=1", '"memo"', "a prompt"):
        assert secret not in serve_log.text
