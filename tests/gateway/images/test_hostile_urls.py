"""What attackers send as URLs: every row is a 4xx in our words, and nothing private is asked."""

import base64
from contextlib import asynccontextmanager

import httpx
import pytest

from flux_ray.config.gateway import Fetching
from flux_ray.gateway.api import build_api
from flux_ray.gateway.images.fetch import Fetcher
from tests.gateway.images.image_server import serving
from tests.gateway.test_hostile import EDITS, GENERATIONS, PROMPT, check

HOME = ["127.0.0.1/32"]
# The port is that of a server that really listens on 127.0.0.1.
PRIVATE = (
    "http://127.0.0.1:{port}/image",
    "http://127.1:{port}/image",
    "http://127.0.0.1.:{port}/image",
    "http://2130706433:{port}/image",
    "http://0177.0.0.1:{port}/image",
    "http://017700000001:{port}/image",
    "http://0x7f000001:{port}/image",
    "http://0x7f.0.0.1:{port}/image",
    "http://0x7F.1:{port}/image",
    "http://127.0.0.1%00.example.com:{port}/image",
    "http://[::ffff:127.0.0.1]:{port}/image",
    "http://[::ffff:7f00:1]:{port}/image",
    "http://[::127.0.0.1]:{port}/image",
    "http://[64:ff9b::127.0.0.1]:{port}/image",
    "http://[2002:7f00:1::]:{port}/image",
    "http://[::1]:{port}/image",
    "http://[::]:{port}/image",
    "http://[fe80::1%25lo]:{port}/image",
    "http://0:{port}/image",
    "http://0.0.0.0:{port}/image",
    "http://\u2460\u2461\u2466.0.0.1:{port}/image",
    "http://127\u30020\u30020\u30021:{port}/image",
    "http://169.254.169.254/latest/meta-data",
    "http://2852039166/latest/meta-data",
    "http://0xA9FEA9FE/latest/meta-data",
    "http://0251.0376.0251.0376/latest/meta-data",
    "http://[::ffff:169.254.169.254]/latest/meta-data",
    "http://[fd00:ec2::254]/latest/meta-data",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.0.1/",
    "http://100.64.0.1/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://localhost:{port}/image",
    "http://home.test:{port}/image",
    "http://mixed.test:{port}/image",
    "http://nowhere.test:{port}/image",
)
MALFORMED = (
    "http://a@home.test:{port}/image",
    "http://8.8.8.8@home.test:{port}/image",
    "http://@home.test:{port}/image",
    "http://8.8.8.8\\@home.test:{port}/image",
    "http:\\\\home.test:{port}/image",
    "http://home.test:{port}/\r\nx-evil: 1",
    "http://home.test:{port}/a b",
    "http://home.test\t:{port}/image",
    "http://home.test.:{port}/image",
    "http://home.test:22/",
    "http://home.test:0/",
    "http://home.test:99999/",
    "http:///image",
    "http:image",
    "https://",
    "ftp://home.test/image",
    "file:///etc/passwd",
    "gopher://home.test:{port}/_x",
    "javascript:alert(1)",
    "http://home.test:{port}/" + "a" * 5000,
)
BAD_ANSWERS = (
    *("/301", "/302", "/307", "/308", "/away", "/missing", "/failing", "/html", "/packed"),
    *("/told", "/told-digits", "/endless", "/slow", "/silent", "/cut", "/babble", "/nothing"),
)

WITHOUT_END = ("/slow", "/silent")


