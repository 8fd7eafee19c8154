"""Count the bytes of each GPU for a tier that is placed in one way on GPUs of one kind.

Weights are exact, because the loader plans them with the same code. Activations are estimated, and
what CUDA and NCCL take is assumed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flux_ray.catalog import MAX_WHOLE_PIXELS, Gpu, Tier
from flux_ray.config import Quantization, TierArgs, check_heads
from flux_ray.engine.api import DTYPES, EmptyModel, Forward
from flux_ray.engine.loading import encoder_axis
from flux_ray.parallel.checkpoint import shards_for
from flux_ray.parallel.load import plan_storage, saved_tensors
from flux_ray.parallel.mesh import Axis, Mesh
from flux_ray.parallel.precision import check_quantization, is_quantized

# Bytes that a product allocates for each number of a quantized weight that has to be unpacked
# first. torchao unpacks FP8 through fp32, the others directly into a dtype of two bytes.
UNPACKED_BYTES = {"fp8": 10, "int8": 2, "nf4": 2}
# CUDA's context, its libraries and their workspaces; and NCCL's buffers for each set of ranks.
# Both are assumed: together 1.5 GB for a tensor-parallel rank.
RUNTIME_BYTES = 800_000_000
COMMUNICATOR_BYTES = 700_000_000
# How much more a stage of the VAE takes on a GPU than its modules allocate: in bf16, convolutions
# copy their inputs and outputs to channels last. Decoding 1 MP with klein-4b took 2.553 GB on an
# H100 where the modules allocate 1.611, a factor of 1.585. Encoding is assumed to be the same.
CARD_CONVOLUTIONS = 1.6


@dataclass(frozen=True)
class ActivationDemand:
    """The size of a request: the pixels of an image, and the number of reference images.

    `encodes_image`: the VAE also encodes an image of that size, to edit or to follow it.
    """

    pixels: int
    num_references: int
    encodes_image: bool = False


def largest_demand(tier: Tier) -> ActivationDemand:
    """Return the largest request that the tier allows."""
    encodes_image = tier.takes_mask or tier.takes_control
    return ActivationDemand(tier.max_pixels, tier.max_references, encodes_image)


def default_demand(tier: Tier) -> ActivationDemand:
    """Return the request of a client that names no size: the default one, without references.

    It has an image only on a tier that cannot work without one.
    """
    needs_image = tier.requires_mask or tier.takes_control
    return ActivationDemand(tier.default_side**2, int(tier.requires_mask), needs_image)


@dataclass(frozen=True)
class Footprint:
    """The bytes that one GPU has to hold, by component."""

    transformer: int = 0
    text_encoder: int = 0
    vae: int = 0
    activations: int = 0
    communication: int = 0
    runtime: int = 0

    @property
    def total(self) -> int:
        """Return the sum of all components, which must be usable on the GPU."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Candidate:
    """A tier placed as its args say on GPUs of one kind; `card` is None for CPUs.

    The planner makes one for each placement that it tries, all with the same `model`. Its methods
    return bytes; `demand` is the request to count for.
    """

    model: EmptyModel
    tier: Tier
    args: TierArgs
    card: Gpu | None

    def check(self) -> None:
        """Raise ValueError, with the setting's name, if the loader would refuse the args."""
        parallel, config = self.args.parallel, self.model.transformer.config
        check_heads(config.num_attention_heads, parallel.tensor, parallel.sequence)
        for quantization, num_ranks in (
            (self.args.quantization, parallel.tensor),
            (self.args.encoder_quantization, self.num_encoder_ranks()),
        ):
            # A single rank can do every quantization. The check would also ask whether bitsandbytes
            # is installed, and it need not be where the plan is made.
            if num_ranks > 1:
                check_quantization(quantization, Axis(0, num_ranks))

    def rank(self, demand: ActivationDemand) -> Footprint:
        """Return the footprint of one rank; all ranks of a replica need the same.

        Stages take turns on a GPU, so of their peaks only the highest counts. Raise ValueError if
        the loader would refuse the args.
        """
        self.check()
        text_encoder = prompt = 0
        if self.args.text_encoder == "colocated":
            text_encoder = self.encoder_bytes(self.num_encoder_ranks())
            prompt = self.prompt_peak(self.num_encoder_ranks())
        kept = self.model.kept_bytes(self.forward_of(demand))
        peak = max(self.denoise_peak(demand), self.vae_peak(demand) + kept, prompt)
        return Footprint(
            transformer=self.transformer_bytes(),
            text_encoder=text_encoder,
            vae=weight_bytes(self.model.vae, {}, Axis(), self.dtype),
            activations=peak + self.held(demand),
            communication=self.num_communicators() * COMMUNICATOR_BYTES,
            runtime=0 if self.card is None else RUNTIME_BYTES,
        )

    def shared_encoder(self) -> Footprint:
        """Return the footprint of a text encoder that all replicas of the tier share."""
        return Footprint(
            text_encoder=self.encoder_bytes(1),
            activations=self.prompt_peak(1),
            runtime=0 if self.card is None else RUNTIME_BYTES,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Return the torch dtype of activations, and of weights that are not quantized."""
        return DTYPES[self.args.dtype]

    def transformer_bytes(self) -> int:
        """Return the bytes of a rank's part of the transformer."""
        module, axis = self.model.transformer, Axis(0, self.args.parallel.tensor)
        return weight_bytes(module, module._tp_plan, axis, self.dtype, self.args.quantization)

    def num_parameters(self) -> tuple[int, int]:
        """Return the parameters of the transformer: all, and those that tensor ranks do not share.

        Each tensor rank has the latter whole, however many ranks there are.
        """
        module = self.model.transformer
        sizes = {name: tensor.numel() for name, tensor in saved_tensors(module)}
        shared = shards_for(module, module._tp_plan, 2)
        return sum(sizes.values()), sum(sizes[name] for name in sizes.keys() - shared.keys())

    def encoder_bytes(self, num_ranks: int) -> int:
        """Return the bytes of the text encoders on each of `num_ranks` ranks that split the first.

        A second one is whole on each of them.
        """
        module, plan = self.model.text_encoder, self.model.text_model.plan
        quantization = self.args.encoder_quantization
        num_bytes = weight_bytes(module, plan, Axis(0, num_ranks), self.dtype, quantization)
        if (whole := self.model.whole_text_encoder) is not None:
            num_bytes += weight_bytes(whole, {}, Axis(), self.dtype)
        return num_bytes

    def num_encoder_ranks(self) -> int:
        """Return how many ranks of the replica split its text encoder, chosen as the loader does.

        A shared text encoder is always whole, on a GPU of its own.
        """
        if self.args.text_encoder == "shared":
            return 1
        parallel = self.args.parallel
        mesh = Mesh(
            world=Axis(0, parallel.num_ranks),
            tensor=Axis(0, parallel.tensor),
            sequence=Axis(0, parallel.sequence),
        )
        heads, quantization = self.model.text_model.num_heads, self.args.encoder_quantization
        return encoder_axis(heads, mesh, quantization).size

    def num_communicators(self) -> int:
        """Return how many NCCL communicators a rank has, as each allocates buffers.

        There is one for each axis with several ranks. If both axes have, and the text encoder is
        split over all ranks, there is one more for these.
        """
        parallel = self.args.parallel
        sets = {"tensor": parallel.tensor, "sequence": parallel.sequence}
        num_sets = sum(size > 1 for size in sets.values())
        shares_prompts = parallel.tensor < self.num_encoder_ranks() == parallel.num_ranks
        if num_sets == 2 and shares_prompts:
            num_sets = 3
        return 0 if self.card is None else num_sets

    def num_image_tokens(self, demand: ActivationDemand) -> int:
        """Return the tokens of the image and its references, each at the tier's maximum."""
        return self.model.num_tokens(demand.pixels) + self.num_reference_tokens(demand)

    def num_reference_tokens(self, demand: ActivationDemand) -> int:
        """Return the tokens of the references alone."""
        return self.model.num_tokens(demand.num_references * self.tier.added_pixels)

    def denoise_peak(self, demand: ActivationDemand) -> int:
        """Return the peak bytes of one denoise step; the images of a replica step one at a time."""
        quantization, axis = self.args.quantization, Axis(0, self.args.parallel.tensor)
        module = self.model.transformer
        unpacked = self.unpacked(module, module._tp_plan, axis, quantization)
        return self.model.denoise_bytes(self.forward_of(demand)) + unpacked

    def forward_of(self, demand: ActivationDemand) -> Forward:
        """Return the forward of one denoise step."""
        return Forward(
            num_text=self.tier.text_length,
            num_image=self.num_image_tokens(demand),
            parallel=self.args.parallel,
            size=self.dtype.itemsize,
            quantizes_activations=self.uses_fp8_units(self.args.quantization),
            num_reference=self.num_reference_tokens(demand),
        )

    def uses_fp8_units(self, quantization: Quantization | None) -> bool:
        """Return whether products are computed on FP8 units, so that weights are not unpacked."""
        has_them = self.card is not None and self.card.has_fp8_units
        return has_them and quantization == "fp8" and self.dtype == torch.bfloat16

    def unpacked(
        self,
        module: nn.Module,
        plan: Mapping[str, Any],
        axis: Axis,
        quantization: Quantization | None,
    ) -> int:
        """Return the bytes for unpacking the largest weight of a module, 0 on FP8 units."""
        if self.uses_fp8_units(quantization):
            return 0
        return unpacked_bytes(module, plan, axis, quantization)

    def vae_peak(self, demand: ActivationDemand) -> int:
        """Return the peak bytes of the VAE: decoding the image, encoding it or a reference.

        Encoding an image takes no more than a tile of 1 MP.
        """
        size = self.dtype.itemsize
        pixels = self.tier.added_pixels if demand.num_references else 0
        if demand.encodes_image:
            pixels = max(pixels, min(demand.pixels, MAX_WHOLE_PIXELS))
        decode = self.model.decode_bytes(demand.pixels, size)
        peak = max(decode, self.model.encode_bytes(pixels, size))
        return peak if self.card is None else int(peak * CARD_CONVOLUTIONS)

    def prompt_peak(self, num_ranks: int) -> int:
        """Return the peak bytes of encoding one prompt, if `num_ranks` split the text encoder."""
        module, quantization = self.model.text_encoder, self.args.encoder_quantization
        plan, length, size = self.model.text_model.plan, self.tier.text_length, self.dtype.itemsize
        peak = self.model.prompt_bytes(
            length,
            num_ranks,
            size,
            quantizes_activations=self.uses_fp8_units(quantization),
        )
        return peak + self.unpacked(module, plan, Axis(0, num_ranks), quantization)

    def held(self, demand: ActivationDemand) -> int:
        """Return the bytes of all requests between their steps, and of the encoding cache."""
        # With guidance by a second forward, the prompt to steer away from is as long.
        num_prompts = 2 if self.tier.takes_negative or self.tier.true_cfg_scale > 1 else 1
        each = self.model.held_bytes(
            num_prompts * self.tier.text_length,
            self.num_image_tokens(demand),
            self.dtype.itemsize,
        )
        return self.args.max_ongoing_requests * each + self.args.cache_bytes


def weight_bytes(
    module: nn.Module,
    plan: Mapping[str, Any],
    axis: Axis,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
) -> int:
    """Return the bytes of a rank's part of a module, exactly as the loader will check them.

    `module` may be on the meta device; of `axis` only the size matters.
    """
    shards = shards_for(module, plan, axis.size)
    stored = plan_storage(module, shards, axis, dtype, quantization)
    return sum(tensor.num_bytes for tensor in stored.values())


def unpacked_bytes(
    module: nn.Module, plan: Mapping[str, Any], axis: Axis, quantization: Quantization | None
) -> int:
    """Return the bytes that unpacking takes in the product with the largest quantized weight.

    Weights are unpacked one at a time, so that only the largest counts.
    """
    if quantization is None:
        return 0
    shards = shards_for(module, plan, axis.size)
    sizes = (
        tensor.numel() // (axis.size if name in shards else 1)
        for name, tensor in saved_tensors(module)
        if is_quantized(name)
    )
    return max(sizes) * UNPACKED_BYTES[quantization]
