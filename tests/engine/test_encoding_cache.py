"""What a rank remembers: within its bytes, and to the very bit."""

from dataclasses import replace

import pytest
import torch

from flux_ray.engine.api import Conditioning, ImageSpec, PromptEmbeds
from flux_ray.engine.cache import Cache
from flux_ray.engine.encoding_cache import CachedEncoder
from flux_ray.engine.packing import pack, packed
from flux_ray.errors import BadRequest
from flux_ray.request import ImageRequest, RgbImage
from flux_ray.stages import EncodedPrompt


def test_the_least_recently_used_goes_first():
    cache: Cache[bytes] = Cache(10, len)
    for name in "abc":
        cache.put(name, name.encode() * 3)
    assert cache.get("a") == b"aaa"
    cache.put("d", b"dddd")
    assert [cache.get(name) for name in "abcd"] == [b"aaa", None, b"ccc", b"dddd"]
    assert cache.num_bytes == 10


def test_what_is_larger_than_all_of_it_is_not_kept():
    cache: Cache[bytes] = Cache(3, len)
    cache.put("a", b"aaa")
    cache.put("b", b"bbbb")
    assert (cache.get("a"), cache.get("b"), cache.num_bytes) == (b"aaa", None, 3)
    nothing: Cache[bytes] = Cache(0, len)
    nothing.put("a", b"a")
    assert nothing.get("a") is None


def test_what_has_no_bytes_is_not_kept():
    """It could not be evicted: its name would take memory for ever."""
    cache: Cache[bytes] = Cache(3, len)
    cache.put("a", b"")
    assert cache.get("a") is None


def request(prompt: str, *shades: int) -> ImageRequest:
    references = tuple(RgbImage(64, 64, bytes([shade]) * (64 * 64 * 3)) for shade in shades)
    return ImageRequest("id", "tiny", prompt, 64, 64, 1, 1.0, seed=7, references=references)


class CountingAdapter:
    """Counts what it is asked to encode."""

    def __init__(self) -> None:
        self.num_prompts = self.num_references = 0

    def encode_prompt(self, prompt: str) -> PromptEmbeds:
        self.num_prompts += 1
        return PromptEmbeds({"embeds": torch.full((1, 4, 2), float(len(prompt)))})

    def encode(self, prompt: PromptEmbeds, references: tuple[RgbImage, ...]) -> Conditioning:
        if not references:
            return Conditioning(prompt)
        self.num_references += 1
        return Conditioning(prompt, {"latents": torch.zeros(1, 4, 2), "ids": torch.zeros(1, 4, 4)})


def test_prompts_and_references_are_encoded_once():
    adapter = CountingAdapter()
    encoding = CachedEncoder(adapter, 10_000, "cpu")
    known = [
        encoding.encode(each, ())[1]
        for each in (
            request("a ring"),
            request("a ring"),
            request("a ring", 1),
            request("a ring", 1, 2),
            request("a ring", 2, 1),
            request("a disc", 2, 1),
            request("a disc", 2, 1),
        )
    ]
    assert known == [False, True, True, True, True, True, True]
    assert (adapter.num_prompts, adapter.num_references) == (2, 3), "their order counts"


def test_a_shared_encoders_prompt_is_known_if_it_says_so():
    encoding = CachedEncoder(CountingAdapter(), 10_000, "cpu")
    for is_cached in (False, True):
        said = EncodedPrompt((("embeds", packed(torch.zeros(1, 4, 2))),), (), is_cached)
        assert encoding.encode(request("a ring"), (said,))[1] is is_cached


def test_a_negative_prompt_is_encoded_beside_the_prompt_and_once_for_all():
    adapter = CountingAdapter()
    encoding = CachedEncoder(adapter, 10_000, "cpu")
    for prompt in ("a ring", "a large disc"):
        given, _ = encoding.encode(replace(request(prompt, 1), negative_prompt=""), ())
        assert given.negative is not None
        found = [float(each.tensors["embeds"][0, 0, 0]) for each in (given.prompt, given.negative)]
        assert found == [len(prompt), 0]
    assert adapter.num_prompts == 3
    given, _ = encoding.encode(request("a ring"), ())
    assert given.negative is None


