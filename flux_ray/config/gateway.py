"""Typed configuration of the gateway: what it serves, to whom, and within which limits.

`GatewayArgs` is the whole of it; the other models are its sections, durable jobs among them. All
checks run when the config file is read, before anything is started.
"""

import re
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from flux_ray.auth import KeyClass
from flux_ray.catalog import TIERS, speed_for, stand_ins_for, tier_for
from flux_ray.config.tier import Args, Seconds
from flux_ray.config.upsampling import Upsampling


class JobArgs(Args):
    """The settings of durable jobs: where they are kept, and for how long.

    `database`: `sqlite:///` and a file, for the gateways of one machine; `postgresql://` for more.
    `results`: a folder of one machine, or a URL for fsspec: `s3://bucket/folder`, or
    `file:///folder` for one that all machines mount.
    `results_options`: what fsspec needs for that URL, such as `endpoint_url`.
    `lease_s`: a worker that gives no heartbeat for so long loses its job to another one.
    `keep_s`: how long an ended job and its images can be fetched, and how long a job waits that no
    gateway takes.
    `max_running`: jobs at once for each gateway and tier; one owner has three quarters of them.
    `max_lost`: a job that was lost with so many workers fails.
    `webhook_retries_s`: pauses before a webhook is posted again that the receiver did not take;
    after the last one it is given up.
    """

    database: str = Field(
        "sqlite:///~/.flux-ray/jobs.sqlite3", pattern="^(sqlite:///.|postgresql://)"
    )
    results: str = "~/.flux-ray/results"
    results_options: dict[str, Any] = Field(default_factory=dict)
    lease_s: Seconds = 30.0
    keep_s: Seconds = 24 * 3600.0
    max_running: int = Field(64, ge=1)
    max_lost: int = Field(5, ge=1)
    webhook_retries_s: tuple[Seconds, ...] = (1.0, 5.0, 30.0, 300.0, 1800.0)

    @model_validator(mode="after")
    def check_times(self) -> "JobArgs":
        """Raise ValueError unless `keep_s` is at least `lease_s`.

        Else the job of a worker that comes back late might be removed already.
        """
        if self.keep_s < self.lease_s:
            raise ValueError(f"keep_s {self.keep_s:g} is below lease_s {self.lease_s:g}")
        return self


Policy = Literal["best", "spill", "cascade"]
# The model name that stands for the best of all served tiers that meets the deadline.
AUTO = "auto"
# One segment of a route's unquoted path: BFL's API has a route `/v1/<model>` for each name.
_SEGMENT = re.compile(r"(?!\.{1,2}$)[^\x00-\x1f\x7f/{}?#%\\]+")
# Paths below /v1/ of other routes: an alias cannot have these names.
TAKEN = {"images/generations", "images/edits", "cancel", "get_result", "credits", "my_finetunes"}
TAKEN |= {"models", "jobs"}

# An origin as browsers send it: without a path, not even a slash.
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/?#@\s*]+)$")]
# The most bytes of memory for each pixel of an image while it is decoded.
MAX_WORK_BYTES = 46


