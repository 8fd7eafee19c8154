"""Load a tensor-parallel rank's transformer from the whole checkpoint, and from its own file.

The transformer is a small FLUX.2 with random weights in bfloat16. Before each load the page cache
is told to drop the files. The last line of the output is one JSON object: for each number of ranks,
of rank 0, the bytes that the rank needs, that the disk read, and the seconds (median).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import save_file

from flux_ray.parallel.checkpoint import Checkpoint, RankCheckpoint, shards_for
from flux_ray.parallel.load import LoadSpec, build_empty, load_sharded, saved_tensors
from flux_ray.parallel.mesh import Axis
from flux_ray.weights.shards import rank_file

CLASS = Flux2Transformer2DModel
# 1.4 GB: layers as wide as klein-4b's, and only a few of them.
CONFIG = {
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}


def make_checkpoint(folder: Path, sizes: list[int]) -> int:
    """Write the whole checkpoint and the files of rank 0 of each size; return its bytes."""
    model = build_empty(lambda: CLASS.from_config(CONFIG))
    tensors = {
        name: torch.zeros(tensor.shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1)
        for name, tensor in saved_tensors(model)
    }
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    with Checkpoint(folder).opened() as checkpoint:
        for size in sizes:
            shards, axis = shards_for(model, CLASS._tp_plan, size), Axis(0, size)
            own = {
                name: checkpoint.read(name, tensor.shape, shards.get(name), axis)
                for name, tensor in tensors.items()
            }
            (folder / f"tp{size}").mkdir()
            save_file(own, folder / f"tp{size}" / rank_file(0, size))
    return sum(tensor.nbytes for tensor in tensors.values())


def drop(folder: Path) -> None:
    """Have the system forget the files' pages, as after a boot."""
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_bytes() -> int:
    """Return what this process has had the disk read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def load(checkpoint: Checkpoint, axis: Axis) -> dict[str, torch.Tensor]:
    """Load rank 0's transformer and touch all of it, since the whole file is only mapped."""
    recipe = LoadSpec(checkpoint, axis, torch.bfloat16)
    model = load_sharded(lambda: CLASS.from_config(CONFIG), CLASS._tp_plan, recipe)
    tensors = dict(saved_tensors(model))
    for tensor in tensors.values():
        tensor.flatten()[::1024].sum()
    return tensors


def measure(folder: Path, checkpoint: Checkpoint, axis: Axis, repeats: int) -> dict[str, Any]:
    """Return the bytes and seconds of cold loads."""
    seconds, read = [], []
    for _ in range(repeats):
        drop(folder)
        checkpoint.num_bytes_read = 0
        before, began = disk_bytes(), time.perf_counter()
        load(checkpoint, axis)
        seconds.append(time.perf_counter() - began)
        read.append(disk_bytes() - before)
    return {
        "needed_bytes": checkpoint.num_bytes_read,
        "disk_bytes": int(statistics.median(read)),
        "seconds": round(statistics.median(seconds), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="On the disk to measure; else a temporary one.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary)
        result: dict[str, Any] = {"checkpoint_bytes": make_checkpoint(folder, given.ranks)}
        for size in given.ranks:
            axis = Axis(0, size)
            own = RankCheckpoint(folder / f"tp{size}", axis)
            whole, split = load(Checkpoint(folder), axis), load(own, axis)
            assert all(torch.equal(whole[name], split[name]) for name in whole)
            del whole, split
            for name, checkpoint in (("whole", Checkpoint(folder)), ("rank_file", own)):
                found = measure(folder, checkpoint, axis, given.repeats)
                result[f"tensor_{size}_{name}"] = found
                print(f"tensor {size}, {name}: {found}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
