"""How near `dbkit plan` comes: the peak that it estimates and the peak that a real training has, for many settings.

    python benchmarks/memory.py

Trains Stable Diffusion 1 with every width divided by 4 (random weights, 256 px) for two steps under each setting, in
a process of its own. On a CPU the peak is that of the process (VmHWM, so Linux), once as it is and once with glibc told
to give back what is freed; on a GPU it is that of torch's tensors (max_memory_allocated). --model takes a real model,
--resolution its size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import figures

TEXT, CHECKPOINTING, BATCH, LORA = (
    {"train_text_encoder": True},
    {"gradient_checkpointing": True},
    {"train_batch_size": 4},
    {"adapter": "lora"},
)
PRIOR = {"with_prior_preservation": True, "class_prompt": "a photo of a thing", "num_class_images": 2}
SETTINGS: dict[str, dict] = {
    "defaults": {},
    "gradient_checkpointing": CHECKPOINTING,
    "train_batch_size 4": BATCH,
    "train_batch_size 4, gradient_checkpointing": {**BATCH, **CHECKPOINTING},
    "train_text_encoder": TEXT,
    "train_text_encoder, gradient_checkpointing, batch 4": {**TEXT, **CHECKPOINTING, **BATCH},
    "use_8bit_adam": {"use_8bit_adam": True},
    "use_8bit_adam, gradient_checkpointing": {"use_8bit_adam": True, **CHECKPOINTING},
    "adafactor": {"optimizer": "adafactor"},
    "lion": {"optimizer": "lion"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "use_ema": {"use_ema": True},
    "lora": LORA,
    "lora, gradient_checkpointing, batch 4": {**LORA, **CHECKPOINTING, **BATCH},
    "prior preservation, batch 2": {**PRIOR, "train_batch_size": 2},
    "gradient_accumulation_steps 2, batch 2": {"gradient_accumulation_steps": 2, "train_batch_size": 2},
    "bf16, batch 4": {"mixed_precision": "bf16", **BATCH},
    "1.5 times the resolution": {"resolution": 1.5},
}


def make_model(folder: Path) -> Path:
    """Stable Diffusion 1 with a fourth of its widths, random weights and the embedded model's tokenizer."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from dbkit import embedded
    from dbkit.families import scheduler_config
    from dbkit.models import Models, save_models
    from dbkit.tokenizer import load_tokenizer

    torch.manual_seed(0)
    tokenizer, schedule = load_tokenizer(str(embedded.MODEL / "tokenizer")), scheduler_config("epsilon")
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(80, 160, 320, 320), norm_num_groups=16, cross_attention_dim=192
    )
    models = Models(tokenizer, CLIPTextModel(text), vae, unet, DDPMScheduler.from_config(schedule), schedule)
    save_models(models, folder, "fp32")
    return folder


def estimate(settings: dict) -> dict:
    """The peak that plan() names, and of it what no tensor takes, in bytes."""
    from dbkit import TrainConfig
    from dbkit.memory import OF_CUDA, OF_PROCESS
    from dbkit.plan import plan

    peak = plan(TrainConfig(**settings)).peak
    others = {kind: count for kind, count in peak.parts.items() if kind in (OF_CUDA, OF_PROCESS)}
    return {"phase": peak.phase, "peak": peak.total, "others": sum(others.values())}


def measure(settings: dict) -> int:
    """The peak of a training, in bytes. What this process held before must not count, so it is a fresh one."""
    import torch

    from dbkit import TrainConfig, train

    shutil.rmtree(settings["output_dir"], ignore_errors=True)
    train(TrainConfig(**settings))
    if torch.cuda.is_available() and settings["device"] != "cpu":
        return torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def in_a_process(work: str, settings: list[dict], **environment: str) -> list:
    """What a function of this file returns for each of the settings, called in a process of its own."""
    command = [sys.executable, __file__, "--work", work, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def draw_photos(folder: Path, seed: int) -> Path:
    """Two pictures of noise."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(2):
        pixels = np.random.default_rng(seed + number).integers(0, 255, (512, 512, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="a diffusers folder in place of the narrow model")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--only", default="", help="settings whose names have this text")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        with contextlib.redirect_stdout(sys.stderr):
            work = {"estimate": estimate, "measure": measure}[arguments.work[0]]
            done = [work(each) for each in json.loads(arguments.work[1])]
        print(json.dumps(done))
        return
    changes = {name: each for name, each in SETTINGS.items() if arguments.only in name}
    on_cpu = arguments.device == "cpu"
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        photos, class_images = draw_photos(base / "photos", 0), draw_photos(base / "class", 2)
        model = arguments.model or make_model(base / "model")
        settings = [
            {
                "pretrained_model_name_or_path": str(model),
                "instance_data_dir": str(photos),
                "instance_prompt": "a photo of zwx thing",
                "output_dir": str(base / "run"),
                "max_train_steps": 2,
                "auto_test_model": False,
                "device": arguments.device,
                **each,
                **({"class_data_dir": str(class_images)} if each.get("with_prior_preservation") else {}),
                "resolution": int(arguments.resolution * each.get("resolution", 1)),
            }
            for each in changes.values()
        ]
        estimates = in_a_process("estimate", settings)
        rows = []
        for name, given, estimated in zip(changes, settings, estimates):
            [measured] = in_a_process("measure", [given])
            # From this size on glibc gives blocks back when they are freed: what is left is what tensors hold.
            [tensors] = in_a_process("measure", [given], MALLOC_MMAP_THRESHOLD_="131072") if on_cpu else [measured]
            rows.append((name, estimated, measured, tensors))
            print(rows[-1], file=sys.stderr, flush=True)
    print_table(rows, on_cpu)
    keys = ("settings", "estimate", "measured", "measured with free blocks given back")
    figures.write(arguments.json, {"in bytes": [dict(zip(keys, row)) for row in rows]})


def print_table(rows: list[tuple[str, dict, int, int]], on_cpu: bool) -> None:
    """All figures in MB (10^6 bytes)."""
    print(f"Made by `{' '.join(['python', *sys.argv])}`, in MB: {figures.in_words(figures.made_on())}.\n")
    # What the process takes beside tensors, by the first row alone.
    process = rows[0][3] - (rows[0][1]["peak"] - rows[0][1]["others"]) if on_cpu else 0
    titles = "settings | peak by `plan` | in | measured | ratio | tensors by `plan`"
    print(f"| {titles} | measured less {process / 1e6:.0f} | ratio |")
    print("| :-- | --: | :-- | --: | --: | --: | --: | --: |")
    for name, estimated, measured, tensors in rows:
        counted, tensors = estimated["peak"] - estimated["others"], tensors - process
        peak = estimated["peak"] if on_cpu else counted
        whole = f"{peak / 1e6:.0f} | {estimated['phase']} | {measured / 1e6:.0f} | {peak / measured:.2f}"
        print(f"| {name} | {whole} | {counted / 1e6:.0f} | {tensors / 1e6:.0f} | {counted / tensors:.2f} |")


if __name__ == "__main__":
    main()
