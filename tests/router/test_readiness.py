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


def application(**replica_states):
    """One deployment; its states as Serve gives them."""
    from ray.serve._private.common import DeploymentStatus, ReplicaState

    deployment = DeploymentStatusOverview(
        status=DeploymentStatus.HEALTHY,
        status_trigger="UNSPECIFIED",
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
        ({"tiny": application(RUNNING=0)}, ()),
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
