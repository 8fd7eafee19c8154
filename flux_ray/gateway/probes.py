"""Name the probe routes, and decide which of their answers to log."""

import logging

# Probes are answered however many requests this gateway holds.
HEALTH, READY = "/health", "/readyz"
PROBES = frozenset({HEALTH, READY})
# Below this prefix are Serve's own routes, whose callers want Serve's own answers.
SERVES_OWN = "/-/"


def is_probe(path: str) -> bool:
    """Return whether a request for that path is a probe, of this gateway or of Serve itself."""
    return path.startswith(SERVES_OWN) or path.endswith((HEALTH, READY))


def readiness_news(was_ready: bool | None, reason: str | None) -> tuple[int, str] | None:
    """Return the level and the text to log, or None if the last probe was answered the same.

    `was_ready`: None before the first probe. `reason`: why no tier can serve; None if one can.
    """
    if was_ready == (reason is None):
        return None
    if reason is None:
        return logging.INFO, "the gateway is ready"
    # While a gateway starts, not being ready is no cause for a warning.
    return logging.WARNING if was_ready else logging.INFO, f"the gateway is not ready: {reason}"
