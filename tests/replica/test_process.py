"""What a process of a replica loads, and how it holds its memory: seen from outside."""

import platform
import subprocess
import sys

import pytest

from flux_ray.replica.process import hidden

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


LOAD_AND_GENERATE = """
import sys
from flux_ray.replica.process import UNUSED_BY_DIFFUSERS, load_engine
load_engine()
print([each for each in UNUSED_BY_DIFFUSERS if each in sys.modules])

from flux_ray.catalog.tiers import tier_for
from flux_ray.engine.registry import load_adapter
from flux_ray.engine.api import Placement
from flux_ray.engine.api import ImageSpec
adapter = load_adapter(tier_for("tiny"), None, Placement("bfloat16", "cpu", quantization="int8"))
state = adapter.prepare(adapter.encode(adapter.encode_prompt("x"), ()), ImageSpec(64, 64, 1), 1)
adapter.decode(adapter.denoise(state))
print("torchao" in sys.modules)
"""


def test_of_quantizers_only_those_in_use_are_loaded() -> None:
    run = subprocess.run(
        [sys.executable, "-c", LOAD_AND_GENERATE],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.splitlines() == ["[]", "True"]


def test_what_was_hidden_can_be_imported_afterwards() -> None:
    sys.modules.pop("this", None)
    with hidden("this", "json"), pytest.raises(ModuleNotFoundError):
        import this  # noqa: F401
    assert "this" not in sys.modules
    assert sys.modules["json"] is not None
