"""The work of a request's stages: FLOPs and numbers of weights, one row for each tier.

Prices and `flux-ray plan` are computed from it. The numbers are counted from the real
configurations on the meta device, by torch's FlopCounterMode; the tests count them again. A
multiplication and an addition are two FLOPs.
"""

import math
from dataclasses import dataclass, replace

# An image token is 16 x 16 pixels: the VAE's 8, and patches of 2.
TOKEN_SIDE = 16
# The VAE takes larger images in tiles of this side, which overlap by a quarter: in one piece, four
# megapixels would take 6 GiB of memory, or 25 GiB if its attention is not fused.
MAX_WHOLE_PIXELS = 1024 * 1024
TILE_SIDE = 1024
TILE_STRIDE = 768


@dataclass(frozen=True)
class TransformerWork:
    """The work of one forward of the transformer; `fixed_flops` do not depend on the image's size.

    Block weights are those of the blocks' linear layers: they are quantized, and split over ranks.
    """

    width: int
    num_double_blocks: int
    num_single_blocks: int
    num_block_weights: int
    num_other_weights: int
    fixed_flops: int
    token_flops: int
    head_size: int = 128

    @property
    def num_blocks(self) -> int:
        return self.num_double_blocks + self.num_single_blocks

    @property
    def num_heads(self) -> int:
        return self.width // self.head_size

    def product_flops(self, num_tokens: int) -> int:
        """Return the FLOPs of the linear layers, for all tokens of text, image and references."""
        return self.fixed_flops + self.token_flops * num_tokens

    def attention_flops(self, num_tokens: int, num_kept: int = 0) -> int:
        """Return the FLOPs of attention: two products of tokens x tokens x width in each block.

        The tokens attend to each other, and to `num_kept` more whose keys and values are kept.
        """
        return 4 * self.width * self.num_blocks * num_tokens * (num_tokens + num_kept)


@dataclass(frozen=True)
class TextEncoderWork:
    """The work for one padded prompt, in the layers that are used; heads are key-value heads.

    `whole_flops` and `num_whole_weights` are those of a second, small encoder, which has
    `num_whole_layers` and is never split over ranks.
    """

    width: int
    num_layers: int
    num_heads: int
    num_block_weights: int
    attention_flops: int
    whole_flops: int = 0
    num_whole_weights: int = 0
    num_whole_layers: int = 0

    def product_flops(self, num_tokens: int) -> int:
        """Return the FLOPs of the linear layers: every weight once for each token."""
        return 2 * self.num_block_weights * num_tokens


@dataclass(frozen=True)
class VaeWork:
    """The work of the VAE: FLOPs a pixel, and a squared pixel for the attention in its middle.

    The attention costs the same in encoding and decoding.
    """

    encode_pixel_flops: int
    decode_pixel_flops: int
    attention_flops: float

    def encode_flops(self, pixels: int) -> int:
        """Return the FLOPs of encoding one reference image."""
        return self.encode_pixel_flops * pixels + int(self.attention_flops * pixels**2)

    def edit_flops(self, width: int, height: int) -> int:
        """Return the FLOPs of encoding a masked image, in the same tiles as it is decoded in."""
        return sum(self.encode_flops(tile) for tile in tiles_of(width, height))

    def decode_flops(self, width: int, height: int) -> int:
        """Return the FLOPs of decoding one image.

        Above a megapixel it is more for each pixel, as tiles overlap.
        """
        return sum(
            self.decode_pixel_flops * tile + int(self.attention_flops * tile**2)
            for tile in tiles_of(width, height)
        )


@dataclass(frozen=True)
class Workload:
    """The work of a tier's models; one that `keeps_references` computes them once for all steps."""

    transformer: TransformerWork
    text_encoder: TextEncoderWork
    vae: VaeWork
    keeps_references: bool = False


def tiles_of(width: int, height: int) -> tuple[int, ...]:
    """Return the pixels of each VAE tile of an image; up to a megapixel it is one tile."""
    if width * height <= MAX_WHOLE_PIXELS:
        return (width * height,)
    return tuple(w * h for w in tile_lengths(width) for h in tile_lengths(height))


def tile_lengths(side: int) -> tuple[int, ...]:
    """Return the lengths in pixels of the tiles along one side of an image."""
    return tuple(min(TILE_SIDE, side - start) for start in range(0, side, TILE_STRIDE))


def reference_pixels(width: int, height: int, max_pixels: int) -> int:
    """Return the pixels of a reference after scaling to the tier's limit and cutting to tokens.

    Exactly as diffusers' Flux2ImageProcessor does it.
    """
    width, height = scaled_size(width, height, max_pixels)
    return width // TOKEN_SIDE * TOKEN_SIDE * (height // TOKEN_SIDE * TOKEN_SIDE)


