"""Serve's status, with a fake Serve: how often it is read, and how long it is believed."""

import asyncio
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ray import serve
from ray.exceptions import RaySystemError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview

from flux_ray.router import readiness
from flux_ray.router.readiness import Readiness


def application(status="HEALTHY", trigger="UNSPECIFIED", **replica_states):
    """One deployment; its states as Serve gives them."""
    from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger, ReplicaState

    deployment = DeploymentStatusOverview(
        status=DeploymentStatus(status),
        status_trigger=DeploymentStatusTrigger(trigger),
        replica_states={ReplicaState(name).value: count for name, count in replica_states.items()},
        message="",
    )
    return ApplicationStatusOverview(
        status="RUNNING", message="", last_deployed_time_s=0, deployments={"tier": deployment}
    )


@pytest.mark.parametrize(
    ("applications", "expected"),
    [
        ({}, ()),
        ({"tiny": application("UPDATING", RUNNING=0)}, ()),
        ({"tiny": application("UPDATING")}, ()),
        ({"tiny": application("UNHEALTHY", "HEALTH_CHECK_FAILED", STARTING=1)}, ()),
        ({"tiny": application("DEPLOY_FAILED", "REPLICA_STARTUP_FAILED")}, ()),
        # At zero replicas on purpose; without having been up, a start is that of a deployment.
        ({"tiny": application()}, ("tiny",)),
        ({"tiny": application(RUNNING=0)}, ("tiny",)),
        ({"tiny": application("DOWNSCALING", "AUTOSCALING", STOPPING=1)}, ("tiny",)),
        ({"tiny": application("UPSCALING", "AUTOSCALING", STARTING=1)}, ()),
        # Of a node that is drained, and after the controller's own start: requests are served.
        ({"tiny": application("UPDATING", PENDING_MIGRATION=1, STARTING=1)}, ("tiny",)),
        ({"tiny": application("UPDATING", RECOVERING=2)}, ("tiny",)),
        ({"tiny": application(RUNNING=1, STARTING=1)}, ("tiny",)),
        ({"gateway": application(RUNNING=1)}, ()),
        ({"tiny": application(PENDING_MIGRATION=1, STARTING=1)}, ("tiny",)),
        ({"tiny": application(RECOVERING=1)}, ("tiny",)),
        # Of a node that is drained at once: others start in their place.
        ({"tiny": application(STARTING=1)}, ("tiny",)),
        ({"tiny": application(STOPPING=1, UPDATING=1)}, ("tiny",)),
        ({"tiny": application(STOPPING=2, STARTING=2)}, ("tiny",)),
    ],
)
async def test_ready_tiers(monkeypatch, applications, expected):
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=applications))
    assert await Readiness(("tiny",)).ready_tiers() == expected


@pytest.mark.parametrize(
    "changing", [("UPSCALING", "AUTOSCALING"), ("UPDATING", "CONFIG_UPDATE_STARTED")]
)
async def test_a_tier_that_is_woken_or_redeployed_stays_ready(monkeypatch, changing):
    """Or a load balancer would turn away from the only gateway in the middle of a cold start."""
    states = [
        application(),
        application(*changing, STARTING=1),
        application(*changing, STARTING=2),
        application("UNHEALTHY", "REPLICA_STARTUP_FAILED", STARTING=1),
        application(*changing, STARTING=1),
    ]
    told = iter(states)
    clock = [0.0]
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={"tiny": next(told)}))
    tiers = Readiness(("tiny",), clock=lambda: clock[0])
    ready = []
    for clock[0] in range(0, 10, 2):
        ready.append(bool(await tiers.ready_tiers()))
    assert ready == [True, True, True, False, False]


@pytest.mark.parametrize("error", [RaySystemError("no controller"), RayServeException("gone")])
async def test_the_status_is_read_once_a_second_and_kept_for_a_minute(monkeypatch, error):
    clock, reads = [0.0], []

    def status():
        reads.append(clock[0])
        if clock[0] >= 10:
            raise error
        return SimpleNamespace(applications={"tiny": application(RUNNING=1)})

    monkeypatch.setattr(serve, "status", status)
    tiers = Readiness(("tiny",), clock=lambda: clock[0])
    for clock[0] in (0.0, 0.5, 2.0, 10.0, 10.5, 61.0):
        assert await tiers.ready_tiers() == ("tiny",)
    clock[0] = 63.0
    assert await tiers.ready_tiers() == ()
    assert reads == [0.0, 2.0, 10.0, 61.0, 63.0]


