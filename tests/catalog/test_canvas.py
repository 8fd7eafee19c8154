"""A lone reference has the canvas that diffusers gives it, where diffusers puts it."""

from diffusers.modular_pipelines.flux3.image_processor import Flux3ImageProcessor
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from flux_ray.catalog.canvas import canvas_for

SIDES = st.integers(1, 9000)
MAX_PIXELS = 4 * 1024 * 1024


class UnscaledProcessor(Flux3ImageProcessor):
    """Notes the size that it is to scale to, and makes no pixels."""

    def resize(self, image: Image.Image, height: int, width: int) -> Image.Image:
        return Image.new("1", (width, height))


PROCESSOR = UnscaledProcessor()


@given(SIDES, SIDES)
@example(100, 70)
@example(2048, 2048)
@example(2047, 2049)
@example(1, 9000)
@example(4096, 1024)
def test_canvas_and_box_are_those_of_diffusers(width: int, height: int) -> None:
    image = PROCESSOR._resize_if_canvas_exceeds_area(Image.new("1", (width, height)))
    rows, columns = PROCESSOR._get_canvas_height_width(image.height, image.width)
    canvas = canvas_for(
        width, height, multiple=16, max_pixels=MAX_PIXELS, min_side=64, max_side=4096
    )
    assert (canvas.width, canvas.height) == (columns, rows)
    assert canvas.box == PROCESSOR._get_fill_region(image, rows, columns)
    assert canvas.pixels <= MAX_PIXELS


def test_an_image_is_cropped_only_if_something_was_added() -> None:
    limits = {"multiple": 16, "max_pixels": MAX_PIXELS, "min_side": 64, "max_side": 4096}
    assert canvas_for(128, 96, **limits).crop is None
    assert canvas_for(100, 70, **limits).crop == (6, 5, 106, 75)
