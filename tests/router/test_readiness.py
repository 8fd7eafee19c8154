"""Serve's status, with a fake Serve: how often it is read, and how long it is believed."""

import threading
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
        ({"tiny": application(STARTING=1)}, ()),
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
        ({"tiny": application(STOPPING=1, UPDATING=1)}, ()),
    ],
)
async def test_ready_tiers(monkeypatch, applications, expected):
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=applications))
    assert await Readiness(("tiny",)).ready_tiers() == expected


async def test_a_tier_that_is_woken_stays_ready(monkeypatch):
    """Or a load balancer would turn away from the only gateway in the middle of a cold start."""
    states = [
        application(),
        application("UPSCALING", "AUTOSCALING", STARTING=1),
        application("UPSCALING", "AUTOSCALING", STARTING=2),
        application("UNHEALTHY", "REPLICA_STARTUP_FAILED", STARTING=1),
        application("UPSCALING", "AUTOSCALING", STARTING=1),
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
