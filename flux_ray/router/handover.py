"""What a gateway's loop and Serve's request routers, on a thread of their own, tell each other.

Items are replaced whole, so that neither needs a lock.
"""

# The replica of a call that is being made, by its tier and request id.
GRANTED: dict[tuple[str, str], str] = {}
# The replicas that this process can reach, by tier.
REACHABLE: dict[str, tuple[str, ...]] = {}
