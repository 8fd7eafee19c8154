"""Photographs become control images at the client: their edges, and their depths."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
)

from flux_ray.engine.control import control_image, opened

SQUARE = (slice(40, 90), slice(50, 110))


def photo_of_a_square(path: Path, size: tuple[int, int] = (160, 130), **options: Any) -> Path:
    """A light square on a dark ground, with a little noise such as photographs have."""
    width, height = size
    pixels = np.random.default_rng(0).integers(20, 26, (height, width, 3)).astype(np.uint8)
    pixels[SQUARE] += np.uint8(200)
    Image.fromarray(pixels).save(path, **options)
    return path


def shown(data: bytes) -> Any:
    """The pixels of a PNG file, which are grey: [height, width]."""
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].astype(int)


def test_the_edges_of_a_square(tmp_path: Path) -> None:
    """One pixel wide, where the square begins and ends, and nothing of the noise."""
    pytest.importorskip("cv2", reason="opencv is not installed; it comes with .[test]")
    edges = shown(control_image(photo_of_a_square(tmp_path / "photo.png"), (160, 130), None))
    assert edges.shape == (130, 160)
    assert set(np.unique(edges)) == {0, 255}
    rows, columns = np.nonzero(edges)
    assert abs(np.array([rows.min(), rows.max()]) - [40, 90]).max() <= 1
    assert abs(np.array([columns.min(), columns.max()]) - [50, 110]).max() <= 1
    # Its sides are 50 and 60 long; inside of them there is nothing.
    assert abs(len(rows) - 2 * (50 + 60)) <= 8
    assert not edges[45:85, 55:105].any()


@pytest.mark.parametrize(
    ("size", "asked", "expected"),
    [
        ((160, 130), None, (160, 128)),
        ((2400, 1600), None, (1248, 832)),
        ((160, 130), (64, 96), (64, 96)),
    ],
)
def test_its_size_is_one_that_the_server_keeps(
    tmp_path: Path, size: tuple[int, int], asked: tuple[int, int] | None, expected: tuple[int, int]
) -> None:
    """At most a megapixel of whole tokens, unless another is asked for."""
    pytest.importorskip("cv2", reason="opencv is not installed; it comes with .[test]")
    photo = photo_of_a_square(tmp_path / "photo.png", size)
    assert Image.open(io.BytesIO(control_image(photo, asked, None))).size == expected


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = photo_of_a_square(tmp_path / "photo.jpg", exif=exif)
    assert (opened(photo).size, opened(photo).mode) == ((130, 160), "RGB")


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"words")
    with pytest.raises(ValueError, match=r"photo\.jpg is no image that can be read"):
        control_image(tmp_path / "photo.jpg", None, None)


def test_without_opencv_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r"flux-ray\[control\]"):
        control_image(photo_of_a_square(tmp_path / "photo.png"), None, None)


def small_depth_model(folder: Path) -> None:
    """A checkpoint in the layout of Depth Anything, with random weights."""
    torch.manual_seed(0)
    eyes = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        out_indices=[1, 2],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=eyes,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 16],
        reassemble_factors=[2, 1],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    settings = {
        "image_processor_type": "DPTImageProcessor",
        "size": {"height": 56, "width": 56},
        "ensure_multiple_of": 14,
        "keep_aspect_ratio": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def test_the_depths_that_a_model_estimates(tmp_path: Path) -> None:
    """From black to white, in the photograph's size."""
    small_depth_model(tmp_path / "model")
    photo = photo_of_a_square(tmp_path / "photo.png")
    depths = shown(control_image(photo, (96, 64), str(tmp_path / "model")))
    assert depths.shape == (64, 96)
    assert (depths.min(), depths.max()) == (0, 255)


def test_a_depth_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    photo = photo_of_a_square(tmp_path / "photo.png")
    with pytest.raises(ValueError, match=r"the depth model \S*/nowhere cannot be loaded"):
        control_image(photo, None, str(tmp_path / "nowhere"))


def test_transparent_parts_of_a_photograph_are_put_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, 32:] = (90, 90, 90, 255)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    grey = np.asarray(opened(tmp_path / "photo.png"))
    assert (grey[:, :32] == 255).all() and (grey[:, 32:] == 90).all()


def test_a_photograph_of_16_bits_is_scaled_to_8(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint16).repeat(64).reshape(256, 64) << 8
    Image.fromarray(ramp).save(tmp_path / "photo.png")
    grey = np.asarray(opened(tmp_path / "photo.png"))
    assert (grey[:, 0] == np.arange(256)[:, None]).all()
