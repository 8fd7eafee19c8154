"""API keys: what is kept of them, the keys file on disk, and the check of a secret.

`flux-ray keys` changes the file with `change_keys`: one process at a time, and never leaving half a
file. Gateways ask `KeyWatch`, which reads the file again when it changes and keeps the keys that it
has when the file is broken. Only hashes of secrets are kept.
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
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NamedTuple

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from flux_ray.catalog import tier_for

logger = logging.getLogger("ray.serve")

# The prefix of every secret, and no secret itself, though bandit takes it for one.
SECRET_MARK = "fr-"  # nosec B105
NUM_SECRET_BYTES = 32
# The characters of a secret that lists and logs show: enough to tell keys apart, while some 200
# bits remain to be guessed.
NUM_PREFIX_CHARS = len(SECRET_MARK) + 8

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
Prefix = Annotated[str, Field(pattern=r"^fr-[A-Za-z0-9_-]{8}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
PERIOD_S = 1.0
# Seconds that a request waits for a look at the file: a disk that hangs must not stop all requests.
PATIENCE_S = 2.0


class Kept(BaseModel):
    """The base of what the keys file holds; unknown fields are errors, as in all configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class KeyClass(Kept):
    """The limits and rights of all keys of one class; the keys file names the class of each key.

    `deadline_s`: the deadline of a request that names none.
    `weight`: a caller's share of a tier that is short of replicas.
    `licenses`: those of the tiers that the callers may use; all, if it is left out.
    `tiers`: the tiers that the callers may use; all, if it is left out.
    `upsampling`: whether prompts of the callers may be upsampled, where the gateway does that.
    `max_concurrent`: requests of one caller at once, over all gateways.
    `requests_per_minute`: requests of one caller in any 60 seconds, over all gateways.
    `gpu_seconds_per_day`: GPU seconds of one caller in a day of UTC, over all gateways.
    `megapixels_per_day`: megapixels of its images, likewise.
    """

    deadline_s: float | None = Field(None, gt=0)
    weight: float = Field(1.0, gt=0)
    licenses: tuple[str, ...] | None = Field(None, min_length=1)
    tiers: tuple[str, ...] | None = Field(None, min_length=1)
    upsampling: bool = True
    max_concurrent: int | None = Field(None, ge=1)
    requests_per_minute: int | None = Field(None, ge=1)
    gpu_seconds_per_day: float | None = Field(None, gt=0)
    megapixels_per_day: float | None = Field(None, gt=0)

    def may_use(self, tier: str) -> bool:
        """Return whether the class may use the tier and its licence."""
        return self.may_name(tier) and (
            self.licenses is None or tier_for(tier).license in self.licenses
        )

    def may_name(self, tier: str) -> bool:
        """Return whether the class may use the tier, whatever its licence."""
        return self.tiers is None or tier in self.tiers


class Key(Kept):
    """A key as the file has it, with the hash of its secret.

    `key_class`, `class` in the file, names one of the gateway's classes. All keys of one name are
    one caller: its limits and its jobs stay when a secret is replaced.
    """

    name: Name
    prefix: Prefix
    sha256: Sha256
    key_class: str | None = Field(None, alias="class")
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None

    def is_live(self, now: datetime) -> bool:
        """Return whether the key is neither revoked nor expired at that time."""
        return all(end is None or now < end for end in (self.revoked, self.expires))


class KeyFile(Kept):
    """The contents of the keys file."""

    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def check_keys(self) -> "KeyFile":
        """Raise ValueError if a prefix comes twice, or a caller's live keys differ in class."""
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
        """Raise ValueError if a key is of none of these classes."""
        known = set(classes)
        for key in self.keys:
            if key.key_class is not None and key.key_class not in known:
                raise ValueError(f"{key.prefix} is of the class {key.key_class}, which is unknown")


class NewKey(NamedTuple):
    """A new key: what the file keeps, and the secret, which only its owner gets."""

    key: Key
    secret: str


def new_key(
    name: str, key_class: str | None, now: datetime, expires: datetime | None = None
) -> NewKey:
    """Make a key whose secret has 256 random bits."""
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
    """Return the file with the key added."""
    return KeyFile(keys=(*file.keys, key))


def without_key(file: KeyFile, which: str, now: datetime) -> KeyFile:
    """Return the file with the key of that prefix, or all keys of that name, revoked.

    Raises ValueError if there is none that is not revoked yet.
    """
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
    """Return the SHA-256 of a secret in hexadecimal digits.

    Slow and salted hashes protect words that people choose. 256 random bits cannot be guessed
    anyway, and a slow hash would cost time for every request, also those of strangers.
    """
    return hashlib.sha256(secret.encode()).hexdigest()