class Names:
    """A name server; `asked` are its questions."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        answers = {
            "home.test": ["127.0.0.1"],
            "localhost": ["127.0.0.1", "::1"],
            "mixed.test": ["8.8.8.8", "127.0.0.1"],
            # The second answer is another.
            "rebound.test": ["127.0.0.1"] if self.asked.count(host) == 1 else ["10.0.0.1"],
            "evil-rebound.test": ["10.0.0.1"] if self.asked.count(host) == 1 else ["127.0.0.1"],
        }
        if host not in answers:
            raise OSError(f"[Errno -2] {host} is in no file of ours")
        return answers[host]


@pytest.fixture
async def server(make_image):
    async with serving(make_image()) as server:
        yield server


@pytest.fixture
def names():
    return Names()


@pytest.fixture
def open_client(router, gateway_args, server, names):
    @asynccontextmanager
    async def open_client(**fetching):
        options = {"ports": (80, 443, server.port), "timeout_s": 30} | fetching
        fetcher = Fetcher(Fetching.model_validate(options), names.resolve)
        api = build_api(router, gateway_args, fetcher=fetcher)
        transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield client

    return open_client


@pytest.mark.parametrize("url", PRIVATE)
async def test_private_places(open_client, server, handles, url):
    url = url.format(port=server.port)
    async with open_client() as client:
        answer = await check(client, EDITS, json=PROMPT | {"images": [{"image_url": url}]})
        await check(client, EDITS, data=PROMPT, files={"url[]": (None, url)})
    assert "not that of a public" in answer.json()["error"]["message"]
    assert (server.asked, handles.requests) == ([], [])


@pytest.mark.parametrize("url", MALFORMED)
async def test_malformed(open_client, server, handles, url):
    """Not even where the place itself may be reached."""
    async with open_client(networks=HOME) as client:
        body = PROMPT | {"url": url.format(port=server.port)}
        answer = await check(client, GENERATIONS, json=body)
    assert answer.json()["error"]["param"] == "url"
    assert "x-evil" not in answer.headers
    assert (server.asked, handles.requests) == ([], [])


@pytest.mark.parametrize("path", BAD_ANSWERS)
async def test_bad_answers(open_client, server, handles, path):
    in_time = {"timeout_s": 0.5} if path in WITHOUT_END else {}
    async with open_client(networks=HOME, **in_time) as client:
        url = f"http://home.test:{server.port}{path}"
        await check(client, EDITS, json=PROMPT | {"image": url})
    assert server.asked == [path]
    assert handles.requests == []


@pytest.mark.parametrize("options", [{"enabled": False}, {"hosts": ("other.test",)}])
async def test_what_the_operator_forbids(open_client, server, names, options):
    async with open_client(networks=HOME, **options) as client:
        url = f"http://home.test:{server.port}/image"
        await check(client, EDITS, json=PROMPT | {"image": url})
    assert (server.asked, names.asked) == ([], [])


async def test_a_name_is_resolved_once(open_client, server, names, handles):
    """Between the check and the connection nobody is asked again."""
    async with open_client(networks=HOME) as client:
        body = PROMPT | {"url": f"http://rebound.test:{server.port}/image?a=1"}
        assert (await client.post(EDITS, json=body)).status_code == 200
        body = PROMPT | {"url": f"http://evil-rebound.test:{server.port}/image"}
        await check(client, EDITS, json=body)
    assert names.asked == ["rebound.test", "evil-rebound.test"]
    assert server.asked == ["/image?a=1"]
    assert server.hosts == [f"rebound.test:{server.port}"]
    assert len(handles.requests[0].references) == 1


async def test_order_over_all_ways(open_client, server, handles, make_image):
    """Form parts keep their order, whatever they hold."""
    url = f"http://home.test:{server.port}/image"
    blue = base64.b64encode(make_image(color="blue")).decode()
    async with open_client(networks=HOME, hosts=("home.test",)) as client:
        for parts in (
            [("url", (None, url)), ("image", (None, blue))],
            [
                ("image[]", ("f", make_image())),
                ("image[]", (None, f"data:image/png;base64,{blue}")),
            ],
        ):
            answer = await client.post(EDITS, files=[("prompt", (None, "a ring")), *parts])
            assert answer.status_code == 200, answer.text
    for request in handles.requests:
        assert [each.rgb[:3] for each in request.references] == [b"\xff\0\0", b"\0\0\xff"]
