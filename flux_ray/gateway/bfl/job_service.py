"""The desk of a gateway: its jobs are drawn by the router, and told of in BFL's words."""

from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.bfl.message import message_for
from flux_ray.gateway.jobs import JobGenerator
from flux_ray.gateway.results.urls import sample_url_of, urls_for
from flux_ray.gateway.webhooks import Poster
from flux_ray.jobs.job import Job
from flux_ray.jobs.service import JobService
from flux_ray.jobs.webhooks import Mail
from flux_ray.router.router import Router


def desk_for(router: Router, args: GatewayArgs, poster: Poster | None = None) -> JobService | None:
    """None where there are no jobs. `poster`: else one that posts as `args.webhooks` say."""
    if args.jobs is None or args.public_url is None:
        return None
    public_url = args.public_url

    async def message_of(job: Job) -> bytes:
        # A new URL each time: the first one may have expired.
        return message_for(job, sample_url_of(job, await urls_for(desk, public_url)))

    poster = poster or Poster(args.webhooks)
    mail = Mail(message_of, poster.post, args.webhooks.timeout_s)
    drawing = JobGenerator(router, args)
    desk = JobService(
        args.jobs,
        drawing.draw,
        drawing.progress_of,
        mail,
        drawing.preview_of,
        drawing.standing_of,
        tiers=args.tiers,
    )
    return desk
