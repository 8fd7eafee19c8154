"""Measure what `flux-ray doctor` judges: torch and driver, ports, weights, clocks, open files.

torch and a tracing exporter are imported in processes of their own, since that takes seconds and
may fail in any way. Nothing here changes anything.
"""

import json
import re
import resource
import shutil
import socket
import subprocess  # nosec B404
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from flux_ray.catalog import WORKLOADS
from flux_ray.cli.diagnosis import Found
from flux_ray.config import ALL_ADDRESSES, WEIGHT_FILES
from flux_ray.weights.source import HUB_ID

HUB = "https://huggingface.co"
HUB_TIMEOUT_S = 10.0
PROGRAM_TIMEOUT_S = 300.0
TORCH_PROBE = """
import json, torch
told = {"version": torch.__version__, "cuda": torch.version.cuda, "error": ""}
told["available"], told["count"] = torch.cuda.is_available(), torch.cuda.device_count()
if told["cuda"] and not told["available"]:
    try:
        torch.cuda.init()
    except Exception as error:
        told["error"] = str(error).splitlines()[0]
nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
told["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if nccl else None
print(json.dumps(told))
"""
IMPORT_PROBE = """
import importlib, sys
module, _, name = sys.argv[1].replace(":", ".").rpartition(".")
try:
    getattr(importlib.import_module(module), name)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""
COMPILERS = ("cc", "gcc", "clang")
# The hub has all layers of a text encoder and its embedding, and the replicas load fewer. Only of
# FLUX.1's two text encoders they load all.
DOWNLOADED_SHARE = 1.2


def output_of(command: Sequence[str]) -> str | None:
    """Return what a program prints, or None if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(  # nosec B603
            command, capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def torch_facts() -> dict[str, Any] | None:
    """Return what torch says of itself and its GPUs; None if it does not import."""
    told = output_of([sys.executable, "-c", TORCH_PROBE])
    facts: dict[str, Any] | None = json.loads(told.splitlines()[-1]) if told else None
    return facts


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, or None without one."""
    told = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return told.splitlines()[0].strip() if told else None


def import_error(import_path: str) -> str | None:
    """Return why `module:name` cannot be imported, or None if it can."""
    told = output_of([sys.executable, "-c", IMPORT_PROBE, import_path])
    if told is None:
        return "its import ends the process"
    return told.splitlines()[-1] if told else None


def is_port_taken(host: str, port: int) -> bool:
    """Return whether a program listens at that port."""
    address = "127.0.0.1" if host in ALL_ADDRESSES else host
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.settimeout(2.0)
        return probe.connect_ex((address, port)) == 0


def answers_as_serve(port: int) -> bool:
    """Return whether what listens there is a proxy of Serve."""
    try:
        with httpx.Client(timeout=5.0, trust_env=False) as client:
            return client.get(f"http://127.0.0.1:{port}/-/healthz").status_code in (200, 503)
    except httpx.HTTPError:
        return False


def shared_memory_bytes() -> int | None:
    """Return the size of /dev/shm, or None if it is not there."""
    try:
        return shutil.disk_usage("/dev/shm").total  # nosec B108
    except OSError:
        return None


def free_bytes(place: Path) -> int:
    """Return the free bytes of the disk that has, or will have, this folder."""
    there = next(each for each in (place, *place.parents) if each.exists())
    return shutil.disk_usage(there).free


def compiler() -> str | None:
    """Return the path of a C compiler, or None without one."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def open_files_limit() -> int:
    """Return how many files a process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def hub_cache(variables: Mapping[str, str], home: Path) -> Path:
    """Return the folder in which the hub's files are kept, as huggingface_hub finds it."""
    if named := variables.get("HF_HUB_CACHE"):
        return Path(named).expanduser()
    if named := variables.get("HF_HOME"):
        return Path(named).expanduser() / "hub"
    return home / ".cache" / "huggingface" / "hub"


def hub_token(variables: Mapping[str, str], home: Path) -> str | None:
    """Return the hub's token, as huggingface_hub finds it, or None without one."""
    if token := variables.get("HF_TOKEN", "").strip():
        return token
    cache = Path(variables.get("HF_HOME", home / ".cache" / "huggingface")).expanduser()
    path = Path(variables.get("HF_TOKEN_PATH", cache / "token")).expanduser()
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def is_cached(cache: Path, repository: str, revision: str) -> bool:
    """Return whether the weights of that revision are in the cache."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return all(any(snapshot.glob(pattern)) for pattern in WEIGHT_FILES)


class Hub:
    """Asks the hub whether weights could be fetched, without fetching them.

    `offset_s`: after an answer, how far this machine's clock is ahead of the hub's.
    """

    def __init__(
        self,
        variables: Mapping[str, str],
        home: Path,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._cache = hub_cache(variables, home)
        self._token = hub_token(variables, home)
        self._is_offline = variables.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes")
        self.endpoint = variables.get("HF_ENDPOINT", HUB).rstrip("/")
        self._client = httpx.Client(timeout=HUB_TIMEOUT_S, transport=transport)
        self.offset_s: float | None = None

    def find(self, weights: str) -> Found:
        """Return where weights are: a folder, or a hub id with its revision."""
        match = HUB_ID.fullmatch(weights)
        if match is None:
            return "here" if Path(weights).is_dir() else "missing"
        repository, revision = match["repository"], match["revision"]
        if is_cached(self._cache, repository, revision):
            return "here"
        if self._is_offline:
            return "unreachable"
        response = self._head(f"/{repository}/resolve/{revision}/model_index.json", self._token)
        return "unreachable" if response is None else found_by(response, self._token is not None)

    def ask_time(self) -> float | None:
        """Return how far this clock is ahead of the hub's, in seconds; None if it is silent."""
        if self.offset_s is None and not self._is_offline:
            self._head("/", None)
        return self.offset_s

    def _head(self, path: str, token: str | None) -> httpx.Response | None:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        try:
            response = self._client.head(self.endpoint + path, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL):
            return None
        if "date" in response.headers:
            self.offset_s = clock_offset_s(response.headers["date"], datetime.now(UTC))
        return response


def found_by(response: httpx.Response, has_token: bool) -> Found:
    """Return what the hub's answer says of weights; a code in its header tells 401 from 401."""
    code = response.headers.get("x-error-code", "")
    if code == "GatedRepo" or (response.status_code in (401, 403) and code != "RepoNotFound"):
        return "gated" if has_token else "no token"
    if code in ("RepoNotFound", "RevisionNotFound"):
        return "missing"
    if response.status_code < 400 or code == "EntryNotFound":
        return "to download"
    return "missing" if response.status_code == 404 else "unreachable"


def clock_offset_s(date: str, now: datetime) -> float | None:
    """Return how far `now` is ahead of the time in an HTTP Date header; None if it is no time."""
    try:
        return (now - parsedate_to_datetime(date)).total_seconds()
    except (TypeError, ValueError):
        return None


def download_bytes(tier: str) -> int:
    """Return about how many bytes a tier's weights are on the hub, in bfloat16."""
    model, encoder = WORKLOADS[tier].transformer, WORKLOADS[tier].text_encoder
    num_weights = model.num_block_weights + model.num_other_weights + encoder.num_block_weights
    if encoder.num_whole_weights:
        return 2 * (num_weights + encoder.num_whole_weights)
    return int(2 * DOWNLOADED_SHARE * num_weights)


def database_path(database: str) -> Path | None:
    """Return the file of a `sqlite:///` database, or None of another kind."""
    if not database.startswith("sqlite:///"):
        return None
    return Path(database.removeprefix("sqlite:///")).expanduser()


def sessions_with(path: Path, processes: Path = Path("/proc")) -> list[str]:
    """Return the Ray sessions whose processes have that file open, as far as they may be seen."""
    sessions = set()
    for process in processes.glob("[0-9]*"):
        links = links_of(process / "fd")
        if str(path) in links:
            named = re.search(r"/(session_[\w-]+)/", "\n".join(links))
            sessions.add(named[1] if named else f"process {process.name}")
    return sorted(sessions)


def links_of(folder: Path) -> list[str]:
    """Return where the links of a folder lead; nothing if it is another user's, or gone."""
    try:
        return [str(link.readlink()) for link in folder.iterdir()]
    except OSError:
        return []
