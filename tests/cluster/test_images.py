"""Images through the whole cluster show what was asked for."""

import base64
import io
from collections.abc import Callable

import httpx
import huggingface_hub
import numpy as np
import openai
import pytest
from PIL import Image

from flux_ray.tiny.judge import COLOR_INDEX, nearest_colors
from tests.cluster.conftest import PATIENCE_S

RED_ON_BLUE = "a red circle on a blue background"
Generate = Callable[..., list[bytes]]
PixelsOf = Callable[[bytes], np.ndarray]


@pytest.fixture(scope="module")
def red_on_blue(generate: Generate) -> bytes:
    return generate(RED_ON_BLUE, seed=1)[0]


def check_circle(pixels: np.ndarray, *, circle: str, background: str) -> None:
    """Check that most of the middle has one colour, and most of the frame the other."""
    colors = nearest_colors(pixels)
    frame = np.ones(colors.shape, bool)
    frame[16:-16, 16:-16] = False
    assert (colors[58:70, 58:70] == COLOR_INDEX[circle]).mean() > 0.9
    assert (colors[frame] == COLOR_INDEX[background]).mean() > 0.9


def test_the_openai_client_gets_a_red_circle_on_blue(
    client: openai.OpenAI, pixels_of: PixelsOf
) -> None:
    answer = client.images.generate(model="tiny", prompt=RED_ON_BLUE, extra_body={"seed": 1})
    pixels = pixels_of(base64.b64decode(answer.data[0].b64_json))
    assert pixels.shape == (128, 128, 3)
    check_circle(pixels, circle="red", background="blue")


def test_an_edit_turns_it_green(
    client: openai.OpenAI, red_on_blue: bytes, pixels_of: PixelsOf
) -> None:
    answer = client.images.edit(
        model="tiny",
        image=("circle.png", red_on_blue),
        prompt="make the circle green",
        extra_body={"seed": 1},
    )
    pixels = pixels_of(base64.b64decode(answer.data[0].b64_json))
    check_circle(pixels, circle="green", background="blue")


def left_half_erased() -> bytes:
    """Return a mask in OpenAI's format: transparent where the image may be edited."""
    alpha = np.full((128, 128), 255, np.uint8)
    alpha[:, :64] = 0
    image = Image.new("RGB", (128, 128))
    image.putalpha(Image.fromarray(alpha))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("model", ["tiny", "tiny-tp2"])
def test_an_edit_under_a_mask_leaves_the_rest_as_it_is(
    client: openai.OpenAI, red_on_blue: bytes, pixels_of: PixelsOf, model: str
) -> None:
    answer = client.images.edit(
        model=model,
        image=("circle.png", red_on_blue),
        mask=("mask.png", left_half_erased()),
        prompt="make the circle green",
        extra_body={"seed": 1},
    )
    before, after = pixels_of(red_on_blue), pixels_of(base64.b64decode(answer.data[0].b64_json))
    assert (after[:, 64:] == before[:, 64:]).all()
    # Away from the mask's edge, where the decoder mixes both sides.
    middle = nearest_colors(after)[58:70]
    assert (middle[:, 48:60] == COLOR_INDEX["green"]).mean() > 0.9
    assert (middle[:, 64:76] == COLOR_INDEX["red"]).all()


def test_a_mask_is_of_the_first_of_two_images(
    client: openai.OpenAI, generate: Generate, red_on_blue: bytes, pixels_of: PixelsOf
) -> None:
    (other,) = generate("a green square on a yellow background", seed=1)
    answer = client.images.edit(
        model="tiny",
        image=[("one.png", red_on_blue), ("two.png", other)],
        mask=("mask.png", left_half_erased()),
        prompt="the shape of image 1 in the color of image 2",
        extra_body={"seed": 1},
    )
    before, after = pixels_of(red_on_blue), pixels_of(base64.b64decode(answer.data[0].b64_json))
    assert (after[:, 64:] == before[:, 64:]).all()
    assert (after[:, :64] != before[:, :64]).any(axis=2).mean() > 0.2


