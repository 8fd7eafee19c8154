"""Upsample prompts without ever failing or delaying a request beyond its time: `Upsampler`.

Equal prompts share one call, and later ones its answer, from a cache. Calls are limited in number
and time. After failures in a row the LLM is left alone for a while (`CircuitBreaker`), so that
callers do not each wait for the time-out. Whatever goes wrong, the caller's own words are used, and
the answer says so.
"""

import asyncio
import contextvars
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, NamedTuple, Protocol

from flux_ray.config import Upsampling
from flux_ray.gateway.upsampling.chat import (
    EDIT_SYSTEM_PROMPT,
    TEXT_SYSTEM_PROMPT,
    ChatClient,
    UpsamplingFailed,
    messages_for,
    prompt_in,
)
from flux_ray.request import ImageRequest
from flux_ray.tracing import UPSAMPLE, span

logger = logging.getLogger("ray.serve")

# `late`: it took too long. `busy`: so did waiting for other calls. `skipped`: it has just failed
# again and again. `recalled`: the request was sent before, and its words are those of that time.
Outcome = Literal["done", "cached", "recalled", "late", "busy", "failed", "skipped"]
REASONS: dict[Outcome, str] = {
    "recalled": "the upsampler gave none when the request came first",
    "late": "the upsampler took too long",
    "busy": "the upsampler is busy",
    "failed": "the upsampler failed",
    "skipped": "the upsampler has just failed several times and is left alone for a while",
}


class Upsampled(NamedTuple):
    """What became of one prompt: its new words, or None, and the seconds that it took."""

    prompt: str | None
    outcome: Outcome
    seconds: float = 0.0


class UpsamplingMetrics(Protocol):
    """Counts prompts by what became of them: `RouterMetrics`, or a fake in tests."""

    def upsample(self, tier: str, key_class: str, outcome: str, seconds: float) -> None:
        """Count a prompt that was to be upsampled, and the seconds that it took."""


class Chat(Protocol):
    """The way to the LLM: `ChatClient`, or a fake in tests."""

    async def ask(self, model: str, messages: list[dict[str, Any]]) -> str:
        """Return what the LLM says; raise UpsamplingFailed."""


