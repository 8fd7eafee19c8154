"""The price of a request before anything was measured: a roofline over what its stages take.

The model and its constants are those of the project's fact sheet on parallelism: products at a
fraction of the card's peak, or the weights' way from memory where that is longer; collectives at
the speed of the link. `calibration` corrects it by what replicas measure.

Seconds of products and of exchanges on one kind of card: the formulas of the cost model.

A product takes as long as its FLOPs, at the fraction of the peak that is reached, or as its weights
on their way from memory. What is assumed is said at each constant.
"""

from dataclasses import dataclass
from functools import lru_cache

from flux_ray.catalog.flops import TOKEN_SIDE, WORKLOADS, reference_pixels
from flux_ray.catalog.gpus import PROCESSOR, Speed, speed_for
from flux_ray.catalog.tiers import tier_for
from flux_ray.config.tier import Quantization, TierArgs
from flux_ray.request import ImageRequest

TERA = 1e12
GIGA = 1e9
# Of its data sheet's bandwidth, what plain reads and writes reach.
MEMORY_FRACTION = 0.8
# FP8 products reach less of a peak that is twice as high.
FP8_FRACTION = 0.5
# Bytes a number as stored; NF4 has a scale of four for every 64.
QUANTIZED_BYTES: dict[Quantization, float] = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5625}
# Query, key, value and answer. Ours sends the first three in one piece, with as many bytes.
EXCHANGES_PER_ATTENTION = 4


@dataclass(frozen=True)
class Split:
    """A model's weights over `tensor` ranks, its tokens over `sequence`."""

    tensor: int
    sequence: int
    quantization: Quantization | None


@dataclass(frozen=True)
class Exchange:
    """What ranks tell each other in one forward: numbers of [tokens, width] that they sum up, and
    of attentions before and after which tokens are exchanged for heads.

    `num_passes` are such numbers read or written between products. On one card they are part of
    the fraction of its peak that was measured; on several they are counted.
    """

    num_activations: int
    num_reduced: int
    num_reductions: int
    num_attentions: int = 0
    num_passes: int = 0


@dataclass(frozen=True)
class Roofline:
    """One rank: a card, or `num_threads` of a processor, with numbers of `dtype_bytes`."""

    speed: Speed
    num_threads: int
    dtype_bytes: int

    def flops_s(self, flops: float) -> float:
        """Of products in the model's own dtype, on one rank."""
        speed = self.speed
        peak = speed.fp32_tflops if self.dtype_bytes == 4 else speed.bf16_tflops
        return flops / (peak * speed.achieved * TERA * self.num_threads)

    def memory_s(self, num_bytes: float) -> float:
        """Of reading or writing."""
        return num_bytes / (self.speed.memory_gb_s * GIGA * MEMORY_FRACTION)

    def uses_fp8_units(self, split: Split) -> bool:
        """Whether FP8 weights are multiplied as they are, by activations made FP8 too."""
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
        """One forward's products; attention stays in the model's dtype, as do whole weights."""
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
        """Of one number of a block's weights."""
        if split.quantization is None:
            return self.dtype_bytes
        return QUANTIZED_BYTES[split.quantization]

    def unpacking_s(self, num_weights: float, split: Split) -> float:
        """Writing quantized weights out in the model's dtype, and reading those for the product."""
        if split.quantization is None or self.uses_fp8_units(split):
            return 0.0
        return self.memory_s(num_weights * 2 * self.dtype_bytes)

    def exchanges_s(self, exchange: Exchange, split: Split) -> float:
        """One forward's all-reduces over tensor ranks and all-to-alls over sequence ranks."""
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
        """What one rank sends in collectives."""
        return num_bytes / (self.speed.link_gb_s * GIGA)

    def launched_s(self, seconds: float, num_blocks: int) -> float:
        """With the host's part: in turn with the work on a processor, meanwhile on a card."""
        host_s = num_blocks * self.speed.block_s
        return seconds + host_s if self.speed.is_host else max(seconds, host_s)


DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# The VAE's four resolutions and the middle are blocks to the host.
NUM_VAE_BLOCKS = 5
# Any bound will do: requests of a few shapes are most of the traffic.
NUM_REMEMBERED = 4096


@dataclass(frozen=True)
class ReplicaSpec:
    """How one replica of a tier is laid out; `card` is `cpu` for this machine's processor.

    Ranks on a processor have `num_threads` each.
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
        """Of a tier's args on cards of that name; ValueError names the cards there are."""
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
        """The cards that a second of this replica occupies."""
        return self.tensor * self.sequence


