"""Estimate the price of a request before anything was measured, by a roofline of its stages.

A matrix product takes as long as its FLOPs at the reached fraction of the GPU's peak, or as
reading its weights from memory, whichever is longer. Collectives take the time that the link
needs for their bytes. Each constant says what it assumes. `CostModel` in `cost_model.py` corrects
these estimates by what replicas measure.
"""

from dataclasses import dataclass
from functools import lru_cache

from flux_ray.catalog import (
    PROCESSOR,
    TOKEN_SIDE,
    WORKLOADS,
    Speed,
    speed_for,
    tier_for,
)
from flux_ray.config import Quantization, TierArgs
from flux_ray.request import ImageRequest

TERA = 1e12
GIGA = 1e9
# The fraction of the data sheet's bandwidth that plain reads and writes reach.
MEMORY_FRACTION = 0.8
# The fraction of their peak that FP8 products reach: less than BF16 does, of twice the peak.
FP8_FRACTION = 0.5
# Bytes per stored number; NF4 adds a scale of four bytes for every 64 numbers.
QUANTIZED_BYTES: dict[Quantization, float] = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5625}
# Query, key, value and output. We send the first three in one piece, which has as many bytes.
EXCHANGES_PER_ATTENTION = 4


@dataclass(frozen=True)
class Split:
    """How a model is split: its weights over `tensor` ranks, its tokens over `sequence` ranks."""

    tensor: int
    sequence: int
    quantization: Quantization | None


@dataclass(frozen=True)
class Exchange:
    """The data that ranks exchange in one forward pass.

    `num_activations` is the size of one activation tensor [tokens, width], in numbers.
    `num_reduced` such tensors are summed over tensor ranks, in `num_reductions` all-reduces;
    before and after each of `num_attentions` attentions, tokens are exchanged for heads.
    `num_passes` tensors are read or written between products. On one GPU this time is contained in
    the measured fraction of the peak, so it is counted only on several.
    """

    num_activations: int
    num_reduced: int
    num_reductions: int
    num_attentions: int = 0
    num_passes: int = 0


@dataclass(frozen=True)
class Roofline:
    """The speed of one rank: a GPU, or `num_threads` of a processor. Numbers have `dtype_bytes`."""

    speed: Speed
    num_threads: int
    dtype_bytes: int

    def flops_s(self, flops: float) -> float:
        """Return the seconds of so many FLOPs in the model's own dtype, on one rank."""
        speed = self.speed
        peak = speed.fp32_tflops if self.dtype_bytes == 4 else speed.bf16_tflops
        return flops / (peak * speed.achieved * TERA * self.num_threads)

    def memory_s(self, num_bytes: float) -> float:
        """Return the seconds of reading or writing so many bytes of memory."""
        return num_bytes / (self.speed.memory_gb_s * GIGA * MEMORY_FRACTION)

    def uses_fp8_units(self, split: Split) -> bool:
        """Return whether FP8 weights are multiplied in FP8, with activations cast to FP8 too."""
        has_them = self.speed.fp8_tflops is not None
        return has_them and split.quantization == "fp8" and self.dtype_bytes == 2

    def products_s(
        self,
        product_flops: float,
        attention_flops: float,
        split: Split,
        *,
        num_weights: int,
        num_whole_weights: int = 0,
    ) -> float:
        """Return the seconds of the products of one forward pass, on each rank.

        Attention stays in the model's dtype, and so do `num_whole_weights`, the weights that no
        rank has only a part of.
        """
        num_ranks = split.tensor * split.sequence
        seconds = self.flops_s(product_flops)
        if self.uses_fp8_units(split):
            assert self.speed.fp8_tflops is not None
            seconds = product_flops / (self.speed.fp8_tflops * FP8_FRACTION * TERA)
        seconds = (seconds + self.flops_s(attention_flops)) / num_ranks
        own = num_weights / split.tensor
        read_s = self.memory_s(own * self.weight_bytes(split))
        read_s += self.memory_s(num_whole_weights * self.dtype_bytes)
        return max(seconds, read_s) + self.unpacking_s(own, split)

    def weight_bytes(self, split: Split) -> float:
        """Return the stored bytes of one number of a block's weights."""
        if split.quantization is None:
            return self.dtype_bytes
        return QUANTIZED_BYTES[split.quantization]

    def unpacking_s(self, num_weights: float, split: Split) -> float:
        """Return the seconds of writing weights out in the model's dtype and reading them again."""
        if split.quantization is None or self.uses_fp8_units(split):
            return 0.0
        return self.memory_s(num_weights * 2 * self.dtype_bytes)

    def exchanges_s(self, exchange: Exchange, split: Split) -> float:
        """Return the seconds of one forward's all-reduces (tensor) and all-to-alls (sequence)."""
        num_bytes = exchange.num_activations * self.dtype_bytes / split.sequence
        seconds = 0.0
        if split.tensor > 1:
            parts = 2 * (split.tensor - 1) / split.tensor
            seconds += self.sent_s(num_bytes * exchange.num_reduced * parts)
            seconds += exchange.num_reductions * self.speed.collective_s
        if split.sequence > 1:
            num_exchanges = EXCHANGES_PER_ATTENTION * exchange.num_attentions
            parts = (split.sequence - 1) / split.sequence / split.tensor
            seconds += self.sent_s(num_bytes * num_exchanges * parts)
            seconds += num_exchanges * self.speed.collective_s
        if split.tensor * split.sequence > 1:
            seconds += self.memory_s(num_bytes * exchange.num_passes)
        return seconds

    def sent_s(self, num_bytes: float) -> float:
        """Return the seconds in which one rank sends so many bytes over its link."""
        return num_bytes / (self.speed.link_gb_s * GIGA)

    def launched_s(self, seconds: float, num_blocks: int) -> float:
        """Add the host's launch time: on a processor it is added, on a GPU it overlaps."""
        host_s = num_blocks * self.speed.block_s
        return seconds + host_s if self.speed.is_host else max(seconds, host_s)


DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# To the host, the VAE's four resolutions and its middle are one block each.
NUM_VAE_BLOCKS = 5
# Most traffic has a few shapes. Any bound will do that keeps strange ones from filling memory.
NUM_REMEMBERED = 4096


@dataclass(frozen=True)
class ReplicaSpec:
    """How one replica of a tier is laid out, as far as prices depend on it.

    `card` names the kind of GPU, or is `cpu` for a processor, where each rank has `num_threads`.
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
        )

    @property
    def num_ranks(self) -> int:
        """The number of GPUs of a replica: the GPU seconds in one of its replica seconds."""
        return self.tensor * self.sequence


@dataclass(frozen=True)
class RequestShape:
    """The properties of a request that its price depends on.

    `references` has the pixels of each reference image, in the size in which the model takes it.
    `is_masked`: only a part of the first reference is generated. `num_previews` counts those of
    each image. `num_text`: the tokens of its padded prompt, or None for the tier's whole text
    length. Guidance is left out, because every tier is distilled and a step is one forward pass.
    Files are left out, because they are made while the ranks do something else.
    """

    tier: str
    width: int
    height: int
    num_steps: int
    references: tuple[int, ...] = ()
    num_images: int = 1
    is_masked: bool = False
    num_previews: int = 0
    num_text: int | None = None

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
        """Whether the masked image is encoded a second time, larger than as a reference."""
        return self.is_masked and self.pixels > tier_for(self.tier).max_reference_pixels

    @property
    def encoded_pixels(self) -> int:
        """The number of pixels that the VAE encodes, of all references and the masked image."""
        return sum(self.references) + (self.pixels if self.is_encoded_apart else 0)

    @property
    def num_tokens(self) -> int:
        """The number of tokens of text, image and references that each step computes."""
        tokens = (self.pixels + sum(self.references)) // TOKEN_SIDE**2
        return self.text_length + tokens


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
    """Return the shape of a request, its references scaled down to what the tier takes."""
    tier, sizes = tier_for(request.tier), request.reference_sizes
    return RequestShape(
        request.tier,
        request.width,
        request.height,
        request.num_steps_made,
        tuple(tier.pixels_added_by(*size, is_alone=len(sizes) == 1) for size in sizes),
        request.num_images,
        is_masked=request.mask is not None,
        num_previews=len(request.preview_steps),
        num_text=None if tier.text_multiple is None else tier.text_tokens(request.prompt),
    )


@lru_cache(NUM_REMEMBERED)
def price(work: RequestShape, layout: ReplicaSpec) -> Cost:
    """Return the replica seconds of a request on a replica that has nothing else to do."""
    roofline = roofline_of(layout)
    return Cost(
        encode_s=sum(encode_parts_s(work, layout)) + edit_s(work, roofline),
        denoise_s=step_s(work, layout, roofline) * work.num_steps * work.num_images,
        decode_s=image_s(work, roofline) * work.num_decoded,
    )


def roofline_of(layout: ReplicaSpec) -> Roofline:
    """Return the roofline of one rank of this layout."""
    return Roofline(speed_for(layout.card), layout.num_threads, DTYPE_BYTES[layout.dtype])


def encode_parts_s(work: RequestShape, layout: ReplicaSpec) -> tuple[float, float]:
    """Return the seconds of encoding the prompt, and of the references with the images' noise."""
    roofline = roofline_of(layout)
    return prompt_s(work, layout, roofline), references_s(work, roofline)


def step_s(work: RequestShape, layout: ReplicaSpec, roofline: Roofline) -> float:
    """Return the seconds of one denoising step of one image."""
    model = WORKLOADS[work.tier].transformer
    split = Split(layout.tensor, layout.sequence, layout.quantization)
    seconds = roofline.products_s(
        model.product_flops(work.num_tokens),
        model.attention_flops(work.num_tokens),
        split,
        num_weights=model.num_block_weights,
        num_whole_weights=model.num_other_weights,
    )
    # In a double block text and image have outputs of attention and MLP each, half as large.
    exchange = Exchange(
        num_activations=work.num_tokens * model.width,
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
    return roofline.launched_s(seconds + roofline.exchanges_s(exchange, split), model.num_layers)


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
    if not work.is_encoded_apart:
        return 0.0
    flops = WORKLOADS[work.tier].vae.edit_flops(work.width, work.height)
    return roofline.launched_s(roofline.flops_s(flops), NUM_VAE_BLOCKS)


def image_s(work: RequestShape, roofline: Roofline) -> float:
    """Return the seconds of decoding one image in the VAE, on one rank."""
    flops = WORKLOADS[work.tier].vae.decode_flops(work.width, work.height)
    return roofline.launched_s(roofline.flops_s(flops), NUM_VAE_BLOCKS)
