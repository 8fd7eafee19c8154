"""What the ledger can be asked: the one interface between gateways, scaling policies and ledger."""

from typing import Protocol

from flux_ray.router.ledger.messages import (
    Backlog,
    Decision,
    GatewayReport,
    Place,
    QuotaRequest,
    Receipt,
    ReportReply,
    SubmitRequest,
    UsageReport,
)
from flux_ray.router.pricing import Snapshot
from flux_ray.router.queue import Forecast
from flux_ray.router.quotas import LimitExceeded, LimitStatus, UsageEntry, UsageRow, UsageSync

# A ledger that hangs is replaced within this many seconds.
LEDGER_BACK_S = 15


class LedgerLost(Exception):
    """The ledger did not answer; what it was told may be lost."""


class LedgerService(Protocol):
    """The ledger's methods, as `LedgerActor` has them and `RemoteLedger` calls them.

    Every method raises LedgerLost if the ledger does not answer in time. `gateway` is the name of
    the process that calls, unique in the cluster.
    """

    async def say(self, gateway: str, report: GatewayReport, /) -> ReportReply:
        """Report what is new; return what the ledger decides at once."""

    async def listen(self, gateway: str, receipt: Receipt, /) -> tuple[Receipt, list[Decision]]:
        """Wait a few seconds for decisions after `receipt`; return them with their receipt."""

    async def forecast(self, submissions: tuple[SubmitRequest, ...], /) -> tuple[Forecast, ...]:
        """Predict what would become of each request if it alone were submitted now."""

    async def places(self, name: str, /) -> tuple[Place, ...]:
        """Return the replicas that run, or ran, the request of this name, the latest first."""

    async def backlog(self, tier: str, cold_start_s: float, /) -> Backlog:
        """Return a tier's work for its scaling policy, which knows how long a replica starts."""

    async def share_prices(self, snapshot: Snapshot, /) -> Snapshot:
        """Report what this gateway learned of prices; return what all gateways did."""

    async def enter(
        self, gateway: str, quota: QuotaRequest, /
    ) -> LimitExceeded | LimitStatus | None:
        """Count a request that is generated later; return why not, or what its key has left."""

    async def leave(self, gateway: str, entry: UsageEntry, rows: tuple[UsageRow, ...], /) -> None:
        """Report that a counted request has ended; `rows` include what it used."""

    async def share_usage(self, gateway: str, report: UsageReport, /) -> UsageSync:
        """Report the counted requests in hand and what keys used; return what is new here."""
