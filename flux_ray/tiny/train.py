"""Make the embedded checkpoint from nothing: `python -m flux_ray.tiny.train`.

Stages, each kept in the run's folder and resumed where it was interrupted: tokenizer, text_encoder,
vae, transformer, decoder, assemble. The transformer stage may run under torchrun, one thread each:

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
    """Run one stage, or all that are not finished."""
    args = build_parser().parse_args()
    run = Run(args.folder)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        if not is_finished(run, stage):
            # Each stage has a seed of its own, so that it does not matter which ran before it.
            torch.manual_seed(STAGES.index(stage))
            run_stage(stage, run, args)


def build_parser() -> argparse.ArgumentParser:
    """The command's options; the steps are those of the published checkpoint."""
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
    """Assembling is cheap and always done again."""
    if stage == "tokenizer":
        return (run.folder / "tokenizer").exists()
    return (run.folder / f"{stage}.pt").exists()


def run_stage(stage: str, run: Run, args: argparse.Namespace) -> None:
    """One stage with what earlier stages left in the run's folder."""
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
    """The run's tokenizer."""
    tokenizer: Qwen2Tokenizer = Qwen2Tokenizer.from_pretrained(run.folder / "tokenizer")
    return tokenizer


def load_small_text_encoder(run: Run) -> Qwen3ForCausalLM:
    """The net of nine layers, as trained."""
    small = models.build_text_encoder(train_text_encoder.NUM_TRAINED_LAYERS)
    small.load_state_dict(torch.load(run.folder / "text_encoder.pt", weights_only=True))
    small.eval()  # type: ignore[no-untyped-call]
    return small


def load_vae(run: Run, stage: str) -> AutoencoderKLFlux2:
    """The VAE after the stage `vae` or `decoder`; their encoders are the same."""
    vae = models.build_vae()
    vae.load_state_dict(torch.load(run.folder / f"{stage}.pt", weights_only=True))
    return vae.eval().to(memory_format=torch.channels_last)


def assemble(run: Run, output: Path) -> None:
    """Write the Flux2KleinPipeline directory."""
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
