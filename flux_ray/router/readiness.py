"""Which tiers can serve now: Serve's own view of their replicas, read off the event loop."""

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
# Where nobody asks, so many times as seldom: for each status Serve writes its whole configuration
# out, a tenth of a second of a slow processor.
UNASKED = 3
# Who asks first waits so long for the first word.
ANSWER_S = 1.0
# Who asks while the word is older than it has to be.
MOMENT_S = 0.1
# Longer than a controller takes to come back; then the last word counts for tiers of which this
# process knows replicas, and for nothing else.
MAX_AGE_S = 60.0
# Of replicas: what Serve's proxies and handles send requests to. Those of a node that is drained
# serve until others do; after the controller's own start they are not looked at yet.
SERVING = ("RUNNING", "PENDING_MIGRATION", "RECOVERING")
# Of deployments that Serve left as they were to be: one that lost a replica is UNHEALTHY.
CONTENT = ("HEALTHY", "DOWNSCALING")
# Of an application: Serve starts none of its replicas any more.
LEAVING = "DELETING"

Applications = Mapping[str, ApplicationStatusOverview]
Reachable = Callable[[], Mapping[str, tuple[str, ...]]]


def none_known() -> Mapping[str, tuple[str, ...]]:
    """Of no tier."""
    return {}


def forget(tier: str) -> None:
    """Nobody wants to know."""


class Readiness:
    """The last status, seconds old once `start` was called. An outage of Serve takes nothing back.

    `reachable`: the replicas that this process knows, by tier.
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
        # Of its own, and one: it stands still while there is no controller.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="readiness")

    def start(self, lose: Callable[[str], None] = forget) -> None:
        """From now on the status is read all the time, and nobody has to wait for it.

        `lose` hears of each tier whose application is no more.
        """
        self._lose = lose
        if self._refreshing is None:
            self._refreshing = keep_running(self._refresh, "what reads Serve's status")

    async def ready_tiers(self) -> tuple[str, ...]:
        """The tiers that serve, or would be woken by a request."""
        if self._clock() - self._tried_at_s > REFRESH_S:
            is_first = self._read_at_s == float("-inf")
            await asyncio.wait((self._read_once(),), timeout=ANSWER_S if is_first else MOMENT_S)
        if self._clock() - self._read_at_s < MAX_AGE_S:
            return self._ready
        # They serve without a controller, as long as they live.
        known = self._reachable()
        return tuple(tier for tier in self._ready if known.get(tier))

    def is_deployed(self, tier: str) -> bool:
        """Say whether Serve has its application, as far as Serve ever told."""
        return tier not in self._undeployed

    def _read_once(self) -> "asyncio.Task[None]":
        # One read at a time: without a controller each would hold a thread for good.
        if self._reading is None:
            # Of no request: a client that leaves does not cancel it.
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
            # A gateway is one of them: none is no word of a controller that knows what there is.
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
    """What Serve says of each. Blocks."""
    applications: Applications = serve.status().applications
    return applications


def undeployed_tiers(tiers: tuple[str, ...], applications: Applications) -> frozenset[str]:
    """Return those that have no application, or one that is being deleted."""
    return frozenset(
        tier for tier in tiers if tier not in applications or applications[tier].status == LEAVING
    )


def serving_tiers(
    tiers: tuple[str, ...], applications: Applications, were_up: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Return those of which every deployment serves, or would.

    `were_up`: those that did a moment ago.
    """
    return tuple(
        tier
        for tier in tiers
        if tier in applications and is_up(applications[tier], tier in were_up)
    )


def is_up(application: ApplicationStatusOverview, was_up: bool) -> bool:
    """Say whether a request can pass through, at once or after a start that is to come anyway.

    A load balancer that took every tier for down would answer with errors of its own, where a
    request can wait, or be refused with a word on when to come again.
    """
    deployments = application.deployments.values()
    return bool(deployments) and all(
        serves(each) or is_content(each) or (was_up and is_changing(each)) for each in deployments
    )


def serves(deployment: DeploymentStatusOverview) -> bool:
    """Say whether it has a replica that requests are sent to."""
    return has_any(deployment, SERVING)


def is_content(deployment: DeploymentStatusOverview) -> bool:
    """Say whether Serve has taken away what replicas are missing: it rests, or a node is drained.

    The next request starts one, or others have been started in their place.
    """
    return deployment.status in CONTENT


def has_any(deployment: DeploymentStatusOverview, states: tuple[str, ...]) -> bool:
    """Say whether it has replicas in one of these states."""
    counts = deployment.replica_states.items()
    return any(state in states and count > 0 for state, count in counts)


def is_changing(deployment: DeploymentStatusOverview) -> bool:
    """Say whether it is called for more replicas, or for other ones.

    A start that fails changes the status.
    """
    is_woken = deployment.status == "UPSCALING" and deployment.status_trigger == "AUTOSCALING"
    return is_woken or deployment.status == "UPDATING"
