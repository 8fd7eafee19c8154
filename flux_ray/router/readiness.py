"""Which tiers can serve now: Serve's own view of their replicas, read off the event loop."""

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview

logger = logging.getLogger("ray.serve")

REFRESH_S = 1.0
ANSWER_S = 5.0
# Longer than a controller takes to come back; then the last word counts for nothing.
MAX_AGE_S = 60.0
# Of replicas: what Serve's proxies and handles send requests to. Those of a node that is drained
# serve until others do; after the controller's own start they are not looked at yet.
SERVING = ("RUNNING", "PENDING_MIGRATION", "RECOVERING")
STARTING = ("STARTING", "UPDATING")
# Of deployments that have as many replicas as they are to have, or too many.
RESTING = ("HEALTHY", "DOWNSCALING")


class Readiness:
    """The last status, at most a second old; in an outage of the controller a minute."""

    def __init__(self, tiers: tuple[str, ...], clock: Callable[[], float] = time.monotonic) -> None:
        self._tiers = tiers
        self._clock = clock
        self._ready: tuple[str, ...] = ()
        self._read_at_s = self._tried_at_s = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    async def ready_tiers(self) -> tuple[str, ...]:
        """The tiers that serve, or would be woken by a request."""
        # One read at a time: without a controller each would hold a thread for good.
        if self._reading is None and self._clock() - self._tried_at_s > REFRESH_S:
            # Of no request: a client that leaves does not cancel it.
            self._reading = asyncio.get_running_loop().create_task(
                self._read(), context=contextvars.Context()
            )
        if self._reading is not None:
            await asyncio.wait((self._reading,), timeout=ANSWER_S)
        return self._ready if self._clock() - self._read_at_s < MAX_AGE_S else ()

    async def _read(self) -> None:
        try:
            self._ready = await asyncio.to_thread(serving_tiers, self._tiers, self._ready)
            self._read_at_s = self._clock()
        except (RayError, RayServeException) as error:
            logger.warning("Serve's status cannot be read: %s", error)
        finally:
            self._tried_at_s = self._clock()
            self._reading = None


def serving_tiers(tiers: tuple[str, ...], were_up: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return those of which every deployment serves, or would. Blocks.

    `were_up`: those that did a moment ago.
    """
    applications = serve.status().applications
    return tuple(
        tier
        for tier in tiers
        if tier in applications and is_up(applications[tier], tier in were_up)
    )


def is_up(application: ApplicationStatusOverview, was_up: bool) -> bool:
    """Say whether a request can pass through, at once or after a start that it causes.

    A load balancer that took a tier at zero replicas for down would never send that request.
    """
    deployments = application.deployments.values()
    return bool(deployments) and all(
        serves(each) or rests(each) or (was_up and wakes(each)) for each in deployments
    )


def serves(deployment: DeploymentStatusOverview) -> bool:
    """Say whether it has a replica that requests are sent to."""
    return has_any(deployment, SERVING)


def rests(deployment: DeploymentStatusOverview) -> bool:
    """Say whether it has no replica on purpose: the next request starts one."""
    return deployment.status in RESTING and not has_any(deployment, STARTING)


def has_any(deployment: DeploymentStatusOverview, states: tuple[str, ...]) -> bool:
    """Say whether it has replicas in one of these states."""
    counts = deployment.replica_states.items()
    return any(state in states and count > 0 for state, count in counts)


def wakes(deployment: DeploymentStatusOverview) -> bool:
    """Say whether it is called for more replicas. A start that fails changes the status."""
    is_called = deployment.status_trigger == "AUTOSCALING"
    return is_called and deployment.status == "UPSCALING"
