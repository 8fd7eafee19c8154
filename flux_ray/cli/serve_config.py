"""The tiers of a Serve config file, checked as the cluster will check them."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flux_ray.cli.client import fail
from flux_ray.config import Args, GatewayArgs, TierArgs
from flux_ray.errors import FluxError

BUILDERS: dict[str, type[Args]] = {
    "flux_ray.app:build_tier": TierArgs,
    "flux_ray.app:build_gateway": GatewayArgs,
}


def tiers_in(path: Path) -> list[TierArgs]:
    """The args of the applications that are tiers; a file that says nonsense ends the command."""
    tiers = [args for args in map(args_of, applications_in(path)) if isinstance(args, TierArgs)]
    if not tiers:
        fail(f"{path} serves no tier: none of its applications is one")
    return tiers


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
