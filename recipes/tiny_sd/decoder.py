"""Stage 6, the decoder again: the encoder and so the latents stay as they are, while the decoder is trained further.

    torchrun --nproc_per_node 2 recipes/tiny_sd/decoder.py --out build/tiny_sd

It may run at any time after the VAE, beside the U-Net too, whose latents do not change.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

from common import Log, arguments, as_tensor, average_gradients, load_images, save_grid, start, steps
from vae import SCALING_FACTOR, draw_pixels, psnr


def main() -> None:
    args = arguments(__doc__, steps=1_500, batch=32, rate=6e-4)
    rank, world, device = start(args.seed)
    vae = AutoencoderKL.from_pretrained(args.out / "vae").to(device).requires_grad_(False)
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    parameters = list(decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    images, things = (load_images(args.out / f"{name}.npz")["images"] for name in ("train", "things"))
    unseen = as_tensor(load_images(args.out / "heldout.npz")["images"]).to(device)
    log = Log("decoder", args, rank)
    for step, generator in steps("decoder", args, rank, {"decoder": decoder}, optimizer):
        pixels = draw_pixels(images, things, args.batch // world, generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.mean
            # A little noise, so that what the U-Net gets slightly wrong still decodes well.
            latents = latents + 0.03 / SCALING_FACTOR * torch.randn(latents.shape, generator=generator).to(device)
            drawn = vae.decode(latents).sample
        error = drawn.float() - pixels
        square = error.square().mean()
        loss = 4 * square + 0.25 * error.abs().mean()
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.add(step, loss=loss, square=square)
        if rank == 0 and (step + 1) % 500 == 0:
            print(f"decoder: {psnr(vae, unseen):.2f} dB on art it has not seen", flush=True)
            shown = unseen[:16]
            drawn = vae.decode(vae.encode(shown).latent_dist.mean).sample
            save_grid(torch.cat([shown, drawn]), 16, args.out / "decoder.png")
            log.draw()
    if rank == 0:
        vae.eval().save_pretrained(args.out / "vae_finished")


if __name__ == "__main__":
    main()
