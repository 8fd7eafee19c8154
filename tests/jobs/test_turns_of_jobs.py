"""What the ledger hears of jobs and of people, so that a job never goes before who waits for it."""

import pytest

from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.jobs import JobGenerator
from flux_ray.jobs.job import Job
from flux_ray.request import ImageRequest
from flux_ray.router.quote import Caller
from flux_ray.router.router import Router

REQUEST = ImageRequest("id", "tiny", "a ring", 128, 128, 4, 1.0, seed=7)
JOB = Job("id", "alice", "tiny", {}, 7, "running", 0.0, 1, 0, created_at_s=0.0)


async def test_a_job_says_that_it_is_one_and_has_no_deadline(
    router: Router, turns, gateway_args: GatewayArgs
) -> None:
    """It says within what time it wants its turn, and that is no promise to anybody."""
    await JobGenerator(router, gateway_args).generate(JOB, REQUEST)
    (offer,) = turns.submissions
    assert (offer.is_job, offer.has_deadline) == (True, False)


@pytest.mark.parametrize("deadline_s", [None, 3.0])
async def test_a_person_is_no_job_and_has_a_deadline_if_it_says_one(
    router: Router, turns, deadline_s: float | None
) -> None:
    await router.generate(REQUEST, Caller(deadline_s=deadline_s))
    (offer,) = turns.submissions
    assert (offer.is_job, offer.has_deadline) == (False, deadline_s is not None)
