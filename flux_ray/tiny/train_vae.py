"""Train the tiny VAE: reconstruction first, then the decoder alone on noisy latents."""

import random

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline

from flux_ray.tiny import models, world
from flux_ray.tiny.state import Run

POOL_SIZE = 2000


def train(run: Run, *, steps: int, pool_size: int = POOL_SIZE) -> None:
    """Encoder and decoder: L1 + MSE + 1e-3 KL, crops of 64 pixels for the first 60 %."""
    # channels_last: 1.3 times as fast as the default layout on a CPU.
    vae = models.build_vae().to(memory_format=torch.channels_last)
    pool = draw_pool(seed=5, size=pool_size)
    with torch.no_grad():
        # A narrow posterior from the start: at logvar 0 the latents drown in noise for long.
        vae.quant_conv.bias[8:] = -5.0
        vae.quant_conv.weight[8:] *= 0.1
        vae.quant_conv.weight[:8] *= 3
    optimizer = torch.optim.AdamW(vae.parameters(), lr=8e-4, betas=(0.9, 0.99), weight_decay=0.0)
    start = run.resume("vae", vae, [optimizer])
    rng = random.Random(start)
    for step in range(start, steps):
        run.set_rate([optimizer], 8e-4, step, steps, warm_up=30, decay=0.6)
        images = draw_batch(pool, rng, crops=step < 0.6 * steps)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(decoded.float(), images) + 1e-3 * kl
        run.descend(loss, [optimizer], vae.parameters())
        run.report("vae", step, steps, loss.item(), vae, [optimizer])
    set_batch_norm(vae, pool[:384])
    run.finish("vae", vae)
    # Their latents are those of an earlier encoder.
    for path in run.folder.glob("pool-*.pt"):
        path.unlink()


def reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """L1 + MSE of [n, 3, h, w]."""
    difference = decoded - images
    return difference.abs().mean() + (difference**2).mean()


def draw_pool(*, seed: int, size: int) -> torch.Tensor:
    """Pictures of the world, every pair allowed, uint8 [size, 3, 128, 128]."""
    rng = random.Random(seed)
    draw = (world.draw_single, world.draw_double)
    images = [world.render(draw[i % 2](rng, held_out=None)) for i in range(size)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def draw_batch(pool: torch.Tensor, rng: random.Random, *, crops: bool) -> torch.Tensor:
    """16 crops of 64 pixels on the grid of 8, or 8 whole pictures; floats in [-1, 1]."""
    index = torch.tensor(rng.choices(range(len(pool)), k=16 if crops else 8))
    images = pool[index].float() / 127.5 - 1
    if rng.random() < 0.5:
        images = images.flip(-1)
    if rng.random() < 0.3:
        images = images.transpose(-1, -2).contiguous()
    if crops:
        top, left = rng.randrange(9) * 8, rng.randrange(9) * 8
        images = images[:, :, top : top + 64, left : left + 64]
    return images


@torch.no_grad()
def set_batch_norm(vae: AutoencoderKLFlux2, pool: torch.Tensor) -> None:
    """Set the statistics that normalise FLUX.2 latents: its VAE keeps them in a BatchNorm."""
    vae.eval()
    latents = torch.cat([encode(vae, images) for images in torch.split(pool, 32)])
    vae.bn.running_mean.copy_(latents.mean((0, 2, 3)))
    vae.bn.running_var.copy_(latents.var((0, 2, 3)))


@torch.no_grad()
def encode(vae: AutoencoderKLFlux2, images: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 3, h, w] to unnormalised patches [n, 32, h / 16, w / 16]."""
    mode = vae.encode(images.float() / 127.5 - 1).latent_dist.mode()
    patches: torch.Tensor = Flux2KleinPipeline._patchify_latents(mode)
    return patches


def train_decoder(run: Run, *, steps: int, pool_size: int = POOL_SIZE) -> None:
    """The decoder alone, encoder and statistics frozen, on latents with up to 0.25 sigma of noise.

    The transformer's latents are never exact; without this stage its small errors show as blots.
    """
    vae = models.build_vae().to(memory_format=torch.channels_last)
    pool = draw_pool(seed=6, size=pool_size)
    vae.load_state_dict(torch.load(run.folder / "vae.pt", weights_only=True))
    vae.eval().requires_grad_(False)
    decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in decoder:
        parameter.requires_grad_(True)
    sigma = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).view(1, -1, 1, 1)
    latents = torch.cat([encode(vae, images) for images in torch.split(pool, 32)])
    optimizer = torch.optim.AdamW(decoder, lr=6e-4, betas=(0.9, 0.99), weight_decay=0.0)
    start = run.resume("decoder", vae, [optimizer])
    for step in range(start, steps):
        run.set_rate([optimizer], 6e-4, step, steps, warm_up=20, decay=0.6)
        index = torch.randint(0, len(pool), (8,))
        images, z = pool[index].float() / 127.5 - 1, latents[index]
        z = z + sigma * torch.randn_like(z) * torch.rand(8, 1, 1, 1) * 0.25
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(Flux2KleinPipeline._unpatchify_latents(z)).sample
        difference = decoded.float() - images
        loss = difference.abs().mean() + 2 * (difference**2).mean()
        run.descend(loss, [optimizer], decoder)
        run.report("decoder", step, steps, loss.item(), vae, [optimizer])
    run.finish("decoder", vae)
