"""Where a prompt is encoded: by the ranks themselves, or by the tier's shared text encoder."""

import asyncio
from typing import Any, Protocol

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from flux_ray.errors import FluxError, ReplicaFailed
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
