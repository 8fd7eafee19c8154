"""Weights come from the hub once for each machine, and what prevents it is said in a sentence."""

import json
import logging
import socket
import threading
from collections import Counter
from pathlib import Path

import pytest
from huggingface_hub import constants

from flux_ray.weights import download as module
from flux_ray.weights.download import DownloadProgress, fetch, log_progress, plan_download
from flux_ray.weights.hub import is_complete, snapshot_of
from flux_ray.weights.source import (
    ALL_PARTS,
    CONFIGS,
    IMAGE_PARTS,
    PROMPT_PARTS,
    WeightSource,
    WeightsUnavailable,
)
from tests.fake_hub import COMMIT, REPOSITORY, FakeHub, use_hub
from tests.weights.conftest import FILES, LARGE, USED

SOURCE = WeightSource(REPOSITORY, COMMIT)


def files_in(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def test_only_what_is_used_is_taken_and_a_second_time_nobody_is_asked(hub: FakeHub) -> None:
    assert not is_complete(SOURCE, ALL_PARTS)
    folder = fetch(SOURCE, ALL_PARTS)
    assert files_in(folder) == USED
    assert all((folder / name).read_bytes() == FILES[name] for name in USED)
    hub.requests.clear()
    assert fetch(SOURCE, ALL_PARTS) == folder
    assert fetch(SOURCE, CONFIGS) == folder
    assert hub.requests == []


def test_configs_alone_are_not_the_whole(hub: FakeHub) -> None:
    fetch(SOURCE, CONFIGS)
    assert is_complete(SOURCE, CONFIGS) and not is_complete(SOURCE, ALL_PARTS)
    assert not any(LARGE in request for request in hub.requests)
    assert files_in(fetch(SOURCE, ALL_PARTS)) == USED


def test_a_branch_may_have_moved(hub: FakeHub) -> None:
    fetch(SOURCE, ALL_PARTS)
    assert not is_complete(WeightSource(REPOSITORY, "main"), ALL_PARTS)


def test_a_cut_download_is_taken_up_where_it_was(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bytes are written in pieces of this size, by default more than these files have.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.num_cuts = 1
    folder = fetch(SOURCE, ALL_PARTS)
    assert (folder / LARGE).read_bytes() == FILES[LARGE]
    assert len(hub.ranges) == 1 and hub.ranges[0] != "bytes=0-"


def test_the_plan_counts_what_is_missing(hub: FakeHub) -> None:
    total = sum(len(FILES[name]) for name in USED)
    plan = plan_download(SOURCE, ALL_PARTS)
    assert (plan.num_bytes, plan.num_missing_bytes) == (total, total)
    fetch(SOURCE, CONFIGS)
    configs = sum(len(FILES[name]) for name in USED if name.endswith(".json"))
    assert plan_download(SOURCE, ALL_PARTS).num_missing_bytes == total - configs


def test_a_full_disk_is_said_before_the_first_byte(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda _: 1_000_000)
    with pytest.raises(WeightsUnavailable, match=r"needs 0\.0 GB in .*hub, whose disk has 0\.0 GB"):
        fetch(SOURCE, ALL_PARTS)
    assert not any(request.startswith("GET /owner") for request in hub.requests)


def test_a_gated_repository_says_what_to_click_and_which_token(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.is_gated = True
    page = f"owner/name is gated: accept its licence at {hub.address}/owner/name"
    with pytest.raises(WeightsUnavailable, match=f"^{page} with your account, and set HF_TOKEN"):
        fetch(SOURCE, ALL_PARTS)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(WeightsUnavailable, match=f"^{page} with the account of your token$"):
        fetch(SOURCE, ALL_PARTS)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (WeightSource("owner/none", COMMIT), "shows no repository owner/none"),
        (WeightSource(REPOSITORY, "b" * 40), "owner/name has no revision bbbb"),
    ],
)
def test_what_the_hub_does_not_have(hub: FakeHub, source: WeightSource, message: str) -> None:
    with pytest.raises(WeightsUnavailable, match=message):
        fetch(source, ALL_PARTS)


def test_a_hub_that_cannot_be_reached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        use_hub(monkeypatch, address, cache)
        with pytest.raises(WeightsUnavailable, match=f"^{address} cannot be reached for"):
            fetch(SOURCE, ALL_PARTS)


def test_offline_is_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsUnavailable, match="HF_HUB_OFFLINE"):
        fetch(SOURCE, ALL_PARTS)
    assert hub.requests == []


WHOLE = {
    "model_index.json": {
        "_class_name": "Flux2KleinPipeline",
        "is_distilled": True,
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "feature_extractor": [None, None],
    },
    "transformer/config.json": {},
    "transformer/one.safetensors.index.json": {
        "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}
    },
    "transformer/1.safetensors": {},
    "transformer/2.safetensors": {},
    "text_encoder/config.json": {},
    "text_encoder/model.safetensors": {},
    "tokenizer/vocab.json": {},
}


SHARDS = "transformer/one.safetensors.index.json"


@pytest.mark.parametrize("absent", [None, *sorted(WHOLE.keys() - {SHARDS})])
def test_an_older_cache_is_taken_without_the_hub_if_it_seems_whole(
    cache: Path, monkeypatch: pytest.MonkeyPatch, absent: str | None
) -> None:
    with socket.socket() as refusing:
        refusing.bind(("127.0.0.1", 0))
        use_hub(monkeypatch, f"http://127.0.0.1:{refusing.getsockname()[1]}", cache)
        for name, content in WHOLE.items():
            path = snapshot_of(SOURCE) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name != absent:
                path.write_text(json.dumps(content))
        if absent is None:
            assert fetch(SOURCE, ALL_PARTS) == snapshot_of(SOURCE)
            for parts in (CONFIGS, IMAGE_PARTS, PROMPT_PARTS):
                assert fetch(SOURCE, parts) == snapshot_of(SOURCE)
        else:
            with pytest.raises(WeightsUnavailable, match="reach"):
                fetch(SOURCE, ALL_PARTS)


def test_of_many_ranks_one_downloads(hub: FakeHub) -> None:
    folders: list[Path] = []
    ranks = [
        threading.Thread(target=lambda: folders.append(fetch(SOURCE, ALL_PARTS))) for _ in range(8)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(folders) == 8 and len(set(folders)) == 1
    downloads = Counter(request for request in hub.requests if request.startswith("GET /owner"))
    assert len(downloads) == len(USED) and set(downloads.values()) == {1}


def test_a_start_says_how_far_its_download_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ray.serve"), log_progress("owner/name", 0.01) as progress:
        while not any("another process" in line for line in caplog.messages):
            pass
        progress.start(4 * 10**9)
        progress.add(10**9)
        while not any("1.00 of 4.00 GB" in line for line in caplog.messages):
            pass


def test_a_line_of_progress() -> None:
    times = iter([0.0, 10.0, 30.0])
    progress = DownloadProgress("owner/name", lambda: next(times))
    progress.start(8 * 10**9)
    progress.add(2 * 10**9)
    assert progress.line() == "owner/name: downloaded 2.00 of 8.00 GB, 100 MB/s, 20 s"
