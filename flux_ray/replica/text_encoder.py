"""Where prompts are encoded: by each replica's ranks, or by a text encoder that a tier shares.

`TextEncoder` is the Serve deployment of a shared one. A leader has one of two kinds of `Prompts`:
`EncodedByRanks`, or `EncodedElsewhere`, which calls the shared one.
"""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from flux_ray.catalog import tier_for
from flux_ray.config import TierArgs
from flux_ray.engine.cache import Cache
from flux_ray.errors import FluxError, ReplicaFailed
from flux_ray.replica.process import end_process, free_memory, load_engine, out_of_memory
from flux_ray.replica.watchdog import StepWatchdog
from flux_ray.stages import EncodedPrompt
from flux_ray.weights.start import ENCODER_PARTS, prepare_weights, too_slow

if TYPE_CHECKING:
    from flux_ray.engine.api import PromptEncoder

logger = logging.getLogger("ray.serve")


class Prompts(Protocol):
    """The step loop's way to the encoded prompt that the ranks need with a request."""

    async def wait_until_loaded(self) -> None:
        """Wait until prompts can be encoded."""

    async def encode_prompts(self, prompts: tuple[str, ...]) -> tuple[EncodedPrompt, ...]:
        """Return a request's encoded prompts, or none if the ranks encode; raise only FluxError."""


class EncodedByRanks:
    """The Prompts of replicas whose ranks have a text encoder of their own."""

    async def wait_until_loaded(self) -> None:
        """Return at once: the text encoder is loaded with the ranks."""

    async def encode_prompts(self, prompts: tuple[str, ...]) -> tuple[EncodedPrompt, ...]:
        """Return none: the ranks encode the prompts in their own stage."""
        return ()


class EncodedElsewhere:
    """The Prompts of replicas that share a text encoder: its death fails a request, no replica.

    `timeout_s` limits one prompt. It is longer than a restart takes, so that a request can wait for
    one; a text encoder that hangs ends itself.
    """

    def __init__(self, handle: DeploymentHandle[Any], timeout_s: float) -> None:
        self._handle = handle
        self._timeout_s = timeout_s

    async def wait_until_loaded(self) -> None:
        """Encode a prompt: Serve holds this first call back until a text encoder is running."""
        await self._handle.encode_prompt.remote("warm-up")

    async def encode_prompts(self, prompts: tuple[str, ...]) -> tuple[EncodedPrompt, ...]:
        """Return the prompts as the shared text encoder encodes them, up to 16 MB each.

        Raise ReplicaFailed if it dies or takes too long, and its own FluxErrors as they are.
        """
        return tuple([await self._encoded(prompt) for prompt in prompts])

    async def _encoded(self, prompt: str) -> EncodedPrompt:
        try:
            return await asyncio.wait_for(self._ask(prompt), self._timeout_s)
        except TimeoutError:
            raise ReplicaFailed(
                f"the text encoder took longer than {self._timeout_s:g} s"
            ) from None

    async def _ask(self, prompt: str) -> EncodedPrompt:
        # The step loop handles only FluxErrors; any other would end it, and the replica with it.
        try:
            encoded: EncodedPrompt = await self._handle.encode_prompt.remote(prompt)
        except RayTaskError as error:
            if isinstance(error.cause, FluxError):
                raise error.cause from None
            raise ReplicaFailed("the text encoder failed") from error
        except (RayError, RayServeException) as error:
            raise ReplicaFailed("the text encoder died") from error
        if not hasattr(encoded, "tensors"):
            # While the tier is upgraded: the next request finds the new one.
            raise ReplicaFailed("the text encoder is of another version")
        return encoded


class TextEncoder:
    """The Serve deployment of a text encoder; torch runs in its only thread, a prompt at a time.

    Encoded prompts are cached, up to `cache_bytes`. Serve calls it on the replica's event loop.
    """

    _encoder: "PromptEncoder"

    async def __init__(self, args: TierArgs) -> None:  # type: ignore[misc]
        """Load the model and encode a warm-up prompt; Serve takes the replica for RUNNING then.

        Raise WeightsUnavailable in seconds, and TimeoutError if it takes longer than
        `load_timeout_s`.
        """
        self._args = args
        self._turn = asyncio.Lock()
        self._watchdog = StepWatchdog(args.min_step_timeout_s, args.step_timeout_s)
        self._known: Cache[EncodedPrompt] = Cache(args.cache_bytes, lambda each: each.num_bytes)
        self._thread = ThreadPoolExecutor(max_workers=1)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(args.load_timeout_s) as limit:
                await loop.run_in_executor(self._thread, prepare_weights, args, ENCODER_PARTS)
                await loop.run_in_executor(self._thread, self._load)
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeoutError(too_slow(args, ENCODER_PARTS)) from None
        await self.encode_prompt("warm-up")

    def _load(self) -> None:
        load_engine()
        import torch

        from flux_ray.engine.api import Placement
        from flux_ray.engine.registry import load_prompt_encoder

        args = self._args
        if args.device == "cpu":
            torch.set_num_threads(args.num_threads)
        placement = Placement(
            args.dtype, args.device, encoder_quantization=args.encoder_quantization
        )
        self._encoder = load_prompt_encoder(tier_for(args.tier), args.weights, placement)

    async def check_health(self) -> None:
        """Return, to show Serve and the ledger's watch of replicas that the event loop runs."""

    async def encode_prompt(self, prompt: str) -> EncodedPrompt:
        """Return the encoded prompt; raise a FluxError for a caller's mistake or lack of memory.

        Any other error ends this process, and so does a prompt that takes longer than the watchdog
        allows: Serve starts another one.
        """
        # One at a time: the watchdog's limit is for one prompt, not for those queued before it.
        async with self._turn:
            began = time.perf_counter()
            try:
                encoded = await asyncio.wait_for(
                    asyncio.get_running_loop().run_in_executor(self._thread, self._encode, prompt),
                    self._watchdog.seconds_for("encode_prompt"),
                )
            except FluxError:
                raise
            except Exception as error:
                lacking = out_of_memory(error, self._args.tier)
                if lacking is None:
                    # Also for a prompt that takes too long: nothing can stop the thread it is in,
                    # and every later prompt would wait for that.
                    logger.exception("The text encoder ends")
                    end_process()
                free_memory(self._args.device)
                raise lacking from None
            if not encoded.is_cached:
                self._watchdog.learn(time.perf_counter() - began, "encode_prompt")
            return encoded

    def _encode(self, prompt: str) -> EncodedPrompt:
        from flux_ray.engine.packing import pack

        known = self._known.get(prompt)
        if known is not None:
            return replace(known, is_cached=True)
        encoded = pack(self._encoder.encode_prompt(prompt))
        self._known.put(prompt, encoded)
        return encoded
