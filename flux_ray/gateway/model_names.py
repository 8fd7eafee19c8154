"""Resolve a model's name to a tier, or to an alias of several tiers and a policy to choose by."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from flux_ray.auth import KeyClass
from flux_ray.catalog import Tier, tier_for
from flux_ray.config import Alias, GatewayArgs
from flux_ray.errors import BadRequest, LicenseForbids, TierForbidden, UnknownTier
from flux_ray.gateway.heeded import check_heeded
from flux_ray.request import ImageRequest
from flux_ray.router.router import always

UNLIMITED = KeyClass()


class ResolvedModel(NamedTuple):
    """A model as a client names it, and the tiers that may serve it, best first.

    `served`: all tiers of this gateway that the caller's key may use, to tell it of others.
    """

    name: str
    alias: Alias
    tiers: tuple[Tier, ...]
    served: tuple[Tier, ...] = ()

    @property
    def max_references(self) -> int:
        """Return how many references the tier takes that takes most."""
        return max(tier.max_references for tier in self.tiers)

    @property
    def requires_mask(self) -> bool:
        """Return whether all of its tiers generate only a part of an image."""
        return all(tier.requires_mask for tier in self.tiers)

    @property
    def requires_control(self) -> bool:
        """Return whether all of its tiers follow a control image."""
        return all(tier.takes_control for tier in self.tiers)

    def check_heeded(self, field: str, called: str | None = None) -> None:
        """Raise BadRequest unless one of its tiers heeds the field, which the caller `called` so.

        The error names the tiers here that do.
        """
        check_heeded(field, self.tiers, self.served, called)


def target_for(
    name: str | None,
    args: GatewayArgs,
    key_class: KeyClass = UNLIMITED,
    *,
    may_spill: bool = False,
    is_deployed: Callable[[str], bool] = always,
) -> ResolvedModel:
    """Return the model of that name, with the tiers that the caller's key class may use.

    Without a name it is the default tier, or the only one. An alias that spills has all its tiers
    if `may_spill`, else only the first that is deployed. Raise UnknownTier, which lists the names;
    TierForbidden if the key is for other tiers, LicenseForbids if it is for other licences.
    """
    if name is None:
        name = args.default_tier or (args.tiers[0] if len(args.tiers) == 1 else None)
    if name is None:
        raise BadRequest(f"model is required, one of: {', '.join(names_of(args))}", "model")
    alias = args.alias_for(name)
    if alias is None:
        raise unknown(name, names_of(args))
    tiers = alias.tiers
    if alias.policy == "spill" and not may_spill:
        # If none is deployed, keep the first: the caller then reads that it is not deployed.
        tiers = tuple(filter(is_deployed, tiers))[:1] or tiers[:1]
    usable = tuple(tier_for(tier) for tier in tiers if key_class.may_use(tier))
    if not usable and not any(key_class.may_name(tier) for tier in tiers):
        raise TierForbidden(f"this key may not use {name}", "model")
    if not usable:
        raise LicenseForbids(f"this key may not use {name}: its licence is another", "model")
    served = tuple(tier_for(tier) for tier in args.tiers if key_class.may_use(tier))
    return ResolvedModel(name, alias, usable, served)


def unknown(name: str, names: tuple[str, ...]) -> UnknownTier:
    """Return the error for a model that is not served; it lists `names`."""
    message = f"no model {name[:80]!r} is served here; there are: {', '.join(names)}"
    return UnknownTier(message, "model")


def names_of(args: GatewayArgs) -> tuple[str, ...]:
    """Return the model names that a client may send, besides `auto`."""
    return (*args.tiers, *args.aliases)


def requests_for(
    target: ResolvedModel, build: Callable[[Tier], ImageRequest]
) -> list[ImageRequest]:
    """Return the request as each tier that can do it would, best tier first.

    `build` makes it for one tier, or raises BadRequest; if it does for all, raise the best tier's.
    """
    requests: list[ImageRequest] = []
    objections: list[BadRequest] = []
    for tier in target.tiers:
        try:
            requests.append(build(tier))
        except BadRequest as error:
            objections.append(error)
    if not requests:
        raise objections[0]
    first = requests[0]
    # Whichever tier is chosen, logs and results show one id and one seed.
    return [replace(each, request_id=first.request_id, seed=first.seed) for each in requests]
