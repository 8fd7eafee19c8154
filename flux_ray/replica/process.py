"""A process of a replica: what it loads, how it holds its memory, and how it ends.

Memory that runs out under a request: how a process tells, and how it has room for the next.
"""

import contextlib
import ctypes
import gc
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from types import ModuleType
from typing import NoReturn, cast

from flux_ray.catalog import PROCESSOR, card_of
from flux_ray.errors import OutOfMemory

logger = logging.getLogger("ray.serve")

# What torch says in a plain RuntimeError where the allocation was not its own, or not on a card.
SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that there was no memory, of the card or of the machine."""
    from torch import OutOfMemoryError

    if isinstance(error, (MemoryError, OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def out_of_memory(error: Exception, tier: str) -> OutOfMemory | None:
    """What the caller is told of an error, if memory ran out; nothing is held by it any more.

    Its traceback would hold the tensors of all that was being done.
    """
    if not is_out_of_memory(error):
        return None
    logger.error("%s ran out of memory", tier, exc_info=error)
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__context__
    return OutOfMemory(
        f"this request takes more memory than a replica of {tier} has: ask for a smaller width and"
        " height, or send fewer or smaller reference images"
    )


def free_memory(device: str) -> None:
    """Give back what nothing refers to: in pieces it would be of no use to the next request."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


# Of glibc's `mallopt`, and what it is given: bytes.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
MAX_FREE_BYTES = 2**30
MAX_MAPPED_BYTES = 32 * 2**20

# diffusers loads all of these that are installed, whether or not a checkpoint asks for them: a
# quarter of what a process spends until it is there. We import those that we use, where we do.
UNUSED_BY_DIFFUSERS = ("bitsandbytes", "peft", "torchao")


def keep_memory() -> None:
    """Hold on to memory that is free, to a limit, where the C library is glibc.

    It would else give that of a step's tensors back to the system, and fetch it again for the next
    step, page by page: a twentieth of the time on processors, and now and then a fifth.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, MAX_MAPPED_BYTES)
        mallopt(TRIM_THRESHOLD, MAX_FREE_BYTES)


@contextlib.contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Import as if these packages were not installed, where they are not loaded yet.

    A name that is None in `sys.modules` is one that the import system does not find.
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
    """Import torch and the models: only where they run; leader and gateway never do."""
    # Looking for garbage among what is only being made takes a fifth of the time. Nothing of it
    # will ever be garbage.
    gc.disable()
    with hidden(*UNUSED_BY_DIFFUSERS):
        import flux_ray.engine.registry  # noqa: F401

    gc.freeze()
    gc.enable()


def card_here(device: str) -> str | None:
    """The row of this process's card in `catalog.gpus`; None if it has none."""
    if device == "cpu":
        return PROCESSOR
    import torch

    card = torch.cuda.get_device_properties(0)
    return card_of(card.name, card.total_memory)


def end_process() -> NoReturn:
    """Serve sees a dead actor at its next check, and builds the whole replica anew."""
    logging.shutdown()
    os._exit(1)
