"""`flux-ray generate`: masks, streams and previews, against a gateway whose replicas are fakes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from typer.testing import CliRunner

from flux_ray.catalog import tiers
from flux_ray.catalog.tiers import TINY
from flux_ray.cli.client import parse_events
from flux_ray.cli.main import app
from flux_ray.config.gateway import GatewayArgs, JobArgs
from flux_ray.engine import control
from flux_ray.errors import TierUnavailable
from flux_ray.gateway.api import build_api
from tests.gateway.fake_desk import FakeDesk


@pytest.fixture
def api(router: Any, gateway_args: GatewayArgs) -> FastAPI:
    """Return a gateway that answers by URL under one name, unless it is told."""
    urls = {"public_url": "http://gateway", "jobs": JobArgs(), "aliases": {"dall-e-2": "tiny"}}
    args = GatewayArgs.model_validate(gateway_args.model_dump() | urls)
    return build_api(router, args, job_service=FakeDesk())


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def test_a_mask(url: str, handles: Any, make_image: Any, tmp_path: Path) -> None:
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    image.write_bytes(make_image(96, 80))
    mask.write_bytes(make_image(96, 80, mode="L", color=255))
    output = tmp_path / "out.png"
    result = invoke("green", "--image", image, "--mask", mask, "-o", output, "--url", url)
    assert result.exit_code == 0, result.output
    [request] = handles.requests
    assert request.mask is not None
    assert output.exists()


def test_a_name_that_answers_by_url(url: str, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    result = invoke("a ring", "--tier", "dall-e-2", "--seed", 5, "-o", output, "--url", url)
    assert (result.exit_code, output.read_bytes()) == (0, b"image 5"), result.output


@pytest.mark.parametrize("has_image", [False, True])
def test_words_that_are_not_utf_8(
    url: str, handles: Any, make_image: Any, tmp_path: Path, has_image: bool
) -> None:
    """As Python reads the bytes of a Latin-1 terminal."""
    image = tmp_path / "image.png"
    image.write_bytes(make_image(96, 80))
    more = ("--image", image) if has_image else ()
    result = invoke("caf\udce9", *more, "-o", tmp_path / "out.png", "--url", url)
    assert (result.exit_code, "prompt is not UTF-8" in result.stderr) == (1, True)
    assert handles.requests == []


def test_a_mask_needs_its_image(tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    mask.touch()
    result = invoke("green", "--mask", mask)
    assert result.exit_code == 2
    assert "--image" in result.output


def test_a_control_image(
    url: str, handles: Any, make_image: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth = replace(TINY, max_references=0, takes_mask=False, takes_control=True)
    monkeypatch.setitem(tiers._BY_NAME, "tiny", depth)
    edges, output = tmp_path / "edges.png", tmp_path / "out.png"
    edges.write_bytes(make_image(96, 80))
    result = invoke("a ring", "--control-image", edges, "-o", output, "--url", url)
    assert result.exit_code == 0, result.output
    [request] = handles.requests
    assert request.follows_reference
    result = invoke("a ring", "--control-image", edges, "--image", edges, "--url", url)
    assert (result.exit_code, "--image" in result.output) == (2, True)


def test_a_control_image_is_made_of_a_photograph(
    url: str, handles: Any, make_image: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sent, and kept to be looked at; whoever has one of that name keeps it."""
    follows = replace(TINY, max_references=0, takes_mask=False, takes_control=True)
    monkeypatch.setitem(tiers._BY_NAME, "tiny", follows)
    asked: list[tuple[Any, ...]] = []

    def made(*arguments: Any) -> bytes:
        asked.append(arguments)
        return bytes(make_image(64, 64))

    monkeypatch.setattr(control, "control_image", made)
    photo, output = tmp_path / "photo.jpg", tmp_path / "out.webp"
    photo.touch()
    arguments = ("a ring", "--control-image", photo, "-o", output, "--url", url)
    result = invoke(*arguments, "--make-control", "canny")
    assert result.exit_code == 0, result.output
    kept = tmp_path / "out-control.png"
    assert result.stdout.splitlines()[0] == f"{kept}  canny"
    [request] = handles.requests
    assert (request.follows_reference, request.width, request.height) == (True, 64, 64)
    output.unlink()
    again = (*arguments, "--size", "96x64", "--make-control", "depth:org/model")
    result = invoke(*again)
    assert (result.exit_code, f"there is already {kept}" in result.stderr) == (1, True)
    assert invoke(*again, "--force").exit_code == 0
    assert asked == [(photo, None, None), (photo, (96, 64), "org/model")]
    assert kept.read_bytes() == make_image(64, 64)


