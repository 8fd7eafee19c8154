"""Typed configuration of prompt upsampling: which LLM rewrites whose prompts, and its price."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import Field

from flux_ray.config.tier import Args, Seconds


class TierUpsampling(Args):
    """What differs for the prompts of one tier.

    `by_default`: upsample also the prompts of requests that do not say whether they want it.
    `model`: another model of the same endpoint, such as the upsampler that a family came with.
    `text_system_prompt`: what the LLM is told to do with a prompt for a new image.
    `edit_system_prompt`: what it is told to do with an instruction for reference images.
    """

    by_default: bool = False
    model: str | None = None
    text_system_prompt: str | None = Field(None, min_length=1)
    edit_system_prompt: str | None = Field(None, min_length=1)


class Upsampling(Args):
    """An LLM that turns short prompts into detailed ones, for requests that ask for it.

    It is any server with OpenAI's chat API. Where it fails or is late, prompts are used as sent.

    `url`: the base URL of that API, as its clients take it: `http://127.0.0.1:8000/llm/v1`.
    `model`: the name of the model there.
    `api_key_file`: a file with the key that the server asks for; it is read for every call.
    `timeout_s`: how long a prompt may take, and at most half of the time that its request has.
    `max_tokens`: the longest answer, in tokens of the LLM.
    `temperature`: 0 gives the same prompt the same answer, as far as the server can.
    `extra_body`: further fields of every call, such as `chat_template_kwargs`; `null` leaves one
    out.
    `sends_images`: whether the LLM is shown the reference images, scaled down; it takes a model
    that can see.
    `gpu_seconds_per_second`: what a second of the LLM costs the caller, in GPU seconds: as many as
    the GPUs of yours that it holds, over the requests that it does at once.
    `max_concurrent`: calls of one gateway at once; further ones wait within their time.
    `max_failures`: after so many failures in a row, the LLM is left alone for a while.
    `pause_s`: for so long, and until one call has succeeded.
    `cache_bytes`: memory of a gateway for prompts that were upsampled before.
    `text_system_prompt`: as of a tier, for all tiers that have none of their own.
    `edit_system_prompt`: likewise.
    `tiers`: the tiers whose prompts may be upsampled, and what differs there; all tiers, if it is
    left out. Key classes with `upsampling: false` have no part in it.
    """

    # No user and password: addresses are logged.
    url: str = Field(pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$")
    model: str = Field(min_length=1)
    api_key_file: Path | None = None
    timeout_s: Seconds = 15.0
    max_tokens: int = Field(1024, ge=16)
    temperature: float = Field(0.0, ge=0, le=2)
    extra_body: dict[str, Any] = Field(default_factory=dict)
    sends_images: bool = False
    gpu_seconds_per_second: float = Field(0.0, ge=0)
    max_concurrent: int = Field(16, ge=1)
    max_failures: int = Field(3, ge=1)
    pause_s: Seconds = 30.0
    cache_bytes: int = Field(16 * 2**20, ge=0)
    text_system_prompt: str | None = Field(None, min_length=1)
    edit_system_prompt: str | None = Field(None, min_length=1)
    tiers: dict[str, TierUpsampling] | None = Field(None, min_length=1)

    def of_tier(self, tier: str) -> TierUpsampling | None:
        """Return the settings of a tier, its own before those of all; None if it has none."""
        own = TierUpsampling() if self.tiers is None else self.tiers.get(tier)
        if own is None:
            return None
        return TierUpsampling(
            by_default=own.by_default,
            model=own.model or self.model,
            text_system_prompt=own.text_system_prompt or self.text_system_prompt,
            edit_system_prompt=own.edit_system_prompt or self.edit_system_prompt,
        )

    def check(self, tiers: Collection[str], request_timeout_s: float) -> None:
        """Raise ValueError if it is for a tier that is not served, or outlasts every request."""
        for name in (self.tiers or {}).keys() - set(tiers):
            raise ValueError(f"upsampling.tiers.{name}: {name} is not among tiers")
        if self.timeout_s >= request_timeout_s:
            raise ValueError(
                f"upsampling.timeout_s {self.timeout_s:g} leaves nothing of request_timeout_s"
                f" {request_timeout_s:g}; make it shorter"
            )
