"""What the replicas of a tier say of themselves: each is asked once, when it comes up.

A tier is redeployed alone, with another layout or other code, and for a while replicas of both
kinds are up.
"""

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Mapping

from pydantic import ValidationError

from flux_ray.catalog.gpus import SPEEDS
from flux_ray.config.tier import TierArgs
from flux_ray.errors import FluxError
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.wire import Description

logger = logging.getLogger("ray.serve")

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 30.0

Ask = Callable[[str, str], Awaitable[Description]]
# Told of a tier's replicas that are up, in the order in which they started.
Learn = Callable[[str, tuple[Description, ...]], None]


def learn_nothing(tier: str, descriptions: tuple[Description, ...]) -> None:
    """Nobody wants to know."""


class Descriptions:
    """Of one gateway process. `ask` raises FluxError where a replica does not answer."""

    def __init__(self, ask: Ask, learn: Learn = learn_nothing) -> None:
        self._ask = ask
        self._learn = learn
        self._up: dict[str, tuple[str, ...]] = {}
        self._known: dict[str, dict[str, Description]] = {}
        self._asking: dict[tuple[str, str], asyncio.Task[None]] = {}

    def see(self, tier: str, replicas: tuple[str, ...]) -> None:
        """Have the new ones among a tier's replicas asked, and forget those that went. Never waits.

        Called as often as one likes: it does nothing while they stay the same.
        """
        if self._up.get(tier, ()) == replicas:
            return
        self._up[tier] = replicas
        known = self._known.setdefault(tier, {})
        gone = known.keys() - set(replicas)
        for replica in gone:
            del known[replica]
        if gone:
            self._tell(tier)
        for replica in replicas:
            if replica not in known and (tier, replica) not in self._asking:
                # Of no request: a client that leaves does not cancel it.
                self._asking[tier, replica] = asyncio.get_running_loop().create_task(
                    self._meet(tier, replica), context=contextvars.Context()
                )

    def of(self, tier: str) -> Mapping[str, Description]:
        """What is known of a tier's replicas, by their names."""
        return self._known.get(tier, {})

    async def _meet(self, tier: str, replica: str) -> None:
        pause_s = FIRST_PAUSE_S
        try:
            while replica in self._up[tier]:
                try:
                    description = await self._ask(tier, replica)
                    # Serve takes another where this one is full.
                    if description.replica == replica:
                        self._note(tier, description)
                        return
                except FluxError as error:
                    logger.info("replica %s of %s cannot be asked yet: %s", replica, tier, error)
                except Exception:
                    # A mistake of ours, or of a newer version that says it otherwise. Given up, it
                    # would be priced wrong for as long as it lives.
                    logger.exception("replica %s of %s is asked again", replica, tier)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
        finally:
            del self._asking[tier, replica]

    def _note(self, tier: str, description: Description) -> None:
        if description.replica in self._up[tier]:
            self._known[tier][description.replica] = description
            self._tell(tier)

    def _tell(self, tier: str) -> None:
        known = self._known[tier].values()
        self._learn(tier, tuple(sorted(known, key=lambda each: each.started_at_s)))


def learn_layouts(prices: CostModel, card: str, cold_starts: dict[str, float]) -> Learn:
    """What prices are told of replicas; `card` is that of one whose own has no row.

    `cold_starts` gets what a replica of each tier takes to start.
    """

    def learn(tier: str, descriptions: tuple[Description, ...]) -> None:
        for description in descriptions:
            try:
                args = TierArgs.model_validate(description.args, extra="ignore")
            except ValidationError as error:
                # Of a newer version: priced as the one before it.
                logger.warning("the layout of %s is not known here: %s", tier, error)
                continue
            own = description.card if description.card in SPEEDS else None
            # The newest of them says how the tier will be laid out.
            prices.lay_out(tier, ReplicaSpec.of(args, own or card), description.layout)
            cold_starts[tier] = args.cold_start_s

    return learn
