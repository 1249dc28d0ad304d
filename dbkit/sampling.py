"""Pictures from a model in memory, by diffusers' own pipeline, with noise that depends on nothing but its key."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dbkit.libraries import quiet
from dbkit.models import Models
from dbkit.text import encode_prompts, tokenize

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import StableDiffusionPipeline
    from PIL import Image

SAMPLER = "DPM-Solver++ (2M)"


@dataclass(frozen=True)
class Shot:
    """One picture to make. random draws its first noise."""

    prompt: str
    random: np.random.Generator
    guidance_scale: float
    negative_prompt: str = ""


def sample(
    models: Models, shots: Sequence[Shot], size: tuple[int, int], steps: int, batch_size: int, dtype: torch.dtype
) -> Iterator[Image.Image]:
    """Yield one picture of size (width, height) for each shot, in order, on the device that the models are on.

    The sampler is DPM-Solver++ (arXiv:2211.01095), deterministic once the first noise is given, so a picture depends
    on its shot and not on the batch it was made in. The global random state is not touched.
    """
    import torch

    made = pipeline(models)
    width, height = size
    shape = (models.vae.config.latent_channels, height // models.vae_scale_factor, width // models.vae_scale_factor)
    for guidance_scale, group in itertools.groupby(shots, key=lambda shot: shot.guidance_scale):
        for batch in _batches(list(group), batch_size):
            noise = [torch.from_numpy(shot.random.standard_normal(shape)) for shot in batch]
            with torch.no_grad(), autocast(models.unet.device, dtype), quiet():
                pictures = made(
                    prompt_embeds=_states(models, [shot.prompt for shot in batch]),
                    negative_prompt_embeds=_states(models, [shot.negative_prompt for shot in batch]),
                    latents=torch.stack(noise).to(models.unet.device, models.unet.dtype),
                    guidance_scale=guidance_scale,
                    num_inference_steps=steps,
                    height=height,
                    width=width,
                    **(_all_hidden(models, len(batch), size) if models.inpaints else {}),
                ).images
            # Outside the block: a caller may stop here for good, and must not inherit no_grad and autocast.
            yield from pictures


def _states(models: Models, prompts: list[str]) -> torch.Tensor:
    """Text states as training gives them; the pipeline's own way with clip_skip fails with transformers 5."""
    return encode_prompts(models.text_encoder, tokenize(models.tokenizer, prompts).to(models.text_encoder.device))


def _all_hidden(models: Models, count: int, size: tuple[int, int]) -> dict[str, Any]:
    """What makes an inpainting model draw a whole picture: a mask that hides everything, and nothing left to see."""
    import torch

    grey = torch.zeros(count, 3, size[1], size[0], device=models.vae.device, dtype=models.vae.dtype)
    left = models.vae.encode(grey).latent_dist.mode() * models.vae.config.scaling_factor
    return {"image": grey, "mask_image": torch.ones_like(grey[:, :1]), "masked_image_latents": left, "strength": 1.0}


def _batches(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Run matrix products in dtype; no change at all for fp32."""
    import torch

    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def pipeline(models: Models) -> StableDiffusionPipeline:
    """diffusers' own pipeline over the live modules: nothing is copied, so a preview costs no second model."""
    with quiet():
        from diffusers import DPMSolverMultistepScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline

        made = (StableDiffusionInpaintPipeline if models.inpaints else StableDiffusionPipeline)(
            vae=models.vae,
            text_encoder=models.text_encoder,
            tokenizer=models.tokenizer,
            unet=models.unet,
            scheduler=DPMSolverMultistepScheduler.from_config(models.noise_scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    made.set_progress_bar_config(disable=True)
    return made


def place(models: Models, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model that is only sampled to the device, its weights stored in dtype."""
    with quiet():
        for module in (models.text_encoder, models.vae, models.unet):
            module.to(device, dtype)


@contextlib.contextmanager
def borrowed(models: Models, device: torch.device) -> Iterator[None]:
    """Bring the parts to the device in evaluation mode for the time of the block, then put them back as they were."""
    modules = (models.text_encoder, models.vae, models.unet)
    before = [(module, module.device, module.training) for module in modules]
    try:
        for module in modules:
            module.to(device).eval()
        yield
    finally:
        for module, home, training in before:
            module.to(home).train(training)
