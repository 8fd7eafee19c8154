"""`flux-ray generate`: generate an image of a prompt, or edit images, on a running cluster."""

import base64
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flux_ray.cli.client import DEFAULT_URL, Attached, KeyFile, Url, call, fail, follow

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def output_format_for(path: Path) -> str:
    """Return the image format for a file name; BadParameter if its ending is unknown."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise typer.BadParameter(f"{path} must end in one of: {', '.join(FORMATS)}") from None


def paths_for(path: Path, num_images: int) -> list[Path]:
    """Return the paths of all images: `out.png`, or for several `out-0.png`, `out-1.png`, ..."""
    if num_images == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{index}") for index in range(num_images)]


def preview_paths(path: Path, num_previews: int) -> list[Path]:
    """Return the paths of the previews of one image: `out-preview-0.png` and so on."""
    return [path.with_stem(f"{path.stem}-preview-{index}") for index in range(num_previews)]


def control_path(path: Path) -> Path:
    """Return the path of a control image that is made: `out-control.png`, also for `out.jpg`."""
    return path.with_name(f"{path.stem}-control.png")


def save(path: Path, data: bytes) -> None:
    """Write one image; make its folder if it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")


Prompt = Annotated[str, typer.Argument(help="What the image is to show.")]
Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", help=".png, .jpg or .webp; of several, out-0.png, out-1.png ..."
    ),
]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", exists=True, dir_okay=False, help="A reference; repeatable."),
]
MaskFile = Annotated[
    Path | None,
    typer.Option(
        "--mask",
        exists=True,
        dir_okay=False,
        help="Generate only where this is white, or transparent; needs --image.",
    ),
]
ControlFile = Annotated[
    Path | None,
    typer.Option(
        "--control-image",
        exists=True,
        dir_okay=False,
        help="Edges or depths to follow, on tiers that take them; in place of --image.",
    ),
]
MakeControl = Annotated[
    str | None,
    typer.Option(
        metavar="canny|depth:MODEL",
        help="--control-image is a photograph: send its edges, or the depths that a model of"
        " transformers estimates, a folder or a name on the hub. Saved as out-control.png.",
    ),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(help="What to steer away from, on tiers that take it; each step costs double."),
]
TrueCfgScale = Annotated[
    float | None,
    typer.Option(min=0, max=100, help="How far to steer away from the negative prompt, above 1."),
]
Strength = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="How much of the image is lost under --mask; by default all."),
]
NumImages = Annotated[int, typer.Option("-n", "--n", min=1, help="How many images.")]
Quality = Annotated[
    Literal["low", "medium", "high"] | None,
    typer.Option(help="Fewer or more steps, on tiers that are not step-distilled."),
]
Stream = Annotated[
    bool, typer.Option("--stream", help="Show the place in the queue and the progress.")
]
Previews = Annotated[
    int,
    typer.Option(
        min=0, max=3, help="Save so many previews, as out-preview-0.png ...; implies --stream."
    ),
]
Force = Annotated[bool, typer.Option("-f", "--force", help="Overwrite files.")]


def generate(
    prompt: Prompt,
    output: Output = Path("out.png"),
    image: Images = None,
    mask: MaskFile = None,
    control_image: ControlFile = None,
    make_control: MakeControl = None,
    negative_prompt: NegativePrompt = None,
    true_cfg_scale: TrueCfgScale = None,
    strength: Strength = None,
    url: Url = DEFAULT_URL,
    tier: Annotated[str | None, typer.Option(help="One of `flux-ray tiers`.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    quality: Quality = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same one, the same image.")] = None,
    num_images: NumImages = 1,
    stream: Stream = False,
    previews: Previews = 0,
    key_file: KeyFile = None,
    force: Force = False,
) -> None:
    """Generate images of PROMPT, or edit the ones given with --image.

    Exit status: 0 if all images were saved, 1 if not, 2 for wrong options.

    Example: flux-ray generate "make the circle green" --image circle.png -o green.png
    """
    attached = attached_of(image or (), mask, control_image, make_control)
    paths, made = paths_for(output, num_images), control_path(output)
    if not force:
        check_free(paths if make_control is None else [*paths, made], previews)
    if make_control is not None:
        attached = make_control_image(attached, make_control, size, made)
    fields: dict[str, Any] = {"prompt": prompt, "output_format": output_format_for(output)}
    fields |= {"model": tier, "size": size, "steps": steps, "quality": quality, "seed": seed}
    fields |= {"negative_prompt": negative_prompt, "true_cfg_scale": true_cfg_scale}
    fields |= {"strength": strength, "n": num_images}
    sent = {name: value for name, value in fields.items() if value is not None}
    save_images(url, sent, attached, key_file, paths, previews if stream or previews else None)


