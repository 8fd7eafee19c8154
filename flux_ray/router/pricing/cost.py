"""Estimate the price of a request before anything was measured, by a roofline of its stages.

`CostModel` in `cost_model.py` corrects these estimates by what replicas measure.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache

from flux_ray.catalog import (
    PROCESSOR,
    TOKEN_SIDE,
    WORKLOADS,
    speed_for,
    tier_for,
)
from flux_ray.config import Quantization, TierArgs
from flux_ray.request import ImageRequest
from flux_ray.router.pricing.roofline import Exchange, Roofline, Split

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# To the host, the VAE's four resolutions and its middle are one block each.
NUM_VAE_BLOCKS = 5
# Most traffic has a few shapes. Any bound will do that keeps strange ones from filling memory.
NUM_REMEMBERED = 4096
CACHE_BYTES: int = TierArgs.model_fields["cache_bytes"].default


@dataclass(frozen=True)
class ReplicaSpec:
    """How one replica of a tier is laid out, as far as prices depend on it.

    `card` names the kind of GPU, or is `cpu` for a processor, where each rank has `num_threads`.
    `cache_bytes` only says what a cache has room for: layouts with caches of two sizes are equal,
    and what was measured in one holds for the other.
    """

    card: str
    tensor: int = 1
    sequence: int = 1
    quantization: Quantization | None = None
    encoder_quantization: Quantization | None = None
    dtype: str = "bfloat16"
    is_encoder_shared: bool = False
    num_threads: int = 1
    has_cache: bool = True
    cache_bytes: int = field(default=CACHE_BYTES, compare=False, repr=False)

    @classmethod
    def of(cls, args: TierArgs, card: str) -> "ReplicaSpec":
        """Return the layout of a tier's args on GPUs of that name; ValueError if it is unknown."""
        card = PROCESSOR if args.device == "cpu" else card
        speed_for(card)
        return cls(
            card,
            args.parallel.tensor,
            args.parallel.sequence,
            args.quantization,
            args.encoder_quantization,
            args.dtype,
            args.text_encoder == "shared",
            args.num_threads if card == PROCESSOR else 1,
            args.cache_bytes > 0,
            args.cache_bytes,
        )

    @property
    def num_ranks(self) -> int:
        """The number of GPUs of a replica: the GPU seconds in one of its replica seconds."""
        return self.tensor * self.sequence


@dataclass(frozen=True)
class RequestShape:
    """The properties of a request that its price depends on.

    `references` has the pixels of each reference image, in the size in which the model takes it.
    `is_masked`: only a part of the first reference is generated; `has_control`: it is followed as a
    whole. `num_previews` counts those of each image. `num_forwards` are those of each step: two to
    steer away from a second prompt, which makes two of `num_prompts` unless it is empty, since an
    empty one is encoded only once for all requests. `num_text`: the tokens of the padded prompt, or
    None for the tier's whole text length; `num_away` those of the second prompt, or None for as
    many. Guidance by an embedding costs nothing. Files are left out, because they are made while
    the ranks do something else.
    """

    tier: str
    width: int
    height: int
    num_steps: int
    references: tuple[int, ...] = ()
    num_images: int = 1
    is_masked: bool = False
    num_previews: int = 0
    has_control: bool = False
    num_forwards: int = 1
    num_prompts: int = 1
    num_text: int | None = None
    num_away: int | None = None

    @property
    def away(self) -> "RequestShape":
        """The same with its second prompt in the place of the first."""
        return self if self.num_away is None else replace(self, num_text=self.num_away)

    @property
    def text_length(self) -> int:
        """The number of tokens of its padded prompt."""
        return tier_for(self.tier).text_length if self.num_text is None else self.num_text

    @property
    def num_decoded(self) -> int:
        """How many times the VAE decodes an image, previews included."""
        return self.num_images * (1 + self.num_previews)

    @property
    def pixels(self) -> int:
        """The number of pixels of one image."""
        return self.width * self.height

    @property
    def is_encoded_apart(self) -> bool:
        """Whether an image is encoded in the size of what is generated, as no reference is."""
        tier = tier_for(self.tier)
        # A reference has other latents than the image where it is scaled, or none that are kept.
        is_other = tier.reference_tokens is not None or WORKLOADS[self.tier].keeps_references
        is_other = is_other or self.pixels > tier.max_reference_pixels
        return self.has_control or (self.is_masked and is_other)

    @property
    def encoded_pixels(self) -> int:
        """The number of pixels that the VAE encodes, of all references and the masked image."""
        return sum(self.references) + (self.pixels if self.is_encoded_apart else 0)

    @property
    def num_tokens(self) -> int:
        """The number of tokens of text, image and references that each forward computes."""
        tokens = self.text_length + self.pixels // TOKEN_SIDE**2
        return tokens + self.num_reference_tokens - self.num_kept_tokens

    @property
    def num_reference_tokens(self) -> int:
        """The number of tokens of all references."""
        return sum(self.references) // TOKEN_SIDE**2

    @property
    def num_kept_tokens(self) -> int:
        """The number of those that are computed once, while encoding, and kept for all steps."""
        return self.num_reference_tokens if WORKLOADS[self.tier].keeps_references else 0


