"""An adapter's encoding, remembered: the same prompt or references are encoded once."""

from dataclasses import dataclass

from torch import Tensor

from flux_ray.engine.api import Conditioning, PromptEmbeds
from flux_ray.engine.cache import Cache
from flux_ray.engine.flux2.text_encoder import unpack
from flux_ray.engine.registry import Adapter
from flux_ray.request import EncodedPrompt, ImageRequest, RgbImage
from flux_ray.resizing import fit_image, fit_mask


@dataclass(frozen=True)
class References:
    """A request's references as the transformer takes them."""

    latents: Tensor
    ids: Tensor


class CachedEncoder:
    """Prompts and sets of references of one rank, in one cache of `max_bytes`.

    What comes out is the very tensors that went in: an image does not change by it.
    """

    def __init__(self, adapter: Adapter, max_bytes: int, device: str) -> None:
        self._adapter = adapter
        self._device = device
        self._cache: Cache[PromptEmbeds | References] = Cache(max_bytes, bytes_of)

    def encode(
        self, request: ImageRequest, encoded: EncodedPrompt | None
    ) -> tuple[Conditioning, bool]:
        """The conditioning of a request, and whether any of it had been made before.

        `encoded` is its prompt as a shared text encoder says it; that one remembers by itself.
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
        # A mask is never remembered: it is quicker made than found.
        return self._adapter.edit(given, image, mask), is_known

    def forget(self) -> None:
        """Make room: all of it can be made again."""
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
    """Of its tensors."""
    if isinstance(value, PromptEmbeds):
        return value.embeds.nbytes + value.text_ids.nbytes
    return value.latents.nbytes + value.ids.nbytes
