"""The functions that ranks run to measure ways of splitting a model; `tests.ranks` calls them."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import transformers
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from flux_ray.parallel.mesh import Axis, Mesh
from tests.bench.split_models import (
    DEV_DEPTH,
    DEV_INPUTS,
    FORWARDS,
    TEXT_LAYERS,
    num_split_linears,
)
from tests.gauges import Collectives, PeakMemory, counted_reading
from tests.parallel.peers import T5_WAYS, TEXT_WAYS, WAYS, import_deepspeed

# How each model can be split, by the folder of its checkpoint.
WAYS_OF: dict[str, Mapping[str, Callable[..., nn.Module]]] = {
    "mid": WAYS,
    "text": TEXT_WAYS,
    "t5": T5_WAYS,
}
NUM_HOST_ROUNDS = 30
Seconds = tuple[float, float]


def hush() -> None:
    """Keep the libraries from reporting what they load."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def measure_host(_: Mesh, folder: Path) -> dict[str, dict[str, Any]]:
    """Measure the host's work for a model as deep as dev, as one of two ranks.

    The other rank is not there: collectives do nothing. Return for each way the collectives of a
    forward, and the thread's CPU time beyond that of the whole model.
    """
    hush()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    axis = Axis(0, 2, dist.group.WORLD)
    models = {way: load(folder, Mesh(axis, axis)) for way, load in WAYS.items()}
    whole = Flux2Transformer2DModel.from_pretrained(folder)
    with torch.no_grad():
        expected = [whole(**DEV_INPUTS).sample]
    # The outputs are wrong here, since the other rank adds nothing; only the calls count.
    figures = {
        way: look(lambda m=model: [m(**DEV_INPUTS).sample], expected)
        for way, model in models.items()
    }
    seconds: dict[str, list[float]] = {way: [] for way in (*models, "whole")}
    with torch.no_grad():
        for _ in range(NUM_HOST_ROUNDS):
            for way, model in {**models, "whole": whole}.items():
                began = time.thread_time()
                model(**DEV_INPUTS)
                seconds[way].append(time.thread_time() - began)
    for way in models:
        extra_s = statistics.median(seconds[way]) - statistics.median(seconds["whole"])
        figures[way]["host_us_per_linear"] = extra_s * 1e6 / num_split_linears(DEV_DEPTH)
    return figures


def load_split(way: str, folder: Path, mesh: Mesh) -> nn.Module:
    """Load the transformer or a text encoder in that folder."""
    num_layers = (max(TEXT_LAYERS),) if folder.name == "text" else ()
    # DeepSpeed prints what it read of a model.
    with redirect_stdout(None):
        return WAYS_OF[folder.name][way](folder, mesh, *num_layers)


def measure_loads(mesh: Mesh, way: str, root: Path) -> dict[str, dict[str, Any]]:
    """Measure what loading each model costs a rank, and importing what that needs."""
    hush()
    figures: dict[str, dict[str, Any]] = {"import": {"import_s": 0.0}}
    if way == "deepspeed":
        began = time.perf_counter()
        import_deepspeed()
        figures["import"]["import_s"] = time.perf_counter() - began
    models = []
    for name in [model for model, ways in WAYS_OF.items() if way in ways]:
        with counted_reading() as sizes, PeakMemory() as memory:
            began = time.perf_counter()
            models.append(load_split(way, root / name, mesh))
            load_s = time.perf_counter() - began
        figures[name] = {
            "load_s": load_s,
            "read_bytes": sum(sizes),
            "held_bytes": sum(parameter.nbytes for parameter in models[-1].parameters()),
            "peak_anonymous_bytes": memory.anonymous,
            "peak_resident_bytes": memory.resident,
        }
    return figures


def measure_forwards(
    mesh: Mesh, root: Path, expected: dict[str, list[Tensor]], num_rounds: int
) -> dict[str, Any]:
    """Measure forwards of all ways in turns: (wall, own thread's CPU) seconds, errors, collectives.

    In "tp1" each rank has a whole model to itself, and both run at the same time: a core whose
    neighbour is idle would be faster than the cores of two ranks can be.
    """
    hush()
    groups = [dist.new_group([rank]) for rank in range(mesh.world.size)]
    alone = Axis(0, 1, groups[mesh.world.rank])
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    for name, way in [(model, way) for model in expected for way in WAYS_OF[model]]:
        split = load_split(way, root / name, mesh)
        calls[f"{name}.{way}.tp2"] = partial(FORWARDS[name], split)
        if name == "mid":
            whole = load_split(way, root / name, Mesh(alone, alone))
            calls[f"{name}.{way}.tp1"] = partial(FORWARDS[name], whole)
    expected_of = {name: expected[name.split(".")[0]] for name in calls}
    return {
        "first": {name: look(call, expected_of[name]) for name, call in calls.items()},
        "seconds": take_turns(calls, num_rounds),
    }


def look(forward: Callable[[], list[Tensor]], expected: list[Tensor]) -> dict[str, Any]:
    """Return the collectives and the error of a first forward, which is too slow to be timed."""
    with torch.no_grad(), Collectives() as collectives:
        outputs = forward()
    return {
        "max_error": error_of(outputs, expected),
        "kinds": sorted({operator for operator, _ in collectives.calls}),
        "num_collectives": len(collectives.calls),
        "collective_bytes": collectives.num_bytes,
    }


def error_of(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference, relative to the expected tensor's largest value."""
    pairs = zip(outputs, expected, strict=True)
    return max(float((ours - one).abs().max() / one.abs().max()) for ours, one in pairs)


def take_turns(calls: dict[str, Callable[[], Any]], num_rounds: int) -> dict[str, list[Seconds]]:
    """Time each call once a round, on all ranks at once; every other round runs backwards."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in calls}
    with torch.no_grad():
        for turn in range(num_rounds):
            for name in list(calls)[:: 1 if turn % 2 else -1]:
                dist.barrier()
                began, thread_began = time.perf_counter(), time.thread_time()
                calls[name]()
                wall_s, thread_s = time.perf_counter() - began, time.thread_time() - thread_began
                seconds[name].append((wall_s, thread_s))
    return seconds
