"""Measure the seconds in which our loader brings weights to the device, from disk and from memory.

The files are random and as large as the real ones; dev has as many single blocks as the disk has
room for. Where a model is split, one rank reads its slices, and the other ranks are not there.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import Flux2Transformer2DModel
from torch import nn

from flux_ray.config.tier import Quantization
from flux_ray.parallel.checkpoint import Checkpoint
from flux_ray.parallel.load import LoadSpec, load_sharded
from flux_ray.parallel.mesh import Axis
from tests.bench.gpu_checkpoints import (
    TEXT_PREFIX,
    Skipped,
    file_bytes,
    forget,
    free_bytes,
    save_transformer,
)
from tests.bench.gpu_jobs import PRECISIONS, Bench, Figures, attempt
from tests.bench.gpu_models import BF16, Subject
from tests.engine.allocations import alone


@dataclass(frozen=True)
class Part:
    """The files of a component, and how a rank makes its module from them."""

    folder: Path
    build: Callable[[], nn.Module]
    plan: Mapping[str, Any]
    prefix: str = ""
    note: str = ""


def transformer_in(folder: Path, subject: Subject, note: str = "") -> Part:
    """Return the part for a transformer in that folder."""
    model_class = Flux2Transformer2DModel

    def build() -> nn.Module:
        return model_class.from_config(dict(subject.transformer))

    return Part(folder / "transformer", build, model_class._tp_plan, note=note)


def klein_transformer(bench: Bench) -> Part:
    """Return klein's transformer, in the folder of the whole pipeline."""
    return transformer_in(bench.klein_folder, bench.scale.klein)


def klein_text_encoder(bench: Bench) -> Part:
    """Return klein's text encoder, in the folder of the whole pipeline."""
    text_model = bench.scale.klein.empty.text_model
    folder = bench.klein_folder / "text_encoder"
    return Part(folder, text_model.build, text_model.plan, prefix=TEXT_PREFIX)


def dev_transformer(bench: Bench) -> Part:
    """Return as much of dev's transformer as the disk has room for; it is written once."""
    folder = bench.folder / "dev"
    if not folder.exists():
        # klein's measurements are done by now, and dev needs the room.
        shutil.rmtree(bench.folder / "klein", ignore_errors=True)
        dev = dev_that_fits(bench.scale.dev, bench.folder)
        options = {"device": bench.device.kind, "max_bytes": bench.scale.max_file_bytes}
        save_transformer(dev.empty, folder, **options)
    config = Flux2Transformer2DModel.load_config(folder / "transformer")
    num_blocks, all_blocks = (
        shape["num_single_layers"] for shape in (config, bench.scale.dev.transformer)
    )
    note = "" if num_blocks == all_blocks else f"{num_blocks} of {all_blocks} single blocks"
    return transformer_in(folder, bench.scale.dev.shallower(num_blocks), note)


def dev_that_fits(dev: Subject, folder: Path) -> Subject:
    """Return dev with as many single blocks as fit on the disk; raise Skipped if none does."""
    whole = dev.empty.transformer
    num_blocks = dev.transformer["num_single_layers"]
    block_bytes = file_bytes(whole.single_transformer_blocks[0])
    other_bytes = file_bytes(whole) - num_blocks * block_bytes
    num_fitting = (free_bytes(folder) - other_bytes) // block_bytes
    if num_fitting < 1:
        raise Skipped(f"the disk has room for {free_bytes(folder) / 1e9:.1f} GB only")
    return dev.shallower(min(num_blocks, num_fitting))


CASES: tuple[tuple[str, Callable[[Bench], Part], int, str], ...] = (
    ("klein-4b transformer", klein_transformer, 1, "bf16"),
    ("klein-4b transformer", klein_transformer, 1, "fp8"),
    ("klein-4b text encoder", klein_text_encoder, 1, "bf16"),
    ("klein-4b text encoder", klein_text_encoder, 1, "fp8"),
    ("dev transformer", dev_transformer, 2, "bf16"),
    ("dev transformer", dev_transformer, 8, "bf16"),
    ("dev transformer", dev_transformer, 1, "fp8"),
)


def load_job(bench: Bench) -> Figures:
    """Measure every case."""
    figures = {}
    for name, part_of, tensor, precision in CASES:
        measure = partial(measure_load, bench, part_of, tensor, PRECISIONS[precision])
        key = f"{name} tp{tensor}.{precision}"
        figures[key] = attempt(f"load {key}", measure)
    return figures


def measure_load(
    bench: Bench,
    part_of: Callable[[Bench], Part],
    tensor: int,
    quantization: Quantization | None,
) -> Figures:
    """Measure loading cold, from the disk, and warm, from files that were just read."""
    part = part_of(bench)
    device = bench.device
    device.clear()
    checkpoint = Checkpoint(part.folder)
    recipe = LoadSpec(
        checkpoint,
        Axis(0, tensor),
        BF16,
        device.kind,
        prefix=part.prefix,
        quantization=quantization,
    )

    def load() -> nn.Module:
        with alone():
            return load_sharded(part.build, part.plan, recipe)

    forget(part.folder)
    cold_s = device.seconds_of_one(load)
    num_bytes = checkpoint.num_bytes_read
    warm_s, peak = device.peak(partial(device.seconds_of_one, load))
    return {
        "cold_s": cold_s,
        "warm_s": warm_s,
        "read_bytes": num_bytes,
        "peak_bytes": peak,
        "note": part.note,
    }
