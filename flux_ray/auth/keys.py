"""API keys: their classes, what is kept of them, and whose a secret is.

The keys file on disk: read whole or not at all, written in one step, and by one at a time.

The keys that are let in now: read again when their file changes, kept when it is broken.
"""

import asyncio
import contextvars
import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NamedTuple

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

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


class Stamp(NamedTuple):
    """What changes with a file's contents."""

    modified_ns: int
    num_bytes: int
    inode: int


def stamp_of(path: Path) -> Stamp | None:
    """None where there is no file to be read. Follows links, as mounted secrets are."""
    try:
        found = path.stat()
    except OSError:
        return None
    return Stamp(found.st_mtime_ns, found.st_size, found.st_ino)


def read_keys(path: Path) -> KeyFile:
    """JSON by its name, else YAML. ValueError says what is wrong, and shows no value."""
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        return KeyFile.model_validate({} if found is None else found)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path}: {where}{': ' if where else ''}{message}") from None
    except (ValueError, yaml.YAMLError):
        # Their messages quote the line.
        raise ValueError(f"{path}: it cannot be read as YAML or JSON") from None


def change_keys(path: Path, change: Callable[[KeyFile], KeyFile]) -> KeyFile:
    """Put what `change` makes of the file in its place; without a file it begins with an empty one.

    Two that change it at once take turns, so that no key is lost.
    """
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        changed = change(read_keys(path) if path.exists() else KeyFile())
        write_keys(path, changed)
        return changed
    finally:
        # Which also ends the lock.
        os.close(folder)


def write_keys(path: Path, file: KeyFile) -> None:
    """For the owner's eyes only; whoever reads meanwhile finds the old file or the new one."""
    kept = file.model_dump(mode="json", by_alias=True, exclude_none=True)
    # A link stays one.
    target = path.resolve()
    # Made with the mode 0600.
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w") as new:
            new.write(dumped(kept, is_json=path.suffix == ".json"))
            new.flush()
            os.fsync(new.fileno())
        Path(name).replace(target)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def dumped(kept: object, *, is_json: bool) -> str:
    """As text."""
    if is_json:
        return json.dumps(kept, indent=2) + "\n"
    text: str = yaml.safe_dump(kept, sort_keys=False)
    return text


logger = logging.getLogger("ray.serve")

PERIOD_S = 1.0
# A disk that hangs is to hold up nobody for longer.
PATIENCE_S = 2.0


class KeyWatch:
    """Looks at the file at most once a second, when somebody asks: no later request is let in by
    what was true more than a second ago. ValueError if the file cannot be used at the start: a
    gateway that let nobody in would look alive.
    """

    def __init__(self, path: Path, classes: Collection[str], period_s: float = PERIOD_S) -> None:
        self._path = path
        self._classes = classes
        self._period_s = period_s
        self._stamp = stamp_of(path)
        self._keyring = self._read()
        self._looked_at = time.monotonic()
        self._look: asyncio.Task[None] | None = None

    async def find(self, secret: str) -> Key | None:
        """The live key with that secret."""
        await self._keep_up()
        return self._keyring.find(secret, datetime.now(UTC))

    async def _keep_up(self) -> None:
        if self._look is None or self._look.done():
            if time.monotonic() - self._looked_at < self._period_s:
                return
            # In an empty context: it is no part of the request that happens to be the first.
            self._look = asyncio.get_running_loop().create_task(
                self._read_again(), context=contextvars.Context()
            )
        await asyncio.wait((self._look,), timeout=PATIENCE_S)

    async def _read_again(self) -> None:
        stamp = await asyncio.to_thread(stamp_of, self._path)
        self._looked_at = time.monotonic()
        if stamp == self._stamp:
            return
        # Also of a broken file: one line in the log is enough.
        self._stamp = stamp
        try:
            self._keyring = await asyncio.to_thread(self._read)
        except ValueError as error:
            logger.error("the keys stay as they are: %s", error)
        else:
            logger.info("the keys were read again from %s", self._path)

    def _read(self) -> Keyring:
        file = read_keys(self._path)
        file.check_classes(self._classes)
        return Keyring(file)
