"""Ray's errors as ours, with a fake Serve."""

import asyncio
from types import SimpleNamespace

import pytest
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RaySystemError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from flux_ray.config import TierArgs
from flux_ray.errors import BadReference, ReplicaFailed, TierUnavailable
from flux_ray.request import ImageRequest, ImageResult, Progress, StageTimes
from flux_ray.router import handles as handles_module
from flux_ray.router.handles import TierHandles, last_of
from flux_ray.router.handover import GRANTED, REACHABLE

RESULT = ImageResult("id", "tiny", (), StageTimes(0, 0, 0, 0))
ARGS = TierArgs(tier="tiny")
REQUEST = ImageRequest("id", "tiny", "a ring", 128, 128, 4, 1.0, seed=7)


def task_error(cause):
    """What Serve raises when a replica raised `cause`."""
    error = RayTaskError("generate", "Traceback ...", cause, proctitle="p", pid=1, ip="127.0.0.1")
    return error.as_instanceof_cause()


class FakeServe:
    """Every tier's handle answers with `value`: raised if an exception, waited for if an event.

    A stream has what is in `news` before it.
    """

    def __init__(self):
        self.value = None
        self.news = []
        self.handles_made = 0
        self.granted = []
        self.cancelled = 0

    def get_app_handle(self, tier):
        self.handles_made += 1
        if tier != "tiny":
            raise RayServeException(f"Application '{tier}' does not exist.")
        return Handle(self)


class Handle:
    """Of a method, as `options` gives it."""

    def __init__(self, fake, method_name=None, stream=False):
        self.fake = fake
        self.method_name = method_name
        self.stream = stream

    def options(self, *, method_name, stream=False):
        return Handle(self.fake, method_name, stream)

    def remote(self, *args):
        if self.method_name == "describe":
            return Response(SimpleNamespace(value=ARGS))
        assert self.method_name == ("follow" if self.stream else "generate")
        self.fake.granted.append(GRANTED.get((args[0].tier, args[0].request_id)))
        return Stream(self.fake) if self.stream else Response(self.fake)


class Response:
    """Awaitable like Serve's."""

    def __init__(self, fake):
        self.fake = fake

    def __await__(self):
        return self.result().__await__()

    async def result(self):
        value = self.fake.value
        if isinstance(value, asyncio.Event):
            await value.wait()
        if isinstance(value, BaseException):
            raise value
        return value

    def cancel(self):
        self.fake.cancelled += 1


class Stream(Response):
    """Iterable like Serve's, and not awaitable."""

    __await__ = None

    async def __aiter__(self):
        for news in self.fake.news:
            yield news
        last = await self.result()
        if last is not None:
            yield last


@pytest.fixture
def answer(monkeypatch):
    fake = FakeServe()
    monkeypatch.setattr(serve, "get_app_handle", fake.get_app_handle)
    return fake


async def test_a_handle_is_made_once(answer):
    answer.value = "result"
    handles = TierHandles(("tiny",))
    assert [await handles.generate(REQUEST, "replica") for _ in range(3)] == ["result"] * 3
    assert answer.handles_made == 1


async def test_serve_is_told_whose_turn_it_is_while_it_chooses(answer):
    await TierHandles(("tiny",)).generate(REQUEST, "replica 3")
    assert answer.granted == ["replica 3"]
    assert GRANTED == {}


async def test_a_tier_is_met_without_a_request(answer):
    """Its replicas are to be known, and their layout, before the first one comes."""
    layouts = {}
    handles = TierHandles(("tiny",), layouts.__setitem__)
    assert handles.reachable() == {}, "nobody waits for that"
    await asyncio.sleep(0.05)
    handles.reachable()
    assert (answer.handles_made, layouts) == (1, {"tiny": ARGS})


async def test_a_tier_that_comes_later_is_met_then(answer, monkeypatch):
    monkeypatch.setattr(handles_module, "AGAIN_S", 0.01)
    layouts = {}
    handles = TierHandles(("flux-2-klein-4b",), layouts.__setitem__)
    handles.reachable()
    await asyncio.sleep(0.05)
    assert layouts == {}
    monkeypatch.setattr(serve, "get_app_handle", lambda tier: Handle(answer))
    await asyncio.sleep(0.05)
    assert layouts == {"flux-2-klein-4b": ARGS}


