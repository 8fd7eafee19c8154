"""Read a Serve config file and check it as far as the file alone can tell, for all commands.

The checks of `flux_ray/config/checks.py` come first, then those that need prices and budgets.
Errors are printed one a line, each with the file's name, and end the command with status 1.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml

from flux_ray.cli.client import complain, fail, warn
from flux_ray.config import (
    Finding,
    NamedArgs,
    NotServeConfig,
    TierArgs,
    applications_of,
    check_file,
    check_own_addresses,
    check_paths,
    gateways_among,
    tiers_among,
)
from flux_ray.router.autoscaling.gpu_budget import Want, check_budget
from flux_ray.router.pricing import check_possible


@dataclass(frozen=True)
class ConfigFile:
    """A Serve config file that was read: its text as plain values, and its typed applications."""

    path: Path
    config: dict[str, Any]
    applications: list[NamedArgs]

    @property
    def tiers(self) -> list[TierArgs]:
        """Return the args of its tiers."""
        return [each.args for each in tiers_among(self.applications)]


def read_config(path: Path) -> dict[str, Any]:
    """Return a Serve config file as plain values; end the command if it is none."""
    try:
        config = yaml.safe_load(path.read_text())
        applications_of(config)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"{path} cannot be read: {error}")
    except NotServeConfig as error:
        fail(f"{path} is no Serve config file: {error}")
    checked: dict[str, Any] = config
    return checked


def check_config(
    path: Path,
    *,
    is_here: bool | None = None,
    allow_others: bool = False,
    are_warnings_shown: bool = True,
    config: dict[str, Any] | None = None,
) -> ConfigFile:
    """Return the file if nothing is wrong with it; else name all errors and end the command.

    `is_here`: whether its paths are those of this machine, or of others; None asks for no path and
    no address, as for a file that is not deployed.
    `allow_others`: let applications that are not flux-ray's pass, unchecked.
    `config`: what the file says after a command has changed it.
    """
    config = read_config(path) if config is None else config
    applications, findings = check_file(config, allow_others=allow_others)
    findings += [*check_prices(applications), *check_budgets(applications)]
    if is_here is not None:
        findings += [*check_own_addresses(applications), *check_paths(applications, is_here)]
    report(path, findings, are_warnings_shown=are_warnings_shown)
    return ConfigFile(path, config, applications)


def report(path: Path, findings: Iterable[Finding], *, are_warnings_shown: bool = True) -> None:
    """Print findings with the file's name; end the command with status 1 if one is an error."""
    found = list(findings)
    errors = [each for each in found if not each.is_warning]
    for error in errors:
        complain(f"{path}: {error.text}")
    if errors:
        raise typer.Exit(1)
    for finding in found if are_warnings_shown else ():
        warn(f"{path}: {finding.text}")


def check_prices(applications: Iterable[NamedArgs]) -> Iterator[Finding]:
    """Find deadlines and price limits that no GPU could keep."""
    for gateway in gateways_among(applications):
        try:
            check_possible(gateway.args)
        except ValueError as error:
            yield Finding(f"application {gateway.name}: args.{error}")


def check_budgets(applications: Iterable[NamedArgs]) -> Iterator[Finding]:
    """Find GPU budgets that differ between tiers that scale, or that are too small for all."""
    wants, said = [], {}
    for each in tiers_among(applications):
        args, scaling, size = each.args, each.args.autoscaling, each.args.num_gpus_per_replica
        if scaling is not None and size:
            wants.append(Want(args.tier, scaling.max_replicas, size, scaling.min_replicas))
            said[args.tier] = scaling.gpu_budget
    if len(set(said.values())) > 1:
        numbers = ", ".join(f"{tier} {number or 'none'}" for tier, number in said.items())
        yield Finding(
            f"autoscaling.gpu_budget must be the same in all tiers that scale, not {numbers}"
        )
        return
    budget = next(iter(said.values()), None)
    if budget is not None:
        try:
            check_budget(wants, budget)
        except ValueError as error:
            yield Finding(f"autoscaling.{error}")


def tiers_in(path: Path, *, are_warnings_shown: bool = False) -> list[TierArgs]:
    """Return the args of a config file's tiers; end the command if the file is invalid."""
    tiers = check_config(path, are_warnings_shown=are_warnings_shown).tiers
    if not tiers:
        fail(f"{path} serves no tier: none of its applications is one")
    return tiers
