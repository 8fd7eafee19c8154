"""Ray's errors as ours, with a fake Serve."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
from ray import serve
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    OutOfMemoryError,
    RayError,
    RaySystemError,
    RayTaskError,
)
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    RequestCancelledError,
)

from flux_ray.config.tier import TierArgs
from flux_ray.errors import (
    BadReference,
    FluxError,
    KilledForMemory,
    NotKept,
    ProtocolMismatch,
    ReplicaFailed,
    TierUnavailable,
)
from flux_ray.request import PROTOCOL, ImageRequest, ImageResult, Progress, StageTimes, last_of
from flux_ray.router import dispatch as handles_module
from flux_ray.router import readiness
from flux_ray.router.dispatch import TierHandles, events_of
from flux_ray.router.handover import GRANTED, REACHABLE
from flux_ray.wire import Description, pack_answer, packed, request_from

RESULT = ImageResult("id", "tiny", (), StageTimes(0, 0, 0, 0))
ARGS = TierArgs(tier="tiny")
REQUEST = ImageRequest("id", "tiny", "a ring", 128, 128, 4, 1.0, seed=7)


def description(replica, protocol=PROTOCOL):
    fields = ARGS.model_dump(mode="json")
    return Description(protocol, replica, "as it is", fields, "cpu", started_at_s=ord(replica[-1]))


def task_error(cause):
    """What Serve raises when a replica raised `cause`."""
    error = RayTaskError("generate", "Traceback ...", cause, proctitle="p", pid=1, ip="127.0.0.1")
    return error.as_instanceof_cause()


class FakeServe:
    """Every tier's handle answers with `value`: raised if an exception, waited for if an event.

    A stream has what is in `news` before it. `by_replica` are the answers of some replicas only,
    and `described` what each says of itself.
    """

    def __init__(self):
        self.value = None
        self.by_replica = {}
        self.described = {"a": description("a"), "b": description("b")}
        self.asked = []
        self.news = []
        self.handles_made = 0
        self.granted = []
        self.runs = []
        self.recalled = []
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

    def remote(self, call):
        assert call["protocol"] == PROTOCOL
        replica = GRANTED.get((call["tier"], call["request_id"]))
        if self.method_name == "describe":
            self.fake.asked.append(replica)
            return Response(SimpleNamespace(value=packed(self.fake.described[replica])))
        assert self.method_name == ("follow" if self.stream else "generate")
        if "recall" in call:
            self.fake.recalled.append(call["recall"])
        else:
            assert request_from(call).prompt == "a ring"
            self.fake.runs.append(call.get("run"))
        self.fake.granted.append(replica)
        value = self.fake.by_replica.get(replica, self.fake.value)
        answering = SimpleNamespace(value=value, news=self.fake.news, fake=self.fake)
        return Stream(answering) if self.stream else Response(answering)


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
        return pack_answer(value) if isinstance(value, ImageResult) else value

    def cancel(self):
        self.fake.fake.cancelled += 1


class Stream(Response):
    """Iterable like Serve's, and not awaitable."""

    __await__ = None

    async def __aiter__(self):
        for news in self.fake.news:
            yield pack_answer(news)
        last = await self.result()
        if last is not None:
            yield last


@pytest.fixture
def answer(monkeypatch):
    fake = FakeServe()
    monkeypatch.setattr(serve, "get_app_handle", fake.get_app_handle)
    return fake


async def test_a_handle_is_made_once(answer):
    answer.value = RESULT
    handles = TierHandles(("tiny",))
    assert [await handles.generate(REQUEST, "replica") for _ in range(3)] == [RESULT] * 3
    assert answer.handles_made == 1


async def test_while_the_controller_is_away_one_thread_of_its_own_waits_for_it(answer, monkeypatch):
    """A crowd would take the threads in which this process does all else, decoding too."""
    controller, waiting = threading.Event(), []

    def get_app_handle(tier):
        waiting.append(threading.current_thread().name)
        controller.wait()
        return answer.get_app_handle(tier)

    monkeypatch.setattr(serve, "get_app_handle", get_app_handle)
    handles = TierHandles(("tiny",))
    try:
        crowd = [asyncio.ensure_future(handles.connect("tiny")) for _ in range(50)]
        await until(lambda: waiting)
        crowd.pop().cancel()
        await asyncio.sleep(0.02)
        assert [name.split("_")[0] for name in waiting] == ["handle"]
        assert not any(each.done() for each in crowd)
    finally:
        controller.set()
    await asyncio.gather(*crowd)
    assert answer.handles_made == 1


async def test_serve_is_told_whose_turn_it_is_while_it_chooses(answer):
    answer.value = RESULT
    await TierHandles(("tiny",)).generate(REQUEST, "replica 3")
    assert answer.granted == ["replica 3"]
    assert GRANTED == {}


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - of a fake, which tells nobody
            await asyncio.sleep(0.001)


@pytest.fixture
def quick(monkeypatch):
    for name in ("AGAIN_S", "LOOK_S"):
        monkeypatch.setattr(handles_module, name, 0.001)


