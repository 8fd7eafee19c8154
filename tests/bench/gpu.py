"""Measure models of real size on a real GPU, with random weights: seconds, bytes, and use of FP8.

Bytes are compared with those that `flux-ray plan` counts. `--device cpu --small` runs the same code
on a CPU, with models of a few megabytes.
"""

import argparse
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from flux_ray.engine.loading import hide_progress
from flux_ray.planner.candidate import RUNTIME_BYTES
from tests.bench.gpu_gauges import Device
from tests.bench.gpu_jobs import Bench, Figures, dev_job, klein_job
from tests.bench.gpu_loads import load_job
from tests.bench.gpu_models import REAL, SMALL
from tests.bench.gpu_report import report

RESULTS = Path(__file__).parent / "results"
# The bench of loading comes last, since its files fill the disk.
JOBS: dict[str, Callable[[Bench], Figures]] = {
    "dev": dev_job,
    "klein-4b": klein_job,
    "load": load_job,
}


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS), help="some jobs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the report")
    parser.add_argument("--scratch", type=Path, help="the folder of temporary checkpoints")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="models of a few megabytes")
    options = parser.parse_args()
    if options.device == "cpu" and not options.small:
        parser.error("a processor takes --small models only")
    return options


def describe(device: Device) -> Figures:
    """Describe the device, and the bytes in use on it beside PyTorch's tensors."""
    is_card = device.kind == "cuda"
    return {
        "name": device.name,
        "torch": torch.__version__,
        "capability": torch.cuda.get_device_capability() if is_card else None,
        "total_bytes": device.total_bytes(),
        "runtime": {
            "measured": device.runtime_bytes(),
            "planned": RUNTIME_BYTES if is_card else None,
        },
    }


def main() -> None:
    options = read_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device on this machine: nothing was measured.")
        print(json.dumps({"device": None, "measured": False, "why": "no CUDA device"}))
        return
    hide_progress()
    # The libraries warn of optional packages that are not installed.
    logging.disable(logging.WARNING)
    if options.device == "cpu":
        # With models so small, several threads would only wait for each other.
        torch.set_num_threads(1)
    device = Device(options.device)
    figures: Figures = {"measured": True, "scale": "small" if options.small else "real"}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        bench = Bench(device, SMALL if options.small else REAL, Path(folder))
        for name in JOBS:
            if name in options.only:
                figures[name] = JOBS[name](bench)
    # Only now has every kernel been loaded, which takes memory too.
    figures["device"] = describe(device)
    text = report(figures)
    print(f"\n{text}")
    if device.kind == "cuda":
        options.out.mkdir(parents=True, exist_ok=True)
        card = re.sub(r"\W+", "-", device.name).strip("-").lower()
        (options.out / f"gpu-{card}.md").write_text(text)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
