"""How long one rank takes: for products, reading weights, and what ranks exchange.

A matrix product takes as long as its FLOPs at the reached fraction of the GPU's peak, or as
reading its weights from memory, whichever is longer. Collectives take the time that the link
needs for their bytes. Each constant says what it assumes.
"""

from dataclasses import dataclass

from flux_ray.catalog import Speed
from flux_ray.config import Quantization

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
