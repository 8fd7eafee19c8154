"""The GPUs for which plans and prices can be made: usable memory, and speeds.

Peaks are from NVIDIA's data sheets, for dense products (tensor cores with fp32 sums; fp32 without
TF32) and for memory. The fraction of a peak that a program reaches is fitted or assumed, and holds
until replicas have measured their own: 0.62 on Hopper reproduces the 0.4605 s a step of FLUX.2
[dev] on an H100 (SGLang, pull request 16055), 0.46 on B200 follows from NVIDIA's own 1.7 x of an
H200; A100 is assumed to be like Hopper, and the rest to reach 0.60. Collectives reach 0.3 of what
NVLink's data sheet says for both directions, or what PCIe leaves without peer access.
"""

import re
from dataclasses import dataclass

GIB = 2**30
PROCESSOR = "cpu"
# How far a row and CUDA may differ on a GPU's memory: some names stand for GPUs of several sizes.
MEMORY_TOLERANCE = 0.1


@dataclass(frozen=True)
class Gpu:
    """A GPU model; `usable_bytes` is the total that CUDA reports, which is less than its name says.

    Without FP8 units (CUDA capability 8.9) FP8 weights are unpacked before each product. Without
    NVLink more than two tensor ranks wait longer for each other than they compute.
    """

    name: str
    usable_bytes: int
    has_fp8_units: bool
    has_nvlink: bool


@dataclass(frozen=True)
class Speed:
    """The speed of a GPU or CPU: peaks in TFLOP/s and GB/s; `link_gb_s` is for collectives.

    `achieved` is the fraction of a peak that whole steps reach, `collective_s` the seconds before a
    collective sends anything, `block_s` the host's seconds to launch the operations of one block. A
    GPU works on one block while the host launches the next; a CPU, which `is_host` itself, does
    both one after the other.
    """

    fp32_tflops: float
    bf16_tflops: float
    fp8_tflops: float | None
    memory_gb_s: float
    link_gb_s: float
    achieved: float
    collective_s: float = 12e-6
    block_s: float = 0.2e-3
    is_host: bool = False


# One CPU thread, and only a first guess, which the first requests correct: bf16 may be far slower,
# if the processor has to emulate it, or faster. Collectives are gloo's.
ONE_THREAD = Speed(
    fp32_tflops=0.05,
    bf16_tflops=0.05,
    fp8_tflops=None,
    memory_gb_s=10,
    link_gb_s=1,
    achieved=1.0,
    collective_s=0.2e-3,
    block_s=0.3e-3,
    is_host=True,
)

# Memory in GiB as PyTorch's out-of-memory messages give the total: the lowest of several reports.
_ROWS = (
    ("b200-180gb", 178.35, True, Speed(75, 2250, 4500, 8000, 500, 0.46)),
    ("h200-141gb", 139.72, True, Speed(67, 989, 1979, 4800, 270, 0.62)),
    ("h100-80gb", 79.10, True, Speed(67, 989, 1979, 3350, 270, 0.62)),
    ("a100-80gb", 79.10, True, Speed(19.5, 312, None, 2039, 180, 0.62)),
    ("l40s-48gb", 44.34, False, Speed(91.6, 362, 733, 864, 18, 0.60)),
    ("a100-40gb", 39.38, True, Speed(19.5, 312, None, 1555, 180, 0.62)),
    ("rtx5090-32gb", 31.34, False, Speed(104.8, 209.5, 419, 1792, 32, 0.60)),
    ("rtx3090-24gb", 23.56, False, Speed(35.6, 71, None, 936, 16, 0.60)),
    ("rtx4090-24gb", 23.52, False, Speed(82.6, 165, 330, 1000, 16, 0.60)),
    ("l4-24gb", 22.03, False, Speed(30.3, 121, 242, 300, 16, 0.60)),
    ("a10g-24gb", 22.03, False, Speed(31.2, 70, None, 600, 16, 0.60)),
    ("rtx4060-8gb", 7.60, False, Speed(15.1, 30, 60, 272, 8, 0.60)),
)
CARDS = {
    name: Gpu(name, int(gib * GIB), speed.fp8_tflops is not None, nvlink)
    for name, gib, nvlink, speed in _ROWS
}
SPEEDS = {name: speed for name, _, _, speed in _ROWS} | {PROCESSOR: ONE_THREAD}


def card_for(name: str) -> Gpu:
    """Return the GPU of that name. Raises ValueError, which lists the known names."""
    try:
        return CARDS[name]
    except KeyError:
        raise ValueError(f"no card named {name!r}; known cards: {', '.join(CARDS)}") from None


def speed_for(name: str) -> Speed:
    """Return the speed of a GPU, or of one CPU thread (`cpu`). Raises ValueError."""
    try:
        return SPEEDS[name]
    except KeyError:
        raise ValueError(f"no card named {name!r}; known cards: {', '.join(SPEEDS)}") from None


def card_of(device: str, total_bytes: int) -> str | None:
    """Return the name of the GPU with that CUDA device name and memory, or None if unknown."""
    for name, card in CARDS.items():
        chip = re.sub(r"(?<=rtx)(?=\d)", " ?", name.split("-")[0])
        is_chip = re.search(rf"(?<![a-z0-9]){chip}(?![a-z0-9])", device.lower()) is not None
        if is_chip and abs(total_bytes / card.usable_bytes - 1) < MEMORY_TOLERANCE:
            return name
    return None
