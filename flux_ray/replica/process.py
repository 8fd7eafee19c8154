"""What the processes of a replica do as processes: import the engine, handle memory, and end.

`out_of_memory` recognises that memory ran out under a request and drops what the request held;
`free_memory` then makes room for the next one. Ranks and the shared text encoder use both. A leader
asks `KernelKills` whether its rank may have died for want of memory.
"""

import contextlib
import ctypes
import gc
import logging
import os
import sys
import traceback
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn, cast

from flux_ray.catalog import PROCESSOR, card_of
from flux_ray.errors import OutOfMemory

logger = logging.getLogger("ray.serve")

# What torch says in a plain RuntimeError if an allocation fails on the CPU, or inside of CUDA's own
# libraries; its OutOfMemoryError is only for its own allocations on a GPU.
SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)

VMSTAT = Path("/proc/vmstat")
# A process that is killed may need seconds to give back its memory before its connections close.
NUM_LOOKS = 30


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on the GPU or on the machine."""
    from torch import OutOfMemoryError

    if isinstance(error, (MemoryError, OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def out_of_memory(error: Exception, tier: str) -> OutOfMemory | None:
    """Return the caller's OutOfMemory if `error` says that memory ran out, else None.

    The frames of its traceback are cleared: they hold the tensors of the failed request, which
    would stay on the GPU for as long as the error does.
    """
    if not is_out_of_memory(error):
        return None
    logger.error("%s ran out of memory", tier, exc_info=error)
    link: BaseException | None = error
    while link is not None:
        # Errors in whose handling this one was raised have tracebacks with tensors too.
        traceback.clear_frames(link.__traceback__)
        link = link.__context__
    return OutOfMemory(
        f"this request takes more memory than a replica of {tier} has: ask for a smaller width and"
        " height, or send fewer or smaller reference images"
    )


def free_memory(device: str) -> None:
    """Return unused memory to the device: torch's cache of it is in pieces too small to be used."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def num_kernel_kills() -> int:
    """Return how many processes the kernel of this machine has killed to free memory.

    It counts those that are killed for the limit of a container too. Return 0 if it does not say.
    """
    try:
        lines = VMSTAT.read_text().splitlines()
    except OSError:
        return 0
    counts = (line.split() for line in lines if line.startswith("oom_kill "))
    return sum(int(count) for _, count in counts)


class KernelKills:
    """Whether the kernel has lately killed a process for memory, as far as `look` was called."""

    def __init__(self) -> None:
        self._counts = deque([num_kernel_kills()], maxlen=NUM_LOOKS)

    def look(self) -> None:
        """Read the count; call this every second or so."""
        self._counts.append(num_kernel_kills())

    def is_one_recent(self) -> bool:
        """Return whether the count is above that of `NUM_LOOKS` looks ago."""
        return num_kernel_kills() > self._counts[0]


# Two parameters of glibc's `mallopt`, and their values in bytes.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
MAX_FREE_BYTES = 2**30
MAX_MAPPED_BYTES = 32 * 2**20

# diffusers imports those of these packages that are installed, whether a checkpoint needs them or
# not: a quarter of the time in which a process starts. Those that we use are imported where we do.
UNUSED_BY_DIFFUSERS = ("bitsandbytes", "peft", "torchao")


def keep_memory() -> None:
    """Let glibc keep up to 1 GiB of freed memory; do nothing with another C library.

    By default it returns a step's tensors to the system and gets the memory again for the next
    step, page by page: on CPUs this takes 5 % of the time, and now and then 20 %.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, MAX_MAPPED_BYTES)
        mallopt(TRIM_THRESHOLD, MAX_FREE_BYTES)


@contextlib.contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Hide packages from imports inside the block, except those that are imported already.

    Python's import system takes a name that is None in `sys.modules` for not installed.
    """
    modules = cast(dict[str, ModuleType | None], sys.modules)
    absent = [package for package in packages if package not in modules]
    modules.update(dict.fromkeys(absent))
    try:
        yield
    finally:
        for package in absent:
            del modules[package]


def load_engine() -> None:
    """Import torch and the model families; only processes that run them call this.

    Leaders and gateways never do: it takes seconds in which they would answer nobody.
    """
    # Garbage collection takes a fifth of the time of these imports and finds nothing: modules stay.
    # Frozen, they are not looked through later either.
    gc.disable()
    with hidden(*UNUSED_BY_DIFFUSERS):
        import flux_ray.engine.registry  # noqa: F401

    gc.freeze()
    gc.enable()


def card_here(device: str) -> str | None:
    """Return the name of this process's GPU in `catalog.gpus`, or None if it is not listed there.

    On `device` "cpu" the name is `PROCESSOR`.
    """
    if device == "cpu":
        return PROCESSOR
    import torch

    card = torch.cuda.get_device_properties(0)
    return card_of(card.name, card.total_memory)


def end_process() -> NoReturn:
    """End this process at once, without clean-up: a thread that hangs cannot prevent it.

    Serve notices the dead actor at its next health check and starts the whole replica anew.
    """
    logging.shutdown()
    os._exit(1)
