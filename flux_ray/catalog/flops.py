"""The work of a request's stages: FLOPs and numbers of weights, one row for each tier.

Prices and `flux-ray plan` are computed from it. The numbers are counted from the real
configurations on the meta device, by torch's FlopCounterMode; the tests count them again. A
multiplication and an addition are two FLOPs.
"""

import math
from dataclasses import dataclass

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

    def attention_flops(self, num_tokens: int) -> int:
        """Return the FLOPs of attention: two products of tokens x tokens x width in each block."""
        return 4 * self.width * self.num_blocks * num_tokens**2


@dataclass(frozen=True)
class TextEncoderWork:
    """The work for one padded prompt, in the layers that are used; heads are key-value heads."""

    width: int
    num_layers: int
    num_heads: int
    num_block_weights: int
    attention_flops: int

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
    """The work of a tier's three models."""

    transformer: TransformerWork
    text_encoder: TextEncoderWork
    vae: VaeWork


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


_FLUX2_VAE = VaeWork(4_136_832, 9_465_120, 0.5)
_TINY = Workload(
    TransformerWork(128, 2, 6, 2_129_920, 336_512, 2_179_072, 3_424_256, head_size=32),
    TextEncoderWork(64, 27, 2, 995_328, 15_925_248),
    VaeWork(23_112, 55_026, 0.0625),
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
# The weights of pro and max are not public: they are priced as dev, whose size they have.
WORKLOADS = {
    "tiny": _TINY,
    "tiny-tp2": _TINY,
    "flux-2-klein-4b": _KLEIN_4B,
    "flux-2-klein-9b": _KLEIN_9B,
    "flux-2-dev": _DEV,
    "flux-2-pro": _DEV,
    "flux-2-max": _DEV,
}
