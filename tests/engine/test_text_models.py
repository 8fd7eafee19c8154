"""The part of a text model that is loaded says what the whole says, to the bit, or split."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from flux_ray.config.tier import Parallel
from flux_ray.engine.api import Placement, TextModel
from flux_ray.engine.flux2.dev import mistral3
from flux_ray.engine.flux2.empty_model import mistral, qwen3_4b
from flux_ray.engine.flux2.klein import qwen3
from flux_ray.engine.loading import encoder_axis, load_text_model, prefix_in, t5
from flux_ray.parallel.checkpoint import Checkpoint
from flux_ray.parallel.load import build_empty
from flux_ray.parallel.mesh import Axis, Mesh
from flux_ray.tiny import KLEIN_CHECKPOINT
from tests.ranks import Ranks

NUM_LAYERS = {"qwen3": 27, "mistral3": 30}
WHOLE: dict[str, type[PreTrainedModel]] = {
    "qwen3": Qwen3ForCausalLM,
    "mistral3": Mistral3ForConditionalGeneration,
    "t5": T5EncoderModel,
}


def text_model(kind: str, folder: Path) -> TextModel:
    if kind == "t5":
        return t5(folder)
    return {"qwen3": qwen3, "mistral3": mistral3}[kind](folder, NUM_LAYERS[kind])


@pytest.fixture(scope="module")
def folders(small_dev: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each; that of T5 is of FLUX.1's layout, with a position bias to see."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    model = T5EncoderModel(
        T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=12,
            d_ff=48,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return {
        "qwen3": KLEIN_CHECKPOINT / "text_encoder",
        "mistral3": small_dev / "text_encoder",
        "t5": folder,
    }


def inputs_for(kind: str) -> dict[str, Any]:
    """Two prompts, the shorter one padded on the left, in the pipelines' words.

    FluxPipeline gives T5 no mask.
    """
    ids = torch.randint(11, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    if kind == "t5":
        return {"input_ids": ids, "output_hidden_states": True}
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "output_hidden_states": True,
        "use_cache": False,
    }


def states_of(model: torch.nn.Module, kind: str) -> list[Tensor]:
    """The hidden states that are used; of T5 the last, after its norm."""
    with torch.no_grad():
        states = model(**inputs_for(kind)).hidden_states
    return list(states[-1:] if kind == "t5" else states[: NUM_LAYERS[kind] + 1])


KINDS = pytest.mark.parametrize("kind", WHOLE)


@KINDS
def test_on_one_rank_every_bit_is_the_whole_models(kind: str, folders: dict[str, Path]) -> None:
    whole = WHOLE[kind].from_pretrained(folders[kind], dtype=torch.float32).eval()
    part = load_text_model(
        text_model(kind, folders[kind]), folders[kind], Placement("float32", "cpu")
    )
    expected, states = states_of(whole, kind), states_of(part, kind)
    assert len(states) == (1 if kind == "t5" else NUM_LAYERS[kind] + 1)
    assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))


@KINDS
def test_what_is_not_used_is_not_read(
    kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    read: Callable[..., Tensor] = Checkpoint.read

    def remember(checkpoint: Checkpoint, name: str, *rest: Any) -> Tensor:
        names.append(name)
        return read(checkpoint, name, *rest)

    monkeypatch.setattr(Checkpoint, "read", remember)
    model = text_model(kind, folders[kind])
    part = load_text_model(model, folders[kind], Placement("bfloat16", "cpu"))
    assert len(names) == len(list(part.parameters())) == len(set(names))
    unused = (f"layers.{NUM_LAYERS.get(kind)}.", "vision", "lm_head", "projector", ".norm.")
    assert not [name for name in names if any(word in name for word in unused)]
    assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("kind", "config", "num_parameters"),
    [
        (
            "qwen3",
            Qwen3Config(
                vocab_size=151936,
                hidden_size=2560,
                intermediate_size=9728,
                num_hidden_layers=36,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
            ),
            3_114_088_192,
        ),
        # Mistral-Small-3.2-24B is transformers' default.
        ("mistral3", Mistral3Config(), 17_343_754_240),
        (
            "t5",
            T5Config(
                vocab_size=32128,
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=24,
                num_heads=64,
                feed_forward_proj="gated-gelu",
            ),
            4_762_310_656,
        ),
    ],
    ids=list(WHOLE),
)
def test_the_real_encoders_hold_as_much_as_was_measured(
    tmp_path: Path, kind: str, config: PreTrainedConfig, num_parameters: int
) -> None:
    config.save_pretrained(tmp_path)
    model = build_empty(text_model(kind, tmp_path).build)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def states_of_rank(mesh: Mesh, kind: str, folder: Path) -> tuple[list[Any], int]:
    part = load_text_model(text_model(kind, folder), folder, Placement("float32", "cpu", mesh))
    num_bytes = sum(parameter.nbytes for parameter in part.parameters())
    return [state.numpy() for state in states_of(part, kind)], num_bytes


@pytest.mark.parametrize("parallel", [Parallel(tensor=2), Parallel(sequence=2)], ids=["TP2", "SP2"])
@KINDS
def test_two_ranks_say_what_one_says_from_about_half_of_the_weights(
    run_ranks: Ranks, kind: str, folders: dict[str, Path], parallel: Parallel
) -> None:
    expected, num_bytes = states_of_rank(Mesh(), kind, folders[kind])
    for states, part_bytes in run_ranks(parallel, states_of_rank, kind, folders[kind]):
        assert part_bytes < 0.6 * num_bytes
        for state, whole in zip(states, expected, strict=True):
            assert abs(state - whole).max() <= 1e-5 * abs(whole).max()


def mesh_of(tensor: int, sequence: int) -> Mesh:
    """The place of a rank whose others do not exist."""
    return Mesh(Axis(0, tensor * sequence), Axis(0, tensor), Axis(0, sequence))


@pytest.mark.parametrize(
    ("num_heads", "tensor", "sequence", "num_ranks"),
    [(8, 1, 1, 1), (8, 2, 4, 8), (8, 1, 8, 8), (8, 4, 4, 4), (8, 2, 3, 2), (64, 4, 4, 16)],
)
def test_an_encoder_is_split_over_all_ranks_where_its_heads_allow_it(
    num_heads: int, tensor: int, sequence: int, num_ranks: int
) -> None:
    assert encoder_axis(num_heads, mesh_of(tensor, sequence)).size == num_ranks


def test_four_bit_weights_are_not_cut_where_only_tokens_are_shared() -> None:
    assert encoder_axis(8, mesh_of(1, 2), "nf4").size == 1


def test_else_over_the_tensor_axis_and_else_the_setting_is_named() -> None:
    with pytest.raises(ValueError, match=r"parallel\.tensor 16 does not divide .* 8 heads"):
        encoder_axis(8, mesh_of(16, 1))


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "model.language_model."])
def test_the_prefix_is_found(prefix: str) -> None:
    checkpoint = Checkpoint(Path())
    files = [f"{prefix}embed_tokens.weight", "vision_tower.patch_embed.weight"]
    checkpoint.__dict__["files"] = dict.fromkeys(files, Path())
    assert prefix_in(checkpoint, "embed_tokens.weight") == prefix


@pytest.mark.parametrize("names", [[], ["a.embed_tokens.weight", "b.embed_tokens.weight"]])
def test_a_prefix_that_is_not_clear_is_refused(names: list[str]) -> None:
    checkpoint = Checkpoint(Path())
    checkpoint.__dict__["files"] = dict.fromkeys(names, Path())
    with pytest.raises(ValueError, match=f"{len(names)} tensors named embed_tokens.weight"):
        prefix_in(checkpoint, "embed_tokens.weight")


def test_an_encoder_with_too_few_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="of 28 layers has no hidden state 30"):
        qwen3(KLEIN_CHECKPOINT / "text_encoder", 30)


@pytest.mark.parametrize(("text_model", "num_layers"), [(mistral, 30), (qwen3_4b, 27)])
def test_the_part_that_is_built_can_be_written(
    tmp_path: Path, text_model: Callable[[int], TextModel], num_layers: int
) -> None:
    """transformers refuses to where not each of its layers has a type, and nothing else has."""
    config = build_empty(text_model(num_layers).build).config
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).num_hidden_layers == num_layers
