"""Typed configuration: what a Serve config file may say in the `args` of a tier's application."""

import os
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flux_ray.catalog.tiers import tier_for

Quantization = Literal["fp8", "int8", "nf4"]
Seconds = Annotated[float, Field(gt=0)]

# Ray reads it in the proxies of each node; gateways have the environment of their node, too.
PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
READ_WITH_H11 = "flux_ray.gateway.proxy:read_with_h11"


def keep_gloo_local() -> None:
    """Have the ranks of this process exchange over the loopback interface, if nothing else is said.

    Else gloo listens at whatever address the machine's name has, and it is told in no other way.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def reads_with_h11() -> bool:
    """Say whether Serve's proxy of this node was told to read HTTP with h11."""
    return os.environ.get(PROXY_CALLBACK) == READ_WITH_H11


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


# What a replica takes to start that does not scale, the weights being on the node's disk.
COLD_START_S = 20.0
GROUP_COLD_START_S = 60.0


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
    `retry_bytes`, `retry_s`: of finished images that a replica keeps for requests that come again,
    and for how long.
    `drain_timeout_s`: a replica that is taken away has so long for the requests that it has; else
    as long as the tier's longest one takes (router/pricing/config_check.py).
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
    retry_bytes: int = Field(128 * 2**20, ge=0)
    retry_s: Seconds = 120.0
    drain_timeout_s: Seconds | None = None

    @property
    def cold_start_s(self) -> float:
        """From the order of a replica until its first request, weights and all."""
        if self.autoscaling is not None:
            return self.autoscaling.cold_start_s
        return GROUP_COLD_START_S if self.parallel.num_ranks > 1 else COLD_START_S

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
