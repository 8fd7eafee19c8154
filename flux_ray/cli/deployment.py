"""Decide what a deployment changes and when it is done, from what the dashboard says of Serve.

Everything here is pure: a config and Serve's details go in, changes, rows and outcomes come out.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flux_ray.cli.client import plural
from flux_ray.config import Finding

Kind = Literal["new", "changed", "unchanged", "removed"]
# Serve's last words on an application; all others are on the way to one of them.
RUNNING, FAILED, UNHEALTHY = "RUNNING", "DEPLOY_FAILED", "UNHEALTHY"
# The dashboard hides values of environment variables, so these cannot be compared.
HIDDEN = "<redacted>"
ERROR_LINE = re.compile(r"^\s*(?:[\w.]*\.)?(\w*(?:Error|Exception|Failed|Lost|Died)): ?(.*)$")
NOISE = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Change:
    """What a deployment does to one application; `keys` are those that differ."""

    name: str
    kind: Kind
    keys: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Return the change in words."""
        return f"{self.kind}: {', '.join(self.keys)}" if self.keys else self.kind


def changes(config: Mapping[str, Any], details: Mapping[str, Any]) -> list[Change]:
    """Return what giving Serve this config changes, in the order of the file, removals last."""
    running = running_configs(details)
    found = []
    for wanted in wanted_applications(config):
        name = str(wanted.get("name"))
        if name not in running:
            found.append(Change(name, "new"))
            continue
        keys = tuple(differing(running[name], wanted))
        found.append(Change(name, "changed" if keys else "unchanged", keys))
    named = {change.name for change in found}
    return found + [Change(name, "removed") for name in running if name not in named]


def stuck_applications(planned: Iterable[Change], details: Mapping[str, Any]) -> set[str]:
    """Return the applications that failed and do not change, none of whose replicas runs.

    Serve gives up a deployment after three starts that failed, and begins anew only with another
    version of it: given the same config again, it would do nothing.
    """
    return {
        change.name
        for change in planned
        if change.kind == "unchanged"
        and details["applications"][change.name].get("status") == FAILED
        and num_serving(change.name, details) == 0
    }


