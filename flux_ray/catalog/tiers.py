"""The tiers: one row for each, with the defaults and limits that clients and engines rely on."""

import math
from dataclasses import dataclass, replace

from flux_ray.catalog.canvas import Canvas, CanvasLimits, ReferenceLimit
from flux_ray.catalog.flops import TOKEN_SIDE, reference_pixels
from flux_ray.errors import UnknownTier

# Weights in this package, in the layouts of FLUX.2 klein and of FLUX.1 Kontext.
EMBEDDED, EMBEDDED_KONTEXT = "embedded", "embedded-kontext"
ALL_EMBEDDED = frozenset((EMBEDDED, EMBEDDED_KONTEXT))
# Of a prompt that only its tokenizer could count: UTF-8 bytes of a token, and tokens of the chat
# template around it. Both are assumed.
BYTES_PER_TOKEN = 4
TEMPLATE_TOKENS = 8


@dataclass(frozen=True)
class Tier:
    """A tier: what a client may ask for, and what it gets by default.

    `text_length` is the padded prompt length in tokens. Sizes are in pixels; both sides are
    multiples of `size_multiple`. `weights` is one of ALL_EMBEDDED, or None if the operator names
    them in the tier's args; `hub_id` is where they are published, at the revision that was tested,
    for `flux-ray weights`. Tiers that are not guided (distilled ones) have a fixed `guidance`; a
    caller's has no effect. The model scales down references above `max_reference_pixels`. A tier
    that `takes_mask` can generate a part of an image and keep the rest. One that `scales_sizes`
    takes sizes outside its limits: it generates near its default area and scales the image.
    `quality_steps` are the numbers of steps for OpenAI's words for quality, on tiers where they
    make a difference.

    A tier that `takes_negative` steers away from a caller's negative prompt, by classifier-free
    guidance of `true_cfg_scale`. If this is above 1 the tier always does so, if only with an empty
    prompt, and a caller's guidance is this scale. One that `takes_strength` can begin an edit with
    less than pure noise. One that `takes_control` follows the edges or depths of a control image,
    without which it cannot work; one that `requires_mask` works only on what a mask shows. If the
    model scales all references to about one size, each is `reference_tokens`; 0 means that they add
    channels to the image's tokens instead. Only the ranks of one that `splits_tokens` can share the
    tokens of an image.
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
    splits_tokens: bool = True
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

    @property
    def canvas_limits(self) -> CanvasLimits | None:
        """Return the limits of a lone reference's canvas; None if the tier does not keep it."""
        max_pixels = self.max_lone_reference_pixels
        if max_pixels is None:
            return None
        return CanvasLimits(self.size_multiple, max_pixels, self.min_side, self.max_side)

    def reference_limit(self, num_references: int) -> ReferenceLimit:
        """Return to what the model scales each of so many references down."""
        alone = self.canvas_limits if num_references == 1 else None
        return self.max_reference_pixels if alone is None else alone

    def canvas_of(self, width: int, height: int) -> Canvas | None:
        """Return the canvas of a lone reference of this size; None if the tier does not keep it."""
        limits = self.canvas_limits
        return None if limits is None else limits.canvas_of(width, height)

    @property
    def num_forwards(self) -> int:
        """Return the forwards of each step, where the caller has no negative prompt."""
        return 1 + (self.true_cfg_scale > 1)

    @property
    def masks_only(self) -> bool:
        """Return whether it takes an image for nothing but to generate a part of it."""
        return self.takes_mask and self.reference_tokens == 0

    @property
    def added_pixels(self) -> int:
        """Return the pixels whose tokens the largest reference adds to those of the image."""
        if self.reference_tokens is None:
            return self.max_reference_pixels
        return self.reference_tokens * TOKEN_SIDE**2

    def pixels_added_by(self, width: int, height: int, *, is_alone: bool = False) -> int:
        """Return the pixels whose tokens a reference of this size adds to those of the image."""
        canvas = self.canvas_of(width, height) if is_alone else None
        if canvas is not None:
            return canvas.pixels
        if self.reference_tokens is None:
            return reference_pixels(width, height, self.max_reference_pixels)
        return self.added_pixels

    def steps_at(self, quality: str | None) -> int | None:
        """Return the steps for an OpenAI `quality`, or None if this tier ignores it."""
        return dict(self.quality_steps).get(quality or "")


