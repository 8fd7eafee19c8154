"""Both embedded models behind one endpoint: three clients draw, edit and fill with each."""

import base64
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import huggingface_hub
import numpy as np
import openai
import pytest
from PIL import Image

with warnings.catch_warnings():
    # The client declares its fields in an older pydantic's way.
    warnings.simplefilter("ignore", DeprecationWarning)
    from blackforest import BFLClient
    from blackforest.types.general.client_config import ClientConfig

from tests.cluster.conftest import PATIENCE_S, ROOT, free_port, serve_run
from tests.cluster.test_images import RED_ON_BLUE, PixelsOf, check_circle

FAMILIES = ROOT / "serve" / "laptop-families.yaml"
TO_GREEN = "make the circle green"
# The model under the names of BFL's API for what it draws, edits and fills, and the field with the
# image to edit. The client has one name for fills.
BFL_NAMES = {
    "tiny": ("flux-pro-1.1", "flux-pro-1.1", "image_prompt", None),
    "tiny-flux1": ("flux-dev", "flux-kontext-pro", "input_image", "flux-pro-1.0-fill"),
}
# The client takes no size below 256, and its own default is no square.
DOUBLE = {"width": 256, "height": 256}
WAIT = ClientConfig(sync=True, polling_interval=0.2, timeout=PATIENCE_S)
Draw = Callable[[str, str], bytes]
Edit = Callable[[str, bytes], bytes]
Fill = Callable[[str, bytes, bytes], bytes]


@dataclass(frozen=True)
class Client:
    """How one library draws a prompt, edits an image and fills a mask, given the tier's name."""

    draw: Draw
    edit: Edit
    fill: Fill


@pytest.fixture(scope="module")
def families(
    tmp_path_factory: pytest.TempPathFactory, wait_until_ready: Callable[[str], None]
) -> Iterator[str]:
    """Run the file as it is, but for its port."""
    folder = tmp_path_factory.mktemp("families")
    port = free_port()
    (folder / "families.yaml").write_text(FAMILIES.read_text().replace("8000", str(port)))
    address = f"http://127.0.0.1:{port}"
    with serve_run(folder / "families.yaml", folder):
        wait_until_ready(address)
        yield address


def hole() -> bytes:
    """Return a painted mask: white in the middle, around the circle."""
    image = Image.new("L", (128, 128))
    image.paste(255, (22, 22, 106, 106))
    return png(image)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def of_openai(address: str) -> Client:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=PATIENCE_S)

    def edit(model: str, prompt: str, image: bytes, **fields: object) -> bytes:
        answer = client.images.edit(
            model=model, prompt=prompt, image=("a.png", image), extra_body={"seed": 1}, **fields
        )
        return base64.b64decode(answer.data[0].b64_json)

    def draw(model: str, prompt: str) -> bytes:
        answer = client.images.generate(model=model, prompt=prompt, extra_body={"seed": 1})
        return base64.b64decode(answer.data[0].b64_json)

    def fill(model: str, image: bytes, mask: bytes) -> bytes:
        # OpenAI's masks are transparent where the image may change.
        alpha = Image.new("RGBA", (128, 128))
        alpha.putalpha(Image.eval(Image.open(io.BytesIO(mask)), lambda value: 255 - value))
        return edit(model, TO_GREEN, image, mask=("mask.png", png(alpha)))

    return Client(draw, lambda model, image: edit(model, TO_GREEN, image), fill)


def of_bfl(address: str) -> Client:
    client = BFLClient(api_key="a key", base_url=address, timeout=PATIENCE_S)

    def run(name: str, **inputs: object) -> bytes:
        answer = client.generate(name, {"seed": 1, **inputs}, WAIT)
        return httpx.get(answer.result["sample"], timeout=PATIENCE_S).raise_for_status().content

    def draw(model: str, prompt: str) -> bytes:
        return halved(run(BFL_NAMES[model][0], prompt=prompt, **DOUBLE))

    def edit(model: str, image: bytes) -> bytes:
        _, name, field, _ = BFL_NAMES[model]
        size = {} if name == "flux-kontext-pro" else DOUBLE
        return halved(run(name, prompt=TO_GREEN, **{field: text(image)}, **size))

    def fill(model: str, image: bytes, mask: bytes) -> bytes:
        name = BFL_NAMES[model][-1]
        if name is None:
            return of_openai(address).fill(model, image, mask)
        # Otherwise the client asks for what suits FLUX.1 Fill, guidance 60 and 50 steps, as JPEG.
        fields = {"guidance": 2.5, "steps": 15, "output_format": "png"}
        fields |= {"image": text(image), "mask": text(mask)}
        return run(name, prompt=TO_GREEN, **fields)

    return Client(draw, edit, fill)


def halved(data: bytes) -> bytes:
    return png(Image.open(io.BytesIO(data)).resize((128, 128)))


def of_hugging_face(address: str) -> Client:
    def client(model: str) -> huggingface_hub.InferenceClient:
        return huggingface_hub.InferenceClient(
            model=f"{address}/models/{model}", token="none", timeout=PATIENCE_S
        )

    def edit(model: str, prompt: str, image: bytes, **fields: object) -> bytes:
        size = {"width": 128, "height": 128}
        return png(
            client(model).image_to_image(image, prompt=prompt, seed=1, target_size=size, **fields)
        )

    return Client(
        lambda model, prompt: png(client(model).text_to_image(prompt, seed=1)),
        lambda model, image: edit(model, TO_GREEN, image),
        lambda model, image, mask: edit(model, TO_GREEN, image, mask_image=text(mask)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", BFL_NAMES)
@pytest.mark.parametrize("make", [of_openai, of_bfl, of_hugging_face])
def test_a_client_draws_edits_and_fills(
    families: str,
    pixels_of: PixelsOf,
    make: Callable[[str], Client],
    model: str,
) -> None:
    client = make(families)
    red = client.draw(model, RED_ON_BLUE)
    check_circle(pixels_of(red), circle="red", background="blue")
    check_circle(pixels_of(client.edit(model, red)), circle="green", background="blue")
    mask = hole()
    filled, before = pixels_of(client.fill(model, red, mask)), pixels_of(red)
    check_circle(filled, circle="green", background="blue")
    kept = np.asarray(Image.open(io.BytesIO(mask))) == 0
    assert (filled[kept] == before[kept]).all()
