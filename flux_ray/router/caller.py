"""Who asks for pictures: until when, with what weight, and what they allow."""

from dataclasses import dataclass

from flux_ray.router.ledger.retries import Retry
from flux_ray.router.quotas.quota_ledger import UNLIMITED, QuotaLimits


@dataclass(frozen=True)
class Caller:
    """Requests of one `key` share what there is with those of others, by `weight`.

    `deadline_s`: refused at once, or later when it has become impossible, if it cannot be done
    within so many seconds; None is the tier's own. `may_spill`: another tier of an alias will do.
    `allowance`: what the key may have, through all gateways. `is_job`: nobody waits for it.
    `retry`: by what the request is known when it comes again, if that can be known.
    """

    key: str = ""
    weight: float = 1.0
    deadline_s: float | None = None
    may_spill: bool = False
    allowance: QuotaLimits = UNLIMITED
    is_job: bool = False
    retry: Retry | None = None


ANYONE = Caller()