def scaled_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Return width and height of a reference after scaling it down to at most `max_pixels`."""
    if width * height <= max_pixels:
        return width, height
    scale = math.sqrt(max_pixels / (width * height))
    return int(width * scale), int(height * scale)


_FLUX1_VAE = VaeWork(4_132_096, 9_462_784, 0.5)


def flux1(
    token_flops: int, fixed_flops: int, num_other_weights: int, *, text_length: int = 512
) -> Workload:
    """Return the work of a FLUX.1, whose variants differ in what they read and write.

    Its modulations are 3.2 billion weights that are neither quantized nor split. T5 is the text
    encoder, and CLIP the second one, with its 77 tokens.
    """
    return Workload(
        TransformerWork(3072, 19, 38, 8_606_711_808, num_other_weights, fixed_flops, token_flops),
        TextEncoderWork(
            width=4096,
            num_layers=24,
            num_heads=64,
            num_block_weights=4_630_511_616,
            attention_flops=24 * 4 * 4096 * text_length**2,
            whole_flops=13_298_503_680,
            num_whole_weights=123_060_480,
            num_whole_layers=12,
        ),
        _FLUX1_VAE,
    )


_FLUX1_DEV = flux1(12_910_854_144, 19_039_518_720, 3_294_696_512)
_FLUX1_SCHNELL = flux1(12_910_854_144, 12_777_947_136, 3_284_466_752, text_length=256)
_FLUX1_FILL = flux1(12_912_820_224, 18_032_885_760, 3_295_679_552)
_FLUX1_CONTROL = flux1(12_911_247_360, 18_838_192_128, 3_294_893_120)
_FLUX2_VAE = VaeWork(4_136_832, 9_465_120, 0.5)
_TINY = Workload(
    TransformerWork(128, 2, 6, 2_129_920, 336_512, 2_179_072, 3_424_256, head_size=32),
    TextEncoderWork(64, 27, 2, 995_328, 15_925_248),
    VaeWork(23_112, 55_026, 0.0625),
)
_TINY_FLUX1 = Workload(
    TransformerWork(128, 2, 4, 1_572_864, 801_600, 1_507_328, 2_392_064, head_size=32),
    TextEncoderWork(
        width=128,
        num_layers=4,
        num_heads=4,
        num_block_weights=655_360,
        attention_flops=4_718_592,
        whole_flops=69_662_208,
        num_whole_weights=505_856,
        num_whole_layers=3,
    ),
    VaeWork(23_392, 55_168, 0.0625),
)
_KLEIN_4B = Workload(
    TransformerWork(3072, 5, 20, 3_680_501_760, 195_042_816, 23_695_196_160, 6_135_742_464),
    TextEncoderWork(2560, 27, 8, 2_724_986_880, 115_964_116_992),
    _FLUX2_VAE,
)
_KLEIN_9B = Workload(
    TransformerWork(4096, 8, 24, 8_724_152_320, 354_428_928, 51_071_942_656, 13_960_740_864),
    TextEncoderWork(4096, 27, 8, 5_209_325_568, 115_964_116_992),
    _FLUX2_VAE,
)
_DEV = Workload(
    TransformerWork(6144, 8, 48, 31_406_948_352, 816_332_800, 96_466_894_848, 54_965_305_344),
    TextEncoderWork(5120, 30, 8, 16_672_358_400, 128_849_018_880),
    _FLUX2_VAE,
)
# Of its blocks, 5 are for each kind of token by itself: text and image are as a double block here.
_FLUX3_ENCODER = TextEncoderWork(2560, 32, 8, 3_229_614_080, 6_794_772_480_000)
_FLUX3_KLEIN = Workload(
    TransformerWork(3072, 5, 28, 5_275_385_856, 273_296_128, 311_488_413_696, 8_249_671_680),
    _FLUX3_ENCODER,
    _FLUX2_VAE,
)
# It has no embedding for the timestep that a step jumps to.
_FLUX3_BASE = Workload(
    TransformerWork(3072, 5, 28, 5_275_385_856, 263_072_512, 311_467_966_464, 8_249_671_680),
    _FLUX3_ENCODER,
    _FLUX2_VAE,
)
# The weights of pro and max are not public: they are priced as dev, whose size they have.
WORKLOADS = {
    "tiny": _TINY,
    "tiny-tp2": _TINY,
    "tiny-flux1": _TINY_FLUX1,
    "flux-1-dev": _FLUX1_DEV,
    "flux-1-krea-dev": _FLUX1_DEV,
    "flux-1-pro": _FLUX1_DEV,
    "flux-1-kontext-dev": _FLUX1_DEV,
    "flux-1-schnell": _FLUX1_SCHNELL,
    "flux-1-fill-dev": _FLUX1_FILL,
    "flux-1-depth-dev": _FLUX1_CONTROL,
    "flux-1-canny-dev": _FLUX1_CONTROL,
    "flux-2-klein-4b": _KLEIN_4B,
    "flux-2-klein-4b-base": _KLEIN_4B,
    "flux-2-klein-9b": _KLEIN_9B,
    "flux-2-klein-9b-base": _KLEIN_9B,
    "flux-2-klein-9b-kv": replace(_KLEIN_9B, keeps_references=True),
    "flux-2-dev": _DEV,
    "flux-2-pro": _DEV,
    "flux-2-max": _DEV,
    "flux-3-klein": _FLUX3_KLEIN,
    "flux-3-klein-base": _FLUX3_BASE,
}