@dataclass(frozen=True)
class Cost:
    """A price in replica seconds, by stage, for all steps and images of a request."""

    encode_s: float
    denoise_s: float
    decode_s: float

    @property
    def total_s(self) -> float:
        """Replica seconds from the prompt to the last pixel."""
        return self.encode_s + self.denoise_s + self.decode_s


def work_of(request: ImageRequest) -> RequestShape:
    """Return the shape of a request, its references scaled to what the tier takes."""
    tier, sizes = tier_for(request.tier), request.reference_sizes
    texts = [None if tier.text_multiple is None else tier.text_tokens(p) for p in request.prompts]
    added = (tier.pixels_added_by(*size, is_alone=len(sizes) == 1) for size in sizes)
    return RequestShape(
        request.tier,
        request.width,
        request.height,
        request.num_steps_made,
        tuple(filter(None, added)),
        request.num_images,
        is_masked=request.mask is not None,
        num_previews=len(request.preview_steps),
        has_control=request.follows_reference,
        num_forwards=request.num_forwards,
        num_prompts=1 + bool(request.negative_prompt),
        num_text=texts[0],
        num_away=texts[1] if len(texts) > 1 else None,
    )


def work_at(
    name: str, width: int, height: int, num_steps: int, num_references: int = 0, num_images: int = 1
) -> RequestShape:
    """Return the shape of a request of a tier's own kind, its references as large as any.

    So it has two forwards on a tier that always has, and a mask or a control image where the tier
    requires one.
    """
    tier = tier_for(name)
    return RequestShape(
        name,
        width,
        height,
        num_steps,
        (tier.added_pixels,) * num_references if tier.added_pixels else (),
        num_images,
        is_masked=tier.requires_mask,
        has_control=tier.takes_control,
        num_forwards=tier.num_forwards,
    )


@lru_cache(NUM_REMEMBERED)
def price(work: RequestShape, layout: ReplicaSpec) -> Cost:
    """Return the replica seconds of a request on a replica that has nothing else to do."""
    roofline = roofline_of(layout)
    words_s, kept_s = encode_parts_s(work, layout)
    # Each forward has its prompt, and without a cache an empty one is encoded each time too.
    num_prompts = work.num_prompts if layout.has_cache else work.num_forwards
    away_s = prompt_s(work.away, layout, roofline) * (num_prompts - 1)
    return Cost(
        encode_s=words_s + away_s + kept_s + edit_s(work, roofline),
        denoise_s=step_s(work, layout, roofline) * work.num_steps * work.num_images,
        decode_s=image_s(work, roofline) * work.num_decoded,
    )


def roofline_of(layout: ReplicaSpec) -> Roofline:
    """Return the roofline of one rank of this layout."""
    return Roofline(speed_for(layout.card), layout.num_threads, DTYPE_BYTES[layout.dtype])


def encode_parts_s(work: RequestShape, layout: ReplicaSpec) -> tuple[float, float]:
    """Return the seconds of what is cached: one prompt; all references, with the images' noise."""
    roofline = roofline_of(layout)
    seconds = references_s(work, roofline)
    if work.has_control:
        seconds += whole_image_s(work, roofline)
    if work.num_kept_tokens:
        alone = replace(work, references=())
        seconds += forward_s(alone, work.num_kept_tokens, layout, roofline)
    return prompt_s(work, layout, roofline), seconds


def kept_bytes(work: RequestShape, layout: ReplicaSpec) -> int:
    """Return the bytes of the references' keys and values that each rank keeps, if the tier does.

    What other tiers cache of references is latents, which are small.
    """
    model = WORKLOADS[work.tier].transformer
    numbers = 2 * model.num_blocks * work.num_kept_tokens * model.width
    return numbers * DTYPE_BYTES[layout.dtype] // layout.num_ranks


