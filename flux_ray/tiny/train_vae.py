"""Train the tiny VAE: first all of it to reconstruct images, later its decoder on noisy latents."""

import random

import numpy as np
import torch
from diffusers import AutoencoderKL

from flux_ray.tiny import world
from flux_ray.tiny.layout import Layout
from flux_ray.tiny.state import Run

POOL_SIZE = 2000


def train(run: Run, layout: Layout, *, steps: int, pool_size: int = POOL_SIZE) -> None:
    """Train encoder and decoder with L1 + MSE + 1e-3 KL, on crops of 64 pixels for the first 60 %.

    The statistics that normalise the latents are set at the end, from encoded images.
    """
    # channels_last: 1.3 times as fast as the default layout on a CPU.
    vae = layout.build_vae().to(memory_format=torch.channels_last)
    pool = draw_pool(seed=5, size=pool_size)
    layout.narrow_posterior(vae)
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
    vae.eval()
    layout.set_statistics(vae, pool[:384])
    run.finish("vae", vae)
    # The pools of the transformer stage have latents of an earlier encoder.
    for path in run.folder.glob("pool-*.pt"):
        path.unlink()


def reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return L1 + MSE, a scalar; both tensors are [n, 3, height, width]."""
    difference = decoded - images
    return difference.abs().mean() + (difference**2).mean()


def draw_pool(*, seed: int, size: int) -> torch.Tensor:
    """Return random images of the world, uint8 [size, 3, 128, 128].

    Held-out pairs are included: the VAE only has to reconstruct what it is given.
    """
    rng = random.Random(seed)
    draw = (world.draw_single, world.draw_double)
    images = [world.render(draw[i % 2](rng, held_out=None)) for i in range(size)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def draw_batch(pool: torch.Tensor, rng: random.Random, *, crops: bool) -> torch.Tensor:
    """Return 16 crops of 64 x 64 pixels, or 8 whole images, fp32 [n, 3, height, width] in [-1, 1].

    Crops begin at multiples of 8 pixels, the grid of the latents. Some batches are mirrored or
    transposed.
    """
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
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encode uint8 [n, 3, h, w] as unnormalised patches, fp32 [n, channels, h / 16, w / 16].

    All pipelines of FLUX make channels of a patch's 2 x 2 latents in this order.
    """
    # A batch at a time: all images at once would be gigabytes in fp32.
    pixels = (batch.float() / 127.5 - 1 for batch in torch.split(images, 32))
    modes = [vae.encode(batch).latent_dist.mode() for batch in pixels]
    return torch.nn.functional.pixel_unshuffle(torch.cat(modes), 2)


def train_decoder(run: Run, layout: Layout, *, steps: int, pool_size: int = POOL_SIZE) -> None:
    """Train only the decoder, on latents with noise of up to 0.25 standard deviations.

    The transformer's latents are never exact; without this stage its small errors show as blots.
    Encoder and statistics stay as they are, because the transformer was trained on their latents.
    """
    vae = layout.build_vae().to(memory_format=torch.channels_last)
    pool = draw_pool(seed=6, size=pool_size)
    vae.load_state_dict(torch.load(run.folder / "vae.pt", weights_only=True))
    vae.eval().requires_grad_(False)
    names = ("decoder.", "post_quant_conv.")
    decoder = [p for name, p in vae.named_parameters() if name.startswith(names)]
    for parameter in decoder:
        parameter.requires_grad_(True)
    _, sigma = layout.statistics(vae)
    latents = encode(vae, pool)
    optimizer = torch.optim.AdamW(decoder, lr=6e-4, betas=(0.9, 0.99), weight_decay=0.0)
    start = run.resume("decoder", vae, [optimizer])
    for step in range(start, steps):
        run.set_rate([optimizer], 6e-4, step, steps, warm_up=20, decay=0.6)
        index = torch.randint(0, len(pool), (8,))
        images, z = pool[index].float() / 127.5 - 1, latents[index]
        z = z + sigma * torch.randn_like(z) * torch.rand(8, 1, 1, 1) * 0.25
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(torch.nn.functional.pixel_shuffle(z, 2)).sample
        difference = decoded.float() - images
        loss = difference.abs().mean() + 2 * (difference**2).mean()
        run.descend(loss, [optimizer], decoder)
        run.report("decoder", step, steps, loss.item(), vae, [optimizer])
    run.finish("decoder", vae)