class Limits(Args):
    """Limits on what a caller sends and on the memory it takes.

    `max_body_bytes`: the largest body of a request.
    `max_image_bytes`: the largest file of an image.
    `max_image_pixels`: the most pixels of an image.
    `max_decode_s`: CPU seconds to decode one image; a caller whose image takes longer is asked to
    save it in a simpler format.
    `max_held_bytes`: memory for all bodies and images that the gateway holds, of callers and jobs;
    a request that finds no room is refused with `Retry-After`.
    `max_prompt_chars`: the longest prompt.
    `max_images`: the largest `n`; a tier's drain time is reckoned for the default of it.
    """

    max_body_bytes: int = 64 * 2**20
    max_image_bytes: int = 20 * 2**20
    max_image_pixels: int = 20_000_000
    max_decode_s: Seconds = 5.0
    max_held_bytes: int = 2 * 2**30
    max_prompt_chars: int = 32_000
    max_images: int = 10

    @property
    def max_work_bytes(self) -> int:
        """Return the memory for images while they are decoded: room for at least the largest."""
        return min(MAX_WORK_BYTES * self.max_image_pixels, self.max_held_bytes // 2)

    @property
    def max_kept_bytes(self) -> int:
        """Return the memory for what is held longer: the rest of `max_held_bytes`."""
        return self.max_held_bytes - self.max_work_bytes


class Uploads(Args):
    """Limits on how bodies of requests come in; what is too slow or too many is refused.

    `first_byte_s`: seconds until a body begins.
    `least_bytes_per_s`: its average speed from then on.
    `grace_s`: how long a network may stall, in all.
    `max_s`: seconds for a whole body; the largest one needs 5 Mbit/s for that.
    `max_per_caller`: bodies that are read at once for one key, or for one address if no keys are
    required; or `max_concurrent` of the key's class, if that is less.
    `wait_s`: how long further ones wait for their turn.
    `max_at_once`: bodies of all callers together, waiting ones included; by default half of the
    requests that the gateway takes.
    """

    first_byte_s: Seconds = 5.0
    least_bytes_per_s: float = Field(20_000, gt=0)
    grace_s: Seconds = 10.0
    max_s: Seconds = 120.0
    max_per_caller: int = Field(16, ge=1)
    max_at_once: int | None = Field(None, ge=1)
    wait_s: Seconds = 1.0

    def due_s(self, num_bytes: int) -> float:
        """Return by when more must have come after so many bytes, in seconds from the start."""
        late_s = self.grace_s + num_bytes / self.least_bytes_per_s
        return min(self.max_s, late_s if num_bytes else self.first_byte_s)


class Fetching(Args):
    """Limits on reference images by URL: they are fetched from public addresses only.

    `enabled`: whether URLs are taken at all.
    `schemes`: those that a URL may begin with.
    `ports`: those that a URL may have.
    `hosts`: if given, the only host names that are allowed.
    `networks`: private networks that callers may reach all the same, such as `10.1.2.0/24`.
    `timeout_s`: seconds for all images of a request together.
    """

    enabled: bool = True
    schemes: tuple[Literal["http", "https"], ...] = ("http", "https")
    hosts: tuple[str, ...] | None = None
    ports: tuple[int, ...] = (80, 443)
    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    timeout_s: Seconds = 10.0


class Webhooks(Fetching):
    """Limits on webhook URLs: as for `Fetching`, but https only.

    `timeout_s`: seconds for the receiver's answer; if it takes longer the webhook is posted again.
    """

    schemes: tuple[Literal["http", "https"], ...] = ("https",)
    ports: tuple[int, ...] = (443,)
    timeout_s: Seconds = 30.0


class Alias(Args):
    """A model name for one or more tiers, best first; an alias among them stands for its tiers.

    `tiers`: names of tiers, or of other aliases.
    `policy`: `best` takes the first tier that meets the deadline. `spill` takes the first tier, or,
    if the caller allows it, the next one that can start within `max_wait_s`. `cascade` takes the
    first tier, and streams have a preview by the last tier before it.
    `max_wait_s`: how long a caller of `spill` may have to wait for the first tier.
    `max_gpu_seconds`: the highest price; tiers at which the request costs more are left out.
    In a config file a single tier's name is enough: `gpt-image-1: flux-2-dev`.
    """

    tiers: tuple[str, ...] = Field(min_length=1)
    policy: Policy = "best"
    max_wait_s: Seconds = 5.0
    max_gpu_seconds: float | None = Field(None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def read_name(cls, value: Any) -> Any:
        """Read a single name, as in `gpt-image-1: flux-2-dev`, as an alias of that tier."""
        return {"tiers": [value]} if isinstance(value, str) else value

    @model_validator(mode="after")
    def check_cascade(self) -> "Alias":
        """Raise ValueError for a cascade with one tier only, or with a price limit."""
        if self.policy == "cascade" and self.max_gpu_seconds is not None:
            raise ValueError("max_gpu_seconds is for the policies best and spill")
        if self.policy == "cascade" and len(self.tiers) < 2:
            raise ValueError("tiers of a cascade are at least two: the last draws the preview")
        return self


class GatewayArgs(Args):
    """The args of the gateway's application. Each tier's application has the tier's name.

    `tiers`: the tiers that are served, by their names in the catalogue.
    `aliases`: what else clients may ask for, by name.
    `bfl_names`: whether BFL's model names (`flux-dev`, `flux-kontext-pro` and so on) are aliases of
    the served tiers that do the same work. Those in `aliases` come before them.
    `default_tier`: a tier or an alias, for requests that name no model.
    `card`: the GPU by which tiers are priced until one of their replicas has reported its own, or
    if that one is not in `catalog.gpus`.
    `deadlines`: seconds by tier, if neither the caller nor its key class sets a deadline.
    `keys_file`: the file that `flux-ray keys` writes; without one everybody is let in.
    `key_classes`: what the keys of a class may do, by the name of the class.
    `record_to`: a folder for traces of what arrives, for `flux-ray simulate`.
    `public_url`: the URL by which clients reach this gateway. It is never taken from a `Host`
    header, by which a caller could have links made to a host of its own.
    `cors_origins`: pages that may call from a browser, like `https://app.example.com`, or `*`.
    `playground`: whether browsers get pages: the playground at `/`, and `/docs`. They need no key,
    what they ask for does.
    `num_replicas`: the number of gateways.
    `num_cpus`: CPUs of its node for each gateway. More than 0, as it decodes images: Ray then keeps
    it off a head node that offers no CPUs.
    `jobs`: turns on BFL's routes, which answer before the image is generated, and answers by URL.
    `request_timeout_s`: seconds that a request may take in all; Serve's own, in `http_options`,
    has to be longer.
    `drain_timeout_s`: seconds for a gateway that is removed to finish its requests; more than
    `request_timeout_s`, as the last one that came may take all of that.
    `max_ongoing_requests`: requests that Serve hands to a gateway at once. Those beyond it wait in
    Serve's proxies, health probes too, so that a gateway takes in fewer by itself.
    `limits`: how large a request may be, and how much memory all of them take.
    `uploads`: how fast bodies have to come in, and how many at once.
    `fetch`: which URLs the gateway reads images from.
    `webhooks`: which URLs it posts the ends of jobs to.
    `upsampling`: the LLM that makes prompts more detailed, for requests that ask for it; none, if
    it is left out.
    """

    tiers: tuple[str, ...] = Field(min_length=1)
    aliases: dict[str, Alias] = Field(default_factory=dict)
    bfl_names: bool = False
    default_tier: str | None = None
    card: str = "h100-80gb"
    deadlines: dict[str, Seconds] = Field(default_factory=dict)
    keys_file: Path | None = None
    key_classes: dict[str, KeyClass] = Field(default_factory=dict)
    record_to: Path | None = None
    public_url: str | None = Field(None, pattern=r"^https?://[^/?#@\s]+(/[^?#\s]*)?$")
    cors_origins: tuple[Origin, ...] = ()
    playground: bool = True
    jobs: JobArgs | None = None
    num_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(0.1, gt=0)
    max_ongoing_requests: int = Field(256, ge=4)
    request_timeout_s: Seconds = 600.0
    drain_timeout_s: Seconds = 660.0
    limits: Limits = Limits()
    uploads: Uploads = Uploads()
    fetch: Fetching = Fetching()
    webhooks: Webhooks = Webhooks()
    upsampling: Upsampling | None = None

    @model_validator(mode="before")
    @classmethod
    def add_bfl_names(cls, values: Any) -> Any:
        """Add BFL's names to the aliases if `bfl_names` is set."""
        if not isinstance(values, dict) or values.get("bfl_names") is not True:
            return values
        tiers, aliases = values.get("tiers") or (), values.get("aliases") or {}
        named = {name: {"tiers": found} for name, found in stand_ins_for(tiers).items()}
        return values | {"aliases": named | dict(aliases)}

    @property
    def num_spare_places(self) -> int:
        """Return how many of Serve's places are kept free, for probes and quick refusals."""
        return max(1, self.max_ongoing_requests // 16)

    @property
    def max_requests(self) -> int:
        """Return how many requests the gateway takes at once, whether read, waiting or streamed."""
        return self.max_ongoing_requests - self.num_spare_places

    @property
    def max_bodies(self) -> int:
        """Return how many of these may be such whose body is still being read."""
        told = self.uploads.max_at_once
        return self.max_requests // 2 if told is None else told

    def alias_for(self, name: str) -> Alias | None:
        """Return the alias of a model's name with aliases in it resolved; None if unknown."""
        if name in self.aliases:
            alias = self.aliases[name]
            return alias.model_copy(update={"tiers": self._tiers_of(name, ())})
        if name in self.tiers:
            return Alias(tiers=(name,))
        if name == AUTO:
            # The catalogue lists the best tiers last.
            served = [tier.name for tier in reversed(TIERS) if tier.name in self.tiers]
            return Alias(tiers=tuple(served))
        return None

    @model_validator(mode="after")
    def check_tiers(self) -> "GatewayArgs":
        """Raise unless all tiers and the GPU are known, and settings are of served tiers."""
        for name in self.tiers:
            tier_for(name)
        speed_for(self.card)
        for name in self.deadlines.keys() - set(self.tiers):
            raise ValueError(f"deadlines.{name}: {name} is not among tiers")
        if self.upsampling is not None:
            self.upsampling.check(self.tiers, self.request_timeout_s)
        return self

    @model_validator(mode="after")
    def check_aliases(self) -> "GatewayArgs":
        """Raise ValueError unless each alias has a free name and leads to served tiers.

        The default tier must be one of them, too.
        """
        for name, alias in self.aliases.items():
            if name in self.tiers:
                raise ValueError(f"aliases.{name}: a tier has that name")
            if not is_path(name) or name in TAKEN:
                raise ValueError(
                    f"aliases.{name!r}: /v1/{name} cannot be its route, or is another's"
                )
            tiers = self._tiers_of(name, ())
            if alias.policy == "cascade" and len(tiers) < 2:
                raise ValueError(f"aliases.{name}: its tiers are all {tiers[0]}: no cascade")
        if self.default_tier is not None and self.alias_for(self.default_tier) is None:
            raise ValueError(f"default_tier {self.default_tier} is not among tiers")
        return self

    @model_validator(mode="after")
    def check_classes(self) -> "GatewayArgs":
        """Raise ValueError if there are key classes without keys, or with tiers not served."""
        if self.key_classes and self.keys_file is None:
            raise ValueError("key_classes: nobody is in them without a keys_file")
        for name, key_class in self.key_classes.items():
            for tier in key_class.tiers or ():
                if tier not in self.tiers:
                    raise ValueError(f"key_classes.{name}.tiers: {tier} is not among tiers")
        return self

    @model_validator(mode="after")
    def check_places(self) -> "GatewayArgs":
        """Raise ValueError if requests that are being read could take all places.

        Else slow senders could keep the gateway from any other work.
        """
        if self.max_bodies >= self.max_requests:
            raise ValueError(
                f"uploads.max_at_once {self.max_bodies} is not below {self.max_requests}, which is"
                f" what a gateway takes in of max_ongoing_requests {self.max_ongoing_requests}"
            )
        return self

    @model_validator(mode="after")
    def check_public_url(self) -> "GatewayArgs":
        """Raise ValueError for jobs without the public URL, by which clients find them."""
        if self.jobs is not None and self.public_url is None:
            raise ValueError("public_url: jobs are told of by URL, and it says of which host")
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
        # Each tier once, at its best place.
        return tuple(dict.fromkeys(tier for tiers in inner for tier in tiers))


# A name that can never be anybody's (RFC 6761): config files have it where only the operator knows
# the real one.
STANDS_FOR = ".invalid"


def check_addresses(args: GatewayArgs) -> None:
    """Raise ValueError, naming the key, if an address is still the one that the file came with."""
    named = {"public_url": args.public_url}
    if args.jobs is not None:
        named |= {"jobs.database": args.jobs.database, "jobs.results": args.jobs.results}
    for key, address in named.items():
        if address is not None and (urlsplit(address).hostname or "").endswith(STANDS_FOR):
            otherwise = ", or say PUBLIC_URL=http://... make serve" if key == "public_url" else ""
            raise ValueError(
                f"{key}: {address} only stands for an address of yours: set it{otherwise}"
            )


def is_path(name: str) -> bool:
    """Return whether a route's path can end in that name, which may contain slashes."""
    return name == name.strip() and all(map(_SEGMENT.fullmatch, name.split("/")))
