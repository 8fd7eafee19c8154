"""A start without its weights ends in seconds, with a sentence that says what to do."""

import re
from pathlib import Path

import pytest

from flux_ray.catalog import tier_for
from flux_ray.config import TierArgs
from flux_ray.weights import download
from flux_ray.weights.hub import is_complete
from flux_ray.weights.source import ALL_PARTS, PROMPT_PARTS, WeightSource, WeightsUnavailable
from flux_ray.weights.start import ENCODER_PARTS, parts_of_ranks, prepare_weights, too_slow
from tests.fake_hub import COMMIT, REPOSITORY, FakeHub

SOURCE = WeightSource(REPOSITORY, COMMIT)


def args_of(weights: str | None, tier: str = "flux-2-dev", **more: object) -> TierArgs:
    return TierArgs.model_validate({"tier": tier, "weights": weights, **more})


def message(args: TierArgs) -> str:
    with pytest.raises(WeightsUnavailable) as raised:
        prepare_weights(args, parts_of_ranks(args))
    assert raised.value.__suppress_context__
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_embedded_weights_ask_nobody(hub: FakeHub) -> None:
    args = args_of(None, "tiny", device="cpu")
    prepare_weights(args, parts_of_ranks(args))
    assert hub.requests == []


def test_weights_of_the_hub_are_fetched_before_ranks_start(hub: FakeHub) -> None:
    args = args_of(str(SOURCE))
    prepare_weights(args, parts_of_ranks(args))
    assert is_complete(SOURCE, ALL_PARTS)
    hub.requests.clear()
    prepare_weights(args, parts_of_ranks(args))
    assert hub.requests == []


def test_each_process_of_a_shared_text_encoder_fetches_its_own(hub: FakeHub) -> None:
    args = args_of(str(SOURCE), text_encoder="shared")
    prepare_weights(args, parts_of_ranks(args))
    assert not is_complete(SOURCE, PROMPT_PARTS)
    encoders = re.compile(r"(text_encoder|tokenizer)(_2)?/.*\.(safetensors|model|txt)$")
    assert not any(encoders.search(request) for request in hub.requests)
    prepare_weights(args, ENCODER_PARTS)
    assert is_complete(SOURCE, ALL_PARTS)


def test_a_folder_that_is_not_there() -> None:
    said = message(args_of("/no/such/models"))
    assert said.startswith("tier flux-2-dev: this machine has no folder /no/such/models: ")
    assert said.endswith("`flux-ray weights pull flux-2-dev --to FOLDER`")
    assert message(args_of("/no/such", "flux-2-pro")).endswith("mount it or copy it here")


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    assert f"the folder {tmp_path} has no model_index.json" in message(args_of(str(tmp_path)))


@pytest.mark.parametrize("index", ["model_index.json", "modular_model_index.json"])
def test_a_folder_of_either_layout_is_a_checkpoint(tmp_path: Path, index: str) -> None:
    (tmp_path / index).write_text("{}")
    prepare_weights(args_of(str(tmp_path)), ())


def test_what_is_neither_folder_nor_hub_id() -> None:
    assert "neither an existing folder nor a hub id" in message(args_of("FLUX.2-dev"))


def test_a_gated_repository_names_tier_repository_and_command(hub: FakeHub) -> None:
    hub.is_gated = True
    said = message(args_of(str(SOURCE)))
    assert said.startswith("tier flux-2-dev: owner/name is gated: accept its licence at ")
    assert said.endswith(f"; then run `flux-ray weights pull {SOURCE}` on each node")
    published = tier_for("flux-2-dev").hub_id
    assert message(args_of(published)).endswith("`flux-ray weights pull flux-2-dev` on each node")


def test_a_full_disk(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "free_bytes", lambda _: 0)
    assert "0.0 GB free: make room, or set HF_HOME to" in message(args_of(str(SOURCE)))


def test_a_start_that_takes_too_long_says_whether_it_downloads(hub: FakeHub) -> None:
    args = args_of(str(SOURCE), load_timeout_s=30)
    parts = parts_of_ranks(args)
    said = too_slow(args, parts)
    assert said.startswith(f"tier flux-2-dev did not download {SOURCE} within load_timeout_s 30: ")
    prepare_weights(args, parts)
    expected = "tier flux-2-dev did not load its weights within load_timeout_s 30: raise it"
    assert too_slow(args, parts) == expected
