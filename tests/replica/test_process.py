"""How a process of a replica holds its memory, seen from outside: in page faults."""

import platform
import subprocess
import sys

import pytest

USE_AND_FREE = """
import resource, sys, threading
from flux_ray.replica.process import keep_memory

def num_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def use_and_free():
    bytearray(16 * 2**20)
    before = num_faults()
    for _ in range(10):
        bytearray(16 * 2**20)
    print(num_faults() - before)

if sys.argv[1] == "keep":
    keep_memory()
# As a rank does: its calls are not in the main thread.
thread = threading.Thread(target=use_and_free)
thread.start()
thread.join()
"""


def num_faults(how: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", USE_AND_FREE, how], check=True, capture_output=True, timeout=60
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_memory_is_not_fetched_again_and_again() -> None:
    num_pages = 16 * 2**20 // 4096
    assert num_faults("as it is") >= num_pages
    assert num_faults("keep") < num_pages / 10
