"""What stands for the cluster: an image that its request alone decides."""

import asyncio
import hashlib
from dataclasses import asdict, replace

from flux_ray.request import GeneratedImage, ImageRequest, ImageResult, StageTimes, loaded


def image_for(request: ImageRequest, seed: int) -> bytes:
    """As a model would: by the words, the references and the seed, not by the attempt."""
    words = asdict(replace(request, request_id=""))
    return hashlib.sha256(repr((seed, words)).encode()).hexdigest().encode()


async def paint(job: object, request: ImageRequest, for_s: float = 0.0) -> ImageResult:
    await asyncio.sleep(for_s)
    request = await loaded(request)
    images = tuple(GeneratedImage(image_for(request, seed), seed) for seed in request.seeds)
    return ImageResult(request.request_id, request.tier, images, StageTimes(0, 0, for_s, 0))