class CircuitBreaker:
    """Says whether to call a server at all: not for a while after failures in a row.

    Then it allows one call in each pause until one succeeds. `clock` returns seconds.
    """

    def __init__(
        self, max_failures: int, pause_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_failures = max_failures
        self._pause_s = pause_s
        self._clock = clock
        self._num_failures = 0
        self._next_at = 0.0

    def allows(self) -> bool:
        """Return whether a call may be made now; if it is one after a pause, no other may."""
        if self._num_failures < self._max_failures:
            return True
        if self._clock() < self._next_at:
            return False
        self._next_at = self._clock() + self._pause_s
        return True

    def succeed(self) -> None:
        """Note that the server has answered."""
        self._num_failures = 0

    def fail(self) -> None:
        """Note that it has failed; a pause begins with the last failure that is allowed."""
        self._num_failures += 1
        self._next_at = self._clock() + self._pause_s


class PromptCache:
    """The prompts that were upsampled last, as many as `max_bytes` hold, by a call's digest."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        # The one that was used longest ago comes first.
        self._prompts: dict[str, str] = {}

    def get(self, name: str) -> str | None:
        """Return the prompt of that call, or None."""
        prompt = self._prompts.pop(name, None)
        if prompt is not None:
            self._prompts[name] = prompt
        return prompt

    def put(self, name: str, prompt: str) -> None:
        """Keep a prompt, and forget those that were used longest ago."""
        if (old := self._prompts.pop(name, None)) is not None:
            self._num_bytes -= size_of(name, old)
        self._prompts[name] = prompt
        self._num_bytes += size_of(name, prompt)
        while self._num_bytes > self._max_bytes:
            oldest = next(iter(self._prompts))
            self._num_bytes -= size_of(oldest, self._prompts.pop(oldest))


def size_of(name: str, prompt: str) -> int:
    """Return about how many bytes an entry of the cache takes."""
    # Python keeps up to four bytes a character, and some hundred for each object.
    return 200 + len(name) + 4 * len(prompt)


@dataclass
class Flight:
    """A call that is being made, and how many requests wait for it."""

    task: "asyncio.Task[Upsampled]"
    num_waiting: int = 0


class Upsampler:
    """Upsamples the prompts of one gateway; all of it runs on the gateway's event loop.

    `max_chars`: no prompt becomes longer. `metrics` count what became of each.
    """

    def __init__(
        self,
        upsampling: Upsampling,
        max_chars: int,
        metrics: UpsamplingMetrics,
        chat: Chat | None = None,
    ) -> None:
        self.upsampling = upsampling
        self._max_chars = max_chars
        self._metrics = metrics
        self._chat = chat or ChatClient(upsampling)
        self._cache = PromptCache(upsampling.cache_bytes)
        self._breaker = CircuitBreaker(upsampling.max_failures, upsampling.pause_s)
        self._room = asyncio.Semaphore(upsampling.max_concurrent)
        self._flights: dict[str, Flight] = {}

    async def upsample(self, request: ImageRequest, key_class: str, at_most_s: float) -> Upsampled:
        """Return the prompt of a request upsampled as its tier wants it; never raise for it.

        `key_class`: the caller's, for the metrics. If this is cancelled, so is the call, unless
        others wait for it.
        """
        began = time.monotonic()
        with span(UPSAMPLE, {"flux.tier": request.tier, "flux.key_class": key_class}) as made:
            found = await self._find(request, at_most_s)
            found = found._replace(seconds=time.monotonic() - began)
            made.set_attribute("flux.outcome", found.outcome)
        self._metrics.upsample(request.tier, key_class, found.outcome, found.seconds)
        return found

    async def _find(self, request: ImageRequest, at_most_s: float) -> Upsampled:
        model, system_prompt = self._told(request)
        shown = request.references if self.upsampling.sends_images else ()
        if shown:
            # Hashing the pixels takes some milliseconds, the first time.
            await asyncio.to_thread(lambda: [each.digest for each in shown])
        name = call_name(model, system_prompt, request.prompt, [each.digest for each in shown])
        if (kept := self._cache.get(name)) is not None:
            return Upsampled(kept, "cached")
        if (flight := self._flights.get(name)) is not None:
            shared = await self._wait_for(name, flight, at_most_s)
            # The LLM has worked for another one, who pays for it.
            return shared._replace(outcome="cached") if shared.outcome == "done" else shared
        if not self._breaker.allows():
            return Upsampled(None, "skipped")
        # In an empty context: the call is not only that of the request that made it first.
        task = asyncio.get_running_loop().create_task(
            self._call(name, model, system_prompt, request.prompt, shown),
            context=contextvars.Context(),
        )
        flight = self._flights[name] = Flight(task)
        return await self._wait_for(name, flight, at_most_s)

    def _told(self, request: ImageRequest) -> tuple[str, str]:
        """Return the model and the system prompt for a request."""
        settings = self.upsampling.of_tier(request.tier)
        assert settings is not None and settings.model is not None
        if request.references:
            return settings.model, settings.edit_system_prompt or EDIT_SYSTEM_PROMPT
        return settings.model, settings.text_system_prompt or TEXT_SYSTEM_PROMPT

    async def _wait_for(self, name: str, flight: Flight, at_most_s: float) -> Upsampled:
        # The call limits itself: a second clock would only cut it off before it has noted that it
        # was late.
        timeout_s = at_most_s if at_most_s < self.upsampling.timeout_s else None
        flight.num_waiting += 1
        try:
            await asyncio.wait({flight.task}, timeout=timeout_s)
            return flight.task.result() if flight.task.done() else Upsampled(None, "late")
        finally:
            flight.num_waiting -= 1
            if not flight.num_waiting:
                flight.task.cancel()
                # Whoever comes next must not wait for a call that is being cancelled.
                if self._flights.get(name) is flight:
                    del self._flights[name]

    async def _call(
        self, name: str, model: str, system_prompt: str, prompt: str, shown: tuple[Any, ...]
    ) -> Upsampled:
        is_begun = False
        try:
            async with asyncio.timeout(self.upsampling.timeout_s), self._room:
                is_begun = True
                messages = messages_for(system_prompt, prompt, ())
                if shown:
                    messages = await asyncio.to_thread(messages_for, system_prompt, prompt, shown)
                said = await self._chat.ask(model, messages)
            upsampled = prompt_in(said, prompt, self._max_chars)
        except TimeoutError:
            if not is_begun:
                return Upsampled(None, "busy")
            self._breaker.fail()
            logger.warning("the upsampler took more than %g s", self.upsampling.timeout_s)
            return Upsampled(None, "late")
        except UpsamplingFailed as error:
            (self._breaker.fail if error.is_down else self._breaker.succeed)()
            logger.warning("the upsampler failed: %s", error)
            return Upsampled(None, "failed")
        except Exception:
            # A mistake of ours: whoever wanted better words still gets an image of the old ones.
            logger.exception("the upsampler could not be asked")
            return Upsampled(None, "failed")
        self._breaker.succeed()
        self._cache.put(name, upsampled)
        return Upsampled(upsampled, "done")


def call_name(model: str, system_prompt: str, prompt: str, digests: list[bytes]) -> str:
    """Return a digest of all that an answer depends on."""
    parts = json.dumps([model, system_prompt, prompt, [each.hex() for each in digests]])
    return sha256(parts.encode()).hexdigest()
