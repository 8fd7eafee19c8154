"""The tiers of a Serve config file, checked as the cluster will check them."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flux_ray.cli.client import fail
from flux_ray.config.gateway import GatewayArgs
from flux_ray.config.tier import Args, TierArgs
from flux_ray.errors import FluxError
from flux_ray.router.autoscaling.gpu_budget import Want, check_budget

BUILDERS: dict[str, type[Args]] = {
    "flux_ray.app:build_tier": TierArgs,
    "flux_ray.app:build_gateway": GatewayArgs,
}


def tiers_in(path: Path) -> list[TierArgs]:
    """The args of the applications that are tiers; a file that says nonsense ends the command."""
    tiers = [args for args in map(args_of, applications_in(path)) if isinstance(args, TierArgs)]
    if not tiers:
        fail(f"{path} serves no tier: none of its applications is one")
    check_gpu_budgets(tiers)
    return tiers


def check_gpu_budgets(tiers: list[TierArgs]) -> None:
    """One budget for all tiers that scale on GPUs, which holds what all of them must have."""
    wants, said = [], {}
    for args in tiers:
        scaling, size = args.autoscaling, args.num_gpus_per_replica
        if scaling is not None and size:
            wants.append(Want(args.tier, scaling.max_replicas, size, scaling.min_replicas))
            said[args.tier] = scaling.gpu_budget
    if len(set(said.values())) > 1:
        numbers = ", ".join(f"{tier} {number or 'none'}" for tier, number in said.items())
        fail(f"autoscaling.gpu_budget must be the same in all tiers that scale, not {numbers}")
    budget = next(iter(said.values()), None)
    if budget is None:
        return
    try:
        check_budget(wants, budget)
    except ValueError as error:
        fail(f"autoscaling.{error}")


def applications_in(path: Path) -> list[dict[str, Any]]:
    """The file's applications, all of them ours."""
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"{path} cannot be read: {error}")
    applications = config.get("applications") if isinstance(config, dict) else None
    if not isinstance(applications, list) or not all(isinstance(a, dict) for a in applications):
        fail(f"{path} is no Serve config file: it has no list of `applications`")
    return applications


def args_of(application: dict[str, Any]) -> Args:
    """Its typed args; what is wrong with them is named by application and key."""
    name, import_path = application.get("name"), application.get("import_path")
    if import_path not in BUILDERS:
        fail(f"application {name}: import_path {import_path} is none of {', '.join(BUILDERS)}")
    try:
        return BUILDERS[import_path].model_validate(application.get("args", {}))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["args", *(str(part) for part in first["loc"])])
        fail(f"application {name}: {key}: {first['msg']}")
    except FluxError as error:
        fail(f"application {name}: {error}")
