"""A tier whose leaders write down which requests they have generated."""

from contextlib import aclosing
from pathlib import Path

from ray.serve import Application

from flux_ray.app import tier_application
from flux_ray.config.tier import TierArgs
from flux_ray.replica.leader import Leader
from flux_ray.request import EventStream, ImageRequest, ImageResult

# The file's name, in the home of the `serve run` that the leader is part of.
GENERATED = "drawn"


class CountedLeader(Leader):
    """A leader that writes a line for each finished request: its prompt and its seed."""

    async def _stream(self, request: ImageRequest) -> EventStream:
        async with aclosing(super()._stream(request)) as events:
            async for event in events:
                if isinstance(event, ImageResult):
                    with (Path.home() / GENERATED).open("a") as generated:
                        generated.write(f"{request.prompt} {request.seed}\n")
                yield event


def build_tier(args: TierArgs) -> Application:
    """Build the tier with such leaders, in place of flux_ray.app:build_tier."""
    return tier_application(args, CountedLeader)
