"""Stage 3, latents: what the VAE makes of the training pictures, once, and what it gives back.

python recipes/tiny_sd/latents.py --out build/tiny_sd
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from common import as_tensor, load_images


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/tiny_sd"), help="where all stages work")
    parser.add_argument("--decoded", type=int, default=20_000, help="pictures to decode again, for the judges")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderKL.from_pretrained(args.out / "vae").to(device)
    images = load_images(args.out / "train.npz")["images"]
    means, deviations, decoded = [], [], []
    for start in tqdm(range(0, len(images), 250), "latents"):
        posterior = vae.encode(as_tensor(images[start : start + 250]).to(device)).latent_dist
        means.append(posterior.mean.cpu())
        deviations.append(posterior.std.cpu())
        if start < args.decoded:
            pixels = vae.decode(posterior.mean).sample.clamp(-1, 1).add(1).mul(127.5).round().byte()
            decoded.append(pixels.permute(0, 2, 3, 1).cpu().numpy())
    latents = torch.cat(means)
    np.savez(args.out / "latents.npz", means=latents.numpy(), deviations=torch.cat(deviations).numpy())
    np.savez(args.out / "decoded.npz", images=np.concatenate(decoded))
    scaled = latents * vae.config.scaling_factor
    print(f"latents: mean {scaled.mean((0, 2, 3)).tolist()}, standard deviation {scaled.std((0, 2, 3)).tolist()}")


if __name__ == "__main__":
    main()