# Compared with if no key has the prefix, so that this takes as long as a wrong secret. Nobody can
# find a secret with this hash.
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
    """The keys by prefix, to find the one of a secret.

    Neither the answer nor the time it takes shows whether a secret is unknown, wrong, or revoked.
    """

    def __init__(self, file: KeyFile) -> None:
        self._keys = {key.prefix: key for key in file.keys}

    def find(self, secret: str, now: datetime) -> Key | None:
        """Return the live key with that secret, or None."""
        key = self._keys.get(secret[:NUM_PREFIX_CHARS], NOBODY)
        is_same = hmac.compare_digest(key.sha256, hash_secret(secret))
        return key if is_same & key.is_live(now) else None


class Stamp(NamedTuple):
    """The properties of a file by which a change of its contents is noticed."""

    modified_ns: int
    num_bytes: int
    inode: int


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of a file, or None if there is none.

    It is that of the target of a link: Kubernetes mounts secrets as links.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    return Stamp(found.st_mtime_ns, found.st_size, found.st_ino)


def read_keys(path: Path) -> KeyFile:
    """Read a keys file: JSON if its name says so, else YAML.

    Raises ValueError, which says what is wrong without quoting any value.
    """
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
        # Not the parser's message, which quotes the line.
        raise ValueError(f"{path}: it cannot be read as YAML or JSON") from None


def change_keys(path: Path, change: Callable[[KeyFile], KeyFile]) -> KeyFile:
    """Replace the keys file by what `change` returns for it, and return that.

    A missing file counts as an empty one. Processes that change it at once take turns, by a lock on
    its folder, so that no key is lost. Raises ValueError, OSError.
    """
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        changed = change(read_keys(path) if path.exists() else KeyFile())
        write_keys(path, changed)
        return changed
    finally:
        # Closing also releases the lock.
        os.close(folder)


def write_keys(path: Path, file: KeyFile) -> None:
    """Write the keys file in one step, with the owner and the mode of the one before.

    A new one is readable only to its owner. Whoever reads it meanwhile finds the old file or the
    new one, never half of it.
    """
    kept = file.model_dump(mode="json", by_alias=True, exclude_none=True)
    # Replace the target of a link, so that the link itself stays.
    target = path.resolve()
    # mkstemp creates it with mode 0600.
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w") as new:
            keep_rights(handle, target)
            new.write(dumped(kept, is_json=path.suffix == ".json"))
            new.flush()
            os.fsync(new.fileno())
        Path(name).replace(target)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def keep_rights(handle: int, old: Path) -> None:
    """Give a new file the owner and the mode of the old one, if there is one.

    Gateways are another user than root, who may change the file: they must be able to read it on.
    """
    try:
        found = old.stat()
    except FileNotFoundError:
        return
    mode = stat.S_IMODE(found.st_mode)
    try:
        os.fchown(handle, found.st_uid if os.geteuid() == 0 else -1, found.st_gid)
    except PermissionError:
        # It has the caller's group now, which gets no more than everybody has.
        mode = mode & ~stat.S_IRWXG | (mode & stat.S_IRWXO) << 3
    os.fchmod(handle, mode)


def dumped(kept: object, *, is_json: bool) -> str:
    """Return the contents as JSON or YAML text."""
    if is_json:
        return json.dumps(kept, indent=2) + "\n"
    text: str = yaml.safe_dump(kept, sort_keys=False)
    return text


class KeyWatch:
    """The keys of a file, read again after a change; the middleware asks it for every request.

    It looks at the file when somebody asks, at most once in `period_s`, so that a revoked key stops
    working within a second. Raises ValueError if the file cannot be used at the start: a gateway
    that lets nobody in would look healthy.
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
        """Return the live key with that secret, or None, by the file as it is now."""
        await self._keep_up()
        return self._keyring.find(secret, datetime.now(UTC))

    async def _keep_up(self) -> None:
        if self._look is None or self._look.done():
            if time.monotonic() - self._looked_at < self._period_s:
                return
            # In an empty context: the task must not belong to the request that started it.
            self._look = asyncio.get_running_loop().create_task(
                self._read_again(), context=contextvars.Context()
            )
        await asyncio.wait((self._look,), timeout=PATIENCE_S)

    async def _read_again(self) -> None:
        stamp = await asyncio.to_thread(stamp_of, self._path)
        self._looked_at = time.monotonic()
        if stamp == self._stamp:
            return
        # Stored also if the file is broken: one line in the log for it is enough.
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