def attached_of(
    images: Sequence[Path], mask: Path | None, control: Path | None, make_control: str | None
) -> Attached:
    """Return the files to send; BadParameter for those that do not go together."""
    if mask is not None and not images:
        raise typer.BadParameter("--mask needs the image that it is for: --image")
    if control is not None and images:
        raise typer.BadParameter("--control-image comes without --image")
    if make_control is not None and control is None:
        raise typer.BadParameter("--make-control needs the photograph: --control-image")
    if make_control is not None and not re.fullmatch("canny|depth:.+", make_control):
        raise typer.BadParameter(f"--make-control is canny or depth:MODEL, not {make_control!r}")
    return Attached(tuple(images), mask, control)


def check_free(paths: Sequence[Path], num_previews: int) -> None:
    """End the command if a file is there that an image or a preview would overwrite.

    The cluster must not generate images that could then not be saved.
    """
    kept = [each for path in paths for each in preview_paths(path, num_previews)]
    if taken := [str(path) for path in [*paths, *kept] if path.exists()]:
        fail(f"there is already {', '.join(taken)}: choose another --output, or say --force")


def make_control_image(attached: Attached, how: str, size: str | None, path: Path) -> Attached:
    """Save what a photograph shows for the tier to follow; return `attached` with that instead.

    `how`: canny or depth:MODEL. `size` is the one asked for, of which the server knows what it may
    be. End the command if it cannot be made.
    """
    # Pillow, and for depths torch, are of no use to the other commands.
    from flux_ray.engine.control import control_image

    assert attached.control is not None, "checked by attached_of"
    numbers = re.fullmatch(r"(\d{2,4})x(\d{2,4})", size or "")
    fitting = None if numbers is None else (int(numbers[1]), int(numbers[2]))
    kind, _, model = how.partition(":")
    try:
        save(path, control_image(attached.control, fitting, model or None))
    except ValueError as error:
        fail(str(error))
    typer.echo(f"{path}  {kind}")
    return replace(attached, control=path)


def save_images(
    url: str,
    fields: dict[str, Any],
    attached: Attached,
    key_file: Path | None,
    paths: Sequence[Path],
    num_previews: int | None,
) -> None:
    """Ask for images and save them, as a stream with so many previews of each unless it is None."""
    if num_previews is None:
        save_answer(url, fields, attached, key_file, paths)
    else:
        save_stream(url, fields, attached, key_file, paths, num_previews)


def save_answer(
    url: str,
    fields: dict[str, Any],
    attached: Attached,
    key_file: Path | None,
    paths: Sequence[Path],
) -> None:
    """Ask for images, and save them when all are done."""
    # Some aliases answer by URL unless they are told.
    asked = {**fields, "response_format": "b64_json"}
    answer, taken_s = call(url, asked, attached, key_file)
    say_warnings(answer.get("warnings", []))
    for path, answered in zip(paths, answer["data"], strict=True):
        save(path, base64.b64decode(answered["b64_json"]))
        typer.echo(f"{path}  seed {answered['seed']}  {taken_s:.2f} s")


def save_stream(
    url: str,
    fields: dict[str, Any],
    attached: Attached,
    key_file: Path | None,
    paths: Sequence[Path],
    num_previews: int,
) -> None:
    """Ask for a stream, and save each image and preview as soon as it comes."""
    waiting, said, shown = list(paths), set(), 0
    asked = {**fields, "stream": True}
    if num_previews:
        asked["partial_images"] = num_previews
    for event in follow(url, asked, attached, key_file, len(paths)):
        said.update(event.fields.get("warnings", []))
        if event.is_preview and waiting and shown < num_previews:
            # The previews of an image come before it, and the images one after the other.
            path, shown = preview_paths(waiting[0], num_previews)[shown], shown + 1
            save(path, base64.b64decode(event.fields["b64_json"]))
            typer.echo(f"{path}  preview")
        elif event.is_image and waiting:
            path, shown = waiting.pop(0), 0
            save(path, base64.b64decode(event.fields["b64_json"]))
            typer.echo(f"{path}  seed {event.fields['seed']}  {event.at_s:.2f} s")
    say_warnings(sorted(said))
    if waiting:
        fail(f"the stream ended before {', '.join(map(str, waiting))} came; ask again")


def say_warnings(warnings: Sequence[str]) -> None:
    """Print the server's warnings to stderr."""
    for warning in warnings:
        typer.secho(warning, fg="yellow", err=True)
