"""Typed configuration: what a Serve config file may say in an application's `args`."""

from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flux_ray.cards import speed_for
from flux_ray.catalog import TIERS, tier_for
from flux_ray.keys import KeyClass

Quantization = Literal["fp8", "int8", "nf4"]
Policy = Literal["best", "spill", "cascade"]
Seconds = Annotated[float, Field(gt=0)]
# As a model's name, whatever tiers there are: the best that meets the deadline.
AUTO = "auto"


class Args(BaseModel):
    """Unknown keys are errors, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Parallel(Args):
    """How one copy of the model is split over `tensor` x `sequence` ranks, one GPU each.

    `tensor` ranks share the weights, `sequence` ranks share the tokens. A group that does not fit
    in one node says over how many it may spread.
    """

    tensor: int = Field(1, ge=1)
    sequence: int = Field(1, ge=1)
    num_nodes: int = Field(1, ge=1)

    @property
    def num_ranks(self) -> int:
        """The processes of one rank group."""
        return self.tensor * self.sequence


class Lora(Args):
    """A LoRA adapter that is fused into the transformer: a safetensors file, and how strongly."""

    path: str
    scale: float = 1.0


class Autoscaling(Args):
    """How many replicas a tier may have, and what calls for one more: GPU seconds, not requests.

    `target_wait_s`: what waits is to be begun within that time. `cold_start_s`: what a replica
    takes to start. `headroom`: standard deviations of the arriving work for which there are
    replicas to spare. `idle_s`: after so long without work the last replica goes, if
    `min_replicas` is 0; the next request then waits for one.
    `gpu_budget`: the GPUs that all tiers which scale share, the same number in each of them. Where
    they are short, a tier of higher `priority` comes first. What does not scale is beside it: tiers
    of a fixed number, and the card of a shared text encoder.
    """

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(ge=1)
    target_wait_s: Seconds = 5.0
    cold_start_s: Seconds = 60.0
    headroom: float = Field(0.5, ge=0)
    idle_s: Seconds = 300.0
    gpu_budget: int | None = Field(None, ge=1)
    priority: int = 0

    @model_validator(mode="after")
    def check_bounds(self) -> "Autoscaling":
        """In the right order."""
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}"
            )
        return self


class TierArgs(Args):
    """The application of one tier.

    `weights`: a folder, or a hub id with its revision (`owner/name@sha`); else the catalogue's.
    `quantization`: of the linear layers of the transformer's blocks, and `encoder_quantization` of
    the text encoder's; the rest stays in `dtype`.
    `text_encoder`: in every rank group, or one for all replicas of the tier (`shared`).
    `num_replicas`: as many as that, unless `autoscaling` says otherwise.
    `num_cpus`: for each rank, whose torch uses as many threads.
    `cache_bytes`: what a rank keeps of encoded prompts and references; 0 for nothing.
    `step_timeout_s`: a call to the ranks that takes longer ends the replica; so does one that takes
    ten times as long as those before it, and longer than `min_step_timeout_s`.
    `drain_timeout_s`: longer than the longest request: a replica that is taken away waits so long.
    """

    tier: str
    weights: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: Literal["cpu", "cuda"] = "cuda"
    parallel: Parallel = Parallel()
    quantization: Quantization | None = None
    encoder_quantization: Quantization | None = None
    text_encoder: Literal["colocated", "shared"] = "colocated"
    loras: tuple[Lora, ...] = ()
    num_replicas: int = Field(1, ge=0)
    autoscaling: Autoscaling | None = None
    num_cpus: float = Field(1.0, gt=0)
    cache_bytes: int = Field(64 * 2**20, ge=0)
    max_ongoing_requests: int = Field(8, ge=1)
    step_timeout_s: Seconds = 60.0
    min_step_timeout_s: Seconds = 5.0
    load_timeout_s: Seconds = 600.0
    drain_timeout_s: Seconds = 660.0

    @property
    def num_threads(self) -> int:
        """Of torch in a rank on a CPU."""
        return max(1, int(self.num_cpus))

    @property
    def num_gpus_per_replica(self) -> int:
        """One for each rank; none on processors."""
        return self.parallel.num_ranks if self.device == "cuda" else 0

    @model_validator(mode="after")
    def check_weights(self) -> "TierArgs":
        """A tier without weights fails here, before any GPU is taken."""
        if self.weights is None and tier_for(self.tier).weights is None:
            raise ValueError(f"tier {self.tier} needs `weights`: a folder or owner/name@revision")
        return self

    @model_validator(mode="after")
    def check_quantization(self) -> "TierArgs":
        """What the loader would refuse anyway, before any GPU is taken."""
        if self.quantization == "nf4" and self.parallel.tensor > 1:
            raise ValueError(
                "quantization nf4 is for one small card, its blocks of weights cannot be cut:"
                f" parallel.tensor must be 1, not {self.parallel.tensor}"
            )
        return self

    @model_validator(mode="after")
    def check_gpu_budget(self) -> "TierArgs":
        """It holds the replicas that this tier must have, and one at least."""
        scaling, size = self.autoscaling, self.num_gpus_per_replica
        if scaling is None or scaling.gpu_budget is None:
            return self
        if scaling.gpu_budget < size:
            raise ValueError(
                f"autoscaling.gpu_budget {scaling.gpu_budget} is below one replica of {self.tier},"
                f" which takes {size} GPUs"
            )
        least = scaling.min_replicas * size
        if scaling.gpu_budget < least:
            raise ValueError(
                f"autoscaling.gpu_budget {scaling.gpu_budget} is below autoscaling.min_replicas"
                f" {scaling.min_replicas} of {self.tier}, which take {least} GPUs"
            )
        return self


class Limits(Args):
    """What the gateway refuses before it is decoded."""

    max_body_bytes: int = 64 * 2**20
    max_image_bytes: int = 20 * 2**20
    max_image_pixels: int = 20_000_000
    max_prompt_chars: int = 32_000
    max_images: int = 10


class Fetching(Args):
    """Reference pictures by URL: from public addresses, unless `networks` names others.

    `hosts`: if given, no others. `networks`: of ours, that callers may reach, such as
    `10.1.2.0/24`. `timeout_s`: for all pictures of a request together.
    """

    enabled: bool = True
    hosts: tuple[str, ...] | None = None
    ports: tuple[int, ...] = (80, 443)
    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    timeout_s: Seconds = 10.0


class Alias(Args):
    """Another name for tiers, best first; the name of another alias stands for its tiers.

    `policy`: `best` is the first tier that meets the deadline. `spill` is the first tier; where the
    caller allows it, the next one that begins within `max_wait_s`. `cascade` is the first tier, and
    for those who stream a preview by the last one before it.
    `max_gpu_seconds`: only tiers that do the request at that price.
    In a config file a single tier's name is an alias too.
    """

    tiers: tuple[str, ...] = Field(min_length=1)
    policy: Policy = "best"
    max_wait_s: Seconds = 5.0
    max_gpu_seconds: float | None = Field(None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def read_name(cls, value: Any) -> Any:
        """`gpt-image-1: flux-2-dev`."""
        return {"tiers": [value]} if isinstance(value, str) else value

    @model_validator(mode="after")
    def check_cascade(self) -> "Alias":
        """It needs a tier for the preview, and is not a matter of price."""
        if self.policy == "cascade" and self.max_gpu_seconds is not None:
            raise ValueError("max_gpu_seconds is for the policies best and spill")
        if self.policy == "cascade" and len(self.tiers) < 2:
            raise ValueError("tiers of a cascade are at least two: the last draws the preview")
        return self


class GatewayArgs(Args):
    """The gateway application. A tier's application bears the tier's name.

    `default_tier`: a tier or an alias. `card`: what the tiers run on, by which a request is priced
    before any of its kind was measured. `deadlines`: of tiers, where neither the caller nor its
    class says one. `keys_file`: what `flux-ray keys` writes; without one everybody is let in.
    `record_to`: a folder for traces of what arrives, for `flux-ray simulate`.
    """

    tiers: tuple[str, ...] = Field(min_length=1)
    aliases: dict[str, Alias] = {}
    default_tier: str | None = None
    card: str = "h100-80gb"
    deadlines: dict[str, Seconds] = {}
    keys_file: Path | None = None
    key_classes: dict[str, KeyClass] = {}
    record_to: Path | None = None
    num_replicas: int = Field(1, ge=1)
    max_ongoing_requests: int = Field(256, ge=1)
    request_timeout_s: Seconds = 600.0
    drain_timeout_s: Seconds = 660.0
    limits: Limits = Limits()
    fetch: Fetching = Fetching()

    def alias_for(self, name: str) -> Alias | None:
        """What a model's name stands for, by tiers only; None if there is no such name."""
        if name in self.aliases:
            alias = self.aliases[name]
            return alias.model_copy(update={"tiers": self._tiers_of(name, ())})
        if name in self.tiers:
            return Alias(tiers=(name,))
        if name == AUTO:
            # The catalogue's best are its last.
            served = [tier.name for tier in reversed(TIERS) if tier.name in self.tiers]
            return Alias(tiers=tuple(served))
        return None

    @model_validator(mode="after")
    def check_tiers(self) -> "GatewayArgs":
        """Every tier has a row, and the default one is served."""
        for name in self.tiers:
            tier_for(name)
        speed_for(self.card)
        for name in self.deadlines.keys() - set(self.tiers):
            raise ValueError(f"deadlines.{name}: {name} is not among tiers")
        return self

    @model_validator(mode="after")
    def check_aliases(self) -> "GatewayArgs":
        """Every alias ends at tiers that are served, and none at itself."""
        for name, alias in self.aliases.items():
            if name in self.tiers:
                raise ValueError(f"aliases.{name}: a tier has that name")
            tiers = self._tiers_of(name, ())
            if alias.policy == "cascade" and len(tiers) < 2:
                raise ValueError(f"aliases.{name}: its tiers are all {tiers[0]}: no cascade")
        if self.default_tier is not None and self.alias_for(self.default_tier) is None:
            raise ValueError(f"default_tier {self.default_tier} is not among tiers")
        return self

    @model_validator(mode="after")
    def check_classes(self) -> "GatewayArgs":
        """Somebody can be in them, and their tiers are served."""
        if self.key_classes and self.keys_file is None:
            raise ValueError("key_classes: nobody is in them without a keys_file")
        for name, key_class in self.key_classes.items():
            for tier in key_class.tiers or ():
                if tier not in self.tiers:
                    raise ValueError(f"key_classes.{name}.tiers: {tier} is not among tiers")
        return self

    def _tiers_of(self, name: str, path: tuple[str, ...]) -> tuple[str, ...]:
        if name in path:
            raise ValueError(f"aliases.{name}: a cycle: {' -> '.join((*path, name))}")
        if name in self.tiers:
            return (name,)
        if name not in self.aliases:
            where = f"aliases.{path[-1]}.tiers: " if path else ""
            raise ValueError(f"{where}no tier and no alias {name!r} is served here")
        inner = (self._tiers_of(each, (*path, name)) for each in self.aliases[name].tiers)
        # Each once, where it is best.
        return tuple(dict.fromkeys(tier for tiers in inner for tier in tiers))
