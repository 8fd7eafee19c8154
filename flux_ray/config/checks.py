"""Check a whole Serve config file: what no application sees by itself, and Serve does not say.

Serve accepts a file, answers "success" and fails afterwards; it drops keys that it does not know.
The checks here read the parsed file alone, and `deploy`, `plan` and `simulate` run them before
anything is started. Each finding is one sentence that names the key and says what to do.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flux_ray.auth import read_keys
from flux_ray.catalog import ALL_EMBEDDED
from flux_ray.config.gateway import GatewayArgs, check_addresses
from flux_ray.config.tier import Args, TierArgs
from flux_ray.errors import FluxError

BUILDERS: dict[str, type[Args]] = {
    "flux_ray.app:build_tier": TierArgs,
    "flux_ray.app:build_gateway": GatewayArgs,
}
# What Serve reads at the top of a file and of an application; it drops all other keys silently.
FILE_KEYS = {"proxy_location", "http_options", "grpc_options", "controller_options"}
FILE_KEYS |= {"logging_config", "tracing_config", "applications", "target_capacity"}
APPLICATION_KEYS = {"name", "route_prefix", "import_path", "runtime_env", "host", "port"}
APPLICATION_KEYS |= {"deployments", "autoscaling_policy", "logging_config", "args"}
APPLICATION_KEYS |= {"external_scaler_enabled"}
HTTP_KEYS = {"host", "port", "root_path", "request_timeout_s", "keep_alive_timeout_s"}
HTTP_KEYS |= {"ssl_keyfile", "ssl_certfile", "ssl_keyfile_password", "ssl_ca_certs"}
# Where Serve listens if http_options do not say.
DEFAULT_HOST, DEFAULT_PORT = "0.0.0.0", 8000  # nosec B104
ALL_ADDRESSES = {DEFAULT_HOST, "::", ""}
# Where this machine reaches a server that listens at all addresses.
THIS_MACHINE = "127.0.0.1"
# What a checkpoint's folder must have in it to be a model.
WEIGHT_FILES = ("transformer/*.safetensors", "vae/*.safetensors", "text_encoder/*.safetensors")


@dataclass(frozen=True)
class Finding:
    """One sentence on what is wrong in a file; a warning does not keep it from being deployed."""

    text: str
    is_warning: bool = False


@dataclass(frozen=True)
class NamedArgs:
    """An application of the file: its name, its route, and its args; None if they are not ours."""

    name: str
    route_prefix: str | None
    args: Args | None


class HttpOptions(BaseModel):
    """What a file's `http_options` say of where Serve listens; it checks the other keys itself."""

    model_config = ConfigDict(frozen=True)

    host: str = DEFAULT_HOST
    port: int = Field(DEFAULT_PORT, ge=0, le=65535)
    request_timeout_s: float | None = None
    ssl_certfile: str | None = None

    @property
    def url(self) -> str:
        """Return the URL at which this machine reaches the server."""
        reached = THIS_MACHINE if self.host in ALL_ADDRESSES else self.host
        scheme = "https" if self.ssl_certfile else "http"
        return f"{scheme}://{f'[{reached}]' if ':' in reached else reached}:{self.port}"


class NotServeConfig(ValueError):
    """The file has no list of applications, so there is nothing to check."""


def applications_of(config: Any) -> list[dict[str, Any]]:
    """Return the list of applications of a parsed file; raise NotServeConfig without one."""
    applications = config.get("applications") if isinstance(config, dict) else None
    if not isinstance(applications, list) or not all(isinstance(a, dict) for a in applications):
        raise NotServeConfig("it has no list of `applications`")
    return applications


