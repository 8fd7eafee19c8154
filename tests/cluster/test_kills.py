"""Every process once by SIGKILL and once by SIGSTOP, alone and in pairs, under load."""

import itertools
import signal
from collections.abc import Iterator

import pytest

from tests.cluster.casualties import HEADER, Casualty, Clients, clients, strike

HUNG_LIMIT_S = 15
# Serve's controller is given half a minute, and Ray takes some seconds to kill it.
CONTROLLER_LIMIT_S = 40
# What flux-ray itself ends if it hangs; a proxy is Serve's controller's to end.
MORTAL = ("gateway", "ledger", "lone leader", "leader", "rank", "controller")
ALL = (*MORTAL, "proxy")


def casualties_to_come() -> Iterator[tuple[tuple[str, ...], signal.Signals]]:
    """Yield every kind alone, and every pair but rank and leader, which die together anyway."""
    for sent, kinds in ((signal.SIGKILL, ALL), (signal.SIGSTOP, MORTAL)):
        for each in (*((kind,) for kind in kinds), *itertools.combinations(kinds, 2)):
            if each != ("leader", "rank"):
                yield each, sent


@pytest.fixture(scope="module")
def asking(address: str) -> Iterator[Clients]:
    with clients(address) as asking:
        yield asking


@pytest.fixture(scope="module")
def table() -> Iterator[list[Casualty]]:
    """Yield a list of results, which is printed as a table after the last test."""
    rows: list[Casualty] = []
    yield rows
    print("\n" + "\n".join([HEADER, *map(str, rows)]))


@pytest.mark.drill
@pytest.mark.parametrize(
    ("kinds", "sent"),
    list(casualties_to_come()),
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "+".join(value),
)
def test_what_is_ended_is_replaced_and_only_its_own_requests_fail(
    asking: Clients, table: list[Casualty], kinds: tuple[str, ...], sent: signal.Signals
) -> None:
    casualty = strike(asking, kinds, sent)
    table.append(casualty)
    if sent == signal.SIGSTOP and len(kinds) == 1:
        limit_s = CONTROLLER_LIMIT_S if kinds == ("controller",) else HUNG_LIMIT_S
        assert casualty.gone_s < limit_s, casualty
    if not {"gateway", "proxy"} & set(kinds):
        assert casualty.num_failed == 0, casualty
