"""Measure images per second of one `tiny` replica, with files made on its rank and outside of it.

Eight clients ask at once. The seed of a request says which way its file is made, so that one
replica takes all ways in turn.
"""

import asyncio
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import httpx
from ray.serve import Application

from flux_ray.app import tier_application
from flux_ray.config.tier import TierArgs
from flux_ray.engine.images import encode_image, image_for, scaled
from flux_ray.replica.job import Files, Made
from flux_ray.replica.leader import Leader
from flux_ray.replica.rank import RankActor, RankJob
from flux_ray.request import Encoding, RgbImage
from flux_ray.stages import DenoisedImage

NUM_CLIENTS = 8
NUM_BURSTS = 3
BURST_S = 5.0
# `tiny` cannot generate this size: its images are scaled to it.
LARGE = (1024, 1024)
SEEDS_A_WAY = 1000
# The ways, by the thousands of the seed. Other requests have seeds below 1000.
WAYS = {
    "as drawn, outside": 1,
    "as drawn, on the rank": 2,
    "1024, outside": 3,
    "1024, on the rank": 4,
}
FORMER = {"as drawn, outside": "as drawn, on the rank", "1024, outside": "1024, on the rank"}


def is_large(seed: int) -> bool:
    return seed // SEEDS_A_WAY in (3, 4)


class FormerRank(RankActor):
    """A rank that makes the file itself, as ranks once did, if the seed says so."""

    def pixels(
        self, generation: RankJob, generate: Callable[..., RgbImage]
    ) -> DenoisedImage | None:
        image = super().pixels(generation, generate)
        if image is None or generation.seed // SEEDS_A_WAY not in (2, 4):
            return image
        raster, buffer = image.raster, io.BytesIO()
        if is_large(generation.seed):
            raster = scaled(raster, LARGE)
        image_for(raster).save(buffer, "PNG")
        return DenoisedImage(RgbImage(0, 0, buffer.getvalue()), generation.seed)


class SomeFiles(Files):
    """The leader's files, which are scaled to LARGE if the seed says so."""

    async def start(self, image: DenoisedImage, encoding: Encoding) -> "asyncio.Future[Made]":
        if is_large(image.seed):
            encoding = replace(encoding, scaled_to=LARGE)
        return await super().start(image, encoding)


def encode_unless_done(raster: RgbImage, encoding: Encoding) -> bytes:
    return encode_image(raster, encoding) if raster.width else raster.rgb


class FormerLeader(Leader):
    """A leader whose rank is a FormerRank; it leaves images alone that are files already."""

    rank_class = FormerRank

    async def __init__(self, args: TierArgs) -> None:
        await super().__init__(args)
        self._loop._files = SomeFiles(encode_unless_done)


def tier_of_all_ways(args: TierArgs) -> Application:
    return tier_application(args, FormerLeader)


async def burst(address: str, way: int, seconds: float) -> float:
    """Return the images per second of one way, under NUM_CLIENTS clients."""
    num_images, end = 0, time.perf_counter() + seconds
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:

        async def keep_asking(number: int) -> None:
            nonlocal num_images
            while time.perf_counter() < end:
                fields = {"prompt": "a red circle", "seed": way * SEEDS_A_WAY + number}
                answer = await client.post("/v1/images/generations", json=fields)
                answer.raise_for_status()
                num_images += 1

        began = time.perf_counter()
        await asyncio.gather(*(keep_asking(number) for number in range(NUM_CLIENTS)))
        return num_images / (time.perf_counter() - began)


def images_per_s(address: str) -> dict[str, dict[str, float]]:
    """Return each way's median images per second, and their ratio to files made on the rank.

    The ways take turns in bursts.
    """
    seen: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(1 + NUM_BURSTS):
        for way, each in WAYS.items():
            rate = asyncio.run(burst(address, each, BURST_S))
            # The first burst does not count: the router learns its prices in it.
            if number:
                seen[way].append(rate)
    return {
        way: {
            "images_per_s": statistics.median(rates),
            "ratio": statistics.median(
                mine / former
                for mine, former in zip(rates, seen[FORMER.get(way, way)], strict=True)
            ),
        }
        for way, rates in seen.items()
    }
