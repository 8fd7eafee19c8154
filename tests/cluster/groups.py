"""Rank groups on the shared Ray for tests to break: `tiny-tp2` with other ranks and leaders."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

TIER = "tiny-tp2"
BOOT_S = 400


@contextmanager
def group_with(
    config: dict[str, Any], deploy: Callable[[dict[str, Any]], None], **args: object
) -> Iterator[None]:
    """While it lasts, the tier has these args besides its own, and its ranks fail on demand."""
    changed = copy.deepcopy(config)
    (application,) = (app for app in changed["applications"] if app["name"] == TIER)
    application["import_path"] = "tests.cluster.faulty:build_tier"
    # Two processors carry three ranks, a text encoder and the other tier.
    application["args"] |= {"num_cpus": 0.25, **args}
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
