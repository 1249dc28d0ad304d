"""What training reads instead of images and prompts: latents and text states, computed once, held on the device."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dbkit import draws
from dbkit.examples import Example
from dbkit.images import read_image, square

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class Latents:
    """The VAE's posterior of each image: mean and std of shape (N, C, H, W), fp32, scaled as the U-Net wants them.

    Both are kept, so that every step draws its latents afresh, as if the VAE ran in the loop.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def draw(self, indices: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Latents of shape (B, C, H, W) for indices of shape (B,) and standard normal noise of the result's shape."""
        return self.mean[indices] + self.std[indices] * noise


def encode_images(vae: AutoencoderKL, examples: list[Example], side: int, device: torch.device) -> Latents:
    """The latents of the examples at side × side pixels. The VAE runs in fp32: in fp16 some images overflow."""
    import numpy as np
    import torch
    from tqdm import tqdm

    means, stds = [], []
    with torch.no_grad():
        for example in tqdm(examples, "latents", file=sys.stdout, mininterval=1):
            pixels = np.asarray(square(read_image(example.path), side, example.place), dtype=np.float32) / 127.5 - 1
            posterior = vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device)).latent_dist
            means.append(posterior.mean)
            stds.append(posterior.std)
    factor = vae.config.scaling_factor
    return Latents(torch.cat(means) * factor, torch.cat(stds) * factor)


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Token ids of shape (N, 77), padded and cut as at generation time."""
    length = min(tokenizer.model_max_length, 77)
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def encode_prompts(text_encoder: CLIPTextModel, token_ids: torch.Tensor) -> torch.Tensor:
    """Text states of shape (N, 77, D) for token ids of shape (N, 77)."""
    return text_encoder(token_ids).last_hidden_state


@dataclass(frozen=True)
class Pool:
    """The instance images or the class images, ready for training.

    prompts holds one row for each distinct prompt: text states (P, 77, D), or token ids (P, 77) while the text encoder
    is trained. prompt_of has shape (N,): the row of each image.
    """

    role: Literal["instance", "class"]
    latents: Latents
    prompts: torch.Tensor
    prompt_of: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One forward pass: the first `instances` of its B samples are instance images, the rest class images."""

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    prompts: torch.Tensor
    instances: int


def draw_batch(pools: list[Pool], seed: int, step: int, samples: range, per_step: int, timesteps: int) -> Batch:
    """The batch of the given sample numbers of a step (counted from 1), `per_step` of which make one optimizer step.

    A pure function of its arguments: sample j of step k draws its image, noise, timestep and latents from generators
    keyed by (seed, k, j). Each pool gives one image for each sample number.
    """
    parts = [_draw_part(pool, seed, step, samples, per_step, timesteps) for pool in pools]
    return Batch(*(_concatenate(part) for part in zip(*parts)), instances=len(samples))


def _draw_part(pool: Pool, seed: int, step: int, samples: range, per_step: int, timesteps: int) -> tuple:
    import numpy as np
    import torch

    device, shape = pool.latents.mean.device, pool.latents.mean.shape[1:]
    first = (step - 1) * per_step
    order = f"{pool.role} order"
    chosen = [draws.index(seed, order, len(pool.prompt_of), first + sample) for sample in samples]
    randoms = [draws.generator(seed, pool.role, step, sample) for sample in samples]
    steps = torch.tensor([int(random.integers(timesteps)) for random in randoms])
    # One copy for both: the noise that is added, and the noise that draws the latents from their posterior.
    normal = np.stack([random.standard_normal((2, *shape), dtype=np.float32) for random in randoms], axis=1)
    normal = torch.from_numpy(normal)
    if device.type == "cuda":
        normal = normal.pin_memory()  # only then is the copy not waited for
    noise, latent_noise = normal.to(device, non_blocking=True)
    indices = torch.tensor(chosen).to(device, non_blocking=True)
    latents = pool.latents.draw(indices, latent_noise)
    return latents, noise, steps.to(device, non_blocking=True), pool.prompts[pool.prompt_of[indices]]


def _concatenate(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    import torch

    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
