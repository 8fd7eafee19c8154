"""`flux-ray weights` against a fake hub on a local port."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flux_ray.catalog import TIERS
from flux_ray.cli.main import app
from flux_ray.weights import download
from tests.fake_hub import COMMIT, REPOSITORY, FakeHub, serve_hub, use_hub
from tests.weights.conftest import FILES, LARGE, USED

WEIGHTS = f"{REPOSITORY}@{COMMIT}"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_hub(FILES) as hub:
        use_hub(monkeypatch, hub.address, cache)
        yield hub


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a tier with a licence that is not permissive, and of one with it."""
    path = tmp_path / "fleet.yaml"
    applications = [
        {
            "name": tier,
            "route_prefix": None,
            "import_path": "flux_ray.app:build_tier",
            "args": {"tier": tier, "weights": WEIGHTS},
        }
        for tier in ("flux-2-dev", "flux-2-klein-4b")
    ]
    path.write_text(json.dumps({"applications": applications}))
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["weights", *map(str, words)])


def rows(*words: object) -> list[dict[str, Any]]:
    done = run("list", "--json", *words)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_pull_takes_what_is_used_and_a_second_one_asks_nobody(
    hub: FakeHub, cache: Path, config: Path
) -> None:
    assert [row["is_here"] for row in rows(config)] == [False, False]
    total = sum(len(FILES[name]) for name in USED)
    done = run("pull", config, "--accept-licence")
    assert done.exit_code == 0, done.output
    assert f"flux-2-klein-4b: {len(USED)} files in {cache}" in done.stdout
    hub.requests.clear()
    done = run("pull", config)
    assert done.exit_code == 0 and "is whole already" in done.stdout
    listed = rows(config)
    assert [(row["is_here"], row["num_bytes"]) for row in listed] == [(True, total)] * 2
    assert listed[0]["place"] == str(cache / "models--owner--name" / "snapshots" / COMMIT)
    assert run("verify", config).exit_code == 0
    assert hub.requests == []


def test_a_licence_is_accepted_once(hub: FakeHub, config: Path, cache: Path) -> None:
    done = run("pull", config)
    assert done.exit_code == 1
    assert "flux-2-dev: licence flux-non-commercial" in done.stdout
    assert "then say --accept-licence" in done.stderr
    assert not any(request.startswith("GET /owner") for request in hub.requests)
    assert run("pull", config, "--accept-licence").exit_code == 0
    record = json.loads((cache / "models--owner--name" / "flux-ray-licence.json").read_text())
    assert (record["licence"], record["weights"]) == ("flux-non-commercial", WEIGHTS)
    # Only the file is lost, not what was accepted.
    next((cache / "models--owner--name/snapshots").rglob("config.json")).unlink()
    done = run("pull", config)
    assert done.exit_code == 0, done.output


def test_what_comes_with_the_package_and_what_cannot_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path)
    done = run("list")
    assert done.exit_code == 0, done.output
    published = [tier.name for tier in TIERS if tier.weights or tier.hub_id]
    assert [name for name in published if name in done.stdout] == published
    num_asked = sum(tier.hub_id is not None for tier in TIERS)
    refused = "http://127.0.0.1:9 cannot be reached for black-forest-labs/"
    assert done.stderr.count(refused) == num_asked >= 13
    for command in ("pull", "verify"):
        done = run(command, "tiny")
        assert done.exit_code == 0 and "its weights are in this package" in done.stdout


