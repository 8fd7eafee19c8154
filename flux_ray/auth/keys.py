"""API keys: their classes, what is kept of them, and whose a secret is."""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from flux_ray.catalog.tiers import tier_for

# What secrets begin with, and no secret.
SECRET_MARK = "fr-"  # nosec B105
NUM_SECRET_BYTES = 32
# Enough to tell keys apart in lists and logs; some 200 bits remain to guess.
NUM_PREFIX_CHARS = len(SECRET_MARK) + 8

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
Prefix = Annotated[str, Field(pattern=r"^fr-[A-Za-z0-9_-]{8}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Kept(BaseModel):
    """As in all config, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class KeyClass(Kept):
    """Callers who are treated alike: the keys file names the class of each key.

    `deadline_s`: where the caller says none. `weight`: their share of a tier that is short, others
    having 1. `licenses` and `tiers`: those that they may use, where not all. The rest is what each
    of them may have, over all gateways: at once, in any 60 seconds, and in a day of UTC; None is
    without end.
    """

    deadline_s: float | None = Field(None, gt=0)
    weight: float = Field(1.0, gt=0)
    licenses: tuple[str, ...] | None = Field(None, min_length=1)
    tiers: tuple[str, ...] | None = Field(None, min_length=1)
    max_concurrent: int | None = Field(None, ge=1)
    requests_per_minute: int | None = Field(None, ge=1)
    gpu_seconds_per_day: float | None = Field(None, gt=0)
    megapixels_per_day: float | None = Field(None, gt=0)

    def may_use(self, tier: str) -> bool:
        """Whether the tier and its licence are among theirs."""
        return self.may_name(tier) and (
            self.licenses is None or tier_for(tier).license in self.licenses
        )

    def may_name(self, tier: str) -> bool:
        """Whether the tier is among theirs, whatever its licence."""
        return self.tiers is None or tier in self.tiers


class Key(Kept):
    """A key without its secret. `key_class`, in the file `class`: one of the gateway's classes.

    Keys of one name are one caller: its limits and its jobs outlive any one secret.
    """

    name: Name
    prefix: Prefix
    sha256: Sha256
    key_class: str | None = Field(None, alias="class")
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None

    def is_live(self, now: datetime) -> bool:
        """Neither revoked nor expired by then."""
        return all(end is None or now < end for end in (self.revoked, self.expires))


class KeyFile(Kept):
    """The whole file."""

    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def check_keys(self) -> "KeyFile":
        """A prefix is one key's, and whoever has several is of one class."""
        prefixes: set[str] = set()
        classes: dict[str, str | None] = {}
        for key in self.keys:
            if key.prefix in prefixes:
                raise ValueError(f"two keys have the prefix {key.prefix}")
            prefixes.add(key.prefix)
            if key.revoked is None and classes.setdefault(key.name, key.key_class) != key.key_class:
                raise ValueError(f"the keys of {key.name} are of two classes")
        return self

    def check_classes(self, classes: Iterable[str]) -> None:
        """ValueError where a key is of another class."""
        known = set(classes)
        for key in self.keys:
            if key.key_class is not None and key.key_class not in known:
                raise ValueError(f"{key.prefix} is of the class {key.key_class}, which is unknown")


class NewKey(NamedTuple):
    """What is kept of a key, and what only its owner has."""

    key: Key
    secret: str


def new_key(
    name: str, key_class: str | None, now: datetime, expires: datetime | None = None
) -> NewKey:
    """A key with 256 random bits."""
    secret = SECRET_MARK + secrets.token_urlsafe(NUM_SECRET_BYTES)
    kept = {
        "name": name,
        "prefix": secret[:NUM_PREFIX_CHARS],
        "sha256": hash_secret(secret),
        "class": key_class,
        "created": now,
        "expires": expires,
    }
    return NewKey(Key.model_validate(kept), secret)


def with_key(file: KeyFile, key: Key) -> KeyFile:
    """The file with one more."""
    return KeyFile(keys=(*file.keys, key))


def without_key(file: KeyFile, which: str, now: datetime) -> KeyFile:
    """The file with that prefix's key, or all keys of that name, revoked; ValueError if none is."""
    chosen = {key.prefix for key in file.keys if which in (key.prefix, key.name)}
    if not any(key.prefix in chosen and key.revoked is None for key in file.keys):
        raise ValueError(f"no key that is not revoked has the prefix or the name {which}")
    revoked = (
        key.model_copy(update={"revoked": now})
        if key.prefix in chosen and key.revoked is None
        else key
        for key in file.keys
    )
    return KeyFile(keys=tuple(revoked))


def hash_secret(secret: str) -> str:
    """In hexadecimal digits.

    Slow and salted hashes are for words that people choose. Of 256 random bits none can be guessed,
    and a slow hash would be paid for every request, also those of strangers.
    """
    return hashlib.sha256(secret.encode()).hexdigest()


# No secret has this hash that anybody could find.
NOBODY = Key.model_validate(
    {
        "name": "nobody",
        "prefix": "fr-00000000",
        "sha256": "0" * 64,
        "created": datetime(2000, 1, 1, tzinfo=UTC),
        "revoked": datetime(2000, 1, 1, tzinfo=UTC),
    }
)


class Keyring:
    """Whose a secret is. What is wrong with one shows neither in the answer nor in its time."""

    def __init__(self, file: KeyFile) -> None:
        self._keys = {key.prefix: key for key in file.keys}

    def find(self, secret: str, now: datetime) -> Key | None:
        """Its key, if that is live."""
        key = self._keys.get(secret[:NUM_PREFIX_CHARS], NOBODY)
        is_same = hmac.compare_digest(key.sha256, hash_secret(secret))
        return key if is_same & key.is_live(now) else None