async def test_the_replicas_that_serve_has_told_of_are_reachable(answer, monkeypatch):
    handles = TierHandles(("tiny",))
    monkeypatch.setitem(REACHABLE, "tiny", ("a", "b"))
    monkeypatch.setitem(REACHABLE, "other", ("c",))
    assert handles.reachable() == {"tiny": ("a", "b")}


async def test_a_tier_that_is_not_deployed(answer):
    request = ImageRequest("id", "flux-2-klein-4b", "a ring", 128, 128, 4, 1.0, seed=7)
    with pytest.raises(TierUnavailable, match="flux-2-klein-4b is not deployed"):
        await TierHandles(("flux-2-klein-4b",)).connect("flux-2-klein-4b")
    with pytest.raises(TierUnavailable, match="flux-2-klein-4b is not deployed"):
        await TierHandles(("flux-2-klein-4b",)).generate(request, "replica")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ActorDiedError(), ReplicaFailed),
        (ActorUnavailableError("gone", None), ReplicaFailed),
        (BackPressureError(1, 1), TierUnavailable),
        (DeploymentUnavailableError("tiny"), TierUnavailable),
        (RaySystemError("other"), RaySystemError),
    ],
)
async def test_rays_errors(answer, raised, expected):
    answer.value = raised
    with pytest.raises(expected):
        await TierHandles(("tiny",)).generate(REQUEST, "replica")


async def test_our_errors_come_out_of_rays_wrapping(answer):
    cause = BadReference("no picture", "image")
    answer.value = task_error(cause)
    with pytest.raises(BadReference) as caught:
        await TierHandles(("tiny",)).generate(REQUEST, "replica")
    assert caught.value is cause


async def test_other_errors_of_a_replica_stay_what_they_are(answer):
    answer.value = task_error(KeyError("bug"))
    with pytest.raises(KeyError):
        await TierHandles(("tiny",)).generate(REQUEST, "replica")


async def test_an_attempt_that_is_given_up_is_called_off(answer):
    """asyncio cancels only our waiting; the replica would go on drawing."""
    answer.value = asyncio.Event()
    for number, hear in enumerate((None, print), 1):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await TierHandles(("tiny",)).generate(REQUEST, "replica", hear)
        assert answer.cancelled == number


async def test_who_listens_hears_what_comes_before_the_result(answer):
    result = ImageResult("id", "tiny", (), StageTimes(0, 0, 0, 0))
    answer.value, answer.news = result, [Progress(1, 2), Progress(2, 2)]
    heard = []
    assert await TierHandles(("tiny",)).generate(REQUEST, "replica 3", heard.append) == result
    assert heard == answer.news
    assert answer.granted == ["replica 3"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (ActorDiedError(), ReplicaFailed),
        (task_error(BadReference("no picture", "image")), BadReference),
        (None, ReplicaFailed),
    ],
    ids=["a death", "a mistake", "no result"],
)
async def test_a_stream_may_fail_in_the_middle(answer, value, expected):
    answer.value, answer.news = value, [Progress(1, 2)]
    with pytest.raises(expected) as caught:
        await TierHandles(("tiny",)).generate(REQUEST, "replica", print)
    assert type(caught.value) is expected
    assert GRANTED == {}


async def test_an_end_that_does_not_come_loses_no_picture(monkeypatch):
    async def stream_without_end():
        yield Progress(1, 1)
        yield RESULT
        await asyncio.sleep(60)

    monkeypatch.setattr(handles_module, "END_S", 0.01)
    async with asyncio.timeout(5):
        assert await last_of(stream_without_end(), lambda news: None) == RESULT


async def test_a_stream_without_a_result_has_failed():
    async def stream():
        yield Progress(1, 2)

    with pytest.raises(ReplicaFailed):
        await last_of(stream(), lambda news: None)
