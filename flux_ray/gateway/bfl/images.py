"""The pictures of BFL's routes: references in order, or one to fill where its mask says."""

from flux_ray.config.gateway import Limits
from flux_ray.gateway.bfl.fields import BflFields
from flux_ray.gateway.images.fetch import Fetcher
from flux_ray.gateway.images.masks import decode_painted_mask, decode_with_alpha
from flux_ray.gateway.images.sources import RequestImages, read_pictures, read_with_alpha
from flux_ray.gateway.model_names import ResolvedModel
from flux_ray.gateway.openai.references import sources_in_json


async def pictures_of(
    sent: BflFields, target: ResolvedModel, limits: Limits, fetcher: Fetcher
) -> RequestImages:
    """All of them, decoded. As BFL has it, the alpha channel of `image` may be its mask."""
    to_fill = {} if sent.image is None else {"image": sent.image}
    taken = sources_in_json(to_fill | sent.others, target)
    if sent.image is None or taken.mask is not None or not taken.references:
        return await read_pictures(taken, target, limits, fetcher, decode_painted_mask)
    return await read_with_alpha(taken, target, limits, fetcher, decode_with_alpha)
