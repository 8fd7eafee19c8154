"""Every stage of the recipe runs, resumes and ends in a checkpoint that diffusers loads."""

from pathlib import Path

import pytest
import torch

from flux_ray.tiny import evaluate, train, train_transformer, train_vae
from flux_ray.tiny.klein import models, text_encoder
from flux_ray.tiny.klein.layout import Klein
from flux_ray.tiny.kontext.layout import Kontext
from flux_ray.tiny.layout import Layout
from flux_ray.tiny.state import Run

# bf16 autocast has no fused RMSNorm; only the training meets it.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


@pytest.fixture(scope="module", params=train.LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return train.LAYOUTS[request.param]


@pytest.fixture(scope="module")
def run(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All stages with two steps each."""
    run = Run(tmp_path_factory.mktemp(layout.name))
    layout.save_tokenizers(run)
    layout.train_text_encoders(run, steps=2)
    train_vae.train(run, layout, steps=2, pool_size=8)
    vae = train.load_vae(run, layout, "vae")
    train_transformer.train(run, layout, vae, steps=2, pool_scale=0.002)
    train_vae.train_decoder(run, layout, steps=2, pool_size=8)
    return run


@pytest.mark.slow
def test_the_stages_make_a_pipeline_directory(run: Run, layout: Layout) -> None:
    train.assemble(run, layout)
    pipeline = evaluate.load_pipeline(run.folder / "checkpoint")
    for task_set in evaluate.SETS[layout.name]:
        if task_set.name in ("one thing", "recolour", "two references", "another thing in a mask"):
            row = evaluate.measure(pipeline, task_set, 2)
            assert 0 <= row["everything"] <= 1 and row["seconds"] > 0


@pytest.mark.slow
def test_latents_fit_the_statistics(run: Run, layout: Layout) -> None:
    """What the transformer learns from has unit variance: on the images that were measured."""
    pool = train_vae.draw_pool(seed=5, size=8)
    vae = train.load_vae(run, layout, "vae")
    mean, sigma = layout.statistics(vae)
    patches = (train_vae.encode(vae, pool) - mean) / sigma
    assert patches.std((0, 2, 3)) == pytest.approx(torch.ones(patches.shape[1]), abs=0.3)


@pytest.mark.slow
def test_scaling_the_latents_keeps_what_the_vae_decodes(tmp_path: Path) -> None:
    layout = Kontext()
    vae, images = layout.build_vae().eval(), train_vae.draw_pool(seed=5, size=2)
    pixels = images.float() / 127.5 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        layout.set_statistics(vae, images)
        after = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    assert after == pytest.approx(before, abs=1e-4)


def test_spreading_the_text_encoder_keeps_its_bits(tmp_path: Path) -> None:
    run, klein = Run(tmp_path), Klein()
    klein.save_tokenizers(run)
    small = models.build_text_encoder(text_encoder.NUM_TRAINED_LAYERS).eval()
    run.finish("text_encoders", small)
    prompts = ["a red circle on a blue background", "make the circle green"]
    few = klein.load_embedder(run)
    many = text_encoder.SmallTextEncoder(
        text_encoder.spread(few.small), few.tokenizer, models.OUTPUT_LAYERS
    )
    assert torch.equal(few.embed(prompts, 48)["embeds"], many.embed(prompts, 48)["embeds"])


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
        train_vae.train(Impatient(tmp_path), Klein(), steps=3, pool_size=8)
    model = models.build_vae()
    optimizer = torch.optim.AdamW(model.parameters())
    assert Run(tmp_path).resume("vae", model, [optimizer]) == 2
    train_vae.train(Run(tmp_path), Klein(), steps=3, pool_size=8)
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
