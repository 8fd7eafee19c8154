"""Rank groups on the shared Ray for tests to break: `tiny-tp2` with other ranks and leaders."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cluster.random_klein import save_random_klein

TIER = "tiny-tp2"
BOOT_S = 120


@contextmanager
def group_of(
    num_ranks: int, config: dict[str, Any], deploy: Callable[..., None], folder: Path
) -> Iterator[None]:
    """While it lasts, the tier has so many ranks, and they fail on demand."""
    changed = copy.deepcopy(config)
    (application,) = (app for app in changed["applications"] if app["name"] == TIER)
    application["import_path"] = "tests.cluster.faulty:build_tier"
    application["args"]["parallel"] = {"tensor": num_ranks}
    if num_ranks % 2:
        save_random_klein(folder / "weights")
        application["args"]["weights"] = str(folder / "weights")
    # Two processors carry three ranks and those of the other tier.
    application["args"]["num_cpus"] = 0.25
    deploy(changed)
    wait_until_running()
    yield
    deploy(config)
    wait_until_running()


def wait_until_running() -> None:
    """Return when the tier runs as it was deployed last."""
    from ray import serve

    end = time.monotonic() + BOOT_S
    while serve.status().applications[TIER].status != "RUNNING":
        assert time.monotonic() < end, serve.status().applications[TIER]
        time.sleep(0.1)
