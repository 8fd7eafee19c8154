"""The routes of probes, and what of their answers is worth a line in the log."""

import logging

# These are answered whatever else this gateway has in hand.
HEALTH, READY = "/health", "/readyz"
PROBES = frozenset({HEALTH, READY})


def readiness_news(was_ready: bool | None, reason: str | None) -> tuple[int, str] | None:
    """Return the level and the text to log, or None if the last probe was answered the same.

    `was_ready`: None before the first probe. `reason`: why no tier can serve; None if one can.
    """
    if was_ready == (reason is None):
        return None
    if reason is None:
        return logging.INFO, "the gateway is ready"
    # A gateway that is only starting has lost nothing.
    return logging.WARNING if was_ready else logging.INFO, f"the gateway is not ready: {reason}"
