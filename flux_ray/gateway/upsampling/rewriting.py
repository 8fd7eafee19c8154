"""Decide whose prompt is upsampled, and tell what became of it: `PromptRewriter`, `Rewriting`."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from flux_ray.config import GatewayArgs
from flux_ray.gateway.upsampling.upsampler import REASONS, Upsampled, Upsampler
from flux_ray.request import ImageRequest
from flux_ray.router.quote import Caller
from flux_ray.router.router import Router

FIELD = "prompt_upsampling"


class UpsamplingWish(NamedTuple):
    """Whether a caller wants its prompt upsampled; None if it does not say.

    `called`: the name by which it sent the field.
    """

    is_wanted: bool | None = None
    called: str = FIELD


class Rewriting(NamedTuple):
    """What became of the prompt of one request.

    `tiers`: those for which it is upsampled; on any other tier of an alias it is as it was sent.
    `upsampled`: None if nobody was asked. `gpu_s`: what that costs its caller.
    """

    wish: UpsamplingWish = UpsamplingWish()
    tiers: frozenset[str] = frozenset()
    upsampled: Upsampled | None = None
    gpu_s: float = 0.0

    @property
    def words(self) -> str | None:
        """Return the upsampled prompt, or None."""
        return None if self.upsampled is None else self.upsampled.prompt

    @property
    def seconds(self) -> float | None:
        """Return how long upsampling took, or None if it was not tried."""
        return None if self.upsampled is None else self.upsampled.seconds

    def prompt_on(self, tier: str) -> str | None:
        """Return the upsampled prompt if an image of that tier is generated from it."""
        return self.words if tier in self.tiers else None

    def notes_on(self, tier: str) -> list[str]:
        """Return a sentence for the caller if it has not what it wished, or should have had."""
        if tier not in self.tiers:
            return [f"{self.wish.called} has no effect on {tier}"] if self.wish.is_wanted else []
        if self.upsampled is None or self.upsampled.prompt is not None:
            return []
        reason = REASONS[self.upsampled.outcome]
        return [f"{self.wish.called} had no effect, and the prompt was used as sent: {reason}"]

    def rewritten(self, request: ImageRequest) -> ImageRequest:
        """Return the request with its upsampled prompt, if it has one on its tier."""
        prompt = self.prompt_on(request.tier)
        return request if prompt is None else replace(request, prompt=prompt)

    def charged(self, caller: Caller) -> Caller:
        """Return the caller with what upsampling took, and the words for who sends it again."""
        retry = caller.retry
        if retry is not None and self.words is not None:
            retry = replace(retry, prompt=self.words)
        return replace(caller, retry=retry, spent_s=self.seconds or 0.0, spent_gpu_s=self.gpu_s)


NOT_REWRITTEN = Rewriting()


class PromptRewriter:
    """Upsamples prompts for the dialects of one gateway, of whoever may and wants it."""

    def __init__(self, router: Router, args: GatewayArgs) -> None:
        self._router = router
        self._upsampler: Upsampler | None = None
        if args.upsampling is not None:
            max_chars = args.limits.max_prompt_chars
            self._upsampler = Upsampler(args.upsampling, max_chars, router.metrics)

    def plan(
        self, tiers: Iterable[str], wish: UpsamplingWish, *, is_allowed: bool = True
    ) -> Rewriting:
        """Return for which of these tiers the prompt will be upsampled.

        `is_allowed`: whether the caller's key class has a part in it.
        """
        if self._upsampler is None or not is_allowed or wish.is_wanted is False:
            return Rewriting(wish)
        of_tiers = {tier: self._upsampler.upsampling.of_tier(tier) for tier in tiers}
        wanted = {
            tier
            for tier, settings in of_tiers.items()
            if settings is not None and (wish.is_wanted or settings.by_default)
        }
        return Rewriting(wish, frozenset(wanted))

    async def run(
        self, plan: Rewriting, requests: Iterable[ImageRequest], caller: Caller
    ) -> Rewriting:
        """Upsample the prompt once, as the best tier of the plan wants it; never raise for it.

        `requests`: the request in its form for each tier, best first.
        """
        first = next((each for each in requests if each.tier in plan.tiers), None)
        if first is None or self._upsampler is None:
            return plan
        if self._is_spent(caller):
            return plan._replace(tiers=frozenset())
        # The rest of the time is for generating the image.
        at_most_s = self._router.terms.deadline_s(first, caller) / 2
        upsampled = await self._upsampler.upsample(first, caller.key_class, at_most_s)
        is_paid = upsampled.outcome == "done"
        price = self._upsampler.upsampling.gpu_seconds_per_second
        return plan._replace(
            upsampled=upsampled, gpu_s=price * upsampled.seconds if is_paid else 0.0
        )

    def recall(self, plan: Rewriting, prompt: str) -> Rewriting:
        """Return what became of the prompt when the request was sent before."""
        if not plan.tiers:
            return plan
        return plan._replace(upsampled=Upsampled(prompt or None, "recalled"))

    def _is_spent(self, caller: Caller) -> bool:
        """Return whether a limit of the caller's key refuses the request anyway, for long."""
        standing = self._router.standing(caller)
        assert self._upsampler is not None
        longest_s = self._upsampler.upsampling.timeout_s
        return standing is not None and standing.left <= 0 and standing.reset_s > longest_s
