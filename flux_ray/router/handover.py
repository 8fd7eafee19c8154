"""Shared state of a gateway's event loop and Serve's request routers, which run on another thread.

Items are only ever replaced as a whole, so that no lock is needed.
"""

# The assigned replica of each call that is being made, by tier and request id.
GRANTED: dict[tuple[str, str], str] = {}
# The replicas that this process can reach, by tier.
REACHABLE: dict[str, tuple[str, ...]] = {}
