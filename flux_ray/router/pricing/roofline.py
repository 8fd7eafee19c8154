"""Seconds of products and of exchanges on one kind of card: the formulas of the cost model.

A product takes as long as its FLOPs, at the fraction of the peak that is reached, or as its weights
on their way from memory. What is assumed is said at each constant.
"""

from dataclasses import dataclass

from flux_ray.catalog.gpus import Speed
from flux_ray.config.tier import Quantization

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
