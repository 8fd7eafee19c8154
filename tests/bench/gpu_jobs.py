"""Measure loaded models: whole images of klein-4b, and single steps of dev's ranks."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_ray.config.tier import Parallel, Quantization
from flux_ray.engine.flux2.pipeline import Flux2
from flux_ray.planner.candidate import Candidate, default_demand
from tests.bench.gpu_checkpoints import Skipped, save_klein
from tests.bench.gpu_gauges import Call, Device, fp8_products
from tests.bench.gpu_models import (
    PROMPT,
    Scale,
    Subject,
    generate,
    load_dev,
    load_klein,
    random_prompt,
    start,
)
from tests.engine.allocations import alone

PRECISIONS: dict[str, Quantization | None] = {"bf16": None, "fp8": "fp8"}
TENSOR_DEGREES = (1, 2, 4, 8)
Figures = dict[str, Any]


@dataclass
class Bench:
    """One run of the bench: its device, its models, and the folder for checkpoints.

    `velocities`: outputs of the transformers in bf16, to compare those in FP8 with.
    """

    device: Device
    scale: Scale
    folder: Path
    velocities: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def klein_folder(self) -> Path:
        """Return the folder of klein's checkpoint, which is written when it is first needed."""
        folder = self.folder / "klein"
        options = {"device": self.device.kind, "max_bytes": self.scale.max_file_bytes}
        save_klein(self.scale.klein.empty, folder, **options)
        return folder


def attempt(name: str, measure: Callable[[], Figures]) -> Figures:
    """Return the figures, or why there are none: a failure must not end the other measurements."""
    print(f"{name} ...", flush=True)
    try:
        return measure()
    except Skipped as skipped:
        return {"skipped": str(skipped)}
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def klein_job(bench: Bench) -> Figures:
    """Measure whole images of klein in each precision."""
    figures, klein = {}, bench.scale.klein
    for name, quantization in PRECISIONS.items():
        candidate = klein.candidate(
            bench.device, quantization=quantization, encoder_quantization=quantization
        )
        load = partial(load_klein_of, bench, quantization)
        measure = partial(measure_stages, bench, klein, candidate, load)
        figures[name] = attempt(f"klein-4b {name}", measure)
    return figures


def load_klein_of(bench: Bench, quantization: Quantization | None) -> Flux2:
    """Load klein from the bench's own files."""
    return load_klein(bench.scale.klein, bench.klein_folder, quantization, bench.device)


def dev_job(bench: Bench) -> Figures:
    """Measure a step of dev on rank 0 of 1, 2, 4 and 8, in each precision.

    The text encoder is not loaded, as if it were elsewhere.
    """
    figures, dev = {}, bench.scale.dev
    for tensor in TENSOR_DEGREES:
        for precision, quantization in PRECISIONS.items():
            candidate = dev.candidate(
                bench.device,
                parallel=Parallel(tensor=tensor),
                quantization=quantization,
                text_encoder="shared",
            )
            load = partial(load_dev, dev, tensor, quantization, bench.device)
            measure = partial(measure_stages, bench, dev, candidate, load)
            name = f"tp{tensor}.{precision}"
            with alone():
                figures[name] = attempt(f"dev {name}", measure)
    return figures


def check_card(bench: Bench, candidate: Candidate) -> None:
    """Raise Skipped if the plan says that the GPU is too small for an image of default size."""
    needed = candidate.rank(default_demand(candidate.tier)).total
    total = bench.device.total_bytes()
    if total is not None and needed > total:
        raise Skipped(f"it takes {needed / 1e9:.1f} GB, and the card has {total / 1e9:.1f}")


def stages_of(bench: Bench, subject: Subject, adapter: Flux2) -> dict[str, Call]:
    """Return the calls to measure: a step if there is no text encoder, else a whole image too."""
    state = start(adapter, subject, random_prompt(subject, bench.device))
    stages: dict[str, Call] = {"step": lambda: adapter.denoise(state)}
    if adapter.prompts is None:
        return stages
    done = state
    while not done.is_done:
        done = adapter.denoise(done)
    return {
        "image": lambda: generate(adapter, subject),
        "encode": lambda: adapter.encode_prompt(PROMPT),
        **stages,
        "decode": lambda: adapter.decode(done),
    }


def measure_stages(
    bench: Bench, subject: Subject, candidate: Candidate, load: Callable[[], Flux2]
) -> Figures:
    """Measure an adapter's stages: seconds, bytes beside the planned ones, and FP8 products."""
    check_card(bench, candidate)
    device = bench.device
    device.clear()
    before = device.held_bytes()
    adapter, load_peak = device.peak(load)
    weights = None if before is None else device.held_bytes() - before
    stages = stages_of(bench, subject, adapter)
    num_rounds = bench.scale.num_rounds
    seconds = {name: device.seconds(stage, num_rounds) for name, stage in stages.items()}
    peaks = {name: device.peak(stage)[1] for name, stage in stages.items()}
    return {
        "seconds": seconds,
        "bytes": beside_plan(candidate, peaks | {"weights": weights}),
        "load_peak_bytes": load_peak,
        **quality_of(bench, subject, candidate, adapter),
        "fp8": products_of(candidate, adapter, stages),
    }


def beside_plan(candidate: Candidate, measured: dict[str, int | None]) -> Figures:
    """Return the measured bytes with those that a plan counts for the same."""
    if "image" in measured:
        parts = measured["weights"], measured["image"]
        measured["whole"] = None if None in parts else sum(parts)
    demand = default_demand(candidate.tier)
    footprint = candidate.rank(demand)
    weights = footprint.transformer + footprint.text_encoder + footprint.vae
    planned = {
        "weights": weights,
        "image": footprint.activations,
        "whole": weights + footprint.activations,
        "encode": candidate.prompt_peak(1),
        "step": candidate.denoise_peak(demand),
        "decode": candidate.vae_peak(demand),
    }
    return {
        name: {"measured": num_bytes, "planned": planned[name]}
        for name, num_bytes in measured.items()
    }


def products_of(candidate: Candidate, adapter: Flux2, stages: dict[str, Call]) -> Figures:
    """Return how many FP8 weights are multiplied as they are, without conversion."""
    parts = {}
    if candidate.args.quantization == "fp8":
        parts["step"] = fp8_products(stages["step"], adapter.pipeline.transformer)
    if candidate.args.encoder_quantization == "fp8" and adapter.prompts is not None:
        parts["encode"] = fp8_products(stages["encode"], adapter.prompts.pipeline.text_encoder)
    return parts


@torch.inference_mode()
def quality_of(bench: Bench, subject: Subject, candidate: Candidate, adapter: Flux2) -> Figures:
    """Return whether the transformer's output is finite, and how far it is from that in bf16."""
    state = start(adapter, subject, random_prompt(subject, bench.device))
    velocity = adapter.velocity(state).float().cpu()
    is_finite = bool(velocity.isfinite().all())
    key = f"{subject.tier.name} {candidate.args.parallel.tensor}"
    error = None
    if candidate.args.quantization is None:
        bench.velocities[key] = velocity
    elif key in bench.velocities and is_finite:
        plain = bench.velocities[key]
        error = float((velocity - plain).norm() / plain.norm())
    return {"is_finite": is_finite, "error_to_bf16": error}
