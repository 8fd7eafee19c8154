"""The memory figures that were published for these models, beside ours, and why they differ."""

from dataclasses import dataclass, replace

from flux_ray.config.tier import Parallel
from flux_ray.planner.activations import default_demand
from flux_ray.planner.architectures import DEV_TRANSFORMER, KLEIN_4B_TRANSFORMER, Shape
from flux_ray.planner.candidate import Candidate

GB = 10**9
# Mistral-Small-3.2-24B whole, with its eyes, in FP8: the layers' linears 1 byte, the rest 2.
WHOLE_ENCODER_FP8_BYTES = 25_790_000_000


@dataclass(frozen=True)
class PublishedFigure:
    """A published figure, ours for one card that holds it all, and the difference in words."""

    published: str
    our_bytes: int
    why: str


def claims_for(candidate: Candidate) -> tuple[PublishedFigure, ...]:
    """What was published of the tier's model; nothing of one that has other shapes."""
    if candidate.tier.name == "flux-2-dev" and has_shape(candidate, DEV_TRANSFORMER):
        return (full(candidate), fp8(candidate))
    if candidate.tier.name == "flux-2-klein-4b" and has_shape(candidate, KLEIN_4B_TRANSFORMER):
        return (klein(candidate),)
    return ()


def has_shape(candidate: Candidate, shape: Shape) -> bool:
    """Whether the transformer is the published one."""
    config = candidate.model.transformer.config
    return all(config[name] == value for name, value in shape.items())


def full(candidate: Candidate) -> PublishedFigure:
    """ "90 GB full"."""
    whole = on_one_card(candidate, None)
    transformer, vae = whole.transformer_bytes(), whole.rank(default_demand(whole.tier)).vae
    encoder = whole.encoder_bytes(1)
    mixed = transformer + WHOLE_ENCODER_FP8_BYTES + vae
    return PublishedFigure(
        "90 GB full",
        transformer + encoder + vae,
        f"{mixed / GB:.1f} = bf16 transformer {transformer / GB:.1f} + all of the 24B encoder in"
        f" FP8 {WHOLE_ENCODER_FP8_BYTES / GB:.1f} + VAE {vae / GB:.1f}; ours, weights too, has"
        f" 30 of its 40 layers in bf16, {encoder / GB:.1f}",
    )


def fp8(candidate: Candidate) -> PublishedFigure:
    """ "about 54 GB FP8"."""
    footprint = on_one_card(candidate, "fp8").rank(default_demand(candidate.tier))
    weights = footprint.transformer + footprint.text_encoder + footprint.vae
    return PublishedFigure(
        "about 54 GB FP8",
        footprint.total,
        f"weights {weights / GB:.1f}, of the encoder 30 layers, + about 3 to run, as we read it;"
        " ours is at 1024x1024 on one card",
    )


def klein(candidate: Candidate) -> PublishedFigure:
    """ "about 8 GB klein 4B"."""
    footprint = on_one_card(candidate, None).rank(default_demand(candidate.tier))
    return PublishedFigure(
        "about 8 GB klein 4B",
        footprint.total,
        f"that is the bf16 transformer alone, {footprint.transformer / GB:.2f}; drawing 1024x1024"
        f" takes the encoder's {footprint.text_encoder / GB:.1f}, VAE, activations and CUDA too",
    )


def on_one_card(candidate: Candidate, precision: str | None) -> Candidate:
    """The same model, unsplit, in bf16 or with its linears in `precision`."""
    update = {
        "dtype": "bfloat16",
        "parallel": Parallel(),
        "text_encoder": "colocated",
        "quantization": precision,
        "encoder_quantization": precision,
    }
    return replace(candidate, args=candidate.args.model_copy(update=update))
