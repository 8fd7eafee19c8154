"""Typed configuration of a tier: the `args` of its application in a Serve config file.

The settings that are made by the environment, where libraries leave no other way, are read and set
here as well.
"""

import os
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flux_ray.catalog import ALL_EMBEDDED, WORKLOADS, tier_for

Quantization = Literal["fp8", "int8", "nf4"]
Seconds = Annotated[float, Field(gt=0)]

# Ray reads this variable in the proxy of each node. A gateway has the environment of its node too,
# and so can tell how its proxy reads HTTP.
PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
READ_WITH_H11 = "flux_ray.gateway.proxy:read_with_h11"


def keep_collectives_local() -> None:
    """Have gloo and NCCL use the loopback interface, unless the environment names another one.

    Otherwise they listen at the address of a network, where others could reach them. There is no
    other way to tell them.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def use_gpu(gpu_id: str) -> None:
    """Have CUDA see only this GPU of the node; call it before anything asks for a device."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu_id


def reads_with_h11() -> bool:
    """Return whether Serve's proxy on this node was told to read HTTP with h11."""
    return os.environ.get(PROXY_CALLBACK) == READ_WITH_H11


# What Ray has to be told where it starts, for Serve to do what flux-ray promises. The Makefile says
# the same, with the reasons.
RAY_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "268435456",
    "FORWARDED_ALLOW_IPS": "",
    PROXY_CALLBACK: READ_WITH_H11,
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.25",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "3",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_health_check_period_ms": "1000",
    "MALLOC_ARENA_MAX": "1",
}


def environment_for_ray() -> dict[str, str]:
    """Return this process's environment, with the settings that it lacks, to start Ray in."""
    return {**RAY_SETTINGS, **os.environ}


def tracing_ratio() -> float:
    """Return the share of requests to trace, from 0 to 1, which Serve reads from there too."""
    return float(os.environ.get("RAY_SERVE_TRACING_SAMPLING_RATIO", "0.01"))


def environment() -> Mapping[str, str]:
    """Return the environment, for commands that look at what Ray and the hub are told by it."""
    return os.environ


class Args(BaseModel):
    """The base of all configuration models: unknown keys are errors, and values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Parallel(Args):
    """The split of one replica's model over `tensor` x `sequence` ranks, one GPU each.

    `tensor`: ranks that share the weights.
    `sequence`: such groups of ranks that share the tokens.
    `num_nodes`: how many nodes a rank group may use that does not fit into one.
    """

    tensor: int = Field(1, ge=1)
    sequence: int = Field(1, ge=1)
    num_nodes: int = Field(1, ge=1)

    @property
    def num_ranks(self) -> int:
        """Return the number of ranks, which are processes, of one replica."""
        return self.tensor * self.sequence


def check_heads(num_heads: int, tensor: int, sequence: int) -> None:
    """Raise ValueError, with the setting's name, if a split would cut an attention head.

    Tensor ranks split the heads first; sequence ranks split those that each tensor rank has.
    """
    if num_heads % tensor:
        raise ValueError(f"parallel.tensor {tensor} does not divide the {num_heads} heads")
    if num_heads // tensor % sequence:
        raise ValueError(
            f"parallel.sequence {sequence} does not divide the {num_heads // tensor} heads that"
            f" each rank has at parallel.tensor {tensor}"
        )


class Lora(Args):
    """A LoRA adapter that is fused into the transformer when it is loaded.

    `path`: its safetensors file, on every node.
    `scale`: its strength.
    """

    path: str
    scale: float = 1.0


# Seconds that a replica takes to start, with the weights on its node's disk, on tiers without
# autoscaling; that has its own setting.
COLD_START_S = 20.0
GROUP_COLD_START_S = 60.0


class Autoscaling(Args):
    """The rules by which a tier's replicas are added and removed: by work, not by requests.

    `min_replicas`: the fewest replicas; 0 lets a tier rest without any.
    `max_replicas`: the most replicas.
    `target_wait_s`: seconds within which waiting requests are to be started.
    `cold_start_s`: seconds that a replica takes to start.
    `headroom`: spare replicas, in standard deviations of the arriving work.
    `idle_s`: after so long without work the last replica is removed, if `min_replicas` is 0; the
    next request then waits for a new one.
    `gpu_budget`: the GPUs that all autoscaled tiers share; give each of them the same number. Tiers
    with a fixed number of replicas and the GPU of a shared text encoder are not counted in it.
    `priority`: if these GPUs are short, tiers of higher priority come first.
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
        """Raise ValueError unless min_replicas <= max_replicas."""
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}"
            )
        return self


