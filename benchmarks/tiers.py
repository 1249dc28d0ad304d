"""What each memory tier learns, beside training in fp32: the embedded model, one subject, several seeds.

    python benchmarks/tiers.py --seeds 5

The tolerances of tests/test_memory_tiers.py are read off the first table. CPU is enough.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
import tempfile
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from dbkit import embedded, evaluate, in_backward, train
from dbkit.images import list_images, read_image
from dbkit.losses import add_noise
from dbkit.models import load_models

BASE = embedded.MODEL
PHOTOS, PROMPT = embedded.data_templates() / embedded.SAMPLE, "photo of zwx dog"
TIERS = {
    "fp32": {"memory": "fast", "mixed_precision": "no"},
    "fast": {"memory": "fast", "mixed_precision": "bf16"},
    "balanced": {"memory": "balanced", "mixed_precision": "bf16"},
    "small": {"memory": "small", "mixed_precision": "bf16"},
    "tiny": {"memory": "tiny", "mixed_precision": "bf16"},
}
# tiny, as it would be without stochastic rounding.
NEAREST = "tiny, rounded to the nearest"
# A usual step is small beside the distance of bf16 numbers; so is this one, a quarter of what suits the model.
SHORT = {"max_train_steps": 12, "learning_rate": 5e-5, "train_text_encoder": False}
WHOLE = {**embedded.TRAINING, "max_train_steps": 80}
COMMON = {
    **embedded.TRAINING,
    "pretrained_model_name_or_path": embedded.NAME,
    "instance_data_dir": PHOTOS,
    "instance_prompt": PROMPT,
    "resolution": embedded.RESOLUTION,
    "auto_test_model": False,
    "save_model_every_n_steps": None,
    "save_precision": "fp32",
    "device": "cpu",
}


def learn(tier: str, seed: int, folder: Path, **changes) -> Path:
    """The model after a short training of the subject in a tier, or with other settings."""
    settings = {**COMMON, **SHORT, **TIERS[tier], "seed": seed, "output_dir": folder / f"{tier}-{seed}"}
    return train(**{**settings, **changes})


@torch.no_grad()
def fixed_loss(folder: Path, draws: int = 16) -> float:
    """The loss of a model in fp32 over the subject's pictures, each with the same noises and timesteps every time."""
    models, size = load_models(folder), (embedded.RESOLUTION,) * 2
    pictures = [np.asarray(read_image(path).resize(size), np.float32) / 127.5 - 1 for path in list_images(PHOTOS)]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    latents = models.vae.encode(pixels).latent_dist.mean * models.vae.config.scaling_factor
    ids = models.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    text = models.text_encoder(ids).last_hidden_state.expand(len(latents), -1, -1)
    random, alphas, errors = torch.Generator().manual_seed(0), models.noise_scheduler.alphas_cumprod, []
    for _ in range(draws):
        timesteps = torch.randint(0, len(alphas), (len(latents),), generator=random)
        noise = torch.randn(latents.shape, generator=random)
        found = models.unet(add_noise(latents, noise, timesteps, alphas), timesteps, text).sample
        errors.append((found - noise).square().mean())
    return float(torch.stack(errors).mean())


@contextlib.contextmanager
def rounding_to_the_nearest():
    """Round weights to the nearest bf16 number for the time of the block."""
    exact, in_backward.to_bf16 = in_backward.to_bf16, lambda values, random: values.bfloat16()
    try:
        yield
    finally:
        in_backward.to_bf16 = exact


def compare_losses(seeds: int, folder: Path) -> dict[str, list[float]]:
    """How far each tier ends from fp32 training, in percent of what that takes off the loss."""
    base, off = fixed_loss(BASE), {}
    for seed in range(seeds):
        reference = _quietly(learn, "fp32", seed, folder)
        taken = base - fixed_loss(reference)
        print(f"seed {seed}: fp32 takes {taken:.4f} off {base:.4f}", flush=True)
        for name in [*list(TIERS)[1:], NEAREST]:
            with rounding_to_the_nearest() if name == NEAREST else contextlib.nullcontext():
                tier = "tiny" if name == NEAREST else name
                made = _quietly(learn, tier, seed, folder / name)
            off.setdefault(name, []).append(100 * (fixed_loss(made) - fixed_loss(reference)) / taken)
            print(f"seed {seed}, {name}: {off[name][-1]:.2f} %", flush=True)
    return off


def compare_fidelity(seeds: int, folder: Path) -> dict[str, list[float]]:
    """The likeness to the subject that a longer training reaches in each tier."""
    found: dict[str, list[float]] = {}
    for name in ("fp32", "balanced", "tiny"):
        for seed in range(seeds):
            made = _quietly(learn, name, seed, folder / "whole", **WHOLE)
            judged = _quietly(evaluate, made, seed=seed, num_per_prompt=2, sample_batch_size=16, device="cpu")
            found.setdefault(name, []).append(judged.model.subject_fidelity)
            print(f"seed {seed}, {name}: subject fidelity {found[name][-1]:.3f}", flush=True)
    return found


def table(title: str, found: dict[str, list[float]]) -> str:
    rows = [f"| | {title}: mean | lowest | highest |", "| :-- | --: | --: | --: |"]
    rows += [f"| {name} | {mean(v):.2f} | {min(v):.2f} | {max(v):.2f} |" for name, v in found.items()]
    return "\n".join(rows)


def _quietly(function, *arguments, **settings):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*arguments, **settings)


def main() -> None:
    import figures  # tests load this file from elsewhere

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/tiers.md"))
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a model is fastest on one
    folder = Path(tempfile.mkdtemp(prefix="dbkit-tiers-"))
    losses, fidelity = compare_losses(args.seeds, folder), compare_fidelity(args.seeds, folder)
    made_on = figures.in_words(figures.made_on())
    args.output.write_text(
        f"# What the memory tiers learn\n\nMade by `python {shlex.join(sys.argv)}` with tiny-sd, "
        f"{embedded.SAMPLE}, {args.seeds} seeds: {made_on}. small computes what balanced does, bit for bit.\n\n"
        f"Loss at fixed noise after {_said(SHORT)}, the U-Net alone:\n\n"
        f"{table('off fp32, % of what it learns', losses)}\n\n"
        f"Subject fidelity after {_said(WHOLE)}, with the text encoder:\n\n"
        f"{table('subject fidelity', fidelity)}\n"
    )
    figures.write(args.json, {"percent off fp32": losses, "subject fidelity": fidelity})


def _said(training: dict) -> str:
    return f"{training['max_train_steps']} steps with learning rate {training['learning_rate']:g}"


if __name__ == "__main__":
    main()
