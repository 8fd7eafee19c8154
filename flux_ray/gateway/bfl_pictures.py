"""The pictures of BFL's routes: references in order, or one to fill where its mask says."""

from flux_ray.gateway.bfl_fields import IMAGES, BflFields
from flux_ray.gateway.fetch import Fetcher
from flux_ray.gateway.masks import decode_with_alpha
from flux_ray.gateway.openai_references import checked
from flux_ray.gateway.references import whole_image
from flux_ray.gateway.sources import Pictures, Source, read_pictures, reader_for
from flux_ray.gateway.targets import Target
from flux_ray.gateway_config import Limits


async def pictures_of(
    sent: BflFields, target: Target, limits: Limits, fetcher: Fetcher
) -> Pictures:
    """All of them, decoded. As BFL has it, the alpha channel of `image` may be its mask."""
    sources = [Source(name, getattr(sent, name)) for name in ("image", *IMAGES)]
    sources = [source for source in sources if source.content is not None]
    masks = [] if sent.mask is None else [Source("mask", sent.mask)]
    taken = checked(iter(sources), iter(masks), target)
    if sent.image is None or sent.mask is not None:
        return await read_pictures(taken, target, limits, fetcher)
    reader = reader_for(target, limits, fetcher)
    image, *others = taken.references
    raster, mask = await reader.read(image, "image 1", decode_with_alpha)
    picture = whole_image(raster, reader.max_pixels)
    return Pictures((picture, *await reader.read_references(others, first=2)), mask)
