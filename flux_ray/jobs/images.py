"""The shelf: images of jobs by their names, and those that were drawn without a job.

The results store: images by names of ours, in a folder or wherever fsspec reaches.
"""

import asyncio
import hashlib
import logging
import os
import re
import shlex
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from sqlalchemy import Executable, and_, insert, or_, select, update

from flux_ray.errors import ResultsLost, StoreLost
from flux_ray.jobs.database import Database
from flux_ray.jobs.job import JobResult, StoredImage
from flux_ray.jobs.statements import ARRIVAL_S, RESULT
from flux_ray.jobs.table import JOBS
from flux_ray.private_files import is_open_to_others, make_folder, open_privately
from flux_ray.request import GeneratedImage, ImageFormat, ImageRequest, ImageResult

logger = logging.getLogger("ray.serve")

JOB_ID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
NAME = re.compile(
    rf"{JOB_ID}/(?:[0-9]+-(?:preview-)?[0-9]+\.(?:png|jpeg|webp)|reference-[0-9]+)", re.A
)
MAX_BYTES = 128 * 2**20
# Entries of a folder: those of one release are all alike.
MAX_LOOKED_AT = 1000

# A store that never answers keeps a thread: not one of those that decode images.
THREADS = ThreadPoolExecutor(16, thread_name_prefix="results")

T = TypeVar("T")


class ResultMissing(Exception):
    """There is nothing whole of that name."""


class ResultTooLarge(Exception):
    """More bytes than the results store keeps under one name."""


