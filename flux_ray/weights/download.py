"""Download the files of a checkpoint that are used: once for each machine, and with progress.

`fetch` is what a start of the cluster calls and `download` what the command calls; both plan first,
so that a gated repository or a full disk is said before the first byte.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import tqdm

from flux_ray.weights.hub import (
    check_reachable,
    endpoint_of,
    is_complete,
    plain_errors,
    seems_complete,
    snapshot_of,
    storage_of,
)
from flux_ray.weights.source import WeightSource, WeightsUnavailable

logger = logging.getLogger("ray.serve")

GB = 10**9
# How often a start says how far its download is.
SAY_S = 60.0
# huggingface_hub's bar of the bytes that are written, over all files.
WRITTEN_BYTES = "huggingface_hub.snapshot_download"

Hear = Callable[[int], None]


@dataclass(frozen=True)
class DownloadPlan:
    """What a download would take: bytes of all files, of those that are missing, and free ones."""

    num_bytes: int
    num_missing_bytes: int
    num_free_bytes: int

    @property
    def fits(self) -> bool:
        """Return whether the disk has room for what is missing."""
        return self.num_missing_bytes <= self.num_free_bytes


def plan_download(
    source: WeightSource,
    patterns: Iterable[str],
    folder: Path | None = None,
    endpoint: str | None = None,
) -> DownloadPlan:
    """Ask the hub what a download would take, in a request for each file that is not on disk.

    Raise WeightsUnavailable for whatever would fail the download: a gated repository, a revision
    that is not there, a hub that cannot be reached.
    """
    check_reachable(source, endpoint)
    with plain_errors(source, endpoint):
        files = snapshot_download(
            source.location,
            revision=source.revision,
            allow_patterns=sorted(patterns),
            local_dir=folder,
            endpoint=endpoint_of(endpoint),
            tqdm_class=silent(lambda _: None),
            dry_run=True,
        )
    sizes = [(file.file_size or 0, file.will_download) for file in files]
    return DownloadPlan(
        sum(size for size, _ in sizes),
        sum(size for size, is_missing in sizes if is_missing),
        free_bytes(folder or Path(constants.HF_HUB_CACHE)),
    )


def download(
    source: WeightSource,
    patterns: Iterable[str],
    hear: Hear,
    folder: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """Download the missing files and return their folder; raise WeightsUnavailable.

    `hear` is told of bytes as they are written, from several threads. A connection that is cut is
    taken up again where it was; a download that ends keeps the files that are whole.
    """
    with plain_errors(source, endpoint):
        return Path(
            snapshot_download(
                source.location,
                revision=source.revision,
                allow_patterns=sorted(patterns),
                local_dir=folder,
                endpoint=endpoint_of(endpoint),
                tqdm_class=silent(hear),
            )
        )


def fetch(source: WeightSource, patterns: Iterable[str]) -> Path:
    """Return a local folder that has the files of the source that match the patterns.

    They are downloaded if they are not on disk, once for all processes of the machine; progress is
    logged every minute. A source that is a folder, or pinned and whole, asks nobody; one that only
    seems whole is taken if the hub cannot be asked. Raise WeightsUnavailable, in seconds, if the
    files cannot be had or do not fit.
    """
    patterns = tuple(patterns)
    if source.revision is None:
        return Path(source.location)
    if is_complete(source, patterns):
        return snapshot_of(source)
    with log_progress(str(source)) as progress, one_of_machine(source):
        plan = plan_fetch(source, patterns)
        if plan is None:
            return snapshot_of(source)
        check_room(source.location, plan)
        progress.start(plan.num_missing_bytes)
        return download(source, patterns, progress.add)


def plan_fetch(source: WeightSource, patterns: Iterable[str]) -> DownloadPlan | None:
    """Return what `fetch` would download of a hub's source, or None if it would ask for nothing.

    Raise WeightsUnavailable as it would.
    """
    patterns = tuple(patterns)
    if is_complete(source, patterns):
        return None
    try:
        return plan_download(source, patterns)
    except WeightsUnavailable as error:
        if not seems_complete(source, patterns):
            raise
        logger.warning("%s is taken from this machine, as it seems whole: %s", source, error)
        return None


def check_room(name: str, plan: DownloadPlan, folder: Path | None = None) -> None:
    """Raise WeightsUnavailable if the disk has too little room for what is missing."""
    if not plan.fits:
        place = folder or constants.HF_HUB_CACHE
        remedy = "" if folder else ", or set HF_HOME to a folder on a larger one"
        raise WeightsUnavailable(
            f"{name} needs {plan.num_missing_bytes / GB:.1f} GB in {place}, whose disk"
            f" has {plan.num_free_bytes / GB:.1f} GB free: make room{remedy}"
        )


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on, or will be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


@contextmanager
def one_of_machine(source: WeightSource) -> Iterator[None]:
    """Wait until no other process of this machine downloads the repository for flux-ray.

    The hub's own locks are one for each file: with those alone each rank would ask for each file.
    """
    storage = storage_of(source)
    with plain_errors(source):
        folder = storage.parent / ".locks" / storage.name
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder / "flux-ray.lock"):
        yield


class DownloadProgress:
    """The bytes of one download as its threads report them, and a line that says how far it is."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._num_bytes = 0
        self._total: int | None = None
        self._began_s = clock()

    def start(self, num_bytes: int) -> None:
        """Begin a download of so many bytes; until then another process has its turn."""
        self._total, self._began_s = num_bytes, self._clock()

    def add(self, num_bytes: int) -> None:
        """Count bytes that were written."""
        with self._lock:
            self._num_bytes += num_bytes

    def line(self) -> str:
        """Say how far the download is: `x of y GB, z MB/s`."""
        taken_s = max(self._clock() - self._began_s, 1e-3)
        if self._total is None:
            return f"{self._name}: another process of this machine downloads it, {taken_s:.0f} s"
        done = min(self._num_bytes, self._total)
        return (
            f"{self._name}: downloaded {done / GB:.2f} of {self._total / GB:.2f} GB,"
            f" {done / taken_s / 1e6:.0f} MB/s, {taken_s:.0f} s"
        )


@contextmanager
def log_progress(name: str, every_s: float | None = None) -> Iterator[DownloadProgress]:
    """Log a download's line every `every_s` seconds, SAY_S by default, and once at its end."""
    progress = DownloadProgress(name)
    ended = threading.Event()

    def say() -> None:
        while not ended.wait(SAY_S if every_s is None else every_s):
            logger.info(progress.line())

    logger.info("%s: not whole on this disk, downloading it", name)
    # It must not keep a process alive whose download hangs.
    talker = threading.Thread(target=say, daemon=True)
    talker.start()
    try:
        yield progress
        logger.info(progress.line())
    finally:
        ended.set()
        talker.join()


def silent(hear: Hear) -> type[tqdm]:
    """Return a class of bars for huggingface_hub that shows nothing and tells `hear` of bytes."""

    class SilentBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts = kwargs.get("name") == WRITTEN_BYTES
            super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if self._counts:
                hear(int(n or 0))

    return SilentBar
