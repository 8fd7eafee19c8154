"""The Serve deployment of a text encoder that all replicas of a tier share."""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.tier import TierArgs
from flux_ray.engine.cache import Cache
from flux_ray.errors import FluxError
from flux_ray.replica.memory import free_memory, out_of_memory
from flux_ray.replica.patience import StepWatchdog
from flux_ray.replica.process import end_process, load_engine
from flux_ray.request import EncodedPrompt

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
