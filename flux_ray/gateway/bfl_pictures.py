"""The pictures of BFL's routes: references in order, or one to fill where its mask says."""

import asyncio

from flux_ray.gateway.bfl_fields import IMAGES, BflFields
from flux_ray.gateway.fetch import Fetcher
from flux_ray.gateway.masks import decode_alpha
from flux_ray.gateway.openai_references import checked
from flux_ray.gateway.sources import Pictures, Reader, Source, read_pictures
from flux_ray.gateway.targets import Target
from flux_ray.gateway_config import Limits


async def pictures_of(
    sent: BflFields, target: Target, limits: Limits, fetcher: Fetcher
) -> Pictures:
    """All of them, decoded. As BFL has it, the alpha channel of `image` may be its mask."""
    sources = [Source(name, getattr(sent, name)) for name in ("image", *IMAGES)]
    sources = [source for source in sources if source.content is not None]
    masks = [] if sent.mask is None else [Source("mask", sent.mask)]
    pictures = await read_pictures(checked(iter(sources), iter(masks), target), limits, fetcher)
    if sent.image is None or sent.mask is not None:
        return pictures
    until_s = asyncio.get_running_loop().time() + fetcher.fetching.timeout_s
    reader = Reader(limits, fetcher, until_s)
    mask = await reader.read(Source("image", sent.image), "image", decode_alpha)
    return pictures._replace(mask=mask)
