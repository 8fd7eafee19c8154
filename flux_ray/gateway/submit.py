"""What every dialect does with what it has read: find the tiers that can, and who asks."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import NamedTuple

from starlette.requests import Request

from flux_ray.catalog import Tier
from flux_ray.config import GatewayArgs
from flux_ray.errors import KeyReused
from flux_ray.gateway.callers import IDEMPOTENCY_KEY, Callers, may_spill, retry_of, seed_of
from flux_ray.gateway.errors import limit_headers
from flux_ray.gateway.fields.sizes import size_notes
from flux_ray.gateway.images.masks import fitted
from flux_ray.gateway.model_names import ResolvedModel, requests_for, target_for
from flux_ray.request import (
    EventStream,
    Finished,
    ImageRequest,
    ImageResult,
    OnEvent,
    Preview,
    stream_events,
)
from flux_ray.router.cascade import cascade
from flux_ray.router.ledger.messages import Place
from flux_ray.router.quote import Caller
from flux_ray.router.router import Router

logger = logging.getLogger("ray.serve")


class PreparedRequest(NamedTuple):
    """A complete request as each tier that can do it would, best first, and whose it is.

    `notes` are for the caller: what of its images could not be used. `places`: where its images
    are drawn already, or were, if it comes again.
    """

    target: ResolvedModel
    requests: list[ImageRequest]
    caller: Caller
    notes: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()

    def request_of(self, generated: ImageResult | Preview | Finished) -> ImageRequest:
        """The one that was drawn."""
        return next(each for each in self.requests if each.tier == generated.tier)

    def notes_on(self, generated: ImageResult | Preview | Finished) -> list[str]:
        """Tell the caller what is not as it was asked for, besides fields without effect."""
        return [*size_notes(self.request_of(generated)), *self.notes]


class Submitter:
    """Takes them, and has them drawn."""

    def __init__(self, router: Router, args: GatewayArgs) -> None:
        self.router = router
        self.args = args
        self._callers = Callers(args)

    def target_of(self, http: Request, model: str | None) -> ResolvedModel:
        """The tiers that may serve this caller under that name."""
        key_class = self._callers.class_of(http)
        return target_for(
            model,
            self.args,
            key_class,
            may_spill=may_spill(http),
            is_deployed=self.router.is_deployed,
        )

    async def take(
        self,
        http: Request,
        target: ResolvedModel,
        build: Callable[[Tier], ImageRequest],
        notes: tuple[str, ...] = (),
    ) -> PreparedRequest:
        """The order; the log joins the client's id with ours.

        TierUnavailable at once where no tier that can do it is deployed: it would wait for nobody.
        """
        limits = self.args.limits
        deployed = self.router.deployed(requests_for(target, build))
        requests = [await fitted(request, limits) for request in deployed]
        order = PreparedRequest(target, requests, self._callers.caller_of(http), notes)
        whose = order.caller.key or "anybody"
        http_id, image_id = http.state.request_id, order.requests[0].request_id
        logger.info(
            "request %s: image request %s on %s for %s", http_id, image_id, target.name, whose
        )
        return order

    async def named(
        self, http: Request, order: PreparedRequest, seed: int | None
    ) -> PreparedRequest:
        """The order, which is the one from before if it comes again. `seed`: that its client sent.

        KeyReused where its idempotency key is that of another one.
        """
        retry = await retry_of(http, order.target.name, order.requests[0], seed)
        if retry is None:
            return order
        caller = replace(order.caller, retry=retry)
        places = await self.router.places(caller)
        if any(place.fingerprint != retry.fingerprint for place in places):
            message = "this idempotency-key is that of another request"
            raise KeyReused(message, IDEMPOTENCY_KEY)
        if seed is None and places:
            seed = places[0].seed
        elif seed is None and retry.is_lasting:
            seed = seed_of(retry)
        requests = order.requests
        if seed is not None:
            requests = [replace(each, seed=seed) for each in requests]
        return order._replace(requests=requests, caller=caller, places=places)

    async def generate(self, order: PreparedRequest) -> ImageResult:
        """Its images, by the tier that the policy prefers, if no replica has them yet."""
        if order.places:
            result = await self.router.recall(order.places, order.requests, order.caller)
            if result is not None:
                return result
        return await self.router.generate_by(order.target.alias, order.requests, order.caller)

    def stream(self, order: PreparedRequest) -> EventStream:
        """Yield what there is to see before the images, by its target's policy, then those.

        A client that is slow to read keeps neither a replica nor its turn.
        """
        best, *others = order.requests
        if order.target.alias.policy == "cascade" and others:
            # The fast tier's image is the preview.
            early, late = (replace(each, num_previews=0) for each in (others[-1], best))
            # The images of two tiers are not one run that could be found again.
            return cascade(self.router, early, late, replace(order.caller, retry=None))

        def generate(on_event: OnEvent) -> Awaitable[ImageResult]:
            caller = replace(order.caller, on_event=on_event)
            return self.generate(order._replace(caller=caller))

        return stream_events(generate)

    def limit_headers(self, order: PreparedRequest) -> dict[str, str]:
        """For its answer: what is left to the caller, where that is limited."""
        standing = self.router.standing(order.caller)
        return {} if standing is None else limit_headers(*standing)

    async def credits(self, http: Request) -> float | None:
        """The GPU seconds that the caller has left today; None where that is not limited."""
        return await self.router.credits(self._callers.caller_of(http))
