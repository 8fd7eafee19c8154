"""Decide from what was measured whether it is well, and how to mend it: `flux-ray doctor`.

Everything here is pure; `flux_ray/cli/doctor.py` measures. Each function returns one line of the
table: what was looked at, `ok`, `warning` or `problem`, and a sentence with the remedy.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flux_ray.weights.source import HubUnreachable, WeightsUnavailable

State = Literal["ok", "warning", "problem"]
GB = 10**9
# NCCL and gloo exchange tensors of the ranks of one node in shared memory.
SHM_BYTES_PER_RANK = 1 * GB
# Each connection of a proxy, a gateway or a rank is one open file, and so is each of Ray's.
FEW_FILES, ENOUGH_FILES = 4096, 65536
# Signed URLs are valid for ten minutes, and S3 refuses requests that are a quarter of an hour off.
MAX_CLOCK_S, LARGE_CLOCK_S = 5.0, 60.0
# CUDA runs on drivers from these versions on, by its major version (NVIDIA's release notes).
LEAST_DRIVERS = {11: 450, 12: 525, 13: 580}
TOKEN_REMEDY = "`ray get-auth-token --generate` makes one; copy it to every node"  # nosec B105


@dataclass(frozen=True)
class Diagnosis:
    """One line of the table."""

    what: str
    state: State
    said: str


def judge_driver(torch: Mapping[str, Any] | None, driver: str | None, needs_gpu: bool) -> Diagnosis:
    """Judge the GPU driver (`nvidia-smi`'s version, None without one) against torch's CUDA."""
    what = "driver and torch"
    if torch is None:
        return Diagnosis(what, "problem", "torch does not import; run `make serve` to install it")
    build = torch["cuda"]
    if not needs_gpu:
        return Diagnosis(what, "ok", f"torch {torch['version']}; no tier asks for a GPU")
    if build is None:
        said = f"torch {torch['version']} is built without CUDA; install the CUDA build of it"
        return Diagnosis(what, "problem", said)
    if driver is None:
        said = "no NVIDIA driver answers (nvidia-smi); install one, or run on a GPU node"
        return Diagnosis(what, "problem", said)
    least = LEAST_DRIVERS.get(int(build.split(".")[0]), 0)
    if int(driver.split(".")[0]) < least:
        said = f"driver {driver} is too old for torch's CUDA {build}; update it to {least} or later"
        return Diagnosis(what, "problem", said)
    if not torch["available"]:
        said = f"torch sees no GPU: {torch['error'] or 'CUDA is not available'}; see `nvidia-smi`"
        return Diagnosis(what, "problem", said)
    said = f"driver {driver}, torch {torch['version']} with CUDA {build}, {torch['count']} GPUs"
    return Diagnosis(what, "ok", said)


def judge_nccl(torch: Mapping[str, Any] | None, num_ranks: int, needs_gpu: bool) -> Diagnosis:
    """Judge whether ranks on several GPUs can exchange tensors."""
    what = "NCCL"
    if num_ranks < 2 or not needs_gpu:
        return Diagnosis(what, "ok", "not needed: no tier has several ranks on GPUs")
    if torch is None or not torch["nccl"]:
        said = f"torch has no NCCL, and {num_ranks} ranks need it; install the CUDA build of torch"
        return Diagnosis(what, "problem", said)
    return Diagnosis(what, "ok", f"NCCL {torch['nccl']}")


def judge_shared_memory(num_bytes: int | None, num_ranks: int) -> Diagnosis:
    """Judge the size of /dev/shm, where Ray keeps its objects and ranks exchange tensors."""
    what = "/dev/shm"  # nosec B108
    if num_bytes is None:
        return Diagnosis(what, "warning", "is not there; mount a tmpfs, as containers have it")
    needed, size = SHM_BYTES_PER_RANK * max(1, num_ranks), f"{num_bytes / GB:.1f} GB"
    if num_bytes < 0.1 * GB:
        said = f"{size} is what containers have by default; start them with --shm-size=16g or more"
        return Diagnosis(what, "problem", said)
    if num_bytes < needed:
        said = f"{size} is little for {num_ranks} ranks on a node; make it {needed / GB:.0f} GB"
        return Diagnosis(what, "warning", said)
    return Diagnosis(what, "ok", size)


def judge_port(port: int, host: str, is_taken: bool, answers_as_serve: bool) -> Diagnosis:
    """Judge whether Serve's port is free, or taken by a Serve that runs already."""
    what = f"port {port}"
    if not is_taken:
        return Diagnosis(what, "ok", f"free at {host}")
    if answers_as_serve:
        return Diagnosis(what, "ok", f"a Serve answers at {host}")
    said = f"another program has it; end that, or say another http_options.port than {port}"
    return Diagnosis(what, "problem", said)


def judge_auth(mode: str | None, has_token: bool) -> Diagnosis:
    """Judge RAY_AUTH_MODE: without it, Ray decides by whether there is a token."""
    what = "Ray's authentication"
    if mode is None:
        said = "RAY_AUTH_MODE is not set, so Ray chooses; say RAY_AUTH_MODE=token on every node"
        return Diagnosis(what, "warning", said)
    if mode.lower() == "disabled":
        said = "off: who reaches a port of Ray can run code; say RAY_AUTH_MODE=token on every node"
        return Diagnosis(what, "warning", said)
    if mode.lower() != "token":
        said = f"RAY_AUTH_MODE={mode} is unknown to Ray; say token or disabled"
        return Diagnosis(what, "problem", said)
    if not has_token:
        return Diagnosis(what, "problem", f"there is no token: {TOKEN_REMEDY}")
    return Diagnosis(what, "ok", "by token")


def judge_tracing(import_path: str | None, error: str | None) -> Diagnosis:
    """Judge the tracing exporter: if it does not import, no proxy of Serve starts."""
    what = "tracing exporter"
    if not import_path:
        return Diagnosis(what, "ok", "none is set")
    if error is not None:
        said = (
            f"{import_path} does not import ({error}), and Serve would not start; install it, or"
            " unset RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"
        )
        return Diagnosis(what, "problem", said)
    return Diagnosis(what, "ok", import_path)


def judge_clock(offset_s: float | None) -> Diagnosis:
    """Judge by how many seconds this clock is ahead of a server's; None if none could be asked."""
    what = "clock"
    if offset_s is None:
        return Diagnosis(what, "ok", "not compared: the hub cannot be reached")
    side = "ahead" if offset_s > 0 else "behind"
    said = f"{abs(offset_s):.0f} s {side} of the hub's"
    if abs(offset_s) <= MAX_CLOCK_S:
        return Diagnosis(what, "ok", said)
    remedy = "turn on time synchronisation (`timedatectl set-ntp true`)"
    state: State = "warning" if abs(offset_s) <= LARGE_CLOCK_S else "problem"
    return Diagnosis(what, state, f"{said}; {remedy}")


def judge_job_file(path: str | None, sessions: Sequence[str]) -> Diagnosis:
    """Judge which Ray sessions have the job database open: two take each other's jobs."""
    what = "job database"
    if path is None:
        return Diagnosis(what, "ok", "no file: jobs are off, or kept in PostgreSQL")
    if len(sessions) > 1:
        said = (
            f"{path} is open in {len(sessions)} clusters ({', '.join(sessions)}), which take each"
            " other's jobs; give each one a `jobs: {database: ...}` of its own"
        )
        return Diagnosis(what, "problem", said)
    return Diagnosis(what, "ok", f"{path}, {'open in one cluster' if sessions else 'not in use'}")


def judge_compiler(compiler: str | None, needs_gpu: bool) -> Diagnosis:
    """Judge whether there is a C compiler, which torch.compile and Triton's kernels need."""
    what = "C compiler"
    if compiler is not None:
        return Diagnosis(what, "ok", compiler)
    if not needs_gpu:
        return Diagnosis(what, "ok", "none, and no tier needs one")
    said = "none is found (cc, gcc, clang), and compiled kernels need one; install gcc"
    return Diagnosis(what, "warning", said)


Heard = Literal["no answer", "refused", "no list", "other models", "has it", "no key file"]


def judge_upsampler(url: str, model: str, heard: Heard) -> Diagnosis:
    """Judge the LLM that upsamples prompts; without it they are used as they were sent."""
    said: dict[Heard, tuple[State, str]] = {
        "has it": ("ok", f"answers, and has {model}"),
        "no list": ("ok", f"answers, but does not list its models: whether it has {model} is open"),
        "other models": ("problem", f"answers, but has no model {model}; correct the name"),
        "refused": ("problem", "refuses the key; correct what is in upsampling.api_key_file"),
        "no key file": ("problem", "upsampling.api_key_file cannot be read; put it on every node"),
        "no answer": (
            "warning",
            "does not answer, so that prompts will be used as sent; start it, or correct the URL"
            " (one that this file deploys answers when it is up)",
        ),
    }
    state, words = said[heard]
    return Diagnosis("upsampler", state, f"{url} {words}")


def judge_disk(free_bytes: int, missing_bytes: int, place: str) -> Diagnosis:
    """Judge whether weights that are not there yet have room on the disk."""
    what, free = "disk", f"{free_bytes / GB:.0f} GB free at {place}"
    if not missing_bytes:
        return Diagnosis(what, "ok", free)
    needed = f"about {missing_bytes / GB:.0f} GB of weights are to be downloaded"
    if free_bytes < missing_bytes:
        said = f"{free}, and {needed}; free some, or name a larger disk with HF_HOME"
        return Diagnosis(what, "problem", said)
    return Diagnosis(what, "ok", f"{free}, {needed}")


def judge_open_files(limit: int) -> Diagnosis:
    """Judge how many files a process may have open."""
    what = "open files"
    if limit >= ENOUGH_FILES:
        return Diagnosis(what, "ok", str(limit))
    remedy = f"say `ulimit -n {ENOUGH_FILES}` before Ray starts (LimitNOFILE of a unit)"
    if limit < FEW_FILES:
        return Diagnosis(what, "warning", f"{limit} are soon too few for a node; {remedy}")
    return Diagnosis(what, "ok", f"{limit}; for many connections {remedy}")


def judge_versions(own: Mapping[str, str], running: Mapping[str, str | None]) -> Diagnosis:
    """Judge the versions of Ray and Python here and on the cluster's head; {} without a cluster.

    Ray needs the same minor version of Python on all nodes, and the same release of Ray.
    """
    what = "versions"
    here = ", ".join(f"{name} {version}" for name, version in own.items())
    if not running:
        return Diagnosis(what, "ok", f"{here}; no cluster answers to compare with")
    for name, version in own.items():
        theirs = running.get(name)
        if theirs is not None and minor(name, theirs) != minor(name, version):
            said = f"{name} {version} here and {theirs} on the cluster; install the same here"
            return Diagnosis(what, "problem", said)
    return Diagnosis(what, "ok", f"{here}, as on the cluster")


def minor(name: str, version: str) -> str:
    """Return of Python's version what must be the same, and all of another's."""
    if name != "Python":
        return version
    return ".".join(re.findall(r"\d+", version)[:2])


def judge_weights(
    tier: str, weights: str, num_bytes: int, refused: WeightsUnavailable | None = None
) -> Diagnosis:
    """Judge a tier's weights: `num_bytes` are to be downloaded, which may be `refused`."""
    what = f"weights of {tier}"
    if refused is not None:
        # Another node may have them, or reach the hub.
        state: State = "warning" if isinstance(refused, HubUnreachable) else "problem"
        return Diagnosis(what, state, str(refused))
    if num_bytes:
        said = f"{num_bytes / GB:.3g} GB not here yet; each node downloads them at its first start"
        return Diagnosis(what, "ok", f"{weights}: {said}")
    return Diagnosis(what, "ok", f"{weights}: on this machine")
