"""Serve `/v1/models`: the tiers of this gateway and their aliases, in OpenAI's format."""

import time
from collections.abc import Callable
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from flux_ray.config import GatewayArgs
from flux_ray.gateway.errors import Envelope
from flux_ray.gateway.model_names import ResolvedModel, names_of, target_for


class Model(BaseModel):
    """OpenAI's four fields, then the licence, defaults and limits of a model.

    `tiers`: those that may serve it, best first; the other fields are the best one's.
    `scales_sizes`: sizes outside the sides given here are generated at the default area and scaled.
    `takes_guidance`: whether the caller's guidance has an effect, else `default_guidance` is fixed.
    `takes_negative`: whether it takes a `negative_prompt`, and a `true_cfg_scale` for it.
    `default_true_cfg_scale`: above 1 each step has two forwards, and the guidance is this scale.
    `takes_mask`, `requires_mask`: whether it can generate a part of an image, or only that.
    `masks_only`: whether it takes an image for nothing but to generate a part of it.
    `takes_strength`: whether an edit under a mask can begin with less than pure noise.
    `takes_control`: whether it needs a `control_image`, whose edges or depths it follows.
    `max_images`, `max_prompt_chars`: this gateway's own limits of a request.
    `prompt_upsampling`: whether an LLM makes prompts more detailed: `never`, `asked` (for requests
    that ask for it) or `default` (for all that do not refuse it). A key may have no part in it.
    `is_default`: this model serves requests that name none.
    `deployed`: whether one of its tiers is deployed; until then its requests are answered 503.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    tiers: list[str]
    license: str
    default_size: str
    default_steps: int
    max_steps: int
    takes_guidance: bool
    default_guidance: float
    takes_negative: bool
    default_true_cfg_scale: float
    max_images: int
    max_prompt_chars: int
    max_references: int
    takes_mask: bool
    requires_mask: bool
    masks_only: bool
    takes_strength: bool
    takes_control: bool
    min_side: int
    max_side: int
    max_pixels: int
    size_multiple: int
    scales_sizes: bool
    prompt_upsampling: Literal["never", "asked", "default"]
    is_default: bool
    deployed: bool


class ModelList(BaseModel):
    """All models of this gateway."""

    object: Literal["list"] = "list"
    data: list[Model]


class Models:
    """The two routes. `is_deployed` says whether a tier is deployed."""

    def __init__(self, args: GatewayArgs, is_deployed: Callable[[str], bool]) -> None:
        self.args = args
        self.is_deployed = is_deployed
        # OpenAI's clients require a time; when the gateway started serves as one.
        self.created = int(time.time())
        is_alone = args.default_tier is None and len(args.tiers) == 1
        self._default = args.tiers[0] if is_alone else args.default_tier

    def routes(self) -> APIRouter:
        """Return both routes; they answer GET."""
        routes = APIRouter(tags=["models"], responses={"default": {"model": Envelope}})
        routes.add_api_route("/v1/models", self.list_models)
        routes.add_api_route("/v1/models/{model:path}", self.show_model)
        return routes

    async def list_models(self) -> ModelList:
        """List the models that this gateway is configured to serve."""
        targets = [target_for(name, self.args, may_spill=True) for name in names_of(self.args)]
        return ModelList(data=[self.model_for(target) for target in targets])

    async def show_model(self, model: str) -> Model:
        """Return one model by its name."""
        return self.model_for(target_for(model, self.args, may_spill=True))

    def model_for(self, target: ResolvedModel) -> Model:
        """Return a tier of the catalogue, or an alias, as clients see it."""
        tier = target.tiers[0]
        return Model(
            id=target.name,
            created=self.created,
            owned_by=tier.owner,
            tiers=[each.name for each in target.tiers],
            license=tier.license,
            default_size=f"{tier.default_side}x{tier.default_side}",
            default_steps=tier.num_steps,
            max_steps=tier.max_steps,
            takes_guidance=tier.is_guided,
            default_guidance=tier.guidance,
            takes_negative=tier.takes_negative,
            default_true_cfg_scale=tier.true_cfg_scale,
            max_images=self.args.limits.max_images,
            max_prompt_chars=self.args.limits.max_prompt_chars,
            max_references=tier.max_references,
            takes_mask=tier.takes_mask,
            requires_mask=tier.requires_mask,
            masks_only=tier.masks_only,
            takes_strength=tier.takes_strength,
            takes_control=tier.takes_control,
            min_side=tier.min_side,
            max_side=tier.max_side,
            max_pixels=tier.max_pixels,
            size_multiple=tier.size_multiple,
            scales_sizes=tier.scales_sizes,
            prompt_upsampling=self._upsampling_of(tier.name),
            is_default=target.name == self._default,
            deployed=any(self.is_deployed(each.name) for each in target.tiers),
        )

    def _upsampling_of(self, tier: str) -> Literal["never", "asked", "default"]:
        upsampling = self.args.upsampling
        settings = None if upsampling is None else upsampling.of_tier(tier)
        if settings is None:
            return "never"
        return "default" if settings.by_default else "asked"
