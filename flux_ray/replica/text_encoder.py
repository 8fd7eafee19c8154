"""The Serve deployment of a text encoder that all replicas of a tier share.

Where a prompt is encoded: by the ranks themselves, or by the tier's shared text encoder.
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
from flux_ray.request import EncodedPrompt


class Prompts(Protocol):
    """What the ranks need for a prompt besides its words."""

    async def wait_until_loaded(self) -> None:
        """Return when prompts can be encoded."""

    async def encode_prompt(self, prompt: str) -> EncodedPrompt | None:
        """None where the ranks encode it themselves. Raises FluxError only."""


class EncodedByRanks:
    """Every rank group has a text encoder of its own."""

    async def wait_until_loaded(self) -> None:
        """It comes with the ranks."""

    async def encode_prompt(self, prompt: str) -> None:
        """Nothing to do."""


class EncodedElsewhere:
    """A text encoder that other replicas use too: its death fails a request, but not the group.

    `timeout_s` is longer than it takes to start anew: one that hangs ends itself.
    """

    def __init__(self, handle: DeploymentHandle[Any], timeout_s: float) -> None:
        self._handle = handle
        self._timeout_s = timeout_s

    async def wait_until_loaded(self) -> None:
        """Serve holds the call back until there is a replica."""
        await self._handle.encode_prompt.remote("warm-up")

    async def encode_prompt(self, prompt: str) -> EncodedPrompt:
        """As the text encoder has it: 16 MB for the largest."""
        try:
            return await asyncio.wait_for(self._ask(prompt), self._timeout_s)
        except TimeoutError:
            raise ReplicaFailed(
                f"the text encoder took longer than {self._timeout_s:g} s"
            ) from None

    async def _ask(self, prompt: str) -> EncodedPrompt:
        try:
            encoded: EncodedPrompt = await self._handle.encode_prompt.remote(prompt)
        except RayTaskError as error:
            if isinstance(error.cause, FluxError):
                raise error.cause from None
            raise ReplicaFailed("the text encoder failed") from error
        except (RayError, RayServeException) as error:
            raise ReplicaFailed("the text encoder died") from error
        return encoded


if TYPE_CHECKING:
    from flux_ray.engine.flux2.text_encoder import PromptEncoder

logger = logging.getLogger("ray.serve")


class TextEncoder:
    """Serve's loop runs here, torch in a thread of its own: one prompt at a time."""

    _encoder: "PromptEncoder"

    async def __init__(self, args: TierArgs) -> None:  # type: ignore[misc]
        """Serve awaits this: the replica is RUNNING once it has encoded a prompt."""
        self._args = args
        self._turn = asyncio.Lock()
        self._patience = StepWatchdog(args.min_step_timeout_s, args.step_timeout_s)
        self._known: Cache[EncodedPrompt] = Cache(args.cache_bytes, lambda each: len(each.data))
        self._thread = ThreadPoolExecutor(max_workers=1)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._load)
        await self.encode_prompt("warm-up")

    def _load(self) -> None:
        load_engine()
        import torch

        from flux_ray.engine.flux2.text_encoder import load_prompt_encoder
        from flux_ray.engine.loading import Placement

        args = self._args
        if args.device == "cpu":
            torch.set_num_threads(args.num_threads)
        placement = Placement(
            args.dtype, args.device, encoder_quantization=args.encoder_quantization
        )
        self._encoder = load_prompt_encoder(tier_for(args.tier), args.weights, placement)

    async def check_health(self) -> None:
        """Answer Serve, and whoever ends what hangs: this loop runs."""

    async def encode_prompt(self, prompt: str) -> EncodedPrompt:
        """The prompt for the ranks. What is no caller's mistake, or hangs, ends this process."""
        async with self._turn:
            began = time.perf_counter()
            try:
                encoded = await asyncio.wait_for(
                    asyncio.get_running_loop().run_in_executor(self._thread, self._encode, prompt),
                    self._patience.seconds_for("encode_prompt"),
                )
            except FluxError:
                raise
            except Exception as error:
                lacking = out_of_memory(error, self._args.tier)
                if lacking is None:
                    logger.exception("The text encoder ends")
                    end_process()
                free_memory(self._args.device)
                raise lacking from None
            if not encoded.is_cached:
                self._patience.learn(time.perf_counter() - began, "encode_prompt")
            return encoded

    def _encode(self, prompt: str) -> EncodedPrompt:
        from flux_ray.engine.flux2.text_encoder import pack

        known = self._known.get(prompt)
        if known is not None:
            return replace(known, is_cached=True)
        encoded = pack(self._encoder.encode_prompt(prompt))
        self._known.put(prompt, encoded)
        return encoded
