"""Stage 2, the autoencoder: 32 x 32 pixels to 8 x 8 x 4 latents and back, AutoencoderKL with three levels.

torchrun --nproc_per_node 2 recipes/tiny_sd/vae.py --out build/tiny_sd
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from common import Log, arguments, as_tensor, average_gradients, load_images, save_grid, start, steps

SCALING_FACTOR = 0.18215


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=32,
        scaling_factor=SCALING_FACTOR,
    )


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirrored, shifted by up to two pixels, and some with colours exchanged: a VAE should not know the world."""
    if torch.rand((), generator=generator) < 0.5:
        pixels = pixels.flip(-1)
    x, y = torch.randint(-2, 3, (2,), generator=generator).tolist()
    pixels = F.pad(pixels, (2, 2, 2, 2), mode="reflect")[..., 2 + y : 34 + y, 2 + x : 34 + x]
    few = max(1, len(pixels) // 6)
    mixed = pixels[:few, torch.randperm(3, generator=generator)]
    return torch.cat([-mixed if torch.rand((), generator=generator) < 0.5 else mixed, pixels[few:]])


def draw_pixels(images: np.ndarray, things: np.ndarray, count: int, generator: torch.Generator) -> torch.Tensor:
    """A batch (count, 3, 32, 32) that is half of the world's pictures and half of other icons, augmented."""
    chosen = [some[torch.randint(len(some), (count // 2,), generator=generator)] for some in (images, things)]
    pixels = torch.cat([as_tensor(some) for some in chosen])
    return augment(pixels[torch.randperm(len(pixels), generator=generator)], generator)


def losses(vae: AutoencoderKL, pixels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Colour, edges (the gradient of the picture) and a light pull of the latents to a normal distribution."""
    with torch.autocast(pixels.device.type, torch.bfloat16):
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
        drawn = vae.decode(posterior.mean + posterior.std * noise).sample
    error = drawn.float() - pixels
    across, down = error.diff(dim=-1), error.diff(dim=-2)
    edges = across.abs().mean() + down.abs().mean()
    square = error.square().mean()
    return error.abs().mean() + 0.5 * edges + 2 * square + 3e-4 * posterior.kl().float().mean() / 256, square


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over the images."""
    drawn = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    error = (drawn - pixels).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / error)).mean())


@torch.no_grad()
def whiten(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Fold a shift and a scale into the layers around the latents, so that each channel of latents * SCALING_FACTOR has
    mean 0 and standard deviation 1: otherwise the starting noise decides a picture's colour."""
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(256)])
    shift, scale = means.mean((0, 2, 3)), SCALING_FACTOR * means.std((0, 2, 3))
    weight, bias, after = vae.quant_conv.weight, vae.quant_conv.bias, vae.post_quant_conv
    after.bias += (after.weight[:, :, 0, 0] * shift).sum(1)
    after.weight *= scale[None, :, None, None]
    weight[:4] /= scale[:, None, None, None]
    bias[:4] = (bias[:4] - shift) / scale
    bias[4:] -= 2 * scale.log()


def main() -> None:
    args = arguments(__doc__, steps=9_000, batch=32, rate=2e-3)
    rank, world, device = start(args.seed)
    vae = make_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    images = load_images(args.out / "train.npz")["images"]
    things = load_images(args.out / "things.npz")["images"]
    unseen = as_tensor(load_images(args.out / "heldout.npz")["images"]).to(device)
    log = Log("vae", args, rank)
    if rank == 0:
        print(
            f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters on {world} x {device}", flush=True
        )
    parameters = list(vae.parameters())
    for step, generator in steps("vae", args, rank, {"vae": vae}, optimizer):
        pixels = draw_pixels(images, things, args.batch // world, generator).to(device)
        loss, square = losses(vae, pixels, generator)
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.add(step, loss=loss, square=square)
        if rank == 0 and (step + 1) % 1000 == 0:
            print(f"vae: {psnr(vae, unseen):.2f} dB on art it has not seen", flush=True)
            shown = unseen[:16]
            save_grid(
                torch.cat([shown, vae.decode(vae.encode(shown).latent_dist.mean).sample]), 16, args.out / "vae.png"
            )
            log.draw()
    if rank == 0:
        finished = copy.deepcopy(vae).eval()
        whiten(finished, as_tensor(images[:4096]).to(device))
        before, after = psnr(vae, unseen), psnr(finished, unseen)
        assert abs(before - after) < 0.05, (before, after)
        finished.save_pretrained(args.out / "vae")
        print(f"vae: {after:.2f} dB on art it has not seen; written to {args.out / 'vae'}", flush=True)


if __name__ == "__main__":
    main()
