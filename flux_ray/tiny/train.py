"""Train the embedded checkpoint from nothing: `python -m flux_ray.tiny.train`.

The stages are tokenizer, text_encoder, vae, transformer, decoder and assemble. Each is kept in the
run's folder, and resumed if it was interrupted. The transformer stage may run under torchrun, with
one thread for each process:

    torchrun --nproc-per-node 2 -m flux_ray.tiny.train --stage transformer
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from flux_ray.tiny import CHECKPOINT, models, train_text_encoder, train_transformer, train_vae
from flux_ray.tiny.state import Run

STAGES = ("tokenizer", "text_encoder", "vae", "transformer", "decoder", "assemble")


def main() -> None:
    """Run the stage that is asked for, or all of them, without those that are finished."""
    args = build_parser().parse_args()
    run = Run(args.folder)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        if not is_finished(run, stage):
            # Each stage has its own seed: it gives the same weights whichever ran before it.
            torch.manual_seed(STAGES.index(stage))
            run_stage(stage, run, args)


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser; the defaults are the steps of the published checkpoint."""
    parser = argparse.ArgumentParser(description="Train the tiny model.")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/tiny"), help="for unfinished work"
    )
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--text-encoder-steps", type=int, default=1500)
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--transformer-steps", type=int, default=7700)
    parser.add_argument("--decoder-steps", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    return parser


def is_finished(run: Run, stage: str) -> bool:
    """Return whether a stage has left its result; `assemble` never has, as it is cheap."""
    if stage == "tokenizer":
        return (run.folder / "tokenizer").exists()
    return (run.folder / f"{stage}.pt").exists()


def run_stage(stage: str, run: Run, args: argparse.Namespace) -> None:
    """Run one stage with the results of the earlier ones, which are in the run's folder."""
    if stage == "tokenizer":
        models.build_tokenizer().save_pretrained(run.folder / "tokenizer")
    elif stage == "text_encoder":
        train_text_encoder.train(run, load_tokenizer(run), steps=args.text_encoder_steps)
    elif stage == "vae":
        train_vae.train(run, steps=args.vae_steps)
    elif stage == "transformer":
        train_transformer.train(
            run,
            vae=load_vae(run, "vae"),
            text_encoder=load_small_text_encoder(run),
            tokenizer=load_tokenizer(run),
            steps=args.transformer_steps,
        )
    elif stage == "decoder":
        train_vae.train_decoder(run, steps=args.decoder_steps)
    else:
        assemble(run, args.output)


def load_tokenizer(run: Run) -> Qwen2Tokenizer:
    """Load the tokenizer that the first stage has saved."""
    tokenizer: Qwen2Tokenizer = Qwen2Tokenizer.from_pretrained(run.folder / "tokenizer")
    return tokenizer


def load_small_text_encoder(run: Run) -> Qwen3ForCausalLM:
    """Load the trained net of nine layers."""
    small = models.build_text_encoder(train_text_encoder.NUM_TRAINED_LAYERS)
    small.load_state_dict(torch.load(run.folder / "text_encoder.pt", weights_only=True))
    small.eval()  # type: ignore[no-untyped-call]
    return small


def load_vae(run: Run, stage: str) -> AutoencoderKLFlux2:
    """Load the VAE after the stage `vae` or `decoder`; the encoder is the same after both."""
    vae = models.build_vae()
    vae.load_state_dict(torch.load(run.folder / f"{stage}.pt", weights_only=True))
    return vae.eval().to(memory_format=torch.channels_last)


def assemble(run: Run, output: Path) -> None:
    """Put the trained parts together, and write the checkpoint folder to `output`."""
    transformer = models.build_transformer()
    transformer.load_state_dict(torch.load(run.folder / "transformer.pt", weights_only=True))
    models.save_pipeline(
        output,
        vae=load_vae(run, "decoder"),
        text_encoder=train_text_encoder.spread(load_small_text_encoder(run)),
        tokenizer=load_tokenizer(run),
        transformer=transformer,
    )


if __name__ == "__main__":
    main()
