"""Which tiers can serve now: Serve's own view of their replicas, read off the event loop."""

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatusOverview

logger = logging.getLogger("ray.serve")

REFRESH_S = 1.0
ANSWER_S = 5.0
# Longer than a controller takes to come back; then the last word counts for nothing.
MAX_AGE_S = 60.0
# Replicas in these states get requests: also those of a node that is drained, until others have
# started, and those that a controller that came back has not looked at yet.
SERVING = {"RUNNING", "PENDING_MIGRATION", "RECOVERING"}


class Readiness:
    """The last status, at most a second old; in an outage of the controller a minute."""

    def __init__(self, tiers: tuple[str, ...], clock: Callable[[], float] = time.monotonic) -> None:
        self._tiers = tiers
        self._clock = clock
        self._ready: tuple[str, ...] = ()
        self._read_at_s = self._tried_at_s = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    async def ready_tiers(self) -> tuple[str, ...]:
        """The tiers with a running replica."""
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
            self._ready = await asyncio.to_thread(running_tiers, self._tiers)
            self._read_at_s = self._clock()
        except (RayError, RayServeException) as error:
            logger.warning("Serve's status cannot be read: %s", error)
        finally:
            self._tried_at_s = self._clock()
            self._reading = None


def running_tiers(tiers: tuple[str, ...]) -> tuple[str, ...]:
    """Those with a running replica of every deployment of their application. Blocks."""
    applications = serve.status().applications
    return tuple(tier for tier in tiers if tier in applications and is_up(applications[tier]))


def is_up(application: ApplicationStatusOverview) -> bool:
    """Whether a request can pass through."""
    deployments = application.deployments.values()
    return bool(deployments) and all(
        any(state in SERVING and count > 0 for state, count in deployment.replica_states.items())
        for deployment in deployments
    )