def check_keys(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Find keys that Serve would drop without a word."""
    yield from unknown_keys("", config, FILE_KEYS)
    options = config.get("http_options")
    if isinstance(options, dict):
        yield from unknown_keys("http_options.", options, HTTP_KEYS)
    for application in applications_of(config):
        where = f"application {application.get('name')}: "
        yield from unknown_keys(where, application, APPLICATION_KEYS)


def unknown_keys(where: str, found: Mapping[str, Any], known: set[str]) -> Iterator[Finding]:
    """Find keys that are none of those known, and say which one each is most like."""
    for key in found.keys() - known:
        yield Finding(f"{where}{key}: Serve knows no such key{hint_for(str(key), known)}")


def hint_for(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean x?` for a name that is almost a known one, else nothing."""
    near = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


def read_args(
    application: Mapping[str, Any], allow_others: bool = False
) -> tuple[NamedArgs | None, list[Finding]]:
    """Return the typed application, or None and why its args would be refused.

    `allow_others`: let applications that are not flux-ray's pass, with args that nobody checks.
    Ray's own pass anyway, such as an LLM of `ray.serve.llm`.
    """
    name, import_path = str(application.get("name")), str(application.get("import_path"))
    route = application.get("route_prefix", "/")
    if import_path not in BUILDERS:
        is_known = import_path.startswith("ray.serve.")
        if is_known or (allow_others and not import_path.startswith("flux_ray.")):
            return NamedArgs(name, route, None), []
        known = ", ".join(BUILDERS)
        text = f"application {name}: import_path {import_path} is none of {known}"
        return None, [Finding(text)]
    builder = BUILDERS[import_path]
    try:
        args = builder.model_validate(application.get("args") or {})
    except ValidationError as error:
        found = [Finding(f"application {name}: {said(each, builder)}") for each in error.errors()]
        return None, found
    except FluxError as error:
        return None, [Finding(f"application {name}: {error}")]
    return NamedArgs(name, route, args), []


def said(error: Any, builder: type[BaseModel], top: str = "args") -> str:
    """Return pydantic's error with its key below `top`, and the key that was probably meant."""
    place: tuple[Any, ...] = tuple(error["loc"])
    key = ".".join([top, *map(str, place)])
    hint = ""
    if error["type"] == "extra_forbidden":
        hint = hint_for(str(place[-1]), fields_at(builder, place[:-1]))
    return f"{key}: {error['msg']}{hint}"


def fields_at(model: type[BaseModel], place: tuple[Any, ...]) -> list[str]:
    """Return the names of the fields of the model at that place inside of another one."""
    for part in place:
        if not isinstance(part, str) or part not in model.model_fields:
            return []
        annotation = model.model_fields[part].annotation
        kinds = [annotation, *get_args(annotation)]
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def check_names(applications: Sequence[NamedArgs]) -> Iterator[Finding]:
    """Find two applications of one name, two of one tier, and a tier under another name."""
    for name in doubles(each.name for each in applications):
        yield Finding(f"application {name}: name: two applications have it; rename one of them")
    for tier in doubles(each.args.tier for each in tiers_among(applications)):
        yield Finding(
            f"args.tier: two applications serve {tier}; keep one, and set its num_replicas"
        )
    for each in tiers_among(applications):
        if each.name != each.args.tier:
            yield Finding(
                f"application {each.name}: name: gateways look for {each.args.tier}, its tier;"
                " give the application that name"
            )


def doubles(names: Iterable[str]) -> list[str]:
    """Return the names that come more than once, in order."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


@dataclass(frozen=True)
class NamedTier(NamedArgs):
    """An application that is a tier."""

    args: TierArgs


@dataclass(frozen=True)
class NamedGateway(NamedArgs):
    """An application that is a gateway."""

    args: GatewayArgs


def tiers_among(applications: Iterable[NamedArgs]) -> list[NamedTier]:
    """Return the applications that are tiers."""
    return [
        NamedTier(each.name, each.route_prefix, each.args)
        for each in applications
        if isinstance(each.args, TierArgs)
    ]


def gateways_among(applications: Iterable[NamedArgs]) -> list[NamedGateway]:
    """Return the applications that are gateways."""
    return [
        NamedGateway(each.name, each.route_prefix, each.args)
        for each in applications
        if isinstance(each.args, GatewayArgs)
    ]


def check_routes(applications: Sequence[NamedArgs]) -> Iterator[Finding]:
    """Find two applications at one route; a tier has none, and Serve's default would be `/`."""
    for each in tiers_among(applications):
        if each.route_prefix is not None:
            yield Finding(
                f"application {each.name}: route_prefix: a tier has no route, its gateway has;"
                " say `route_prefix: null`"
            )
    others = [each for each in applications if not isinstance(each.args, TierArgs)]
    for route in doubles(each.route_prefix for each in others if each.route_prefix is not None):
        names = ", ".join(each.name for each in others if each.route_prefix == route)
        yield Finding(f"route_prefix {route}: {names} have it; give each application its own")


def check_served(applications: Sequence[NamedArgs]) -> Iterator[Finding]:
    """Find tiers that a gateway lists and nobody deploys, and tiers that no gateway lists."""
    deployed = {each.name for each in applications}
    gateways = gateways_among(applications)
    for gateway in gateways:
        for tier in gateway.args.tiers:
            if tier not in deployed:
                yield Finding(
                    f"application {gateway.name}: args.tiers: {tier} has no application in this"
                    " file; add one, or take it off the list"
                )
    if not gateways:
        return
    listed = {tier for gateway in gateways for tier in gateway.args.tiers}
    for each in tiers_among(applications):
        if each.name not in listed:
            yield Finding(
                f"application {each.name}: no gateway lists it, so nobody can ask for it; add it to"
                " a gateway's args.tiers",
                is_warning=True,
            )


def read_http_options(config: Mapping[str, Any]) -> tuple[HttpOptions, list[Finding]]:
    """Return the file's HTTP options; Serve's defaults, and what is wrong, if they are invalid."""
    try:
        return HttpOptions.model_validate(config.get("http_options") or {}), []
    except ValidationError as error:
        found = [Finding(said(each, HttpOptions, "http_options")) for each in error.errors()]
        return HttpOptions(), found


def check_http(config: Mapping[str, Any], applications: Sequence[NamedArgs]) -> Iterator[Finding]:
    """Find a port that is open to all without keys, and time limits that cut requests off."""
    options, wrong = read_http_options(config)
    yield from wrong
    host, limit_s = options.host, options.request_timeout_s
    for gateway in gateways_among(applications):
        if host in ALL_ADDRESSES and gateway.args.keys_file is None:
            yield Finding(
                f"http_options.host {host!r}: everybody who reaches this machine is let in; say"
                f" 127.0.0.1, or name a keys_file in the args of {gateway.name}",
                is_warning=True,
            )
        own_s = gateway.args.request_timeout_s
        if limit_s is not None and 0 < limit_s <= own_s:
            yield Finding(
                f"http_options.request_timeout_s {limit_s:g} ends requests before {gateway.name}"
                f" does, after request_timeout_s {own_s:g}; make it larger",
                is_warning=True,
            )
        if gateway.args.drain_timeout_s <= own_s:
            yield Finding(
                f"application {gateway.name}: args.drain_timeout_s"
                f" {gateway.args.drain_timeout_s:g} is not above request_timeout_s {own_s:g}, so"
                " that an upgrade may cut requests off; make it larger",
                is_warning=True,
            )


def check_own_addresses(applications: Iterable[NamedArgs]) -> Iterator[Finding]:
    """Find addresses that only stand for one that the operator knows."""
    for gateway in gateways_among(applications):
        try:
            check_addresses(gateway.args)
        except ValueError as error:
            yield Finding(f"application {gateway.name}: args.{error}")


def check_paths(applications: Sequence[NamedArgs], is_here: bool) -> Iterator[Finding]:
    """Find folders and files of the file that this machine lacks.

    They must be on all nodes: if the cluster is not on this machine (`is_here`), they are warnings.
    """
    for each in tiers_among(applications):
        weights = each.args.weights
        if weights is not None and weights not in ALL_EMBEDDED and "@" not in weights:
            yield from missing_weights(each.name, Path(weights), is_here)
        for lora in each.args.loras:
            if not Path(lora.path).is_file():
                yield absent(f"application {each.name}: args.loras: {lora.path}", is_here)
    for gateway in gateways_among(applications):
        yield from unusable_keys(gateway, is_here)
        upsampling = gateway.args.upsampling
        secret = None if upsampling is None else upsampling.api_key_file
        if secret is not None and not secret.is_file():
            key = f"application {gateway.name}: args.upsampling.api_key_file: {secret}"
            yield absent(key, is_here)


def unusable_keys(gateway: NamedGateway, is_here: bool) -> Iterator[Finding]:
    """Find that a keys file is not there, or that a gateway could not use it."""
    keys_file, key = gateway.args.keys_file, f"application {gateway.name}: args.keys_file"
    if keys_file is None:
        return
    try:
        if keys_file.is_file():
            read_keys(keys_file).check_classes(gateway.args.key_classes)
        else:
            yield absent(f"{key}: {keys_file}", is_here)
    except (OSError, ValueError) as error:
        # Permission denied, among others.
        yield Finding(
            f"{key}: {error}; correct it, or let the user who runs Ray read it",
            is_warning=not is_here,
        )


def missing_weights(name: str, folder: Path, is_here: bool) -> Iterator[Finding]:
    """Find that a folder of weights is not there, or has no weights in it."""
    key = f"application {name}: args.weights: {folder}"
    if not folder.is_dir():
        yield absent(key, is_here)
        return
    for pattern in WEIGHT_FILES:
        if not any(folder.glob(pattern)):
            text = f"{key} has no {pattern}; download the whole checkpoint again"
            yield Finding(text, is_warning=not is_here)


def absent(key: str, is_here: bool) -> Finding:
    """Return the finding that a path is missing."""
    if is_here:
        return Finding(f"{key} is not there; put it there, or correct the path")
    text = f"{key} is not on this machine; it has to be on every node of the cluster"
    return Finding(text, is_warning=True)


def check_file(
    config: Mapping[str, Any], *, allow_others: bool = False
) -> tuple[list[NamedArgs], list[Finding]]:
    """Return the applications of a file and everything that is wrong with it as a whole.

    Applications whose args are wrong are left out, and what depends on them is not checked then.
    """
    findings = list(check_keys(config))
    applications = []
    for each in applications_of(config):
        application, wrong = read_args(each, allow_others)
        findings += wrong
        if application is not None:
            applications.append(application)
    findings += [*check_names(applications), *check_routes(applications)]
    if len(applications) == len(applications_of(config)):
        findings += check_served(applications)
    return applications, [*findings, *check_http(config, applications)]
