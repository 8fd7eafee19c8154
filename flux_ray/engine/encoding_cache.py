"""A cache in front of an adapter's encode stage: the same prompt or references are encoded once."""

from dataclasses import dataclass

from torch import Tensor

from flux_ray.engine.api import Adapter, Conditioning, PromptEmbeds
from flux_ray.engine.cache import Cache
from flux_ray.engine.packing import unpack
from flux_ray.request import EncodedPrompt, ImageRequest, RgbImage
from flux_ray.resizing import fit_image, fit_mask


@dataclass(frozen=True)
class References:
    """All references of a request, encoded: latents [1, tokens, channels], ids [1, tokens, 4]."""

    latents: Tensor
    ids: Tensor


class CachedEncoder:
    """The encode stage of one rank, with a cache of `max_bytes` for prompts and sets of references.

    A rank calls it on the thread that works on its jobs. A hit returns the very tensors that were
    stored, so a cached request gives the same image, bit for bit.
    """

    def __init__(self, adapter: Adapter, max_bytes: int, device: str) -> None:
        self._adapter = adapter
        self._device = device
        self._cache: Cache[PromptEmbeds | References] = Cache(max_bytes, bytes_of)

    def encode(
        self, request: ImageRequest, encoded: EncodedPrompt | None
    ) -> tuple[Conditioning, bool]:
        """Return the conditioning of a request, and whether any part of it came from a cache.

        `encoded` is the prompt if a shared text encoder has encoded it already. That encoder has a
        cache of its own, so such a prompt is not stored here a second time.
        """
        prompt, is_known = self._prompt(request, encoded)
        if not request.references:
            return Conditioning(prompt), is_known
        if request.mask is None:
            return self._references(request, request.references, prompt, is_known)
        size = (request.width, request.height)
        image, mask = fit_image(request.references[0], size), fit_mask(request.mask, size)
        references = (image, *request.references[1:])
        given, is_known = self._references(request, references, prompt, is_known)
        # Masks are not cached: making one takes less time than hashing it to look it up.
        return self._adapter.edit(given, image, mask), is_known

    def forget(self) -> None:
        """Drop everything, to free memory after a job ran out of it; all can be encoded again."""
        self._cache = Cache(self._cache.max_bytes, bytes_of)

    def _references(
        self,
        request: ImageRequest,
        references: tuple[RgbImage, ...],
        prompt: PromptEmbeds,
        is_known: bool,
    ) -> tuple[Conditioning, bool]:
        known = self._cache.get(request.references_name)
        if isinstance(known, References):
            return Conditioning(prompt, known.latents, known.ids), True
        made = self._adapter.encode(prompt, references)
        if made.reference_latents is not None and made.reference_ids is not None:
            kept = References(made.reference_latents, made.reference_ids)
            self._cache.put(request.references_name, kept)
        return made, is_known

    def _prompt(
        self, request: ImageRequest, encoded: EncodedPrompt | None
    ) -> tuple[PromptEmbeds, bool]:
        if encoded is not None:
            return unpack(encoded, self._device), encoded.is_cached
        known = self._cache.get(request.prompt_name)
        if isinstance(known, PromptEmbeds):
            return known, True
        prompt = self._adapter.encode_prompt(request.prompt)
        self._cache.put(request.prompt_name, prompt)
        return prompt, False


def bytes_of(value: PromptEmbeds | References) -> int:
    """Return how many bytes the tensors of a cached value take."""
    if isinstance(value, PromptEmbeds):
        return value.num_bytes
    return value.latents.nbytes + value.ids.nbytes