def wanted_applications(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the applications of a file as Serve will note them, with the file's logging config."""
    logging = config.get("logging_config")
    shared = {} if logging is None else {"logging_config": logging}
    return [shared | application for application in config["applications"]]


def running_configs(details: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the configs of the applications that Serve has, by name, but for those it removes."""
    return {
        name: application.get("deployed_app_config") or {}
        for name, application in details["applications"].items()
        if application.get("status") != "DELETING"
    }


def differing(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Yield the keys whose values differ, as `args.parallel.tensor`."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            inner = f"{place}.{key}" if place else str(key)
            yield from differing(before.get(key), after.get(key), inner)
    elif before != after and before != HIDDEN and not (is_empty(before) and is_empty(after)):
        yield place


def is_empty(value: Any) -> bool:
    """Return whether a value says nothing: Serve leaves such keys out or fills them in."""
    return value is None or value == {} or value == []


def fixed_options(config: Mapping[str, Any], details: Mapping[str, Any]) -> Iterator[Finding]:
    """Find HTTP options that a Serve that runs already will not take."""
    running = details.get("http_options") or {}
    for key, value in (config.get("http_options") or {}).items():
        if key in running and running[key] != value:
            yield Finding(
                f"http_options.{key} {value!r} has no effect: Serve runs with {running[key]!r};"
                " `serve shutdown` first, or leave it as it is",
                is_warning=True,
            )


@dataclass(frozen=True)
class AppProgress:
    """An application while it is deployed: Serve's status, replicas, and what hinders it."""

    name: str
    status: str
    num_running: int = 0
    num_wanted: int = 0
    message: str = ""

    @property
    def is_done(self) -> bool:
        """Return whether Serve has said its last word."""
        return self.status in (RUNNING, FAILED, UNHEALTHY)

    @property
    def text(self) -> str:
        """Return the state in words, for a line."""
        state = self.status.lower().replace("_", " ")
        replicas = f", {self.num_running} of {self.num_wanted} replicas" if self.num_wanted else ""
        return f"{state}{replicas}{f': {self.message}' if self.message else ''}"


def progress(names: list[str], details: Mapping[str, Any]) -> list[AppProgress]:
    """Return the state of the applications of these names."""
    return [progress_of(name, details["applications"].get(name)) for name in names]


def progress_of(name: str, application: Mapping[str, Any] | None) -> AppProgress:
    """Return the state of one application, which Serve may not have noted yet."""
    if application is None:
        return AppProgress(name, "NOT_STARTED")
    deployments = application.get("deployments", {}).values()
    messages = [application.get("message", ""), *(each.get("message", "") for each in deployments)]
    return AppProgress(
        name,
        str(application.get("status")),
        num_running(application),
        sum(each.get("target_num_replicas", 0) for each in deployments),
        next((cause_of(message) for message in messages if message), ""),
    )


def num_running(application: Mapping[str, Any]) -> int:
    """Return how many replicas of an application run."""
    return sum(num_in_state(each, RUNNING) for each in application.get("deployments", {}).values())


def num_in_state(deployment: Mapping[str, Any], state: str) -> int:
    """Return how many of a deployment's replicas are in that state."""
    return sum(replica.get("state") == state for replica in deployment.get("replicas", []))


def cause_of(message: str) -> str:
    """Return the sentence of Serve's message that says why, without the stack traces around it."""
    lines = [line.rstrip() for line in NOISE.sub("", message).splitlines() if line.strip()]
    found = [(number, match) for number, line in enumerate(lines) if (match := is_cause(line))]
    if not found:
        return lines[0].strip() if lines else ""
    number, match = found[-1]
    text = match[2]
    if "validation error" in text:
        # Pydantic puts key and reason into the lines below.
        key, reason, *_ = [*lines[number + 1 :], "", ""]
        return f"{key.strip()}: {reason.split(' [type=')[0].strip()}"
    return f"{match[1]}: {text}" if text else match[1]


def is_cause(line: str) -> re.Match[str] | None:
    """Return the match of a line that ends a stack trace; Ray's wrappers around it are none."""
    match = ERROR_LINE.match(line)
    return None if match is None or match[1] in ("RayTaskError", "RayActorError") else match


def failure_text(
    rows: list[AppProgress], details: Mapping[str, Any], before: Mapping[str, Any]
) -> str:
    """Return one sentence on what failed, and whether something of it still serves.

    `before`: Serve's details of before the deployment.
    """
    failed = [row for row in rows if row.status in (FAILED, UNHEALTHY)]
    first = failed[0]
    also = f" (and {', '.join(row.name for row in failed[1:])})" if failed[1:] else ""
    reason = first.message or "Serve does not say why"
    kept = num_serving(first.name, details)
    if not details["applications"].get(first.name, {}).get("deployments"):
        # Serve could not even build the application: it lists nothing of it, and stops nothing.
        kept = num_serving(first.name, before)
    still = f"; {plural(kept, 'replica')} of before still serve" if kept else ""
    return f"application {first.name} failed{also}: {reason}{still}"


def num_serving(name: str, details: Mapping[str, Any]) -> int:
    """Return how many replicas run of the application of that name, which Serve may not have."""
    return num_running(details["applications"].get(name, {}))


def waiting_text(rows: list[AppProgress], timeout_s: float) -> str:
    """Return one sentence on what was not ready in time."""
    late = "; ".join(f"{row.name} {row.text}" for row in rows if row.status != RUNNING)
    return (
        f"not ready within {timeout_s:g} s: {late}; Serve goes on with it, `flux-ray status` shows"
        " how, and --timeout waits longer"
    )
