"""What is left of a limit, in the headers that clients know."""

import math


def limit_headers(limit: float, left: float, reset_s: float) -> dict[str, str]:
    """`reset_s` in whole seconds: never too early."""
    return {
        "x-ratelimit-limit": f"{limit:.6g}",
        "x-ratelimit-remaining": f"{left:.6g}",
        "x-ratelimit-reset": str(max(1, math.ceil(reset_s))),
    }
