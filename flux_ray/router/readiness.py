"""Find out which tiers can serve now, from Serve's own status, read off the event loop."""

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview

from flux_ray.router.background import keep_running

logger = logging.getLogger("ray.serve")

REFRESH_S = 1.0
# While no probe asks, the status is read this many times less often: for each, Serve serializes its
# whole configuration, which takes a tenth of a second of a slow processor.
UNASKED = 3
# How long the first probe waits for the first status.
ANSWER_S = 1.0
# How long a probe waits for a newer status if the last one is older than REFRESH_S.
MOMENT_S = 0.1
# Longer than a controller takes to come back. A status that is older counts only for tiers of which
# this process still knows replicas.
MAX_AGE_S = 60.0
# States of replicas that Serve's proxies and handles send requests to. PENDING_MIGRATION: its node
# is being drained, and it serves until another does. RECOVERING: the controller has restarted and
# has not looked at it yet.
SERVING = ("RUNNING", "PENDING_MIGRATION", "RECOVERING")
# States of deployments that are as Serve wants them; one that lost a replica is UNHEALTHY.
CONTENT = ("HEALTHY", "DOWNSCALING")
# The state of an application of which Serve starts no more replicas.
LEAVING = "DELETING"

Applications = Mapping[str, ApplicationStatusOverview]
Reachable = Callable[[], Mapping[str, tuple[str, ...]]]


def none_known() -> Mapping[str, tuple[str, ...]]:
    """Return no replicas, of no tier."""
    return {}


def forget(tier: str) -> None:
    """Do nothing with a tier that was removed."""


class Readiness:
    """The last known status of the tiers; an outage of Serve's controller changes nothing in it.

    Each gateway has one, used from its event loop. Once `start` was called it is at most seconds
    old. `reachable` returns the replicas that this process knows, by tier.
    """

    def __init__(
        self,
        tiers: tuple[str, ...],
        clock: Callable[[], float] = time.monotonic,
        reachable: Reachable = none_known,
    ) -> None:
        self._tiers = tiers
        self._clock = clock
        self._reachable = reachable
        self._lose: Callable[[str], None] = forget
        self._ready: tuple[str, ...] = ()
        self._undeployed: frozenset[str] = frozenset()
        self._read_at_s = self._tried_at_s = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        # A thread of its own, because the call blocks while there is no controller; and only one,
        # or more and more threads would block.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="readiness")

    def start(self, lose: Callable[[str], None] = forget) -> None:
        """Start reading the status all the time, so that no probe has to wait for it.

        `lose` is called with each tier whose application has been removed.
        """
        self._lose = lose
        if self._refreshing is None:
            self._refreshing = keep_running(self._refresh, "what reads Serve's status")

    async def ready_tiers(self) -> tuple[str, ...]:
        """Return the tiers that serve, or that a request would wake."""
        if self._clock() - self._tried_at_s > REFRESH_S:
            is_first = self._read_at_s == float("-inf")
            await asyncio.wait((self._read_once(),), timeout=ANSWER_S if is_first else MOMENT_S)
        if self._clock() - self._read_at_s < MAX_AGE_S:
            return self._ready
        # Replicas serve without a controller, as long as they live.
        known = self._reachable()
        return tuple(tier for tier in self._ready if known.get(tier))

    def is_deployed(self, tier: str) -> bool:
        """Return whether Serve has an application of the tier; True until Serve has answered."""
        return tier not in self._undeployed

    def _read_once(self) -> "asyncio.Task[None]":
        # One read at a time: without a controller each would hold a thread for good.
        if self._reading is None:
            # In an empty context: otherwise Ray would cancel it with the request that asked.
            self._reading = asyncio.get_running_loop().create_task(
                self._read(), context=contextvars.Context()
            )
        return self._reading

    async def _refresh(self) -> None:
        while True:
            await self._read_once()
            await asyncio.sleep(UNASKED * REFRESH_S)

    async def _read(self) -> None:
        try:
            loop = asyncio.get_running_loop()
            applications = await loop.run_in_executor(self._thread, applications_now)
            # This gateway is an application itself. So an empty status comes from a controller that
            # does not know yet what is deployed, and must not make every tier undeployed.
            if applications:
                self._ready = serving_tiers(self._tiers, applications, self._ready)
                self._note_undeployed(undeployed_tiers(self._tiers, applications))
                self._read_at_s = self._clock()
        except (RayError, RayServeException) as error:
            logger.warning("Serve's status cannot be read: %s", error)
        finally:
            self._tried_at_s = self._clock()
            self._reading = None

    def _note_undeployed(self, undeployed: frozenset[str]) -> None:
        gone, back = undeployed - self._undeployed, self._undeployed - undeployed
        self._undeployed = undeployed
        for tier in gone:
            logger.warning("%s is not deployed: its requests are refused", tier)
            self._lose(tier)
        for tier in back:
            logger.info("%s is deployed", tier)


def applications_now() -> Applications:
    """Return Serve's status of each application; this blocks."""
    applications: Applications = serve.status().applications
    return applications


def undeployed_tiers(tiers: tuple[str, ...], applications: Applications) -> frozenset[str]:
    """Return the tiers that have no application, or one that is being deleted."""
    return frozenset(
        tier for tier in tiers if tier not in applications or applications[tier].status == LEAVING
    )


def serving_tiers(
    tiers: tuple[str, ...], applications: Applications, were_up: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Return the tiers of which every deployment serves, or would if it were asked.

    `were_up` are those that did at the last reading.
    """
    return tuple(
        tier
        for tier in tiers
        if tier in applications and is_up(applications[tier], tier in were_up)
    )


def is_up(application: ApplicationStatusOverview, was_up: bool) -> bool:
    """Return whether a request would be served, at once or after a start that will come anyway.

    If a load balancer took every tier for down, it would answer with errors of its own; a gateway
    can let the request wait, or refuse it with the time to come back.
    """
    deployments = application.deployments.values()
    return bool(deployments) and all(
        serves(each) or is_content(each) or (was_up and is_changing(each)) for each in deployments
    )


def serves(deployment: DeploymentStatusOverview) -> bool:
    """Return whether the deployment has a replica that requests are sent to."""
    return has_any(deployment, SERVING)


def is_content(deployment: DeploymentStatusOverview) -> bool:
    """Return whether missing replicas were taken away by Serve itself, not lost.

    Then the tier rests at zero and the next request starts a replica, or a node is being drained
    and others have been started instead.
    """
    return deployment.status in CONTENT


def has_any(deployment: DeploymentStatusOverview, states: tuple[str, ...]) -> bool:
    """Return whether the deployment has replicas in one of these states."""
    counts = deployment.replica_states.items()
    return any(state in states and count > 0 for state, count in counts)


def is_changing(deployment: DeploymentStatusOverview) -> bool:
    """Return whether Serve is starting more replicas for requests, or replacing them.

    If a start fails, the status changes, and the tier no longer counts as up.
    """
    is_woken = deployment.status == "UPSCALING" and deployment.status_trigger == "AUTOSCALING"
    return is_woken or deployment.status == "UPDATING"