@dataclass(frozen=True)
class RequestShape:
    """What of a request makes it long; `references` are pixels of each, as the model takes it.

    `is_masked`: a part of an image is drawn, the first reference. `num_previews` is of each
    image. Guidance is no part of it: every tier is distilled, and a step is one forward. Nor are
    files: they are made while the replica does something else.
    """

    tier: str
    width: int
    height: int
    num_steps: int
    references: tuple[int, ...] = ()
    num_images: int = 1
    is_masked: bool = False
    num_previews: int = 0

    @property
    def num_decoded(self) -> int:
        """How many times an image is decoded."""
        return self.num_images * (1 + self.num_previews)

    @property
    def pixels(self) -> int:
        """Of one image."""
        return self.width * self.height

    @property
    def is_encoded_apart(self) -> bool:
        """Whether the image under a mask is larger than the reference that is made of it."""
        return self.is_masked and self.pixels > tier_for(self.tier).max_reference_pixels

    @property
    def encoded_pixels(self) -> int:
        """Of all that the VAE encodes."""
        return sum(self.references) + (self.pixels if self.is_encoded_apart else 0)

    @property
    def num_tokens(self) -> int:
        """Of text, image and references: what each step computes."""
        tokens = (self.pixels + sum(self.references)) // TOKEN_SIDE**2
        return tier_for(self.tier).text_length + tokens


@dataclass(frozen=True)
class Cost:
    """Seconds of one replica, by stage, for all steps and images of a request."""

    encode_s: float
    denoise_s: float
    decode_s: float

    @property
    def total_s(self) -> float:
        """From the prompt to the last pixel."""
        return self.encode_s + self.denoise_s + self.decode_s


def work_of(request: ImageRequest) -> RequestShape:
    """The work that a request makes for its tier."""
    limit = tier_for(request.tier).max_reference_pixels
    return RequestShape(
        request.tier,
        request.width,
        request.height,
        request.num_steps,
        tuple(reference_pixels(*size, limit) for size in request.reference_sizes),
        request.num_images,
        is_masked=request.mask is not None,
        num_previews=len(request.preview_steps),
    )


@lru_cache(NUM_REMEMBERED)
def price(work: RequestShape, layout: ReplicaSpec) -> Cost:
    """The seconds of a request on one replica that has nothing else to do."""
    roofline = roofline_of(layout)
    return Cost(
        encode_s=sum(encode_parts_s(work, layout)) + edit_s(work, roofline),
        denoise_s=step_s(work, layout, roofline) * work.num_steps * work.num_images,
        decode_s=image_s(work, roofline) * work.num_decoded,
    )


def roofline_of(layout: ReplicaSpec) -> Roofline:
    """Of one of its cards."""
    return Roofline(speed_for(layout.card), layout.num_threads, DTYPE_BYTES[layout.dtype])


def encode_parts_s(work: RequestShape, layout: ReplicaSpec) -> tuple[float, float]:
    """The prompt, and the references with the images' noise."""
    roofline = roofline_of(layout)
    return prompt_s(work, layout, roofline), references_s(work, roofline)


def step_s(work: RequestShape, layout: ReplicaSpec, roofline: Roofline) -> float:
    """One denoise step of one image."""
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
    """The prompt in the text encoder, wherever that is."""
    model, length = WORKLOADS[work.tier].text_encoder, tier_for(work.tier).text_length
    split = Split(encoder_ranks(layout, model.num_heads), 1, layout.encoder_quantization)
    seconds = roofline.products_s(
        model.product_flops(length),
        model.attention_flops,
        split,
        num_weights=model.num_block_weights,
    )
    num_outputs = 2 * model.num_layers
    exchange = Exchange(length * model.width, num_outputs, num_outputs)
    return roofline.launched_s(seconds + roofline.exchanges_s(exchange, split), model.num_layers)


def encoder_ranks(layout: ReplicaSpec, num_heads: int) -> int:
    """Over how many ranks the text encoder is split, as its loader decides."""
    if layout.is_encoder_shared:
        return 1
    is_whole = layout.encoder_quantization == "nf4" or num_heads % layout.num_ranks
    return layout.tensor if is_whole else layout.num_ranks


def references_s(work: RequestShape, roofline: Roofline) -> float:
    """The references in the VAE, one by one on every rank, and each image's noise."""
    vae = WORKLOADS[work.tier].vae
    each = (
        roofline.launched_s(roofline.flops_s(vae.encode_flops(pixels)), NUM_VAE_BLOCKS)
        for pixels in work.references
    )
    return sum(each) + work.num_images * roofline.speed.block_s


def edit_s(work: RequestShape, roofline: Roofline) -> float:
    """The image under a mask in the VAE, where it is no reference as it is."""
    if not work.is_encoded_apart:
        return 0.0
    flops = WORKLOADS[work.tier].vae.edit_flops(work.width, work.height)
    return roofline.launched_s(roofline.flops_s(flops), NUM_VAE_BLOCKS)


def image_s(work: RequestShape, roofline: Roofline) -> float:
    """One image through the VAE on one rank."""
    flops = WORKLOADS[work.tier].vae.decode_flops(work.width, work.height)
    return roofline.launched_s(roofline.flops_s(flops), NUM_VAE_BLOCKS)
