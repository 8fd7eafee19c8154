"""Where the command puts pictures, and in which format."""

import base64
from pathlib import Path

import typer

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def output_format_for(path: Path) -> str:
    """The format that the file's name says."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise typer.BadParameter(f"{path} must end in one of: {', '.join(FORMATS)}") from None


def paths_for(path: Path, num_images: int) -> list[Path]:
    """`out.png`, or for several `out-0.png`, `out-1.png`, ..."""
    if num_images == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{index}") for index in range(num_images)]


def save(path: Path, b64: str) -> None:
    """Write one picture, in a folder that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(b64))
