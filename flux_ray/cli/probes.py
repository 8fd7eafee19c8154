"""Measure what `flux-ray doctor` judges: torch and driver, ports, clocks, open files.

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
from collections.abc import Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from flux_ray.cli.diagnosis import Heard
from flux_ray.config import ALL_ADDRESSES, Upsampling

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


def own_client(timeout_s: float) -> httpx.Client:
    """Return a client for a server on this machine: through no proxy, whatever its certificate.

    That names the host which clients know, not the address at which this machine reaches it.
    """
    return httpx.Client(timeout=timeout_s, trust_env=False, verify=False)  # nosec B501


def answers_as_serve(url: str) -> bool:
    """Return whether what answers at that URL of this machine is a proxy of Serve."""
    try:
        with own_client(5.0) as client:
            return client.get(f"{url}/-/healthz").status_code in (200, 503)
    except httpx.HTTPError:
        return False


def ask_upsampler(
    upsampling: Upsampling, model: str, transport: httpx.BaseTransport | None = None
) -> Heard:
    """Return what an LLM's server says of itself, and whether it has that model."""
    headers = {}
    if upsampling.api_key_file is not None:
        try:
            key = upsampling.api_key_file.read_text().strip()
            headers["authorization"] = f"Bearer {key}"
        except (OSError, UnicodeDecodeError):
            return "no key file"
    try:
        with httpx.Client(timeout=5.0, trust_env=False, transport=transport) as client:
            answer = client.get(f"{upsampling.url.rstrip('/')}/models", headers=headers)
    except (httpx.HTTPError, UnicodeEncodeError):
        return "no answer"
    if answer.status_code in (401, 403):
        return "refused"
    if answer.status_code >= 500:
        return "no answer"
    try:
        names = {each["id"] for each in answer.json()["data"]}
    except (ValueError, KeyError, TypeError):
        return "no list"
    return "has it" if model in names else "other models"


def shared_memory_bytes() -> int | None:
    """Return the size of /dev/shm, or None if it is not there."""
    try:
        return shutil.disk_usage("/dev/shm").total  # nosec B108
    except OSError:
        return None


def compiler() -> str | None:
    """Return the path of a C compiler, or None without one."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def open_files_limit() -> int:
    """Return how many files a process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def clock_offset_s(date: str, now: datetime) -> float | None:
    """Return how far `now` is ahead of the time in an HTTP Date header; None if it is no time."""
    try:
        return (now - parsedate_to_datetime(date)).total_seconds()
    except (TypeError, ValueError):
        return None


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
