"""A gateway with an LLM beside it, which is a real HTTP server on this machine."""

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from flux_ray.config import GatewayArgs, Upsampling
from flux_ray.gateway.api import build_api
from flux_ray.gateway.upsampling.upsampler import Upsampler
from tests.conftest import LIMITS
from tests.gateway.upsampling.chat_server import ChatServer, chatting


@pytest.fixture
async def llm() -> AsyncIterator[ChatServer]:
    async with chatting() as server:
        yield server


@pytest.fixture
def args_with(llm: ChatServer, gateway_args: GatewayArgs) -> Callable[..., GatewayArgs]:
    """Return `args_with(timeout_s=1)`: the gateway's args with those of the upsampler."""

    def make(**settings: Any) -> GatewayArgs:
        upsampling = Upsampling(**({"url": llm.url, "model": "scribe"} | settings))
        return gateway_args.model_copy(update={"upsampling": upsampling})

    return make


@pytest.fixture
def upsampler_with(llm: ChatServer, bill) -> Callable[..., Upsampler]:
    """Return `upsampler_with(timeout_s=1)`: an upsampler with these settings."""

    def make(**settings: Any) -> Upsampler:
        upsampling = Upsampling(**({"url": llm.url, "model": "scribe"} | settings))
        return Upsampler(upsampling, LIMITS.max_prompt_chars, bill)

    return make


@pytest.fixture
def api(router, args_with) -> FastAPI:
    return build_api(router, args_with())


@pytest.fixture
def ask_of() -> Callable[..., Any]:
    """Return `ask_of(api, prompt_upsampling=True)`: the answer of OpenAI's route to a ring."""

    async def ask_of(
        api: FastAPI, headers: dict[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        body = {"model": "tiny", "prompt": "a ring"} | fields
        transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.post("/v1/images/generations", json=body, headers=headers or {})

    return ask_of


@pytest.fixture
def ask(api: FastAPI, ask_of: Callable[..., Any]) -> Callable[..., Any]:
    """Return `ask(prompt_upsampling=True)`, of the gateway of the test."""
    return partial(ask_of, api)
