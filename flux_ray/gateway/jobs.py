"""Has jobs drawn by the router, on behalf of those who handed them in."""

from dataclasses import replace

from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.callers import allowance_of
from flux_ray.gateway.job_loading import within_budget
from flux_ray.gateway.model_names import UNLIMITED
from flux_ray.jobs.job import Job
from flux_ray.request import (
    GeneratedImage,
    ImageRequest,
    ImageResult,
    News,
    Preview,
    Progress,
    QueuePosition,
)
from flux_ray.router.caller import Caller
from flux_ray.router.router import Router

# Of a job's memo: the class of the key that it was accepted from.
KEY_CLASS = "key_class"

QUEUE_SHARE = 0.75


class JobGenerator:
    """What a Desk calls for each attempt at a job."""

    def __init__(self, router: Router, args: GatewayArgs) -> None:
        self.router = router
        self.args = args
        self._progress: dict[str, float] = {}
        self._previews: dict[str, GeneratedImage] = {}
        self._standings: dict[str, QueuePosition] = {}

    async def draw(self, job: Job, request: ImageRequest) -> ImageResult:
        """The job's pictures; raises as the router does."""
        request = within_budget(request, self.args.limits)

        def hear(news: News) -> None:
            if isinstance(news, QueuePosition):
                self._standings[request.request_id] = news
                return
            # It has been granted a replica.
            self._standings.pop(request.request_id, None)
            if isinstance(news, Progress):
                self._progress[request.request_id] = news.share
            elif isinstance(news, Preview):
                self._previews[request.request_id] = news.image

        try:
            return await self.router.generate(request, self.caller_of(job), hear)
        finally:
            self._progress.pop(request.request_id, None)
            self._previews.pop(request.request_id, None)
            self._standings.pop(request.request_id, None)

    def progress_of(self, request_id: str) -> float | None:
        """How far a request has come, from 0 to 1; None if nothing was heard of it."""
        return self._progress.get(request_id)

    def standing_of(self, request_id: str) -> QueuePosition | None:
        """Where a request waits for a replica; None if it does not, or nothing was heard of it."""
        return self._standings.get(request_id)

    def preview_of(self, request_id: str) -> GeneratedImage | None:
        """What a request's picture will look like; None if nothing was heard of that."""
        return self._previews.get(request_id)

    def caller_of(self, job: Job) -> Caller:
        """Its owner, who waits as long as it takes.

        How many jobs and how often was asked when they were accepted; what is left is the day's.
        """
        key_class = self.args.key_classes.get(job.memo.get(KEY_CLASS, ""), UNLIMITED)
        allowance = replace(allowance_of(key_class), max_concurrent=None, requests_per_minute=None)
        return Caller(
            key=job.owner,
            weight=key_class.weight,
            # The rest is for the drawing: a job that gets no turn in time waits on, as one whose
            # time is over while it is drawn was lost.
            deadline_s=self.args.request_timeout_s * QUEUE_SHARE,
            allowance=allowance,
            is_job=True,
        )
