"""A process of a replica: how it holds its memory, and how it ends when it is of no use."""

import ctypes
import logging
import os
from typing import NoReturn

# Of glibc's `mallopt`, and what it is given: bytes.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
MAX_FREE_BYTES = 2**30
MAX_MAPPED_BYTES = 32 * 2**20


def keep_memory() -> None:
    """Hold on to memory that is free, to a limit, where the C library is glibc.

    It would else give that of a step's tensors back to the system, and fetch it again for the next
    step, page by page: a twentieth of the time on processors, and now and then a fifth.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, MAX_MAPPED_BYTES)
        mallopt(TRIM_THRESHOLD, MAX_FREE_BYTES)


def end_process() -> NoReturn:
    """Serve sees a dead actor at its next check, and builds the whole replica anew."""
    logging.shutdown()
    os._exit(1)
