"""Submit what a dialect has read to the router: `Submitter`, which all dialects share.

A dialect resolves the model, prepares the request for every tier that can do it, looks for an
earlier run if the client repeats it, and then generates or streams the images.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
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
from flux_ray.gateway.upsampling.rewriting import (
    NOT_REWRITTEN,
    PromptRewriter,
    Rewriting,
    UpsamplingWish,
)
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
    """A complete request, in one form for each tier that can do it, best first, and its caller.

    `notes` tell the caller which parts of its images could not be used. `places`: the replicas
    that generate its images already, or did, if the client sent the same request before.
    `rewriting`: what became of its prompt.
    """

    target: ResolvedModel
    requests: list[ImageRequest]
    caller: Caller
    notes: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()
    rewriting: Rewriting = NOT_REWRITTEN

    def request_of(self, generated: ImageResult | Preview | Finished) -> ImageRequest:
        """Return the form of the request for the tier that generated these images."""
        return next(each for each in self.requests if each.tier == generated.tier)

    def notes_on(self, generated: ImageResult | Preview | Finished) -> list[str]:
        """Return sentences for the caller about images that differ from what was asked for.

        Those about fields that have no effect are the dialect's to add.
        """
        notes = size_notes(self.request_of(generated))
        return [*notes, *self.rewriting.notes_on(generated.tier), *self.notes]


class Submitter:
    """The way from the dialects to the router, used from the gateway's event loop.

    `rewriter`: upsamples prompts; all dialects of a gateway share one.
    """

    def __init__(
        self, router: Router, args: GatewayArgs, rewriter: PromptRewriter | None = None
    ) -> None:
        self.router = router
        self.args = args
        self._rewriter = rewriter or PromptRewriter(router, args)
        self._callers = Callers(args)

    def target_of(self, http: Request, model: str | None) -> ResolvedModel:
        """Return the model of that name with the tiers that this caller's key may use.

        None is the default model. Raise UnknownTier, TierForbidden or LicenseForbids.
        """
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
        """Prepare the request for each deployed tier of `target` that can do it.

        `build` makes it for one tier, or raises BadRequest; if it does for all, raise that of the
        best tier. Raise TierUnavailable if no tier that can do it is deployed: the request would
        wait in a queue that nobody serves.
        """
        limits = self.args.limits
        deployed = self.router.deployed(requests_for(target, build))
        requests = [await fitted(request, limits) for request in deployed]
        prepared = PreparedRequest(target, requests, self._callers.caller_of(http), notes)
        whose = prepared.caller.key or "anybody"
        http_id, image_id = http.state.request_id, prepared.requests[0].request_id
        # The only line with both ids: the client knows its own, all later lines have ours.
        logger.info(
            "request %s: image request %s on %s for %s", http_id, image_id, target.name, whose
        )
        return prepared

    async def complete(
        self, http: Request, prepared: PreparedRequest, seed: int | None, wish: UpsamplingWish
    ) -> PreparedRequest:
        """Return `prepared` with its seed and words: new ones, or those of when it was sent before.

        `seed` is the one that the client sent, or None; `wish`, whether it wants its prompt
        upsampled. Raise KeyReused if the idempotency key came before with another request.
        """
        plan = self.plan_upsampling(http, prepared.requests, wish)
        prepared = prepared._replace(rewriting=plan)
        named = await self._named(http, prepared, seed)
        if not plan.tiers or named.places:
            return named
        requests, caller = prepared.requests, prepared.caller
        rewriting = await self._rewriter.run(plan, requests, caller)
        if named.caller.retry is not None:
            # The client may have sent it again meanwhile, and its other run may have its turn.
            named = await self._named(http, prepared, seed)
            if named.places:
                return named
        return named._replace(
            requests=[rewriting.rewritten(each) for each in named.requests],
            caller=rewriting.charged(named.caller),
            rewriting=rewriting,
        )

    def plan_upsampling(
        self, http: Request, requests: Sequence[ImageRequest], wish: UpsamplingWish
    ) -> Rewriting:
        """Return for which tiers the caller's prompt is to be upsampled.

        An empty one, as a fill may have, has nothing that an LLM could make more detailed.
        """
        is_allowed = self._callers.class_of(http).upsampling
        tiers = [request.tier for request in requests if request.prompt.strip()]
        return self._rewriter.plan(tiers, wish, is_allowed=is_allowed)

    async def upsample(
        self, http: Request, request: ImageRequest, caller: Caller, wish: UpsamplingWish
    ) -> Rewriting:
        """Upsample the prompt of a request whose tier is chosen, if that is wanted."""
        plan = self.plan_upsampling(http, [request], wish)
        return await self._rewriter.run(plan, [request], caller)

    async def _named(
        self, http: Request, prepared: PreparedRequest, seed: int | None
    ) -> PreparedRequest:
        """Return `prepared` with its earlier places, seed and words, if it was sent before."""
        plan = prepared.rewriting
        retry = await retry_of(
            http, prepared.target.name, prepared.requests[0], seed, is_upsampled=bool(plan.tiers)
        )
        if retry is None:
            return prepared
        caller = replace(prepared.caller, retry=retry)
        places = await self.router.places(caller)
        if any(place.fingerprint != retry.fingerprint for place in places):
            message = "this idempotency-key is that of another request"
            raise KeyReused(message, IDEMPOTENCY_KEY)
        # Without a seed of its own, the request must not get a new random one: it would have other
        # images than the first time. After the ledger has forgotten the first run, the seed still
        # follows from the idempotency key.
        if seed is None and places:
            seed = places[0].seed
        elif seed is None and retry.is_lasting:
            seed = seed_of(retry)
        requests = prepared.requests
        if seed is not None:
            requests = [replace(each, seed=seed) for each in requests]
        prepared = prepared._replace(requests=requests, caller=caller, places=places)
        return prepared if not places else self._recalled(prepared, places[0].prompt)

    def _recalled(self, prepared: PreparedRequest, prompt: str) -> PreparedRequest:
        """Return a request that was sent before with the words that it had then."""
        rewriting = self._rewriter.recall(prepared.rewriting, prompt)
        return prepared._replace(
            requests=[rewriting.rewritten(each) for each in prepared.requests],
            caller=rewriting.charged(prepared.caller),
            rewriting=rewriting,
        )

    async def generate(self, prepared: PreparedRequest) -> ImageResult:
        """Return the images: those of an earlier run of this request if a replica has them still.

        Otherwise generate them on the tier that the alias's policy prefers.
        """
        if prepared.places:
            result = await self.router.recall(prepared.places, prepared.requests, prepared.caller)
            if result is not None:
                return result
        return await self.router.generate_by(
            prepared.target.alias, prepared.requests, prepared.caller
        )

    def stream(self, prepared: PreparedRequest) -> EventStream:
        """Yield the request's events and then its images, as the alias's policy says.

        The generation does not wait for whoever reads: a slow client holds up no replica.
        """
        best, *others = prepared.requests
        if prepared.target.alias.policy == "cascade" and others:
            # The fast tier's image is the preview, so neither tier has to make others.
            early, late = (replace(each, num_previews=0) for each in (others[-1], best))
            # The images of two tiers are not one run that could be found again.
            return cascade(self.router, early, late, replace(prepared.caller, retry=None))

        def generate(on_event: OnEvent) -> Awaitable[ImageResult]:
            caller = replace(prepared.caller, on_event=on_event)
            return self.generate(prepared._replace(caller=caller))

        return stream_events(generate)

    def limit_headers(self, prepared: PreparedRequest) -> dict[str, str]:
        """Return headers that tell the caller what is left of its limits; none without limits."""
        standing = self.router.standing(prepared.caller)
        return {} if standing is None else limit_headers(*standing)

    async def credits(self, http: Request) -> float | None:
        """Return the GPU seconds that the caller has left today, or None without such a limit."""
        return await self.router.credits(self._callers.caller_of(http))
