"""The tiers: one row each, with the defaults and limits that clients and engines rely on."""

from dataclasses import dataclass, replace

from flux_ray.errors import UnknownTier

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Tier:
    """A row: what a client may ask for, and what it gets when it does not say.

    `text_length` is the padded prompt length in tokens; sizes are pixels, `size_multiple` for both
    sides; `weights` is `embedded`, or None where the operator names them in the tier's args.
    Distilled tiers are not guided: `guidance` then is fixed, and a caller's changes nothing.
    A reference of more than `max_reference_pixels` is scaled down by the model. `takes_mask`: it
    can draw a part of an image and keep the rest.
    `scales_sizes`: other sizes than its own are generated at its default area and then scaled.
    `quality_steps`: the steps of OpenAI's words for quality, where they make a difference.
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
    scales_sizes: bool = False
    max_reference_pixels: int = 1024 * 1024
    weights: str | None = None
    owner: str = "black-forest-labs"
    quality_steps: tuple[tuple[str, int], ...] = ()

    def steps_at(self, quality: str | None) -> int | None:
        """Of that quality; None where the word says nothing to this tier."""
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
    # It has seen nothing larger; a larger reference is scaled down to that.
    max_side=192,
    max_pixels=192 * 192,
    max_reference_pixels=192 * 192,
    takes_mask=True,
    # Most clients have a list of sizes, of which the least is 512x512.
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
    # 28 is the usual trade. Nobody who asks for more than the default gets less.
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
# Their weights are not public: they come from the operator.
PRO = replace(DEV, name="flux-2-pro", license="proprietary", max_references=8)

TIERS = (
    TINY,
    # The same model split over two ranks: the path of the 32B tiers on a laptop.
    replace(TINY, name="tiny-tp2"),
    KLEIN_4B,
    replace(KLEIN_4B, name="flux-2-klein-9b", license="flux-non-commercial"),
    DEV,
    PRO,
    replace(PRO, name="flux-2-max"),
)
_BY_NAME = {tier.name: tier for tier in TIERS}


def tier_for(name: str) -> Tier:
    """The row of a tier; UnknownTier names the ones there are."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise UnknownTier(
            f"no tier named {name!r}; known tiers: {', '.join(_BY_NAME)}", "model"
        ) from None