def test_a_control_image_that_cannot_be_made(url: str, handles: Any, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.touch()
    arguments = ("a ring", "-o", tmp_path / "out.png", "--url", url)
    made = ("--control-image", photo, "--make-control")
    result = invoke(*arguments, *made, "canny")
    assert (result.exit_code, f"{photo} is no image" in result.stderr) == (1, True)
    for wrong in ((*made, "sketch"), (*made, "depth:"), ("--make-control", "canny")):
        assert invoke(*arguments, *wrong).exit_code == 2
    assert handles.requests == []


def test_a_negative_prompt_and_a_strength(
    url: str, handles: Any, make_image: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, image = tmp_path / "out.png", tmp_path / "image.png"
    arguments = ("a ring", "-o", output, "--force", "--url", url)
    steered = ("--negative-prompt", "a dot", "--true-cfg-scale", 2.5)
    result = invoke(*arguments, *steered)
    assert (result.exit_code, "negative_prompt: tiny does not heed it" in result.stderr) == (
        1,
        True,
    )
    row = replace(TINY, takes_negative=True, takes_strength=True)
    monkeypatch.setitem(tiers._BY_NAME, "tiny", row)
    image.write_bytes(make_image(96, 80, mode="L", color=255))
    edit = ("--image", image, "--mask", image, "--strength", 0.6)
    result = invoke(*arguments, *steered, *edit)
    assert result.exit_code == 0, result.output
    [request] = handles.requests
    assert (request.negative_prompt, request.true_cfg_scale) == ("a dot", 2.5)
    assert request.strength == 0.6


def test_a_stream_saves_each_image_as_it_comes(url: str, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    result = invoke("a ring", "-o", output, "--stream", "--n", 2, "--seed", 5, "--url", url)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out-0.png").read_bytes() == b"image 5"
    assert (tmp_path / "out-1.png").read_bytes() == b"image 6"
    assert [line.split("  ")[1] for line in result.stdout.splitlines()] == ["seed 5", "seed 6"]


def test_previews_are_saved_beside_the_image(url: str, handles: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    result = invoke("a ring", "-o", output, "--previews", 2, "--seed", 5, "--url", url)
    assert result.exit_code == 0, result.output
    assert output.read_bytes() == b"image 5"
    [request] = handles.requests
    assert len(request.preview_steps) == 2
    for number in range(2):
        preview = tmp_path / f"out-preview-{number}.png"
        assert preview.read_bytes() == b"preview %d" % number


def test_a_preview_that_is_there_is_not_overwritten(url: str, handles: Any, tmp_path: Path) -> None:
    kept = tmp_path / "out-preview-0.png"
    kept.write_bytes(b"mine")
    arguments = ("a ring", "-o", tmp_path / "out.png", "--previews", 1, "--url", url)
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert f"there is already {kept}: " in result.stderr
    assert (handles.requests, kept.read_bytes()) == ([], b"mine")
    assert invoke(*arguments, "--force").exit_code == 0
    assert kept.read_bytes() == b"preview 0"


def test_a_stream_that_is_refused(url: str, handles: Any, tmp_path: Path) -> None:
    handles.failures = [TierUnavailable("tiny cannot serve now")]
    result = invoke("a ring", "-o", tmp_path / "out.png", "--stream", "--url", url)
    assert result.exit_code == 1
    assert "tiny cannot serve now" in result.stderr
    result = invoke("a ring", "-o", tmp_path / "out.png", "--stream", "--tier", "x", "--url", url)
    assert (result.exit_code, "no model 'x' is served here" in result.stderr) == (1, True)


def test_warnings_of_a_stream_are_shown(url: str, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    result = invoke("a ring", "-o", output, "--stream", "--quality", "high", "--url", url)
    assert result.exit_code == 0, result.output
    assert "quality has no effect on tiny" in result.stderr


def test_a_file_that_cannot_be_written(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = invoke("a ring", "-o", tmp_path / "file" / "out.png", "--url", url)
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--quality", "best"),
        ("--previews", 4),
        ("--steps", 0),
        ("--seed", -1),
        ("--n", 0),
        ("--strength", 2),
    ],
)
def test_wrong_options(arguments: tuple[object, ...]) -> None:
    assert invoke("a ring", *arguments).exit_code == 2


def test_events_and_comments_of_a_stream() -> None:
    text = (
        ": queued position=3\n\n"
        'event: image_generation.partial_image\ndata: {"a":\ndata: 1}\n\n'
        ": generating progress=0.50\n\n"
        'event: error\ndata: {"error": {}}\n\n'
    )
    assert list(parse_events(text.split("\n"))) == [
        "queued position=3",
        ("image_generation.partial_image", {"a": 1}),
        "generating progress=0.50",
        ("error", {"error": {}}),
    ]
