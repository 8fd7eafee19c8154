"""Weights are named in three ways, and everything else is refused before a byte is read."""

from pathlib import Path

import pytest

from flux_ray.engine.loading import Source, load_model_index, source_for
from flux_ray.tiny import CHECKPOINT


def test_the_three_ways(tmp_path: Path) -> None:
    assert source_for("embedded") == Source(str(CHECKPOINT))
    assert source_for(str(tmp_path)) == Source(str(tmp_path))
    assert source_for("owner/name.v2@0123abc") == Source("owner/name.v2", "0123abc")


@pytest.mark.parametrize("weights", ["owner/name", "/no/such/folder", "name@main", "", "a/b/c@d"])
def test_anything_else_is_refused(weights: str) -> None:
    with pytest.raises(ValueError, match="owner/name@revision"):
        source_for(weights)


def test_a_folder_never_reaches_for_the_network() -> None:
    assert source_for("embedded").options == {"local_files_only": True}
    assert load_model_index(source_for("embedded"))["is_distilled"] is True
