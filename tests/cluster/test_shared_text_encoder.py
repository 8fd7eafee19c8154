"""A text encoder that all replicas share: the images are the same, and its death loses none."""

from collections.abc import Callable
from typing import Any

import psutil
import pytest

from tests.cluster.conftest import PATIENCE_S, Replica, deploy
from tests.cluster.groups import TIER, group_with
from tests.cluster.storm import PROMPT, Generate


@pytest.mark.slow
def test_a_shared_text_encoder_changes_no_image(
    config: dict[str, Any], generate: Generate, replicas: Callable[[str], list[Replica]]
) -> None:
    expected = generate(PROMPT, model=TIER, seed=1)
    with group_with(config, deploy, stays=True, text_encoder="shared"):
        (before,) = replicas(TIER)
        assert generate(PROMPT, model=TIER, seed=1) == expected

        (encoder,) = replicas(TIER, f"{TIER}-text-encoder")
        encoder.leader.kill()
        psutil.wait_procs([encoder.leader], timeout=PATIENCE_S)
        assert generate(PROMPT, model=TIER, seed=1) == expected
        assert replicas(TIER) == [before], "the ranks outlived it"
