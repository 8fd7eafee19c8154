"""The files of jobs: their images, previews and reference images, in a results store.

`Results` reads and writes them, in a folder or wherever fsspec reaches, under names that it makes
itself. `ImageStore` reads them by name for callers, where a row of the job database vouches for the
name, and keeps the images of requests that were answered without a job.
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
# Entries of a folder whose mode is checked: all entries that one release wrote have the same mode.
MAX_LOOKED_AT = 1000

# Own threads: a store that never answers blocks them, and must not block those that decode images.
THREADS = ThreadPoolExecutor(16, thread_name_prefix="results")

T = TypeVar("T")


class ResultMissing(Exception):
    """Nothing is stored under that name, or it is damaged."""


class ResultTooLarge(Exception):
    """An image has more bytes than the results store keeps under one name."""


class Results:
    """The results store: one folder for each job, through fsspec.

    Names contain the number of the attempt, so that no file is overwritten with other bytes. A file
    is there whole or not at all, and counts only once a row of the job database names it. Every
    method raises ResultsLost if the store does not answer.
    """

    def __init__(
        self, url: str, options: Mapping[str, Any] | None = None, max_bytes: int = MAX_BYTES
    ) -> None:
        if "://" not in url:
            url = str(Path(url).expanduser().absolute())
        # Other gateways write there too: a cached listing would miss what they wrote.
        self._files, root = url_to_fs(url, use_listings_cache=False, **(options or {}))
        self._root = str(root).rstrip("/")
        self._max_bytes = max_bytes

    async def warn_of_others(self) -> None:
        """Log how to make the folder private if an earlier release left it readable to others."""
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
        """Store the images of an attempt, and return their names. Raises ResultTooLarge."""
        names = (f"{job_id}/{attempt}-{number}.{format}" for number in range(len(images)))
        return tuple([await self._keep(*each) for each in zip(names, images, strict=True)])

    async def write_preview(
        self, job_id: str, attempt: int, number: int, image: GeneratedImage, format: ImageFormat
    ) -> StoredImage:
        """Store the preview with that number of an attempt. Raises ResultTooLarge."""
        return await self._keep(f"{job_id}/{attempt}-preview-{number}.{format}", image)

    async def remove_previews(
        self, job_id: str, attempt: int, count: int, format: ImageFormat
    ) -> None:
        """Delete the first `count` previews of an attempt; those that are missing are no error."""
        await self._remove(f"{job_id}/{attempt}-preview-{n}.{format}" for n in range(count))

    async def read_image(self, image: StoredImage) -> bytes:
        """Return the bytes of an image; raise ResultMissing unless they are those written."""
        data = await self._read(image.name)
        if await translated(lambda: hashlib.sha256(data).hexdigest()) != image.sha256:
            raise ResultMissing(f"{image.name} is damaged")
        return data

    async def write_references(
        self, job_id: str, images: tuple[bytes, ...], pack: Callable[[bytes], bytes] = bytes
    ) -> None:
        """Store the reference images of a request. Raises ResultTooLarge.

        Each is packed in the thread that writes it: if all were packed beforehand, they would be
        in memory twice.
        """
        for number, image in enumerate(images):
            await self._write(f"{job_id}/reference-{number}", partial(pack, image))

    async def read_references(self, job_id: str, count: int) -> tuple[bytes, ...]:
        """Return the reference images of a request. Raises ResultMissing, ResultTooLarge."""
        return tuple([await self._read(f"{job_id}/reference-{n}") for n in range(count)])

    async def remove_references(self, job_id: str, count: int) -> None:
        """Delete the reference images of a request; missing ones are no error."""
        await self._remove(f"{job_id}/reference-{number}" for number in range(count))

    async def remove_job(self, job_id: str) -> None:
        """Delete the whole folder of a job, with what its lost attempts wrote."""
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
                # Object stores show an object only once all of it has arrived.
                self._files.pipe_file(path, data)

        try:
            await translated(write)
        except ResultMissing as error:
            # A write finds nothing missing but the bucket or the mounted disk: that may come back.
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
    """Return whether other users can enter the folder, and one of its first entries."""
    if not is_open_to_others(folder):
        return False
    try:
        return any(is_open_to_others(each) for each in islice(folder.iterdir(), MAX_LOOKED_AT))
    except OSError:
        return False


def is_job_id(text: str) -> bool:
    """Return whether the text has the form of a job's id."""
    return re.fullmatch(JOB_ID, text, re.A) is not None


async def translated(call: Callable[[], T]) -> T:
    """Return what `call` returns in a thread; raise ResultMissing or ResultsLost for its errors."""
    try:
        return await asyncio.get_running_loop().run_in_executor(THREADS, call)
    except FileNotFoundError as error:
        raise ResultMissing(str(error)) from error
    except ResultTooLarge:
        raise
    except Exception as error:
        # fsspec names no base class of errors: each store raises those of its own libraries.
        raise ResultsLost(f"{type(error).__name__}: {error}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that only this user may read, whatever the mode of its folder.

    It is synced to the disk before it gets its name: neither a kill nor a power cut leaves half a
    file under that name.
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


# The prefix of the owner in rows of images without a job: no key has such a name, so that no
# caller finds these rows among its jobs.
KEPT_FOR = "kept for "


class ImageStore:
    """The images that callers may fetch by name: those that a row of the job database names.

    Images of lost attempts are not found, as no row names them. `keep_s` is how long the images of
    a request without a job are kept, in seconds. Every method raises StoreLost and ResultsLost.
    """

    def __init__(self, database: Database, results: Results, keep_s: float) -> None:
        self._database = database
        self._results = results
        self._keep_s = keep_s

    async def read(self, name: str) -> bytes:
        """Return the bytes of the image of that name. Raises ResultMissing."""
        return await self._results.read_image(await self._find(name))

    async def keep(
        self, owner: str, request: ImageRequest, result: ImageResult
    ) -> tuple[StoredImage, ...]:
        """Store the images of a request that had no job. Raises ResultTooLarge.

        They get a row like that of a job that is ready, so that the clean-up removes them too.
        """
        job_id = str(uuid.uuid4())
        # The row comes first: the clean-up would never find images that were written without one.
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
            # It is never generated again: so its prompt need not be kept.
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
        """Return the image as its job's row describes it. Raises ResultMissing."""
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
