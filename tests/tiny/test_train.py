"""Every stage of the recipe runs, resumes and ends in a checkpoint that diffusers loads."""

from pathlib import Path

import pytest
import torch

from flux_ray.tiny import evaluate, models, train, train_text_encoder, train_transformer, train_vae
from flux_ray.tiny.state import Run

# bf16 autocast has no fused RMSNorm; only the training meets it.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All stages with two steps each."""
    run = Run(tmp_path_factory.mktemp("run"))
    models.build_tokenizer().save_pretrained(run.folder / "tokenizer")
    train_text_encoder.train(run, train.load_tokenizer(run), steps=2)
    train_vae.train(run, steps=2, pool_size=8)
    train_transformer.train(
        run,
        vae=train.load_vae(run, "vae"),
        text_encoder=train.load_small_text_encoder(run),
        tokenizer=train.load_tokenizer(run),
        steps=2,
        pool_scale=0.002,
    )
    train_vae.train_decoder(run, steps=2, pool_size=8)
    return run


@pytest.mark.slow
def test_the_stages_make_a_pipeline_directory(run: Run, tmp_path: Path) -> None:
    train.assemble(run, tmp_path / "checkpoint")
    pipeline = evaluate.load_pipeline(tmp_path / "checkpoint")
    row = evaluate.measure(pipeline, evaluate.SETS[0], 2)
    assert 0 <= row["everything"] <= 1 and row["seconds"] > 0


@pytest.mark.slow
def test_spreading_the_text_encoder_keeps_its_bits(run: Run) -> None:
    small, tokenizer = train.load_small_text_encoder(run), train.load_tokenizer(run)
    prompts = ["a red circle on a blue background", "make the circle green"]
    few = train_text_encoder.embed(small, tokenizer, prompts, 48)
    many = train_text_encoder.embed(
        train_text_encoder.spread(small), tokenizer, prompts, 48, models.OUTPUT_LAYERS
    )
    assert torch.equal(few, many)


@pytest.mark.slow
def test_an_interrupted_stage_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    class Impatient(Run):
        def report(self, stage, step, *rest):  # type: ignore[no-untyped-def]
            self.saved_s = float("-inf")
            super().report(stage, step, *rest)
            if step == 1:
                raise Interrupted

    with pytest.raises(Interrupted):
        train_vae.train(Impatient(tmp_path), steps=3, pool_size=8)
    model = models.build_vae()
    optimizer = torch.optim.AdamW(model.parameters())
    assert Run(tmp_path).resume("vae", model, [optimizer]) == 2
    train_vae.train(Run(tmp_path), steps=3, pool_size=8)
    assert (tmp_path / "vae.pt").exists() and not (tmp_path / "vae.resume.pt").exists()


def test_the_rate_warms_up_and_ends_at_zero(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter])
    rates = []
    for step in range(100):
        Run(tmp_path).set_rate([optimizer], 1.0, step, 100, warm_up=10, decay=0.4)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.1) and rates[50] == 1.0
    assert rates[80] == pytest.approx(0.5) and rates[99] == pytest.approx(1 / 40)
