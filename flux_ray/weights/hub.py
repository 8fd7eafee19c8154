"""Ask the hub, or what it has left on this disk, for a repository's files; say its errors plainly.

Beside every download huggingface_hub keeps the hub's list of the commit's files with their
checksums. With it, whether a snapshot is whole is known without any request.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, get_session, get_token
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from flux_ray.weights.source import HubUnreachable, WeightSource, WeightsUnavailable

# How long the hub has to answer at all.
REACH_S = 10.0


@dataclass(frozen=True)
class HubFile:
    """A file of a repository's commit; large files have a `sha256`, small ones a Git blob's id."""

    path: str
    num_bytes: int
    blob_id: str
    sha256: str | None = None


def storage_of(source: WeightSource) -> Path:
    """Return the repository's folder in the hub's cache, whether it is there or not."""
    return Path(constants.HF_HUB_CACHE) / f"models--{source.location.replace('/', '--')}"


def snapshot_of(source: WeightSource, folder: Path | None = None) -> Path:
    """Return where the commit's files are, or would be: `folder`, or else in the hub's cache."""
    return folder or storage_of(source) / "snapshots" / str(source.revision)


def list_path(source: WeightSource, folder: Path | None = None) -> Path:
    """Return where huggingface_hub keeps the list of the commit's files."""
    beside = storage_of(source) if folder is None else folder / ".cache" / "huggingface"
    return beside / "trees" / f"{source.revision}.json"


def kept_files(path: Path) -> list[HubFile] | None:
    """Return the files of a list that was kept, or None if there is none of a known format."""
    try:
        kept = json.loads(path.read_text())
        if kept["format_version"] != 1:
            return None
        return [
            HubFile(name, row["size"], row["blob_id"], row.get("lfs_sha256"))
            for name, row in kept["files"].items()
        ]
    except (OSError, ValueError, KeyError):
        return None


def asked_files(source: WeightSource, endpoint: str | None = None) -> list[HubFile]:
    """Ask the hub for the commit's files; raise WeightsUnavailable if it does not tell."""
    check_reachable(source, endpoint)
    with plain_errors(source, endpoint):
        listed = HfApi(endpoint=endpoint_of(endpoint)).list_repo_tree(
            source.location, recursive=True, revision=source.revision
        )
        return [
            HubFile(each.path, each.size, each.blob_id, each.lfs.sha256 if each.lfs else None)
            for each in listed
            if isinstance(each, RepoFile)
        ]


def used_files(files: Iterable[HubFile], patterns: Iterable[str]) -> list[HubFile]:
    """Return those of the files that match a pattern."""
    patterns = tuple(patterns)
    return [file for file in files if is_used(file.path, patterns)]


def is_used(path: str, patterns: Iterable[str]) -> bool:
    """Return whether a file matches a pattern, as huggingface_hub matches them."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def is_complete(source: WeightSource, patterns: Iterable[str], folder: Path | None = None) -> bool:
    """Return whether all matching files of a pinned commit are on disk, without any request.

    A file gets its name only when all of it is written. A branch may have moved, so it never is.
    """
    if not source.is_pinned:
        return False
    files = kept_files(list_path(source, folder))
    if files is None:
        return False
    snapshot = snapshot_of(source, folder)
    return all((snapshot / file.path).is_file() for file in used_files(files, patterns))


def seems_complete(source: WeightSource, patterns: Iterable[str]) -> bool:
    """Return whether a pinned commit seems whole by its own lists: of components, and of shards.

    For folders that an older huggingface_hub filled, which kept no list of the commit's files.
    """
    patterns, snapshot = tuple(patterns), snapshot_of(source)
    if not source.is_pinned:
        return False
    folders = [pattern.partition("/")[0] for pattern in patterns if "/" in pattern]
    try:
        index = json.loads((snapshot / "model_index.json").read_text())
        names = [name for name, kind in index.items() if is_component(kind)]
        parts = [snapshot / name for name in names if is_used(name, folders)]
        return bool(parts) and all(is_part_complete(part, patterns) for part in parts)
    except (OSError, ValueError, KeyError):
        return False


def is_component(kind: object) -> bool:
    """Return whether a value of model_index.json, [library, class], is of a component."""
    return isinstance(kind, list) and all(isinstance(each, str) for each in kind)


def is_part_complete(part: Path, patterns: tuple[str, ...]) -> bool:
    """Return whether a component's folder has its files, and all weights if they are asked for."""
    if not is_used(f"{part.name}/model.safetensors", patterns):
        return part.is_dir() and any(part.iterdir())
    shards = [path.name for path in part.glob("*.safetensors")]
    for listed in part.glob("*.safetensors.index.json"):
        shards = list(json.loads(listed.read_text())["weight_map"].values())
    # The config is there too: without it there are no shapes for the weights.
    names = ["config.json", *shards]
    return bool(shards) and all((part / name).is_file() for name in names)


