"""Verify that weights on disk are those of the hub, by checksums, without asking it.

The expected checksums are those that huggingface_hub keeps beside a download, or of the manifest of
a folder of rank files.
"""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flux_ray.weights.hub import HubFile, kept_files, used_files
from flux_ray.weights.shards import MANIFEST, read_manifest
from flux_ray.weights.source import ALL_PARTS, WeightsUnavailable

# The hash releases Python's lock; more threads than this only wait for the disk.
NUM_THREADS = 8
PIECE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Verification:
    """What was found: the number of files, and the paths of those that are damaged or missing."""

    num_files: int
    damaged: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Return whether every file is there and as it should be."""
        return not self.damaged and not self.missing


def verify_folder(
    folder: Path, files: Iterable[HubFile], hear: Callable[[int], None]
) -> Verification:
    """Compare the folder to the checksums; several threads tell `hear` of bytes."""
    expected = sorted(files, key=lambda file: file.path)
    there = [file for file in expected if (folder / file.path).is_file()]
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        same = threads.map(lambda file: is_same(folder / file.path, file, hear), there)
        damaged = [file.path for file, is_one in zip(there, same, strict=True) if not is_one]
    missing = [file.path for file in expected if file not in there]
    return Verification(len(expected), tuple(damaged), tuple(missing))


def is_same(path: Path, file: HubFile, hear: Callable[[int], None]) -> bool:
    """Return whether a file has the bytes that the hub lists."""
    if file.sha256 is not None:
        digest = hashlib.sha256()
    else:
        # Small files are listed by the id that Git gives them.
        digest = hashlib.sha1(usedforsecurity=False)
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as stream:
        while piece := stream.read(PIECE_BYTES):
            digest.update(piece)
            hear(len(piece))
    return digest.hexdigest() == (file.sha256 or file.blob_id)


def expected_files(folder: Path) -> list[HubFile]:
    """Return the files that a folder should have, by what was kept in it when it was made.

    Raise WeightsUnavailable if nothing says so.
    """
    if (manifest := read_manifest(folder)) is not None:
        return [
            HubFile(path, file.num_bytes, "", file.sha256) for path, file in manifest.files.items()
        ]
    # A snapshot of the hub's cache has its list beside `snapshots`; another folder has its own.
    lists = [folder.parent.parent / "trees" / f"{folder.name}.json"]
    own = (folder / ".cache" / "huggingface" / "trees").glob("*.json")
    lists += sorted(own, key=lambda path: path.stat().st_mtime, reverse=True)
    for path in lists:
        if (files := kept_files(path)) is not None:
            return used_files(files, ALL_PARTS)
    raise WeightsUnavailable(
        f"{folder} has no checksums beside it: neither {MANIFEST} nor a list that `flux-ray weights"
        " pull` keeps; say --online to ask the hub for them"
    )


def remove_damaged(folder: Path, paths: Iterable[str]) -> None:
    """Delete files, and in the hub's cache what they link to, so that a pull fetches them again."""
    for path in paths:
        (folder / path).resolve().unlink(missing_ok=True)
        (folder / path).unlink(missing_ok=True)
