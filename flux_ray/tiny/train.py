"""Train the embedded checkpoint from nothing: `python -m flux_ray.tiny.train`.

The stages are tokenizer, text_encoders, vae, transformer, decoder and assemble. Each is kept in the
run's folder, and resumed if it was interrupted. The transformer stage may run under torchrun, with
one thread for each process:

    torchrun --nproc-per-node 2 -m flux_ray.tiny.train --stage transformer
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from flux_ray.tiny import train_transformer, train_vae
from flux_ray.tiny.klein.layout import Klein
from flux_ray.tiny.kontext.layout import Kontext
from flux_ray.tiny.layout import Layout
from flux_ray.tiny.state import Run

LAYOUTS: dict[str, Layout] = {"klein": Klein(), "kontext": Kontext()}
STAGES = ("tokenizer", "text_encoders", "vae", "transformer", "decoder", "assemble")


def main() -> None:
    """Run the stage that is asked for, or all of them, without those that are finished."""
    args = build_parser().parse_args()
    run, layout = Run(args.folder or Path("runs") / args.layout), LAYOUTS[args.layout]
    for stage in STAGES if args.stage == "all" else (args.stage,):
        if not is_finished(run, stage):
            # Each stage has its own seed: it gives the same weights whichever ran before it.
            torch.manual_seed(STAGES.index(stage))
            run_stage(stage, run, layout, args.steps)


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(description="Train the tiny model.")
    parser.add_argument("--layout", choices=LAYOUTS, default="klein")
    parser.add_argument("--folder", type=Path, help="for all results; runs/LAYOUT if not said")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--steps", type=int, help="of a training stage; the layout's if not said")
    return parser


def is_finished(run: Run, stage: str) -> bool:
    """Return whether a stage has left its result; `assemble` never has, as it is cheap."""
    if stage == "tokenizer":
        return (run.folder / "tokenizer").exists()
    return (run.folder / f"{stage}.pt").exists()


def run_stage(stage: str, run: Run, layout: Layout, steps: int | None) -> None:
    """Run one stage with the results of the earlier ones, which are in the run's folder."""
    num_steps = steps or layout.steps.get(stage, 0)
    if stage == "tokenizer":
        layout.save_tokenizers(run)
    elif stage == "text_encoders":
        layout.train_text_encoders(run, num_steps)
    elif stage == "vae":
        train_vae.train(run, layout, steps=num_steps)
    elif stage == "transformer":
        train_transformer.train(run, layout, load_vae(run, layout, "vae"), steps=num_steps)
    elif stage == "decoder":
        train_vae.train_decoder(run, layout, steps=num_steps)
    else:
        assemble(run, layout)


def load_vae(run: Run, layout: Layout, stage: str) -> AutoencoderKL:
    """Load the VAE after the stage `vae` or `decoder`; the encoder is the same after both."""
    vae = layout.build_vae()
    vae.load_state_dict(torch.load(run.folder / f"{stage}.pt", weights_only=True))
    return vae.eval().to(memory_format=torch.channels_last)


def assemble(run: Run, layout: Layout) -> None:
    """Put the trained parts together, and write the folder `checkpoint` of the run."""
    transformer = layout.build_transformer()
    transformer.load_state_dict(torch.load(run.folder / "transformer.pt", weights_only=True))
    layout.assemble(run, load_vae(run, layout, "decoder"), transformer)


if __name__ == "__main__":
    main()