@pytest.mark.usefixtures("quick")
async def test_a_tier_is_met_without_a_request(answer, monkeypatch):
    """Its replicas are to be known, and their layouts, before the first one comes."""
    told = {}
    handles = TierHandles(("tiny",), told.__setitem__)
    assert handles.reachable() == {}, "nobody waits for that"
    await until(lambda: answer.handles_made)
    monkeypatch.setitem(REACHABLE, "tiny", ("a",))
    await until(lambda: told)
    assert (answer.handles_made, told) == (1, {"tiny": (description("a"),)})
    assert GRANTED == {}


@pytest.mark.usefixtures("quick")
async def test_a_tier_that_comes_later_is_met_then(answer, monkeypatch):
    tier, told = "flux-2-klein-4b", {}
    handles = TierHandles((tier,), told.__setitem__)
    handles.reachable()
    await until(lambda: answer.handles_made > 1)
    assert told == {}
    monkeypatch.setattr(serve, "get_app_handle", lambda tier: Handle(answer))
    monkeypatch.setitem(REACHABLE, tier, ("a",))
    await until(lambda: told)
    assert told == {tier: (description("a"),)}


@pytest.mark.usefixtures("quick")
async def test_a_watch_that_a_mistake_has_ended_is_begun_again(answer, monkeypatch):
    failed = []

    def learn(tier, descriptions):
        failed.append(descriptions)
        if len(failed) == 2:
            raise ValueError("a mistake of ours")

    handles = TierHandles(("tiny",), learn)
    for up in (("a", "b"), ("a",), ("a", "b")):
        monkeypatch.setitem(REACHABLE, "tiny", up)
        before = len(failed)
        handles.reachable()
        await until(lambda before=before: len(failed) > before)
        await asyncio.sleep(0.01)
    await until(lambda: len(failed[-1]) == 2)


@pytest.mark.usefixtures("quick")
async def test_each_replica_is_asked_once_and_itself(answer, monkeypatch):
    told = {}
    handles = TierHandles(("tiny",), told.__setitem__)
    monkeypatch.setitem(REACHABLE, "tiny", ("a",))
    handles.reachable()
    await until(lambda: told)
    monkeypatch.setitem(REACHABLE, "tiny", ("a", "b"))
    await until(lambda: len(told["tiny"]) == 2)
    answer.value = RESULT
    for _ in range(3):
        await handles.generate(REQUEST, "a")
    assert answer.asked == ["a", "b"], "no request costs another round trip"


@pytest.mark.usefixtures("quick")
async def test_a_request_that_a_replica_cannot_read_goes_to_one_that_can(answer, monkeypatch):
    for name, protocol in (("old", PROTOCOL - 1), ("older", PROTOCOL - 2), ("ours", PROTOCOL)):
        answer.described[name] = description(name, protocol)
        answer.by_replica[name] = task_error(ProtocolMismatch("what?", None, protocol))
    answer.by_replica["ours"] = RESULT
    monkeypatch.setitem(REACHABLE, "tiny", ("old", "older", "ours"))
    told = {}
    handles = TierHandles(("tiny",), told.__setitem__)
    handles.reachable()
    await until(lambda: len(told.get("tiny", ())) == 3)
    for on_event in (None, print):
        answer.granted.clear()
        assert await handles.generate(REQUEST, "old", on_event) == RESULT
        assert answer.granted == ["old", "ours"]
    assert GRANTED == {}


@pytest.mark.usefixtures("quick")
async def test_a_request_that_no_replica_can_read_is_told_to_come_back(answer, monkeypatch):
    for name in ("old", "as old"):
        answer.described[name] = description(name, PROTOCOL - 1)
        answer.by_replica[name] = task_error(ProtocolMismatch("what?", None, PROTOCOL - 1))
    monkeypatch.setitem(REACHABLE, "tiny", ("as old", "old"))
    told = {}
    handles = TierHandles(("tiny",), told.__setitem__)
    handles.reachable()
    await until(lambda: len(told.get("tiny", ())) == 2)
    with pytest.raises(TierUnavailable) as caught:
        await handles.generate(REQUEST, "old")
    assert (caught.value.status, caught.value.retry_after_s) == (503, 5)
    assert answer.granted == ["old"]


async def test_news_of_a_kind_that_is_not_known_here_are_left_out(answer):
    result = pack_answer(RESULT)
    result["value"]["sharpness"] = 3
    later = {"protocol": PROTOCOL + 1, "kind": "Sharpened", "value": {}}

    async def stream():
        for news in (later, pack_answer(Progress(1, 1)), result):
            yield news

    heard = []
    assert await last_of(events_of(stream()), heard.append) == RESULT
    assert heard == [Progress(1, 1)]


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
        (RayServeException("the controller is away"), TierUnavailable),
        (RaySystemError("other"), ReplicaFailed),
        (OutOfMemoryError("the node's"), KilledForMemory),
        (task_error(OutOfMemoryError("the node's")), KilledForMemory),
        (GetTimeoutError("late"), ReplicaFailed),
        (RequestCancelledError("id"), ReplicaFailed),
        (task_error(RaySystemError("what the replica had called is gone")), ReplicaFailed),
    ],
)
async def test_rays_errors(answer, raised, expected):
    answer.value = raised
    with pytest.raises(expected):
        await TierHandles(("tiny",)).generate(REQUEST, "replica")


