"""`/v1/models`: the tiers of this gateway, in OpenAI's words."""

import time
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from flux_ray.catalog import Tier, tier_for
from flux_ray.config import GatewayArgs
from flux_ray.gateway.failures import Envelope
from flux_ray.gateway.tiers import served_tier


class Model(BaseModel):
    """A tier: OpenAI's four fields, then what its licence, defaults and limits are."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    license: str
    default_size: str
    default_steps: int
    max_steps: int
    max_references: int
    max_pixels: int
    size_multiple: int


class ModelList(BaseModel):
    """All tiers of this gateway."""

    object: Literal["list"] = "list"
    data: list[Model]


class Models:
    """The two routes; `created` is when this gateway started."""

    def __init__(self, args: GatewayArgs) -> None:
        self.args = args
        self.created = int(time.time())

    def routes(self) -> APIRouter:
        """Both answer GET."""
        routes = APIRouter(tags=["models"], responses={"default": {"model": Envelope}})
        routes.add_api_route("/v1/models", self.list_models)
        routes.add_api_route("/v1/models/{model}", self.show_model)
        return routes

    async def list_models(self) -> ModelList:
        """The tiers that this gateway is configured to serve."""
        return ModelList(data=[self.model_for(tier_for(name)) for name in self.args.tiers])

    async def show_model(self, model: str) -> Model:
        """One tier."""
        return self.model_for(served_tier(model, self.args))

    def model_for(self, tier: Tier) -> Model:
        """A row of the catalogue as a client sees it."""
        return Model(
            id=tier.name,
            created=self.created,
            owned_by=tier.owner,
            license=tier.license,
            default_size=f"{tier.default_side}x{tier.default_side}",
            default_steps=tier.num_steps,
            max_steps=tier.max_steps,
            max_references=tier.max_references,
            max_pixels=tier.max_pixels,
            size_multiple=tier.size_multiple,
        )
