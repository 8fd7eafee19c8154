"""Deploy the tier `tiny-tp2` of the shared Ray with other arguments, for tests that break it."""

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
    """Deploy the tier with `args` changed during the `with`, then as it was before.

    With `stays` it keeps the changed ones: for the tests that run last (`LAST` in conftest.py),
    each of which changes it anyway. To start a group that no test uses takes as long as a test.
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
    """Wait until the tier is running as it was deployed last."""
    from ray import serve

    end = time.monotonic() + BOOT_S
    while serve.status().applications[TIER].status != "RUNNING":
        assert time.monotonic() < end, serve.status().applications[TIER]
        time.sleep(0.05)
