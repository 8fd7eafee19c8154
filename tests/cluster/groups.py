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
    config: dict[str, Any],
    deploy: Callable[[dict[str, Any]], None],
    *,
    stays: bool = False,
    **args: object,
) -> Iterator[None]:
    """While it lasts, the tier has these args besides its own.

    It keeps them afterwards if it `stays`: for tests that come last (`LAST` in conftest.py), of
    which each changes it anyway. To start a group that nobody asks takes as long as a test.
    """
    changed = copy.deepcopy(config)
    (application,) = (app for app in changed["applications"] if app["name"] == TIER)
    application["args"] |= args
    deploy(changed)
    wait_until_running()
    yield
    if not stays:
        deploy(config)
        wait_until_running()


def wait_until_running() -> None:
    """Return when the tier runs as it was deployed last."""
    from ray import serve

    end = time.monotonic() + BOOT_S
    while serve.status().applications[TIER].status != "RUNNING":
        assert time.monotonic() < end, serve.status().applications[TIER]
        time.sleep(0.05)