async def test_a_controller_that_hangs_holds_one_thread(monkeypatch):
    started, release = [], threading.Event()

    def status():
        started.append(1)
        release.wait(10)
        return SimpleNamespace(applications={"tiny": application(RUNNING=1)})

    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(readiness, "ANSWER_S", 0.01)
    tiers = Readiness(("tiny",))
    assert [await tiers.ready_tiers() for _ in range(20)] == [()] * 20
    assert len(started) == 1
    release.set()
    monkeypatch.setattr(readiness, "ANSWER_S", 10)
    assert await tiers.ready_tiers() == ("tiny",)


class ServeStatus:
    """Serve's own word: it does not come until `speaks` is set, and fails with `error`."""

    def __init__(self, **applications):
        self.applications = applications
        self.speaks = threading.Event()
        self.speaks.set()
        self.error = None

    def __call__(self):
        self.speaks.wait(10)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(applications=dict(self.applications))


@pytest.fixture
def status(monkeypatch):
    """Of a gateway and a tier that serves; read again and again, without a pause."""
    told = ServeStatus(gateway=application(RUNNING=1), tiny=application(RUNNING=1))
    monkeypatch.setattr(serve, "status", told)
    monkeypatch.setattr(readiness, "REFRESH_S", 0.01)
    yield told
    told.speaks.set()


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.01)


async def test_a_slow_controller_makes_nobody_wait_who_heard_it_once(status):
    tiers = Readiness(("tiny",))
    tiers.start()
    assert await tiers.ready_tiers() == ("tiny",)
    status.speaks.clear()
    await asyncio.sleep(0.05)
    began = time.monotonic()
    assert [await tiers.ready_tiers() for _ in range(5)] == [("tiny",)] * 5
    assert time.monotonic() - began < 5 * readiness.MOMENT_S + 1


async def test_it_is_read_though_nobody_asks(status):
    tiers = Readiness(("tiny",))
    tiers.start()
    await until(lambda: tiers._ready == ("tiny",))
    status.applications["tiny"] = application("UNHEALTHY", "HEALTH_CHECK_FAILED", STARTING=1)
    await until(lambda: tiers._ready == ())


@pytest.mark.parametrize("gone", [None, "DELETING"])
async def test_a_tier_is_undeployed_while_serve_has_no_application_of_its_name(status, gone):
    lost = []
    tiers = Readiness(("tiny", "other"))
    assert tiers.is_deployed("tiny") and tiers.is_deployed("other"), "nobody said otherwise"
    tiers.start(lost.append)
    await until(lambda: lost == ["other"])
    assert tiers.is_deployed("tiny") and not tiers.is_deployed("other")
    status.applications["other"] = application("UPDATING", STARTING=1)
    await until(lambda: tiers.is_deployed("other"))
    leaving = status.applications.pop("tiny")
    if gone is not None:
        status.applications["tiny"] = replace(leaving, status=gone)
    await until(lambda: lost == ["other", "tiny"])
    assert not tiers.is_deployed("tiny")


@pytest.mark.parametrize("error", [RaySystemError("no controller"), None])
async def test_an_outage_of_the_controller_undeploys_nobody(status, error):
    lost = []
    tiers = Readiness(("tiny",))
    tiers.start(lost.append)
    await until(lambda: tiers._ready == ("tiny",))
    status.error = error
    # What Serve says where it finds no controller at all.
    status.applications = {}
    tried_at_s = tiers._tried_at_s
    await until(lambda: tiers._tried_at_s > tried_at_s + 0.05)
    assert tiers.is_deployed("tiny") and lost == []
    assert await tiers.ready_tiers() == ("tiny",)


async def test_without_a_controller_what_this_process_reaches_still_serves(monkeypatch):
    clock, reached = [0.0], {"tiny": ("one",), "other": ()}
    told = ServeStatus(tiny=application(RUNNING=1), other=application(RUNNING=1))
    monkeypatch.setattr(serve, "status", told)
    tiers = Readiness(("tiny", "other"), lambda: clock[0], lambda: reached)
    assert await tiers.ready_tiers() == ("tiny", "other")
    told.error = RaySystemError("no controller")
    clock[0] = readiness.MAX_AGE_S - 1
    assert await tiers.ready_tiers() == ("tiny", "other")
    clock[0] = 10 * readiness.MAX_AGE_S
    assert await tiers.ready_tiers() == ("tiny",)
    reached["tiny"] = ()
    assert await tiers.ready_tiers() == ()
