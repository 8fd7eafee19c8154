"""The image of cluster/docker/: hadolint's word on its file, and the image really built."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import flux_ray
from tests.deployment.cluster_files import DOCKER, ROOT, environment_of_image

DOCKERFILE = DOCKER / "Dockerfile"
BUILDERS = ("buildah", "crun", "mmdebstrap")
# Debian without what the image does not need itself.
DEBIAN = ["--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm"]
MIRROR = "http://deb.debian.org/debian"
BASE = "localhost/flux-ray-base:1"
IMAGE = "localhost/flux-ray:test"
BUILD_S = 3000
SHOW = """
import importlib.metadata, json, os, pathlib, sys
import flux_ray, psycopg, ray, s3fs, torch
from flux_ray.tiny import KLEIN_CHECKPOINT
print(json.dumps({
    "uid": os.getuid(),
    "version": flux_ray.__version__,
    "torch": torch.__version__.split("+")[0],
    "checkpoint": (pathlib.Path(KLEIN_CHECKPOINT) / "model_index.json").exists(),
    "writable": [path for path in ("/models", "/var/lib/flux-ray", "/opt/flux-ray")
                 if os.access(path, os.W_OK)],
    "environment": dict(os.environ),
}))
"""


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_is_sent_to_the_builder() -> None:
    """All else stays here: caches, secrets of compose.yaml, the history."""
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in lines
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE.read_text(), re.M)
    names = {name.split("/")[0] for line in copied for name in line.split()}
    assert names == sent
    assert all((ROOT / name).exists() for name in sent)


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Yield the command, with storage of its own that needs no rights of the kernel."""
    folder = tmp_path_factory.mktemp("buildah")
    yield [
        *("buildah", "--root", str(folder / "root"), "--runroot", str(folder / "run")),
        *("--storage-driver", "vfs"),
    ]
    shutil.rmtree(folder)


def pip_settings() -> dict[str, str]:
    """Return the settings of pip here, by file or environment: where packages come from."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    lines = (line.split("=", 1) for line in told.stdout.splitlines() if "=" in line)
    return {key.rsplit(".", 1)[1]: value.strip("'") for key, value in lines}


def local_paths(settings: dict[str, str]) -> set[Path]:
    """Return the files and folders of this machine that the settings name."""
    words = " ".join(settings.values()).replace("file://", "").split()
    paths = {Path(word) for word in words if word.startswith("/")}
    paths = {path.parent if path.is_file() else path for path in paths if path.exists()}
    # An index that is a folder beside its files refers to them from there.
    return {path.parent if path.name == "simple" else path for path in paths}


def build(buildah: list[str], folder: Path) -> None:
    """Build the image on a Debian of its own, with the packages that pip finds here."""
    subprocess.run(["mmdebstrap", *DEBIAN, folder / "base.tar", MIRROR], check=True)
    (folder / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
    env = os.environ | {"BUILDAH_ISOLATION": "chroot"}
    subprocess.run([*buildah, "bud", "-q", "-t", BASE, folder], env=env, check=True)
    settings = pip_settings()
    lines = "".join(f"{key} = {value}\n" for key, value in sorted(settings.items()))
    (folder / "pip.conf").write_text(f"[global]\n{lines}")
    mounts = [f"{path}:{path}:ro" for path in sorted(local_paths(settings))]
    command = [
        *(*buildah, "bud", "--network", "host", "--build-arg", f"BASE={BASE}", "-t", IMAGE),
        *(word for mount in mounts for word in ("-v", mount)),
        *("--secret", f"id=pip.conf,src={folder / 'pip.conf'}"),
        *("--ignorefile", str(DOCKER / "Dockerfile.dockerignore"), "-f", str(DOCKERFILE)),
        str(ROOT),
    ]
    subprocess.run(command, env=env, check=True, timeout=BUILD_S)


def run(buildah: list[str], container: str, *command: str) -> str:
    """Return what a command prints in the image, run by its user with its environment."""
    env = os.environ | {"BUILDAH_ISOLATION": "chroot"}
    done = subprocess.run(
        [*buildah, "run", "--network", "host", container, "--", *command],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.drill
@pytest.mark.skipif(
    not all(map(shutil.which, BUILDERS)) or os.getuid() != 0,
    reason=f"needs root and {', '.join(BUILDERS)}: apt-get install {' '.join(BUILDERS)}",
)
def test_the_image_is_built_and_has_what_it_says(buildah: list[str], tmp_path: Path) -> None:
    """Minutes, and gigabytes of disk: torch and Ray are installed into it."""
    began_at = time.monotonic()
    build(buildah, tmp_path)
    built_s = time.monotonic() - began_at
    container = subprocess.run(
        [*buildah, "from", IMAGE], capture_output=True, text=True, check=True
    ).stdout.strip()
    # A login shell, as KubeRay's, finds the same commands.
    for shell in (["bash", "-c"], ["bash", "-lc"]):
        assert run(buildah, container, *shell, "flux-ray --version").split()[-1] == (
            flux_ray.__version__
        )
    shown = json.loads(run(buildah, container, "python", "-c", SHOW).splitlines()[-1])
    assert shown["uid"] == 1000
    assert shown["version"] == flux_ray.__version__
    assert f"torch=={shown['torch']}" in (ROOT / "pyproject.toml").read_text()
    assert shown["checkpoint"]
    assert shown["writable"] == ["/models", "/var/lib/flux-ray"]
    assert environment_of_image().items() - {("PATH", environment_of_image()["PATH"])} <= (
        shown["environment"].items()
    )
    assert run(buildah, container, "sh", "-c", "ls /etc/pip.conf 2>&1 || true").count("No such")
    size = int(run(buildah, container, "du", "-sm", "/opt/flux-ray").split()[0])
    print(f"\nbuilt in {built_s:.0f} s, {size} MB of packages")
