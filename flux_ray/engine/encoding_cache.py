"""A cache in front of an adapter's encode stage: the same prompt or references are encoded once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from flux_ray.engine.api import Adapter, Conditioning, PromptEmbeds
from flux_ray.engine.cache import Cache
from flux_ray.engine.packing import unpack
from flux_ray.errors import BadRequest
from flux_ray.request import ImageRequest, RgbImage, name_of_prompt
from flux_ray.resizing import fit_image, fit_mask
from flux_ray.stages import EncodedPrompt


@dataclass(frozen=True)
class References:
    """All references of a request, encoded, in tensors by the names of the family."""

    tensors: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Return how many bytes the tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class CachedEncoder:
    """The encode stage of one rank, with a cache of `max_bytes` for prompts and sets of references.

    A rank calls it on the thread that works on its jobs. A hit returns the very tensors that were
    stored, so a cached request gives the same image, bit for bit.
    """

    def __init__(self, adapter: Adapter, max_bytes: int, device: str) -> None:
        self._adapter = adapter
        self._device = device
        self._cache: Cache[PromptEmbeds | References] = Cache(
            max_bytes, lambda each: each.num_bytes
        )

    def encode(
        self, request: ImageRequest, encoded: tuple[EncodedPrompt, ...]
    ) -> tuple[Conditioning, bool]:
        """Return the conditioning of a request, and whether any part of it came from a cache.

        An empty negative prompt does not count: it is in the cache for nearly all requests, and
        prices leave it out. `encoded` has the request's `prompts` if a shared text encoder has
        encoded them already. That encoder has a cache of its own, so such prompts are not stored
        here a second time. Raise BadRequest for JSON that is too long and may not be cut.
        """
        if encoded:
            prompts = [(unpack(each, self._device), each.is_cached) for each in encoded]
        else:
            prompts = [self._prompt(words) for words in request.prompts]
        (prompt, is_known), *negative = prompts
        check_whole(request, prompt)
        given, is_known = self._references(request, prompt, is_known)
        for words, was_known in negative:
            given = replace(given, negative=words)
            is_known = is_known or (was_known and bool(request.negative_prompt))
        return given, is_known

    def forget(self) -> None:
        """Drop everything, to free memory after a job ran out of it; all can be encoded again."""
        self._cache = Cache(self._cache.max_bytes, lambda each: each.num_bytes)

    def _prompt(self, words: str) -> tuple[PromptEmbeds, bool]:
        name = name_of_prompt(words)
        known = self._cache.get(name)
        if isinstance(known, PromptEmbeds):
            return known, True
        prompt = self._adapter.encode_prompt(words)
        self._cache.put(name, prompt)
        return prompt, False

    def _references(
        self, request: ImageRequest, prompt: PromptEmbeds, is_known: bool
    ) -> tuple[Conditioning, bool]:
        if not request.references:
            return Conditioning(prompt), is_known
        references, size = request.references, (request.width, request.height)
        if request.fits_reference:
            references = (fit_image(references[0], size), *references[1:])
        given, is_known = self._encoded(request.references_name, references, prompt, is_known)
        if request.mask is None:
            return given, is_known
        # Masks are not cached: making one takes less time than hashing it to look it up.
        return self._adapter.edit(given, references[0], fit_mask(request.mask, size)), is_known

    def _encoded(
        self, name: str, references: tuple[RgbImage, ...], prompt: PromptEmbeds, is_known: bool
    ) -> tuple[Conditioning, bool]:
        known = self._cache.get(name)
        if isinstance(known, References):
            return Conditioning(prompt, known.tensors), True
        made = self._adapter.encode(prompt, references)
        self._cache.put(name, References(made.references))
        return made, is_known


def check_whole(request: ImageRequest, prompt: PromptEmbeds) -> None:
    """Raise BadRequest if the request's prompt was cut, is JSON, and may not be cut.

    Half of a JSON prompt asks for another image: what it names last, such as text or colours, would
    be missing.
    """
    if prompt.warnings and request.has_json and not request.allow_truncation:
        raise BadRequest(
            f"a prompt that is JSON is not cut unless allow_truncation is true:"
            f" {' '.join(prompt.warnings)}",
            "prompt",
        )
