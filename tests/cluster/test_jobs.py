"""Jobs on the real cluster, by BFL's own client."""

import warnings
from pathlib import Path

import httpx
import numpy as np
import pytest

with warnings.catch_warnings():
    # The client declares its fields in an older pydantic's way.
    warnings.simplefilter("ignore", DeprecationWarning)
    from blackforest import BFLClient
    from blackforest.types.general.client_config import ClientConfig

from tests.cluster.conftest import PATIENCE_S
from tests.cluster.test_images import RED_ON_BLUE, Generate, PixelsOf, check_circle

WAIT = ClientConfig(sync=True, polling_interval=0.2, timeout=PATIENCE_S)


@pytest.fixture
def bfl(address: str) -> BFLClient:
    return BFLClient(api_key="a key", base_url=address, timeout=PATIENCE_S)


def fetch(url: str) -> bytes:
    """Download an image, without any key."""
    answer = httpx.get(url, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return answer.content


def test_bfls_client_generates_what_was_asked(bfl: BFLClient, pixels_of: PixelsOf) -> None:
    inputs = {"prompt": RED_ON_BLUE, "width": 256, "height": 256, "steps": 4, "seed": 1}
    answer = bfl.generate("flux-dev", inputs, WAIT)
    assert answer.result["seed"] == 1
    pixels = pixels_of(fetch(answer.result["sample"]))
    assert pixels.shape == (256, 256, 3), "scaled from what the tier draws"
    check_circle(pixels[::2, ::2], circle="red", background="blue")


def test_bfls_client_edits_a_file(
    bfl: BFLClient, generate: Generate, pixels_of: PixelsOf, tmp_path: Path
) -> None:
    red = tmp_path / "red.png"
    red.write_bytes(generate(RED_ON_BLUE, seed=1)[0])
    inputs = {"prompt": "make the circle green", "input_image": str(red), "seed": 1}
    told = bfl.generate("flux-kontext-pro", inputs)
    result = bfl.get_polling_result(told.id, WAIT)
    check_circle(pixels_of(fetch(result["sample"])), circle="green", background="blue")
    assert bfl.get_task_status(told.id).status == "Ready"


def test_a_job_generates_the_image_of_its_seed(
    bfl: BFLClient, generate: Generate, pixels_of: PixelsOf
) -> None:
    told = bfl.generate("flux-kontext-pro", {"prompt": RED_ON_BLUE, "seed": 7})
    result = bfl.get_polling_result(told.id, WAIT)
    [same] = generate(RED_ON_BLUE, seed=7)
    assert np.array_equal(pixels_of(fetch(result["sample"])), pixels_of(same))
