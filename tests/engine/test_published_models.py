"""Every published model as data: its parts have the published numbers of parameters."""

import pytest

from flux_ray.catalog.tiers import tier_for
from flux_ray.engine.registry import empty_model

HUB = "owner/name@revision"
FLUX_1, FLUX_2 = 83_819_683, 84_046_115
T5, QWEN3_4B, QWEN3_8B, MISTRAL = 4_762_310_656, 3_114_088_192, 5_831_883_520, 17_343_754_240
CLIP = 123_060_480
# The first 32 layers of Qwen3-VL-4B, without its eyes.
QWEN3_VL = 3_618_742_272


def num_parameters(module) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "transformer", "text_encoder", "whole", "vae"),
    [
        ("flux-1-dev", 11_901_408_320, T5, CLIP, FLUX_1),
        ("flux-1-krea-dev", 11_901_408_320, T5, CLIP, FLUX_1),
        ("flux-1-pro", 11_901_408_320, T5, CLIP, FLUX_1),
        ("flux-1-kontext-dev", 11_901_408_320, T5, CLIP, FLUX_1),
        ("flux-1-schnell", 11_891_178_560, T5, CLIP, FLUX_1),
        ("flux-1-fill-dev", 11_902_391_360, T5, CLIP, FLUX_1),
        ("flux-1-depth-dev", 11_901_604_928, T5, CLIP, FLUX_1),
        ("flux-1-canny-dev", 11_901_604_928, T5, CLIP, FLUX_1),
        ("flux-2-klein-4b", 3_875_544_576, QWEN3_4B, 0, FLUX_2),
        ("flux-2-klein-4b-base", 3_875_544_576, QWEN3_4B, 0, FLUX_2),
        ("flux-2-klein-9b", 9_078_581_248, QWEN3_8B, 0, FLUX_2),
        ("flux-2-klein-9b-base", 9_078_581_248, QWEN3_8B, 0, FLUX_2),
        ("flux-2-klein-9b-kv", 9_078_581_248, QWEN3_8B, 0, FLUX_2),
        ("flux-2-dev", 32_223_281_152, MISTRAL, 0, FLUX_2),
        ("flux-2-pro", 32_223_281_152, MISTRAL, 0, FLUX_2),
        ("flux-2-max", 32_223_281_152, MISTRAL, 0, FLUX_2),
        ("flux-3-klein", 5_548_681_984, QWEN3_VL, 0, FLUX_2),
        ("flux-3-klein-base", 5_538_458_368, QWEN3_VL, 0, FLUX_2),
    ],
)
def test_the_real_models_have_the_published_number_of_parameters(
    name: str, transformer: int, text_encoder: int, whole: int, vae: int
) -> None:
    model = empty_model(tier_for(name), HUB)
    parts = (model.transformer, model.text_encoder, model.whole_text_encoder, model.vae)
    assert tuple(map(num_parameters, parts)) == (transformer, text_encoder, whole, vae)
    assert model.is_published(tier_for(name))