def qualities(low: int, medium: int, high: int) -> tuple[tuple[str, int], ...]:
    """Return the steps for OpenAI's words; those above `high` never take fewer steps than it."""
    steps = {"low": low, "medium": medium, "standard": medium}
    return tuple((steps | dict.fromkeys(("high", "hd", "xhigh", "max"), high)).items())


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
    takes_strength=True,
    # Most clients have a fixed list of sizes, of which the smallest is 512x512.
    scales_sizes=True,
    weights=EMBEDDED,
    owner="flux-ray",
)
# A caller's guidance is passed on. From 1 to 5 it has no effect: it was trained with all of these.
TINY_FLUX1 = replace(
    TINY,
    name="tiny-flux1",
    family="flux1-kontext",
    guidance=2.5,
    is_guided=True,
    takes_negative=True,
    max_references=1,
    weights=EMBEDDED_KONTEXT,
    quality_steps=qualities(low=2, medium=4, high=8),
)
# FLUX.1 was trained on up to two megapixels. Its limits are wider than those of BFL's own API.
FLUX_1_DEV = Tier(
    name="flux-1-dev",
    family="flux1",
    license="flux-non-commercial",
    num_steps=28,
    guidance=3.5,
    is_guided=True,
    takes_negative=True,
    takes_mask=True,
    takes_strength=True,
    # Only the image that a mask is of, which adds no tokens.
    max_references=1,
    reference_tokens=0,
    max_reference_pixels=2 * 1024 * 1024,
    text_length=512,
    default_side=1024,
    min_side=64,
    max_side=2048,
    max_pixels=2 * 1024 * 1024,
    hub_id="black-forest-labs/FLUX.1-dev@3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
    quality_steps=qualities(low=16, medium=28, high=50),
)
FLUX_1_KREA_DEV = replace(
    FLUX_1_DEV,
    name="flux-1-krea-dev",
    guidance=4.5,
    hub_id="black-forest-labs/FLUX.1-Krea-dev@8162a9c7b05a641be098422bf2fcf335615c2f28",
)
# It has no embedding for a guidance, and was trained on prompts of half the length.
FLUX_1_SCHNELL = replace(
    FLUX_1_DEV,
    name="flux-1-schnell",
    license="apache-2.0",
    num_steps=4,
    guidance=0.0,
    is_guided=False,
    text_length=256,
    hub_id="black-forest-labs/FLUX.1-schnell@741f7c3ce8b383c54771c7003378a50191e9efe9",
    quality_steps=(),
)
# The weights are not public: they come from the operator.
FLUX_1_PRO = replace(
    FLUX_1_DEV, name="flux-1-pro", license="proprietary", guidance=3.0, hub_id=None
)
FLUX_1_KONTEXT_DEV = replace(
    FLUX_1_DEV,
    name="flux-1-kontext-dev",
    family="flux1-kontext",
    guidance=2.5,
    # Whatever its size, a reference is scaled to one of 17 sizes around a megapixel. This is the
    # largest, 1328x800. Only what is far above it is scaled down before.
    reference_tokens=4150,
    max_reference_pixels=4 * 1024 * 1024,
    hub_id="black-forest-labs/FLUX.1-Kontext-dev@24e9dedc4ef646698dc8eb4e18ae2cec3c9fea0d",
)
FLUX_1_FILL_DEV = replace(
    FLUX_1_DEV,
    name="flux-1-fill-dev",
    family="flux1-fill",
    num_steps=50,
    guidance=30.0,
    takes_negative=False,
    takes_strength=False,
    requires_mask=True,
    hub_id="black-forest-labs/FLUX.1-Fill-dev@358293da0354175698b67ec8299acf928313a78a",
    quality_steps=qualities(low=20, medium=28, high=50),
)
# The control image is joined to the channels of the noise, as the image to fill is.
FLUX_1_DEPTH_DEV = replace(
    FLUX_1_FILL_DEV,
    name="flux-1-depth-dev",
    family="flux1-control",
    num_steps=30,
    guidance=10.0,
    takes_mask=False,
    requires_mask=False,
    max_references=0,
    takes_control=True,
    hub_id="black-forest-labs/FLUX.1-Depth-dev@fb5e9b1bae41b8c8adcea4ea2a87b74dd298f07a",
)
FLUX_1_CANNY_DEV = replace(
    FLUX_1_DEPTH_DEV,
    name="flux-1-canny-dev",
    num_steps=50,
    guidance=30.0,
    hub_id="black-forest-labs/FLUX.1-Canny-dev@27c3d8bdc17509b47cf4fd9ba25ab1c7508a69a2",
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
    takes_strength=True,
    hub_id="black-forest-labs/FLUX.2-klein-4B@e7b7dc27f91deacad38e78976d1f2b499d76a294",
)
KLEIN_9B = replace(
    KLEIN_4B,
    name="flux-2-klein-9b",
    license="flux-non-commercial",
    hub_id="black-forest-labs/FLUX.2-klein-9B@92196c8e11f7b6cf2b7493e037d8c5345c559216",
)
# Not distilled: two forwards in each step, with and without the prompt.
KLEIN_4B_BASE = replace(
    KLEIN_4B,
    name="flux-2-klein-4b-base",
    family="flux2-klein-base",
    num_steps=50,
    guidance=4.0,
    true_cfg_scale=4.0,
    is_guided=True,
    hub_id="black-forest-labs/FLUX.2-klein-base-4B@a3b4f4849157f664bdbc776fd7453c2783562f4d",
    quality_steps=qualities(low=20, medium=28, high=50),
)
KLEIN_9B_BASE = replace(
    KLEIN_4B_BASE,
    name="flux-2-klein-9b-base",
    license=KLEIN_9B.license,
    hub_id="black-forest-labs/FLUX.2-klein-base-9B@32773329fbe7e81a90ef971740e8ba4b0364ecf3",
)
# Computes the attention's keys and values of the references once, and not in each step.
KLEIN_9B_KV = replace(
    KLEIN_9B,
    name="flux-2-klein-9b-kv",
    family="flux2-klein-kv",
    hub_id="black-forest-labs/FLUX.2-klein-9b-kv@a6dfb36eca3a3906eb2fd460795adfb844e5fcce",
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
    # 28 steps are the usual compromise.
    quality_steps=qualities(low=20, medium=28, high=50),
)
# The weights of pro and max are not public: they come from the operator.
PRO = replace(DEV, name="flux-2-pro", license="proprietary", max_references=8, hub_id=None)
# The longest prompt that its upsampler writes, 3,584 tokens, and the chat template around it.
FLUX_3_KLEIN = Tier(
    name="flux-3-klein",
    family="flux3-klein",
    license="flux-kommunity",
    num_steps=16,
    guidance=1.0,
    max_references=10,
    text_length=3600,
    text_multiple=80,
    splits_tokens=False,
    default_side=1024,
    min_side=64,
    max_side=4096,
    max_pixels=4 * 1024 * 1024,
    max_lone_reference_pixels=4 * 1024 * 1024,
    hub_id="black-forest-labs/flux-3-image-klein@8454017f9ebaada30c998fccd9f67a80c7580f68",
)
# Not distilled: two forwards in each step. Which of its published revisions to pin is not known.
FLUX_3_KLEIN_BASE = replace(
    FLUX_3_KLEIN,
    name="flux-3-klein-base",
    family="flux3-klein-base",
    num_steps=50,
    guidance=3.5,
    true_cfg_scale=3.5,
    is_guided=True,
    takes_negative=True,
    hub_id=None,
    quality_steps=qualities(low=20, medium=28, high=50),
)

# The best last: `auto` is the last one that can do what is asked for.
TIERS = (
    TINY,
    # The same model split over two ranks, so that a laptop runs the code of the 32B tiers.
    replace(TINY, name="tiny-tp2"),
    TINY_FLUX1,
    FLUX_1_SCHNELL,
    FLUX_1_CANNY_DEV,
    FLUX_1_DEPTH_DEV,
    FLUX_1_FILL_DEV,
    FLUX_1_KONTEXT_DEV,
    FLUX_1_DEV,
    FLUX_1_KREA_DEV,
    FLUX_1_PRO,
    KLEIN_4B_BASE,
    KLEIN_4B,
    KLEIN_9B_BASE,
    KLEIN_9B_KV,
    KLEIN_9B,
    FLUX_3_KLEIN_BASE,
    FLUX_3_KLEIN,
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