async def test_our_errors_come_out_of_rays_wrapping(answer):
    cause = BadReference("no image", "image")
    answer.value = task_error(cause)
    with pytest.raises(BadReference) as caught:
        await TierHandles(("tiny",)).generate(REQUEST, "replica")
    assert caught.value is cause


@pytest.mark.parametrize("cause", [KeyError("bug"), TypeError("seven values, not six")])
async def test_another_error_of_a_replica_is_no_error_of_the_gateways_own(answer, cause):
    """As Serve raises it, it is an instance of its cause: the gateway's own, it would seem."""
    answer.value = task_error(cause)
    with pytest.raises(FluxError) as caught:
        await TierHandles(("tiny",)).generate(REQUEST, "replica")
    assert type(caught.value) is FluxError
    assert not isinstance(caught.value, RayError)
    assert "Traceback" not in caught.value.shown


async def test_an_attempt_that_is_given_up_is_called_off(answer):
    """asyncio cancels only our waiting; the replica would go on drawing."""
    answer.value = asyncio.Event()
    handles = TierHandles(("tiny",))
    await handles.connect("tiny")
    for number, on_event in enumerate((None, print), 1):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await handles.generate(REQUEST, "replica", on_event)
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
        (task_error(BadReference("no image", "image")), BadReference),
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


async def test_an_end_that_does_not_come_loses_no_image(monkeypatch):
    async def stream_without_end():
        yield pack_answer(Progress(1, 1))
        yield pack_answer(RESULT)
        await asyncio.sleep(60)

    monkeypatch.setattr(handles_module, "END_S", 0.01)
    async with asyncio.timeout(5):
        assert await last_of(events_of(stream_without_end()), lambda news: None) == RESULT


async def test_a_replica_that_dies_after_its_result_loses_no_image():
    async def stream_that_breaks():
        yield pack_answer(RESULT)
        raise ActorDiedError

    assert await last_of(events_of(stream_that_breaks()), lambda news: None) == RESULT


async def test_a_stream_without_a_result_has_failed():
    async def stream():
        yield pack_answer(Progress(1, 2))

    with pytest.raises(ReplicaFailed):
        await last_of(events_of(stream()), lambda news: None)


async def test_a_tier_that_is_no_more_is_refused_though_there_is_a_handle(answer, monkeypatch):
    there = {"tiny": SimpleNamespace(status="RUNNING", deployments={})}
    applications = {"gateway": SimpleNamespace(status="RUNNING", deployments={})} | there
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=applications))
    monkeypatch.setattr(readiness, "REFRESH_S", 0.01)
    handles = TierHandles(("tiny",))
    await handles.connect("tiny")
    lost = []
    handles.follow_status(lost.append)
    await handles.connect("tiny")
    del applications["tiny"]
    await until(lambda: lost == ["tiny"])
    with pytest.raises(TierUnavailable, match="tiny is not deployed"):
        await handles.connect("tiny")
    applications |= there
    await until(lambda: handles.is_deployed("tiny"))
    await handles.connect("tiny")
    assert answer.handles_made == 1


async def test_a_replica_hears_what_a_request_is_known_by(answer):
    answer.value = RESULT
    handles = TierHandles(("tiny",))
    await handles.generate(REQUEST, "a", None, "mine")
    await handles.generate(REQUEST, "a")
    assert answer.runs == ["mine", None]


@pytest.mark.parametrize("on_event", [None, [].append])
async def test_what_comes_again_is_asked_of_the_replica_that_has_it(answer, monkeypatch, on_event):
    monkeypatch.setitem(REACHABLE, "tiny", ("a", "b"))
    answer.by_replica["b"] = RESULT
    assert await TierHandles(("tiny",)).recall(REQUEST, "b", on_event, "mine") == RESULT
    assert (answer.granted, answer.recalled, answer.runs) == (["b"], ["mine"], [])


@pytest.mark.parametrize("error", [NotKept("no"), ProtocolMismatch("what?", None, 1)])
async def test_a_replica_that_does_not_have_it_says_so(answer, monkeypatch, error):
    monkeypatch.setitem(REACHABLE, "tiny", ("a",))
    answer.value = task_error(error)
    with pytest.raises(type(error)):
        await TierHandles(("tiny",)).recall(REQUEST, "a", None, "mine")


async def test_one_that_is_gone_is_not_waited_for(answer, monkeypatch):
    """Serve would ask another one, or wait for a first."""
    monkeypatch.setitem(REACHABLE, "tiny", ("a",))
    with pytest.raises(ReplicaFailed):
        await TierHandles(("tiny",)).recall(REQUEST, "b", None, "mine")
    assert answer.granted == []
