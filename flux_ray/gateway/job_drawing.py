"""Has jobs drawn by the router, on behalf of those who handed them in."""

from dataclasses import replace

from flux_ray.gateway.callers import allowance_of
from flux_ray.gateway.targets import UNLIMITED
from flux_ray.gateway_config import GatewayArgs
from flux_ray.jobs.job import Job
from flux_ray.request import ImageRequest, ImageResult
from flux_ray.router.caller import Caller
from flux_ray.router.router import Router

# Of a job's memo: the class of the key that it was accepted from.
KEY_CLASS = "key_class"


class JobDrawing:
    """What a Desk calls for each attempt at a job."""

    def __init__(self, router: Router, args: GatewayArgs) -> None:
        self.router = router
        self.args = args

    async def draw(self, job: Job, request: ImageRequest) -> ImageResult:
        """The job's pictures; raises as the router does."""
        return await self.router.generate(request, self.caller_of(job))

    def caller_of(self, job: Job) -> Caller:
        """Its owner, who waits as long as it takes.

        How many jobs and how often was asked when they were accepted; what is left is the day's.
        """
        key_class = self.args.key_classes.get(job.memo.get(KEY_CLASS, ""), UNLIMITED)
        allowance = replace(allowance_of(key_class), max_concurrent=None, requests_per_minute=None)
        return Caller(
            key=job.owner,
            weight=key_class.weight,
            deadline_s=self.args.request_timeout_s,
            allowance=allowance,
        )