class Results:
    """A folder a job. Nothing is overwritten with other bytes: each attempt has its own names.

    What is written under a name is there whole or not at all; it counts only when a row names it.
    All of it raises ResultsLost.
    """

    def __init__(
        self, url: str, options: Mapping[str, Any] | None = None, max_bytes: int = MAX_BYTES
    ) -> None:
        if "://" not in url:
            url = str(Path(url).expanduser().absolute())
        # Other gateways write there too: nobody's listing is remembered.
        self._files, root = url_to_fs(url, use_listings_cache=False, **(options or {}))
        self._root = str(root).rstrip("/")
        self._max_bytes = max_bytes

    async def warn_of_others(self) -> None:
        """Log how to close a folder in which an earlier release left what others may read."""
        if isinstance(self._files, LocalFileSystem) and await asyncio.to_thread(
            has_open_entry, Path(self._root)
        ):
            folder = shlex.quote(self._root)
            logger.warning(
                "other users of this machine can read images in %s: chmod -R go= %s",
                self._root,
                folder,
            )

    async def write_images(
        self, job_id: str, attempt: int, images: tuple[GeneratedImage, ...], format: ImageFormat
    ) -> tuple[StoredImage, ...]:
        """Keep the images of an attempt. Raises ResultTooLarge."""
        names = (f"{job_id}/{attempt}-{number}.{format}" for number in range(len(images)))
        return tuple([await self._keep(*each) for each in zip(names, images, strict=True)])

    async def write_preview(
        self, job_id: str, attempt: int, number: int, image: GeneratedImage, format: ImageFormat
    ) -> StoredImage:
        """Keep what an attempt's image will look like. Raises ResultTooLarge."""
        return await self._keep(f"{job_id}/{attempt}-preview-{number}.{format}", image)

    async def remove_previews(
        self, job_id: str, attempt: int, count: int, format: ImageFormat
    ) -> None:
        """Delete those of an attempt that are there."""
        await self._remove(f"{job_id}/{attempt}-preview-{n}.{format}" for n in range(count))

    async def read_image(self, image: StoredImage) -> bytes:
        """The very bytes that were written. Raises ResultMissing."""
        data = await self._read(image.name)
        if await translated(lambda: hashlib.sha256(data).hexdigest()) != image.sha256:
            raise ResultMissing(f"{image.name} is damaged")
        return data

    async def write_references(
        self, job_id: str, images: tuple[bytes, ...], pack: Callable[[bytes], bytes] = bytes
    ) -> None:
        """Keep the images of a request. Raises ResultTooLarge.

        Each is packed in the thread that writes it: packed all at once, they would be in memory
        twice.
        """
        for number, image in enumerate(images):
            await self._write(f"{job_id}/reference-{number}", partial(pack, image))

    async def read_references(self, job_id: str, count: int) -> tuple[bytes, ...]:
        """The images of a request. Raises ResultMissing."""
        return tuple([await self._read(f"{job_id}/reference-{n}") for n in range(count)])

    async def remove_references(self, job_id: str, count: int) -> None:
        """Delete the images of a request, those that are there."""
        await self._remove(f"{job_id}/reference-{number}" for number in range(count))

    async def remove_job(self, job_id: str) -> None:
        """Delete all that a job has here, of lost attempts too."""
        if not is_job_id(job_id):
            raise ResultMissing(f"{job_id} is no job's name")
        path = f"{self._root}/{job_id}"
        try:
            await translated(lambda: self._files.rm(path, recursive=True))
        except ResultMissing:
            return

    async def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(ResultMissing):
                await translated(partial(self._files.rm_file, self._path_of(name)))

    async def _keep(self, name: str, image: GeneratedImage) -> StoredImage:
        await self._write(name, lambda: image.data)
        digest = await translated(lambda: hashlib.sha256(image.data).hexdigest())
        return StoredImage(name, image.seed, len(image.data), digest)

    async def _write(self, name: str, make: Callable[[], bytes]) -> None:
        path = self._path_of(name)

        def write() -> None:
            data = make()
            if len(data) > self._max_bytes:
                message = f"{name} has {len(data)} bytes: more than {self._max_bytes}"
                raise ResultTooLarge(message)
            if isinstance(self._files, LocalFileSystem):
                write_whole(Path(path), data)
            else:
                # Object stores show an object when all of it came.
                self._files.pipe_file(path, data)

        try:
            await translated(write)
        except ResultMissing as error:
            # No bucket, or no disk where the folder was: it may come back.
            raise ResultsLost(str(error)) from error

    async def _read(self, name: str) -> bytes:
        path = self._path_of(name)
        data: bytes = await translated(
            lambda: self._files.cat_file(path, start=0, end=self._max_bytes + 1)
        )
        if len(data) > self._max_bytes:
            raise ResultTooLarge(f"{name} has more than {self._max_bytes} bytes")
        return data

    def _path_of(self, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ResultMissing(f"{name} is no name of ours")
        return f"{self._root}/{name}"


def has_open_entry(folder: Path) -> bool:
    """Say whether others can come into this folder, and then into one of its first entries."""
    if not is_open_to_others(folder):
        return False
    try:
        return any(is_open_to_others(each) for each in islice(folder.iterdir(), MAX_LOOKED_AT))
    except OSError:
        return False


def is_job_id(text: str) -> bool:
    """Whether a job could be called so."""
    return re.fullmatch(JOB_ID, text, re.A) is not None


async def translated(call: Callable[[], T]) -> T:
    """What it answers, off the event loop, with errors of this module instead of the store's."""
    try:
        return await asyncio.get_running_loop().run_in_executor(THREADS, call)
    except FileNotFoundError as error:
        raise ResultMissing(str(error)) from error
    except ResultTooLarge:
        raise
    except Exception as error:
        # fsspec promises no kind of error: each store raises those of its own libraries.
        raise ResultsLost(f"{type(error).__name__}: {error}") from error


def write_whole(path: Path, data: bytes) -> None:
    """On the disk before it has its name: neither a kill nor a power cut leaves half a file.

    No other user of the machine may read it, whoever made the folder around it.
    """
    make_folder(path.parent)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb", opener=open_privately) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# No key is called so: they are nobody's jobs, and are not found as such.
KEPT_FOR = "kept for "


class ImageStore:
    """Images count only while a row names them: those of lost attempts are not here.

    Everything raises StoreLost and ResultsLost. `keep_s`: so long an image is kept.
    """

    def __init__(self, database: Database, results: Results, keep_s: float) -> None:
        self._database = database
        self._results = results
        self._keep_s = keep_s

    async def read(self, name: str) -> bytes:
        """The very bytes that were written under that name. Raises ResultMissing."""
        return await self._results.read_image(await self._find(name))

    async def keep(
        self, owner: str, request: ImageRequest, result: ImageResult
    ) -> tuple[StoredImage, ...]:
        """Images that somebody waited for, as those of a job that is ready; cleaned up with them.

        Raises ResultTooLarge.
        """
        job_id = str(uuid.uuid4())
        # First the row: what is written without one would never be removed.
        await self._database.first(self._arrival(job_id, owner, request))
        images = await self._results.write_images(job_id, 0, result.images, request.encoding.format)
        kept = JobResult(images, asdict(result.times), result.warnings)
        if await self._database.first(self._completion(job_id, kept)) is None:
            raise StoreLost("the images took too long to be stored")
        return images

    def _arrival(self, job_id: str, owner: str, request: ImageRequest) -> Executable:
        now = self._database.now
        values = {
            "job_id": job_id,
            "owner": KEPT_FOR + owner,
            "tier": request.tier,
            # Nobody will draw it again: its words are not kept.
            "packed": {},
            "seed": request.seed,
            "memo": {},
            "status": "arriving",
            "created_at_s": now,
            "expires_at_s": now + ARRIVAL_S,
        }
        return insert(JOBS).values(values).returning(JOBS.c.job_id)

    def _completion(self, job_id: str, result: JobResult) -> Executable:
        now = self._database.now
        values = {
            "status": "ready",
            "result": asdict(result),
            "progress": 1.0,
            "finished_at_s": now,
            "expires_at_s": now + self._keep_s,
        }
        arriving = update(JOBS).where(JOBS.c.job_id == job_id, JOBS.c.status == "arriving")
        return arriving.values(values).returning(JOBS.c.job_id)

    async def _find(self, name: str) -> StoredImage:
        """As its job's row tells of it."""
        is_kept = and_(JOBS.c.status == "ready", JOBS.c.expires_at_s > self._database.now)
        is_previewed = and_(JOBS.c.status == "running", JOBS.c.result.is_not(None))
        named = select(JOBS.c.result).where(
            JOBS.c.job_id == name.partition("/")[0], or_(is_kept, is_previewed)
        )
        if (row := await self._database.first(named)) is not None:
            for image in RESULT.validate_python(row["result"]).images:
                if image.name == name:
                    return image
        raise ResultMissing("no job has an image of that name")
