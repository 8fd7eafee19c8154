"""Gateways share what they learn, and one that starts anew knows it."""

from flux_ray.request import ImageRequest, StageTimes
from flux_ray.router.ledger.quota_client import PriceExchange
from flux_ray.router.ledger.service import LedgerLost
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel, Snapshot, merged

REQUEST = ImageRequest("id", "tiny", "a ring", 128, 128, 4, 1.0, seed=7)
TIMES = StageTimes(queue_s=0.0, encode_s=1.0, denoise_s=2.0, decode_s=3.0)


class FakeLedger:
    """Merges as the ledger does; `is_down` loses what it is told."""

    def __init__(self) -> None:
        self.known: Snapshot = ()
        self.is_down = False

    async def share_prices(self, snapshot: Snapshot) -> Snapshot:
        if self.is_down:
            raise LedgerLost
        self.known = merged(self.known, snapshot)
        return self.known


def gateway() -> CostModel:
    return CostModel({"tiny": ReplicaSpec("cpu", dtype="float32")})


async def test_one_learns_from_the_other_and_so_does_the_next() -> None:
    ledger, one, other = FakeLedger(), gateway(), gateway()
    for _ in range(3):
        one.learn(REQUEST, TIMES)
    await PriceExchange(ledger, one).share()
    await PriceExchange(ledger, other).share()
    assert other.price(REQUEST) == one.price(REQUEST) != gateway().price(REQUEST)


async def test_a_ledger_that_is_away_is_told_later() -> None:
    ledger, prices = FakeLedger(), gateway()
    exchange = PriceExchange(ledger, prices)
    prices.learn(REQUEST, TIMES)
    ledger.is_down = True
    await exchange.share()
    assert ledger.known == ()
    ledger.is_down = False
    await exchange.share()
    assert ledger.known