def test_a_dry_run_downloads_nothing(hub: FakeHub, config: Path) -> None:
    done = run("pull", config, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "0.00 of 0.00 GB are missing" in done.stdout
    assert not any(request.startswith("GET /owner") for request in hub.requests)


def test_a_full_disk_is_said_before_anything_is_downloaded(
    hub: FakeHub, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each of the two would fit.
    total = sum(len(FILES[name]) for name in USED)
    monkeypatch.setattr(download, "free_bytes", lambda _: total + 1)
    done = run("pull", config, "--accept-licence")
    assert done.exit_code == 1
    assert "flux-2-dev, flux-2-klein-4b needs 0.0 GB" in done.stderr
    assert not any(request.startswith("GET /owner") for request in hub.requests)


def test_a_gated_repository_is_said_in_one_sentence(hub: FakeHub, config: Path) -> None:
    hub.is_gated = True
    done = run("pull", config)
    assert done.exit_code == 1
    [line] = done.stderr.splitlines()
    assert "flux-2-dev: owner/name is gated: accept its licence at" in line and "HF_TOKEN" in line


def test_a_revision_must_be_pinned_and_there(hub: FakeHub) -> None:
    done = run("pull", f"{REPOSITORY}@main")
    assert done.exit_code == 1 and "may change: name a commit" in done.stderr
    done = run("pull", f"{REPOSITORY}@{'b' * 40}")
    assert done.exit_code == 1 and "has no revision bbbb" in done.stderr


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("no-such-tier", "no tier named 'no-such-tier'"),
        ("no/such.yaml", "there is no config file no/such.yaml"),
        ("flux-2-pro", "the weights of flux-2-pro are not published"),
    ],
)
def test_words_that_name_no_weights(word: str, message: str) -> None:
    done = run("pull", word)
    assert done.exit_code == 1 and message in done.stderr


def test_a_cut_connection_costs_no_second_start(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.num_cuts = 1
    done = run("pull", WEIGHTS, "--accept-licence")
    assert done.exit_code == 0, done.output
    assert len(hub.ranges) == 1
    assert f"{REPOSITORY}: downloading: " in done.stderr


def test_a_mirror_and_a_folder(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing listens at the usual address.
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "none")
    to = tmp_path / "models"
    done = run("pull", WEIGHTS, "--to", to, "--endpoint", hub.address, "--accept-licence")
    assert done.exit_code == 0, done.output
    folder = to / "owner--name"
    assert (folder / LARGE).read_bytes() == FILES[LARGE]
    hub.requests.clear()
    assert run("pull", WEIGHTS, "--to", to).exit_code == 0
    done = run("verify", folder)
    assert done.exit_code == 0 and f"{len(USED)} files in" in done.stdout
    assert hub.requests == []


def test_a_flipped_byte_is_found_removed_and_fetched_again(hub: FakeHub, cache: Path) -> None:
    assert run("pull", WEIGHTS, "--accept-licence").exit_code == 0
    path = cache / "models--owner--name" / "snapshots" / COMMIT / LARGE
    data = bytearray(path.read_bytes())
    data[1_234_567] ^= 1
    path.resolve().write_bytes(data)
    hub.requests.clear()
    done = run("verify", WEIGHTS)
    assert done.exit_code == 1
    assert f"damaged: {path}" in done.stderr.replace("\n", "")
    assert done.stderr.count("damaged") == 1
    done = run("verify", WEIGHTS, "--remove")
    assert (done.exit_code, hub.requests) == (1, [])
    done = run("pull", WEIGHTS)
    assert done.exit_code == 0, done.output
    assert path.read_bytes() == FILES[LARGE]
    assert run("verify", WEIGHTS, "--online").exit_code == 0
    assert len(hub.requests) > 0


def test_a_missing_small_file_is_named(hub: FakeHub, cache: Path) -> None:
    assert run("pull", WEIGHTS, "--accept-licence").exit_code == 0
    (cache / "models--owner--name" / "snapshots" / COMMIT / "tokenizer/merges.txt").unlink()
    done = run("verify", WEIGHTS)
    assert done.exit_code == 1 and "missing" in done.stderr and "merges.txt" in done.stderr


def test_a_folder_without_checksums_says_so(tmp_path: Path) -> None:
    done = run("verify", tmp_path)
    assert done.exit_code == 1 and "has no checksums beside it" in done.stderr


def test_rank_files_are_made_verified_and_not_overwritten(tmp_path: Path) -> None:
    to = tmp_path / "tiny-tp2"
    done = run("shard", "tiny-tp2", "--tensor", 2, "--to", to)
    assert done.exit_code == 0, done.output
    assert "transformer/rank-1-of-2.safetensors" in done.stdout
    assert run("verify", to).exit_code == 0
    done = run("shard", "tiny-tp2", "--tensor", 2, "--to", to)
    assert done.exit_code == 1 and "there is already" in done.stderr
    rank = to / "transformer" / "rank-1-of-2.safetensors"
    rank.write_bytes(rank.read_bytes()[:-1] + b"x")
    done = run("verify", to)
    assert done.exit_code == 1 and "rank-1-of-2.safetensors" in done.stderr