def step_s(work: RequestShape, layout: ReplicaSpec, roofline: Roofline) -> float:
    """Return the seconds of one step: a forward with the prompt, and those with the second one."""
    away = work.away
    away_s = forward_s(away, away.num_tokens, layout, roofline) * (work.num_forwards - 1)
    return forward_s(work, work.num_tokens, layout, roofline) + away_s


def forward_s(
    work: RequestShape, num_tokens: int, layout: ReplicaSpec, roofline: Roofline
) -> float:
    """Return the seconds of one forward of the transformer that computes so many tokens."""
    model = WORKLOADS[work.tier].transformer
    split = Split(layout.tensor, layout.sequence, layout.quantization)
    seconds = roofline.products_s(
        model.product_flops(num_tokens),
        model.attention_flops(num_tokens, work.num_kept_tokens),
        split,
        num_weights=model.num_block_weights,
        num_whole_weights=model.num_other_weights,
    )
    # In a double block text and image have outputs of attention and MLP each, half as large.
    exchange = Exchange(
        num_activations=num_tokens * model.width,
        num_reduced=model.num_single_blocks + 2 * model.num_double_blocks,
        num_reductions=model.num_single_blocks + 4 * model.num_double_blocks,
        num_attentions=model.num_blocks,
        num_passes=5 * model.num_single_blocks + 10 * model.num_double_blocks,
    )
    return roofline.launched_s(seconds + roofline.exchanges_s(exchange, split), model.num_blocks)


def prompt_s(work: RequestShape, layout: ReplicaSpec, roofline: Roofline) -> float:
    """Return the seconds of the prompt in the text encoder, shared or in the ranks."""
    model, length = WORKLOADS[work.tier].text_encoder, work.text_length
    split = Split(encoder_ranks(layout, model.num_heads), 1, layout.encoder_quantization)
    seconds = roofline.products_s(
        model.product_flops(length),
        model.attention_flops * (length / tier_for(work.tier).text_length) ** 2,
        split,
        num_weights=model.num_block_weights,
    )
    num_outputs = 2 * model.num_layers
    exchange = Exchange(length * model.width, num_outputs, num_outputs)
    seconds += roofline.exchanges_s(exchange, split)
    whole_s = max(
        roofline.flops_s(model.whole_flops),
        roofline.memory_s(model.num_whole_weights * roofline.dtype_bytes),
    )
    return roofline.launched_s(seconds + whole_s, model.num_layers + model.num_whole_layers)


def encoder_ranks(layout: ReplicaSpec, num_heads: int) -> int:
    """Return over how many ranks the text encoder is split; the same rule as in its loader."""
    if layout.is_encoder_shared:
        return 1
    is_whole = layout.encoder_quantization == "nf4" or num_heads % layout.num_ranks
    return layout.tensor if is_whole else layout.num_ranks


def references_s(work: RequestShape, roofline: Roofline) -> float:
    """Return the seconds of the references in the VAE, and of making each image's noise.

    Every rank encodes all references, one by one.
    """
    vae = WORKLOADS[work.tier].vae
    each = (
        roofline.launched_s(roofline.flops_s(vae.encode_flops(pixels)), NUM_VAE_BLOCKS)
        for pixels in work.references
    )
    return sum(each) + work.num_images * roofline.speed.block_s


def edit_s(work: RequestShape, roofline: Roofline) -> float:
    """Return the seconds of the masked image in the VAE, 0 if its reference will do."""
    is_apart = work.is_encoded_apart and not work.has_control
    return whole_image_s(work, roofline) if is_apart else 0.0


def whole_image_s(work: RequestShape, roofline: Roofline) -> float:
    """Return the seconds of encoding an image in the size that is generated, on one rank."""
    flops = WORKLOADS[work.tier].vae.edit_flops(work.width, work.height)
    return roofline.launched_s(roofline.flops_s(flops), NUM_VAE_BLOCKS)


def image_s(work: RequestShape, roofline: Roofline) -> float:
    """Return the seconds of decoding one image in the VAE, on one rank."""
    flops = WORKLOADS[work.tier].vae.decode_flops(work.width, work.height)
    return roofline.launched_s(roofline.flops_s(flops), NUM_VAE_BLOCKS)
