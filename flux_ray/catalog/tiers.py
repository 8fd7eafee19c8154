"""The tiers: one row for each, with the defaults and limits that clients and engines rely on."""

import math
from dataclasses import dataclass, replace

from flux_ray.catalog.canvas import Canvas, canvas_for
from flux_ray.catalog.flops import reference_pixels
from flux_ray.errors import UnknownTier

EMBEDDED = "embedded"
# Of a prompt that only its tokenizer could count: UTF-8 bytes of a token, and tokens of the chat
# template around it. Both are assumed.
BYTES_PER_TOKEN = 4
TEMPLATE_TOKENS = 8


@dataclass(frozen=True)
class Tier:
    """A tier: what a client may ask for, and what it gets by default.

    `text_length` is the padded prompt length in tokens. Sizes are in pixels; both sides are
    multiples of `size_multiple`. `weights` is `embedded`, or None if the operator names them in the
    tier's args; `hub_id` is where they are published, at the revision that was tested, for `flux-
    ray weights`. Tiers that are not guided (distilled ones) have a fixed `guidance`; a caller's has
    no effect. The model scales down references above `max_reference_pixels`. A tier that
    `takes_mask` can generate a part of an image and keep the rest. One that `scales_sizes` takes
    sizes outside its limits: it generates near its default area and scales the image.
    `quality_steps` are the numbers of steps for OpenAI's words for quality, on tiers where they
    make a difference. A tier that `takes_negative` steers away from a caller's negative prompt. One
    with a `true_cfg_scale` above 1 always does, from an empty one if need be, and a caller's
    guidance is this scale. A tier that `takes_strength` can start an edit from a part of its noise.
    One that `takes_control` generates only after a control image, and one that `requires_mask` only
    what a mask shows. Each reference has `reference_tokens` if the model scales all to about one
    size.
    """

    name: str
    family: str
    license: str
    num_steps: int
    guidance: float
    max_references: int
    text_length: int
    default_side: int
    min_side: int
    max_side: int
    max_pixels: int
    max_steps: int = 50
    size_multiple: int = 16
    is_guided: bool = False
    takes_mask: bool = False
    requires_mask: bool = False
    takes_negative: bool = False
    true_cfg_scale: float = 1.0
    takes_strength: bool = False
    takes_control: bool = False
    reference_tokens: int | None = None
    scales_sizes: bool = False
    max_reference_pixels: int = 1024 * 1024
    # Prompts are padded to multiples of so many tokens, instead of all to the text length.
    text_multiple: int | None = None
    # A reference that is alone is kept whole, up to so many pixels, on a canvas of whole tokens.
    max_lone_reference_pixels: int | None = None
    weights: str | None = None
    hub_id: str | None = None
    owner: str = "black-forest-labs"
    quality_steps: tuple[tuple[str, int], ...] = ()

    def text_tokens(self, prompt: str) -> int:
        """Return to how many tokens a prompt is padded, estimated where its length decides it."""
        if self.text_multiple is None:
            return self.text_length
        num_tokens = TEMPLATE_TOKENS + len(prompt.encode()) / BYTES_PER_TOKEN
        num_padded = math.ceil(num_tokens / self.text_multiple) * self.text_multiple
        return min(num_padded, self.text_length)

    def reference_limit(self, num_references: int) -> int:
        """Return to how many pixels each of so many references is scaled down."""
        alone = self.max_lone_reference_pixels if num_references == 1 else None
        return self.max_reference_pixels if alone is None else alone

    def canvas_of(self, width: int, height: int) -> Canvas | None:
        """Return the canvas of a lone reference of this size; None if the tier does not keep it."""
        if self.max_lone_reference_pixels is None:
            return None
        return canvas_for(
            width,
            height,
            multiple=self.size_multiple,
            max_pixels=self.max_lone_reference_pixels,
            min_side=self.min_side,
            max_side=self.max_side,
        )

    def pixels_added_by(self, width: int, height: int, *, is_alone: bool = False) -> int:
        """Return the pixels whose tokens a reference of this size adds to those of the image."""
        canvas = self.canvas_of(width, height) if is_alone else None
        if canvas is not None:
            return canvas.pixels
        return reference_pixels(width, height, self.max_reference_pixels)

    def steps_at(self, quality: str | None) -> int | None:
        """Return the steps for an OpenAI `quality`, or None if this tier ignores it."""
        return dict(self.quality_steps).get(quality or "")


TINY = Tier(
    name="tiny",
    family="flux2-klein",
    license="apache-2.0",
    num_steps=4,
    guidance=1.0,
    max_references=2,
    text_length=48,
    default_side=128,
    min_side=64,
    # It was trained on nothing larger; larger references are scaled down to this.
    max_side=192,
    max_pixels=192 * 192,
    max_reference_pixels=192 * 192,
    takes_mask=True,
    # Most clients have a fixed list of sizes, of which the smallest is 512x512.
    scales_sizes=True,
    weights=EMBEDDED,
    owner="flux-ray",
)
KLEIN_4B = Tier(
    name="flux-2-klein-4b",
    family="flux2-klein",
    license="apache-2.0",
    num_steps=4,
    guidance=1.0,
    max_references=4,
    text_length=512,
    default_side=1024,
    min_side=64,
    max_side=4096,
    max_pixels=4 * 1024 * 1024,
    takes_mask=True,
    hub_id="black-forest-labs/FLUX.2-klein-4B@e7b7dc27f91deacad38e78976d1f2b499d76a294",
)
KLEIN_9B = replace(
    KLEIN_4B,
    name="flux-2-klein-9b",
    license="flux-non-commercial",
    hub_id="black-forest-labs/FLUX.2-klein-9B@92196c8e11f7b6cf2b7493e037d8c5345c559216",
)
DEV = Tier(
    name="flux-2-dev",
    family="flux2-dev",
    license="flux-non-commercial",
    num_steps=50,
    guidance=4.0,
    is_guided=True,
    max_references=6,
    text_length=512,
    default_side=1024,
    min_side=64,
    max_side=4096,
    max_pixels=4 * 1024 * 1024,
    takes_mask=True,
    hub_id="black-forest-labs/FLUX.2-dev@26afe3a78bb242c0a8bb181dcc8937bb16e5c66c",
    # 28 steps are the usual compromise. `high` and above are never fewer than the default.
    quality_steps=(
        ("low", 20),
        ("medium", 28),
        ("standard", 28),
        ("high", 50),
        ("hd", 50),
        ("xhigh", 50),
        ("max", 50),
    ),
)
# The weights of pro and max are not public: they come from the operator.
PRO = replace(DEV, name="flux-2-pro", license="proprietary", max_references=8, hub_id=None)

TIERS = (
    TINY,
    # The same model split over two ranks, so that a laptop runs the code of the 32B tiers.
    replace(TINY, name="tiny-tp2"),
    KLEIN_4B,
    KLEIN_9B,
    DEV,
    PRO,
    replace(PRO, name="flux-2-max"),
)
_BY_NAME = {tier.name: tier for tier in TIERS}


def tier_for(name: str) -> Tier:
    """Return the tier of that name. Raises UnknownTier, which lists the known names."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise UnknownTier(
            f"no tier named {name!r}; known tiers: {', '.join(_BY_NAME)}", "model"
        ) from None
