"""What a gateway's loop and Serve's request routers, on a thread of their own, tell each other.

Items are replaced whole, so that neither needs a lock.
"""

# The replica of a request that is being handed over, by its tier and id.
GRANTED: dict[tuple[str, str], str] = {}
# The replicas that this process can reach, by tier.
REACHABLE: dict[str, tuple[str, ...]] = {}