def test_a_negative_prompt_comes_from_a_shared_encoder_too():
    encoding = CachedEncoder(CountingAdapter(), 10_000, "cpu")
    said = [EncodedPrompt((("embeds", packed(torch.full((1,), at))),), ("cut",)) for at in (1, 2)]
    given, _ = encoding.encode(replace(request("a ring"), negative_prompt="a disc"), tuple(said))
    assert given.negative is not None and given.negative.tensors["embeds"].item() == 2
    assert given.warnings == ("cut", "negative prompt: cut")


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_negative_prompt_that_is_known_counts_unless_it_is_empty(is_shared):
    """Many callers send one with all prompts; the time of one prompt is not that of two."""
    adapter = CountingAdapter()
    encoding = CachedEncoder(adapter, 10_000, "cpu")
    known = []
    for prompt, negative in (("a", "x"), ("b", "x"), ("c", ""), ("d", ""), ("e", "y")):
        said = ()
        if is_shared:
            was_known = (prompt, negative) in (("b", "x"), ("d", ""))
            said = tuple(pack(adapter.encode_prompt(each)) for each in (prompt, negative))
            said = (said[0], replace(said[1], is_cached=was_known))
        asked = replace(request(prompt), negative_prompt=negative)
        known.append(encoding.encode(asked, said)[1])
    assert known == [False, True, False, False, False]


class MaskAdapter(CountingAdapter):
    """Takes a reference only as the image to inpaint, as FLUX.1 dev and Fill do."""

    def encode(self, prompt: PromptEmbeds, references: tuple[RgbImage, ...]) -> Conditioning:
        return Conditioning(prompt)


def test_an_image_of_which_nothing_is_kept_is_never_known():
    encoding = CachedEncoder(MaskAdapter(), 10_000, "cpu")
    assert [encoding.encode(request(prompt, 1), ())[1] for prompt in "abb"] == [False, False, True]


class FittingAdapter(CountingAdapter):
    """Notes the sizes of the references that it is given."""

    def encode(self, prompt: PromptEmbeds, references: tuple[RgbImage, ...]) -> Conditioning:
        self.sizes = [(each.width, each.height) for each in references]
        return super().encode(prompt, references)


def test_a_control_image_has_the_size_of_what_is_generated():
    adapter = FittingAdapter()
    asked = replace(request("a ring", 1), width=96, height=32, follows_reference=True)
    CachedEncoder(adapter, 10_000, "cpu").encode(asked, ())
    assert adapter.sizes == [(96, 32)] == list(asked.reference_sizes)


@pytest.mark.parametrize("shades", [(), (200,), (200, 30)])
def test_an_image_of_what_is_known_is_the_same_to_the_bit(klein_adapter, shades):
    encoding = CachedEncoder(klein_adapter, 2**20, "cpu")
    asked = request("a red circle on a blue background", *shades)

    def generate() -> bytes:
        conditioning, _ = encoding.encode(asked, ())
        state = klein_adapter.prepare(conditioning, ImageSpec(64, 64, 2), 7)
        while not state.is_done:
            state = klein_adapter.denoise(state)
        return klein_adapter.decode(state).rgb

    first = generate()
    assert encoding.encode(asked, ())[1], "known by now"
    assert generate() == first
    fresh = klein_adapter.encode(klein_adapter.encode_prompt(asked.prompt), asked.references)
    again, _ = encoding.encode(asked, ())
    assert torch.equal(again.prompt.tensors["embeds"], fresh.prompt.tensors["embeds"])
    if shades:
        assert torch.equal(again.references["latents"], fresh.references["latents"])
        assert torch.equal(again.references["ids"], fresh.references["ids"])


CUT = "the prompt has 90 tokens, and only the first 48 were heeded"


class CuttingAdapter(CountingAdapter):
    """Cuts every prompt."""

    def encode_prompt(self, prompt: str) -> PromptEmbeds:
        return replace(super().encode_prompt(prompt), warnings=(CUT,))


@pytest.mark.parametrize("is_encoded", [False, True])
@pytest.mark.parametrize("prompt", ['{"scene": "a ring"}', ' [{"id": 1}]\n'])
def test_json_is_not_cut_unless_the_caller_allows_it(prompt, is_encoded):
    adapter = CuttingAdapter()
    encoded = (pack(adapter.encode_prompt(prompt)),) if is_encoded else ()
    encoding = CachedEncoder(adapter, 10_000, "cpu")
    # Once more, as the prompt is cached then.
    for _ in range(2):
        with pytest.raises(BadRequest, match="allow_truncation is true: the prompt has 90") as no:
            encoding.encode(request(prompt, 1), encoded)
        assert no.value.field == "prompt"
    assert adapter.num_references == 0, "refused before anything else is encoded"
    allowed = replace(request(prompt), allow_truncation=True)
    given, _ = encoding.encode(allowed, encoded)
    assert given.warnings == (CUT,)


@pytest.mark.parametrize("prompt", ["a ring", "{a ring}", "[a] ring", "7", '"a"', "[" * 9999])
def test_words_that_are_too_long_are_cut_with_a_warning(prompt):
    given, _ = CachedEncoder(CuttingAdapter(), 10_000, "cpu").encode(request(prompt), ())
    assert given.warnings == (CUT,)


def test_json_that_is_short_enough_passes():
    given, _ = CachedEncoder(CountingAdapter(), 10_000, "cpu").encode(request('{"a": 1}'), ())
    assert given.warnings == ()