def test_the_hugging_face_client_generates_and_edits(address: str, pixels_of: PixelsOf) -> None:
    client = huggingface_hub.InferenceClient(model=f"{address}/models/tiny", token="none")
    red = io.BytesIO()
    client.text_to_image(RED_ON_BLUE, seed=1).save(red, "PNG")
    check_circle(pixels_of(red.getvalue()), circle="red", background="blue")
    edited = client.image_to_image(
        red.getvalue(),
        prompt="make the circle green",
        seed=1,
        target_size={"width": 128, "height": 128},
    )
    green = io.BytesIO()
    edited.save(green, "PNG")
    check_circle(pixels_of(green.getvalue()), circle="green", background="blue")


def test_a_size_that_tiny_does_not_generate_is_generated_at_its_best_and_scaled(
    client: openai.OpenAI, pixels_of: PixelsOf
) -> None:
    """Most clients send such a size."""
    answer = client.images.generate(
        model="tiny", prompt=RED_ON_BLUE, size="1024x1024", extra_body={"seed": 1}
    )
    pixels = pixels_of(base64.b64decode(answer.data[0].b64_json))
    assert pixels.shape == (1024, 1024, 3)
    check_circle(pixels[4::8, 4::8], circle="red", background="blue")
    assert "128x128" in str(answer.model_extra["warnings"])


def test_two_references_are_taken(client: openai.OpenAI, red_on_blue: bytes) -> None:
    answer = client.images.edit(
        model="tiny",
        image=[("one.png", red_on_blue), ("two.png", red_on_blue)],
        prompt="the shape of image 1 in the color of image 2",
    )
    assert answer.data[0].b64_json


def test_a_seed_means_an_image(generate: Generate, red_on_blue: bytes) -> None:
    assert generate(RED_ON_BLUE, seed=1) == [red_on_blue]
    assert generate(RED_ON_BLUE, seed=2) != [red_on_blue]


def test_two_ranks_generate_what_one_generates(
    generate: Generate, pixels_of: PixelsOf, red_on_blue: bytes
) -> None:
    """Sums over ranks are rounded differently, by one step of a byte at most."""
    (split,) = generate(RED_ON_BLUE, model="tiny-tp2", seed=1)
    difference = pixels_of(split).astype(int) - pixels_of(red_on_blue)
    assert abs(difference).max() <= 1


def test_n_images_are_those_of_n_seeds(generate: Generate, red_on_blue: bytes) -> None:
    assert generate(RED_ON_BLUE, seed=1, n=2) == [red_on_blue, *generate(RED_ON_BLUE, seed=2)]


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_the_file_is_what_was_asked_for(generate: Generate, format: str) -> None:
    (data,) = generate(RED_ON_BLUE, seed=1, size="96x64", output_format=format)
    image = Image.open(io.BytesIO(data))
    assert (image.format.lower(), image.size) == (format, (96, 64))


@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"prompt": ""}, 400, "prompt"),
        ({"model": "flux-9"}, 404, "model"),
        ({"size": "100x"}, 400, "size"),
        ({"size": "4096x4096"}, 400, "size"),
    ],
)
def test_bad_input_is_told_and_the_server_goes_on(
    address: str, generate: Generate, fields: dict[str, str], status: int, named: str
) -> None:
    good = {"model": "tiny", "prompt": RED_ON_BLUE}
    answer = httpx.post(f"{address}/v1/images/generations", json=good | fields, timeout=PATIENCE_S)
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == named
    assert generate(RED_ON_BLUE)


def test_a_reference_that_cannot_be_used_is_told(client: openai.OpenAI, generate: Generate) -> None:
    """Too flat for the model: a caller's mistake, whether the gateway or the engine notices."""
    file = io.BytesIO()
    Image.new("RGB", (800, 64), "red").save(file, "PNG")
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(model="tiny", image=("flat.png", file.getvalue()), prompt="green")
    assert caught.value.param == "image"
    assert generate(RED_ON_BLUE)