class TierArgs(Args):
    """The args of one tier's application.

    `tier`: its name in the catalogue, which its application has too.
    `weights`: a folder, or a hub id with its revision (`owner/name@sha`); else the catalogue's.
    `dtype`: the type of the weights, and of what is computed with them.
    `device`: on what the ranks compute.
    `parallel`: over how many GPUs one replica's model is split; one, unless it says otherwise.
    `quantization`: the type of the linear layers of the transformer's blocks; the rest stays in
    `dtype`.
    `encoder_quantization`: the same for the text encoder.
    `text_encoder`: one in every replica (`colocated`), or one for all of the tier (`shared`).
    `loras`: adapters for all images of the tier.
    `num_replicas`: the fixed number of replicas, without `autoscaling`.
    `autoscaling`: the rules by which the number of replicas follows the work.
    `num_cpus`: CPUs for each rank, and threads of its torch.
    `node_labels`: the labels of the nodes that replicas may be on, as Ray's label selectors.
    `cache_bytes`: memory of a rank for encoded prompts and references; 0 for none.
    `max_ongoing_requests`: requests that a replica has at once; the others wait in the queue.
    `step_timeout_s`: a call to the ranks that takes longer ends the replica.
    `min_step_timeout_s`: so does one that takes longer than this, and ten times as long as those
    before it.
    `load_timeout_s`: seconds to load the weights, and to download them if they are not there.
    `retry_bytes`: bytes of finished images that a replica keeps for requests that are sent again.
    `retry_s`: how long it keeps them.
    `drain_timeout_s`: how long a replica that is removed has to finish its requests; by default as
    long as the tier's longest request takes.
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
    node_labels: dict[str, str] = {}
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
        """Return the seconds from the start of a replica to its first request."""
        if self.autoscaling is not None:
            return self.autoscaling.cold_start_s
        return GROUP_COLD_START_S if self.parallel.num_ranks > 1 else COLD_START_S

    @property
    def num_threads(self) -> int:
        """Return the number of torch threads of a rank."""
        return max(1, int(self.num_cpus))

    @property
    def num_gpus_per_replica(self) -> int:
        """Return the GPUs of one replica: one for each rank, none on CPUs."""
        return self.parallel.num_ranks if self.device == "cuda" else 0

    @model_validator(mode="after")
    def check_weights(self) -> "TierArgs":
        """Raise ValueError for a tier without weights, before any GPU is taken."""
        if self.weights is None and tier_for(self.tier).weights is None:
            raise ValueError(f"tier {self.tier} needs `weights`: a folder or owner/name@revision")
        return self

    @model_validator(mode="after")
    def check_sequence(self) -> "TierArgs":
        """Raise ValueError if ranks were to share the tokens of a model that cannot be split so."""
        if self.parallel.sequence > 1 and not tier_for(self.tier).splits_tokens:
            raise ValueError(
                f"tier {self.tier} cannot split its tokens over ranks, and parallel.sequence is"
                f" {self.parallel.sequence}: set it to 1, and parallel.tensor instead"
            )
        return self

    @model_validator(mode="after")
    def check_split(self) -> "TierArgs":
        """Raise ValueError if the ranks would cut a head of the tier's published model.

        A folder may hold a model of another shape, which only the loader knows.
        """
        if self.weights is None or self.weights in ALL_EMBEDDED or "@" in self.weights:
            try:
                num_heads = WORKLOADS[tier_for(self.tier).name].transformer.num_heads
                check_heads(num_heads, self.parallel.tensor, self.parallel.sequence)
            except ValueError as error:
                raise ValueError(f"tier {self.tier}: {error}") from None
        return self

    @model_validator(mode="after")
    def check_quantization(self) -> "TierArgs":
        """Raise ValueError for what the loader would refuse, before any GPU is taken."""
        if self.quantization == "nf4" and self.parallel.tensor > 1:
            raise ValueError(
                "quantization nf4 is for one small card, its blocks of weights cannot be cut:"
                f" parallel.tensor must be 1, not {self.parallel.tensor}"
            )
        return self

    @model_validator(mode="after")
    def check_gpu_budget(self) -> "TierArgs":
        """Raise ValueError unless the budget holds this tier's least replicas, and at least one."""
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
