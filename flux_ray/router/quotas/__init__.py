"""Count what API keys use against their limits, for all gateways together."""

from flux_ray.router.quotas.quota_ledger import (
    SILENCE_S,
    UNLIMITED,
    LimitExceeded,
    LimitStatus,
    QuotaLedger,
    QuotaLimits,
    UsageEntry,
    UsageSync,
)
from flux_ray.router.quotas.usage import DAY_S, Name, Usage, UsageRow, Use

__all__ = [
    "DAY_S",
    "SILENCE_S",
    "UNLIMITED",
    "LimitExceeded",
    "LimitStatus",
    "Name",
    "QuotaLedger",
    "QuotaLimits",
    "Usage",
    "UsageEntry",
    "UsageRow",
    "UsageSync",
    "Use",
]
