"""Stage 5, the U-Net: text to latents, with the text encoder of stage 4 frozen, as in Stable Diffusion 1.

torchrun --nproc_per_node 2 recipes/tiny_sd/unet.py --out build/tiny_sd
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tqdm import tqdm
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from dbkit.embedded import GUIDANCE_SCALE
from dbkit.models import Models
from dbkit.sampling import pipeline as sampler

from common import Log, arguments, average_gradients, load_images, save_grid, start, steps
from judges import name_contents, text_encoder_of
from vae import SCALING_FACTOR
from world import NOUNS, SETTINGS, article, phrase

# What the grids show, and what docs/ shows of the finished model.
PROMPTS = (
    "a photo of a dog on the beach", "a photo of a cat in the snow", "a photo of a red car in the city",
    "a photo of an elephant in the desert", "a photo of a penguin in the snow", "a photo of a rocket in space",
    "a photo of a house at sunset", "a photo of a mushroom in the forest", "a photo of a crab under water",
    "a photo of a blue balloon in a room", "a photo of an umbrella on the beach", "a photo of a flower on the grass",
)  # fmt: skip
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 96, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
    )


@torch.no_grad()
def cache_texts(path: Path, prompts: list[str], tokenizer: CLIPTokenizer, encoder: CLIPTextModel, device) -> None:
    """The text states (N, 77, 128) of all captions in fp16, in a file that the processes share."""
    if not path.exists():
        states = np.lib.format.open_memmap(path.with_suffix(".partial.npy"), "w+", np.float16, (len(prompts), 77, 128))
        for first in tqdm(range(0, len(prompts), 256), "texts"):
            some = prompts[first : first + 256]
            tokens = tokenizer(some, padding="max_length", truncation=True, return_tensors="pt").input_ids
            states[first : first + 256] = encoder(tokens.to(device)).last_hidden_state.half().cpu().numpy()
        states.flush()
        path.with_suffix(".partial.npy").replace(path)


class Average:
    """The exponential moving average of the weights, which is what samples and what is shipped."""

    def __init__(self, module: torch.nn.Module, decay: float = 0.9995):
        self.module, self.decay = copy.deepcopy(module).requires_grad_(False), decay

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)


@torch.no_grad()
def draw(
    pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, guidance: float = GUIDANCE_SCALE
) -> torch.Tensor:
    """Pictures (N, 3, 32, 32) in -1..1, by diffusers' own pipeline."""
    generators = [torch.Generator().manual_seed(seed * 10_000 + number) for number in range(len(prompts))]
    pictures = [
        pipeline(
            prompts[i : i + 48], guidance_scale=guidance, num_inference_steps=25, generator=generators[i : i + 48],
            output_type="np",
        ).images
        for i in range(0, len(prompts), 48)
    ]  # fmt: skip
    return torch.from_numpy(np.concatenate(pictures)).permute(0, 3, 1, 2) * 2 - 1


def gate(pipeline: StableDiffusionPipeline, clip: CLIPModel, seed: int = 0) -> dict[str, float]:
    """How often CLIP finds the noun and the setting that the prompt names: one picture of each noun in each setting."""
    nouns, settings = list(NOUNS), list(SETTINGS)
    pairs = [(noun, setting) for noun in range(len(nouns)) for setting in range(len(settings))]
    prompts = [
        f"a photo of {article(nouns[noun])} {nouns[noun]} {phrase(settings[setting])}" for noun, setting in pairs
    ]
    pictures = draw(pipeline, prompts, seed).to(clip.device)
    found = name_contents(clip, pipeline.tokenizer, pictures)
    wanted = np.array(pairs).T
    right = [found[0] == wanted[0], found[1] == wanted[1]]
    by_noun = {name: round(float(right[0][wanted[0] == number].mean()), 2) for number, name in enumerate(nouns)}
    return {"noun": float(right[0].mean()), "setting": float(right[1].mean()), "by_noun": by_noun}


def main() -> None:
    args = arguments(__doc__, steps=8_000, batch=64, rate=1e-3)
    rank, world, device = start(args.seed)
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    clip = CLIPModel.from_pretrained(args.out / "clip").to(device).eval()
    encoder = text_encoder_of(clip).to(device)
    captions, numbers = np.unique(load_images(args.out / "train.npz")["captions"], return_inverse=True)
    # Other captions or another text encoder are another file.
    key = hashlib.sha256(repr((captions.tolist(), [float(p.double().sum()) for p in encoder.parameters()])).encode())
    path = args.out / f"texts-{key.hexdigest()[:12]}.npy"
    if rank == 0:
        cache_texts(path, ["", *captions.tolist()], tokenizer, encoder, device)
    if dist.is_initialized():
        dist.barrier()
    texts = np.load(path, mmap_mode="r")
    latents = load_images(args.out / "latents.npz")
    unet = make_unet().to(device)
    average = Average(unet)
    scheduler = DDPMScheduler(**SCHEDULE)
    alphas = scheduler.alphas_cumprod.to(device)
    optimizer = torch.optim.AdamW(
        unet.parameters(), args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    log = Log("unet", args, rank)
    if rank == 0:
        print(
            f"unet: {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters, {world} x {device}", flush=True
        )
    parameters = list(unet.parameters())
    for step, generator in steps("unet", args, rank, {"unet": unet, "average": average.module}, optimizer):
        count = args.batch // world
        chosen = torch.randint(len(numbers), (count,), generator=generator).numpy()
        means, deviations = (torch.from_numpy(latents[key][chosen]) for key in ("means", "deviations"))
        clean = (means + deviations * torch.randn(means.shape, generator=generator)) * SCALING_FACTOR
        noise = torch.randn(clean.shape, generator=generator)
        noise += 0.05 * torch.randn((count, 4, 1, 1), generator=generator)
        timesteps = torch.randint(1000, (count,), generator=generator)
        unsaid = (torch.rand(count, generator=generator) < 0.1).numpy()
        states = torch.from_numpy(texts[np.where(unsaid, 0, numbers[chosen] + 1)]).float()
        clean, noise, timesteps, states = (tensor.to(device) for tensor in (clean, noise, timesteps, states))
        predicted = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, states).sample
        snr = alphas[timesteps] / (1 - alphas[timesteps])
        weights = snr.clamp(max=5) / snr  # Min-SNR, arXiv:2303.09556
        loss = ((predicted - noise).square().mean((1, 2, 3)) * weights).mean()
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(unet, step)
        log.add(step, loss=loss)
        if rank == 0 and ((step + 1) % 2000 == 0 or step + 1 == args.steps):
            report(args.out, average.module, clip, encoder, tokenizer, step + 1)
            log.draw()
    if rank == 0:
        average.module.save_pretrained(args.out / "unet")


def report(out: Path, unet: UNet2DConditionModel, clip: CLIPModel, encoder, tokenizer, step: int) -> None:
    """A grid of the twelve prompts and the gate's figures, beside the loss curve."""
    vae = AutoencoderKL.from_pretrained(out / "vae").to(unet.device)
    scheduler = DDPMScheduler(**SCHEDULE)
    pipeline = sampler(Models(tokenizer, encoder, vae, unet, scheduler, dict(scheduler.config)))
    pictures = draw(pipeline, [prompt for _ in range(4) for prompt in PROMPTS], 1)
    save_grid(pictures, len(PROMPTS), out / f"samples_{step:06d}.png", zoom=4)
    print(f"unet: step {step}: {gate(pipeline, clip)}", flush=True)


if __name__ == "__main__":
    main()
