"""Memory that runs out under a request: how a process tells, and how it has room for the next."""

import gc
import logging
import traceback

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
