"""Typed configuration of the gateway: what it serves, to whom, and within which limits.

Typed configuration of durable jobs.
"""

import re
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flux_ray.auth.keys import KeyClass
from flux_ray.catalog.gpus import speed_for
from flux_ray.catalog.tiers import TIERS, tier_for
from flux_ray.config.tier import Args, Seconds


class JobArgs(Args):
    """Durable jobs: where they are kept, and for how long.

    `database`: `sqlite:///` and a file, for the gateways of one machine; `postgresql://` for more.
    `results`: a folder, or a URL of fsspec (`s3://bucket/folder`), of which `results_options` say
    more (`endpoint_url`). `lease_s`: after so long without a sign of its worker a job is another's.
    `keep_s`: so long an ended job and its images are there, and so long one waits that no gateway
    takes. `max_running`: of one gateway and tier at once, of one owner three quarters of that.
    `max_lost`: a job that was lost with so many workers is given up. `webhook_retries_s`: pauses
    before a webhook that was not taken is posted again; then it is given up.
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
        """A worker that comes late must still find what it may not end."""
        if self.keep_s < self.lease_s:
            raise ValueError(f"keep_s {self.keep_s:g} is below lease_s {self.lease_s:g}")
        return self


Policy = Literal["best", "spill", "cascade"]
# As a model's name, whatever tiers there are: the best that meets the deadline.
AUTO = "auto"
# What the path of a route may be made of, unquoted: jobs for a model are handed in below /v1/.
_SEGMENT = re.compile(r"(?!\.{1,2}$)[^\x00-\x1f\x7f/{}?#%\\]+")
# Paths below /v1/ that are other routes'.
TAKEN = {"images/generations", "images/edits", "cancel", "get_result", "credits", "my_finetunes"}
TAKEN |= {"models", "jobs"}

# As browsers send it: without a path, not even a slash.
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/?#@\s*]+)$")]
# While an image is decoded, for a pixel.
MAX_WORK_BYTES = 46


class Limits(Args):
    """What the gateway refuses before it is decoded.

    `max_held_bytes`: of all that it has in hand, bodies and images, of callers and of jobs; who
    finds no room is told to come back.
    `max_decode_s`: of a processor, for one image; who sends one that takes longer is told to save
    it in a simpler way.
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
        """Of images in the moment in which they are decoded: always room for the largest one."""
        return min(MAX_WORK_BYTES * self.max_image_pixels, self.max_held_bytes // 2)

    @property
    def max_kept_bytes(self) -> int:
        """Of what stays for a while: the rest of them."""
        return self.max_held_bytes - self.max_work_bytes


class Uploads(Args):
    """How the bodies of requests come in: who sends too slowly, or too many at once, is refused.

    `first_byte_s`: until a body begins. `least_bytes_per_s`: from then on, on average; networks
    that stall are forgiven `grace_s` in all. `max_s`: for a whole body; the largest one then takes
    5 Mbit/s.
    `max_per_caller`: bodies that are being read at once, of one key, or of one address where no
    keys are asked for; a class with a smaller `max_concurrent` has so many. The next ones of that
    caller wait for `wait_s`. `max_at_once`: of all callers, those that wait included; half of what
    a gateway has room for, where it is not said.
    """

    first_byte_s: Seconds = 5.0
    least_bytes_per_s: float = Field(20_000, gt=0)
    grace_s: Seconds = 10.0
    max_s: Seconds = 120.0
    max_per_caller: int = Field(16, ge=1)
    max_at_once: int | None = Field(None, ge=1)
    wait_s: Seconds = 1.0

    def due_s(self, num_bytes: int) -> float:
        """Return when more is to have come, in seconds from the start, after so many bytes."""
        late_s = self.grace_s + num_bytes / self.least_bytes_per_s
        return min(self.max_s, late_s if num_bytes else self.first_byte_s)


class Fetching(Args):
    """Reference images by URL: from public addresses, unless `networks` names others.

    `hosts`: if given, no others. `networks`: of ours, that callers may reach, such as
    `10.1.2.0/24`. `timeout_s`: for all images of a request together.
    """

    enabled: bool = True
    schemes: tuple[Literal["http", "https"], ...] = ("http", "https")
    hosts: tuple[str, ...] | None = None
    ports: tuple[int, ...] = (80, 443)
    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    timeout_s: Seconds = 10.0


class Webhooks(Fetching):
    """Where callers may have the ends of their jobs told: as for Fetching, but by https only.

    `timeout_s`: for an answer; who takes longer is told again.
    """

    schemes: tuple[Literal["http", "https"], ...] = ("https",)
    ports: tuple[int, ...] = (443,)
    timeout_s: Seconds = 30.0


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

    `default_tier`: a tier or an alias. `card`: what a tier is priced by until one of its replicas
    has told its own, and where that one is not in `catalog.gpus`.
    `deadlines`: of tiers, where neither the caller nor its class says one.
    `keys_file`: what `flux-ray keys` writes; without one everybody is let in.
    `record_to`: a folder for traces of what arrives, for `flux-ray simulate`.
    `public_url`: where clients find this gateway, which is never taken from what they send.
    `cors_origins`: of pages that may ask from a browser, like `https://app.example.com`, or `*`.
    `num_cpus`: of each replica, of its node's. More than 0, for what it decodes: Ray then keeps it
    off a head that has no processors to give.
    `jobs`: routes that answer before the image is drawn, and answers by URL, where it is given.
    `drain_timeout_s`: of a gateway that is taken away, for what it has: more than
    `request_timeout_s`, for what came last may wait all of that.
    `max_ongoing_requests`: that Serve hands to a gateway at once. Those beyond it wait in Serve's
    proxies, probes too, so that a gateway takes in fewer by itself: `max_requests`.
    """

    tiers: tuple[str, ...] = Field(min_length=1)
    aliases: dict[str, Alias] = Field(default_factory=dict)
    default_tier: str | None = None
    card: str = "h100-80gb"
    deadlines: dict[str, Seconds] = Field(default_factory=dict)
    keys_file: Path | None = None
    key_classes: dict[str, KeyClass] = Field(default_factory=dict)
    record_to: Path | None = None
    public_url: str | None = Field(None, pattern=r"^https?://[^/?#@\s]+(/[^?#\s]*)?$")
    cors_origins: tuple[Origin, ...] = ()
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

    @property
    def num_spare_places(self) -> int:
        """Of those that Serve has: for probes, and for telling others to come back."""
        return max(1, self.max_ongoing_requests // 16)

    @property
    def max_requests(self) -> int:
        """At once: those whose body is read, those that wait for an image, and streams."""
        return self.max_ongoing_requests - self.num_spare_places

    @property
    def max_bodies(self) -> int:
        """Of these, at most so many whose body is still to come."""
        told = self.uploads.max_at_once
        return self.max_requests // 2 if told is None else told

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
        """Somebody can be in them, and their tiers are served."""
        if self.key_classes and self.keys_file is None:
            raise ValueError("key_classes: nobody is in them without a keys_file")
        for name, key_class in self.key_classes.items():
            for tier in key_class.tiers or ():
                if tier not in self.tiers:
                    raise ValueError(f"key_classes.{name}.tiers: {tier} is not among tiers")
        return self

    @model_validator(mode="after")
    def check_places(self) -> "GatewayArgs":
        """Bodies that are being read leave places for requests that are through with theirs."""
        if self.max_bodies >= self.max_requests:
            raise ValueError(
                f"uploads.max_at_once {self.max_bodies} is not below {self.max_requests}, which is"
                f" what a gateway takes in of max_ongoing_requests {self.max_ongoing_requests}"
            )
        return self

    @model_validator(mode="after")
    def check_public_url(self) -> "GatewayArgs":
        """Jobs and their images are told of by URL."""
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
        # Each once, where it is best.
        return tuple(dict.fromkeys(tier for tiers in inner for tier in tiers))


def is_path(name: str) -> bool:
    """Whether a route's path may end in that name, of one segment or more."""
    return name == name.strip() and all(map(_SEGMENT.fullmatch, name.split("/")))
