"""Compare ways to encode an image as PNG: Pillow's levels, and ISA-L's with several filters.

The ways take turns on the same pixels. Milliseconds are CPU time of one thread, sizes are in KiB,
and every file is read back to check that it is lossless. `ratio` is to Pillow's default, which
ranks used before.
"""

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import matplotlib.cbook
import numpy as np
from isal import isal_zlib
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from flux_ray.engine import images as png
from flux_ray.engine.images import encode_image, image_for, raster_for
from flux_ray.request import Encoding, RgbImage

SIDE = 1024
NUM_ROUNDS = 5
FORMER = "pillow 6"
CHOSEN = "ours: up, isal 2"

Filter = Callable[[np.ndarray, np.ndarray], None]


def photograph() -> RgbImage:
    """Return the photograph that comes with matplotlib, of 512 x 600 pixels, scaled."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        return raster_for(Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.LANCZOS))


def texture() -> RgbImage:
    """Return noise with detail at every scale: a natural image's amplitudes, with random phases."""
    rng, frequency = np.random.default_rng(0), np.fft.fftfreq(SIDE)
    radius = np.hypot(*np.meshgrid(frequency, frequency))
    radius[0, 0] = np.inf
    noise = np.fft.fft2(rng.standard_normal((3, SIDE, SIDE))) / radius**1.2
    layers = np.fft.ifft2(noise).real
    layers /= layers.std(axis=(1, 2), keepdims=True)
    layers[1:] = 0.8 * layers[0] + 0.2 * layers[1:]
    pixels = np.clip(50 * layers + 128, 0, 255).astype(np.uint8)
    return RgbImage(SIDE, SIDE, pixels.transpose(1, 2, 0).tobytes())


def shapes() -> RgbImage:
    """Return flat colours with edges, drawn small and scaled, like the images of `tiny`."""
    image = Image.new("RGB", (128, 128), (40, 70, 160))
    generate = ImageDraw.Draw(image)
    generate.ellipse((20, 30, 90, 100), fill=(210, 40, 30))
    generate.rectangle((70, 80, 120, 120), fill=(240, 220, 60))
    return raster_for(image.resize((SIDE, SIDE), Image.LANCZOS))


def sub(rows: np.ndarray, lines: np.ndarray) -> None:
    """Apply PNG's filter 1: subtract the pixel to the left."""
    lines[:, 0], lines[:, 1:4] = 1, rows[:, :3]
    np.subtract(rows[:, 3:], rows[:, :-3], out=lines[:, 4:])


def up(rows: np.ndarray, lines: np.ndarray) -> None:
    """Apply PNG's filter 2: subtract the pixel above."""
    lines[:, 0], lines[0, 1:] = 2, rows[0]
    np.subtract(rows[1:], rows[:-1], out=lines[1:, 1:])


def average(rows: np.ndarray, lines: np.ndarray) -> None:
    """Apply PNG's filter 3: subtract the mean of left and above, computed without a ninth bit."""
    lines[:, 0] = 3
    lines[0, 1:4], lines[1:, 1:4] = rows[0, :3], rows[1:, :3] - (rows[:-1, :3] >> 1)
    lines[0, 4:] = rows[0, 3:] - (rows[0, :-3] >> 1)
    left, above = rows[1:, :-3], rows[:-1, 3:]
    np.subtract(rows[1:, 3:], (left & above) + ((left ^ above) >> 1), out=lines[1:, 4:])


def paeth(rows: np.ndarray, lines: np.ndarray) -> None:
    """Apply PNG's filter 4: subtract the neighbour nearest to left + above - above left.

    The neighbours are left, above and above left.
    """
    sub(rows[:1], lines[:1])
    lines[1:, 0], lines[1:, 1:4] = 4, rows[1:, :3] - rows[:-1, :3]
    left, above, corner = (
        part.astype(np.int16) for part in (rows[1:, :-3], rows[:-1, 3:], rows[:-1, :-3])
    )
    to_left, to_above = np.abs(above - corner), np.abs(left - corner)
    to_corner = np.abs(left + above - 2 * corner)
    nearest = np.where(to_above <= to_corner, above, corner)
    nearest = np.where((to_left <= to_above) & (to_left <= to_corner), left, nearest)
    lines[1:, 4:] = rows[1:, 3:] - nearest.astype(np.uint8)


def with_pillow(raster: RgbImage, level: int) -> bytes:
    buffer = io.BytesIO()
    image_for(raster).save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def with_isal(raster: RgbImage, subtract: Filter, level: int) -> bytes:
    rows = np.frombuffer(raster.rgb, np.uint8).reshape(raster.height, -1)
    lines = np.empty((raster.height, 1 + rows.shape[1]), np.uint8)
    subtract(rows, lines)
    return png.file_of(raster, isal_zlib.compress(lines, level))


def ways() -> dict[str, Callable[[RgbImage], bytes]]:
    found: dict[str, Callable[[RgbImage], bytes]] = {
        CHOSEN: lambda raster: encode_image(raster, Encoding())
    }
    for level in (0, 1, 3, 6):
        found[f"pillow {level}"] = lambda raster, level=level: with_pillow(raster, level)
    for subtract in (sub, up, average, paeth):
        for level in range(4):
            found[f"{subtract.__name__}, isal {level}"] = lambda raster, s=subtract, level=level: (
                with_isal(raster, s, level)
            )
    for format in ("jpeg", "webp"):
        found[format] = lambda raster, format=format: encode_image(raster, Encoding(format))
    return found


def measure(raster: RgbImage) -> dict[str, tuple[float, int]]:
    """Return the best time of each way in ms, and the bytes of its file."""
    seconds: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for _ in range(NUM_ROUNDS):
        for way, encode in ways().items():
            began = time.thread_time()
            data = encode(raster)
            seconds.setdefault(way, []).append(time.thread_time() - began)
            sizes[way] = len(data)
            image = Image.open(io.BytesIO(data))
            assert image.format != "PNG" or image.tobytes() == raster.rgb, f"{way} is not lossless"
    return {way: (1000 * min(taken), sizes[way]) for way, taken in seconds.items()}


def main() -> None:
    figures: dict[str, dict[str, dict[str, float]]] = {}
    table = Table(title=f"Files of {SIDE} x {SIDE} pixels")
    table.add_column("way")
    for make in (photograph, texture, shapes):
        found = measure(make())
        former_ms, former_bytes = found[FORMER]
        figures[make.__name__] = {
            way: {
                "ms": ms,
                "bytes": num_bytes,
                "time_ratio": ms / former_ms,
                "size_ratio": num_bytes / former_bytes,
            }
            for way, (ms, num_bytes) in found.items()
        }
        for column in (f"{make.__name__}: ms", "ratio", "KiB", "ratio"):
            table.add_column(column, justify="right")
    for way in ways():
        cells = [
            (
                f"{f['ms']:.1f}",
                f"{f['time_ratio']:.3f}",
                f"{f['bytes'] / 1024:.0f}",
                f"{f['size_ratio']:.2f}",
            )
            for f in (figures[name][way] for name in figures)
        ]
        table.add_row(way, *(cell for each in cells for cell in each))
    Console(width=140).print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