def endpoint_of(endpoint: str | None) -> str:
    """Return the hub's address: the one given, or else of HF_ENDPOINT, or the public one."""
    return (endpoint or constants.ENDPOINT).rstrip("/")


def check_reachable(source: WeightSource, endpoint: str | None = None) -> None:
    """Raise WeightsUnavailable if the hub does not answer at all.

    huggingface_hub itself tries each request six times, over half a minute.
    """
    with plain_errors(source, endpoint):
        get_session().head(f"{endpoint_of(endpoint)}/", timeout=REACH_S)


def hub_date(endpoint: str | None = None) -> str | None:
    """Return the time by the hub's clock as an HTTP date, or None if it does not answer."""
    try:
        answer = get_session().head(f"{endpoint_of(endpoint)}/", timeout=REACH_S)
    except (httpx2.HTTPError, OSError):
        return None
    date: str | None = answer.headers.get("date")
    return date


@contextmanager
def plain_errors(source: WeightSource, endpoint: str | None = None) -> Iterator[None]:
    """Turn whatever the hub or the network raises into a WeightsUnavailable of one sentence."""
    try:
        yield
    except DryRunError as error:
        # Its own words leave out the reason.
        raise plain(error.__cause__ or error, source, endpoint) from None
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise plain(error, source, endpoint) from None


def plain(error: BaseException, source: WeightSource, endpoint: str | None) -> WeightsUnavailable:
    """Return the error of one sentence for one of the hub or the network."""
    kind = HubUnreachable if is_silence(error) else WeightsUnavailable
    return kind(reason_of(error, source, endpoint))


def is_silence(error: BaseException) -> bool:
    """Return whether the hub was not asked, did not answer, or failed."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, (httpx2.HTTPError, LocalEntryNotFoundError, ConnectionError))


def reason_of(error: BaseException, source: WeightSource, endpoint: str | None) -> str:
    """Return in one sentence what is wrong and what to do about it."""
    hub, name = endpoint_of(endpoint), source.location
    page, token = f"{hub}/{name}", "set HF_TOKEN, or run `hf auth login`"
    has_token = get_token() is not None
    if isinstance(error, GatedRepoError):
        ours = "with the account of your token" if has_token else f"with your account, and {token}"
        return f"{name} is gated: accept its licence at {page} {ours}"
    if isinstance(error, RepositoryNotFoundError) or is_unauthorized(error):
        ours = "your token may not see it" if has_token else f"it is private: {token}"
        return f"{hub} shows no repository {name}: its name is wrong, or {ours}"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {source.revision}: look for a commit at {page}/commits/main"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{name} is not whole on this disk, and HF_HUB_OFFLINE forbids to download it"
    if isinstance(error, HfHubHTTPError):
        return f"{hub} answered {error.response.status_code} for {name}: try again later"
    if is_silence(error):
        return (
            f"{hub} cannot be reached for {name} ({type(error).__name__}): check the network, or"
            " set HF_ENDPOINT to a mirror"
        )
    return f"{name} cannot be written to {constants.HF_HUB_CACHE}: {error}"


def is_unauthorized(error: BaseException) -> bool:
    """Return whether the hub refused the token itself."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code == 401
