"""How near `dbkit plan` comes: the peak that it estimates and the peak that a real training has, for many settings.

    python benchmarks/memory.py

Trains Stable Diffusion 1 with every width divided by 4 (random weights, 256 px) for three steps under each setting, in
a process of its own. On a CPU the peak is that of the process (VmHWM, so Linux); on a GPU that of torch's tensors
(max_memory_allocated). --model takes a real one, --resolution its size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

TEXT, CHECKPOINTING, BATCH, LORA = (
    {"train_text_encoder": True},
    {"gradient_checkpointing": True},
    {"train_batch_size": 4},
    {"adapter": "lora"},
)
PRIOR = {"with_prior_preservation": True, "class_prompt": "a photo of a thing", "num_class_images": 2}
SETTINGS: dict[str, dict] = {
    "the defaults": {},
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


def one(settings: dict) -> dict:
    """Estimate a training, then train: {phase, estimated, measured}, in bytes. Runs in a process of its own."""
    import torch

    from dbkit import TrainConfig, train
    from dbkit.memory import OF_CUDA
    from dbkit.plan import plan

    config = TrainConfig(**settings)
    with contextlib.redirect_stdout(sys.stderr):
        if "DBKIT_ESTIMATE" in os.environ:
            peak = plan(config).peak
            return {"phase": peak.phase, "estimated": peak.total - peak.parts.get(OF_CUDA, 0), **peak.parts}
        train(config)
    if torch.cuda.is_available() and config.device != "cpu":
        return {"measured": torch.cuda.max_memory_allocated()}
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return {"measured": int(status.split()[0]) * 1024}


def in_a_process(settings: dict, **environment: str) -> dict:
    """What one() returns, from a fresh process: what an earlier one held must not count."""
    command = [sys.executable, __file__, "--one", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def draw_photos(folder: Path) -> Path:
    """Two pictures of noise."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (512, 512, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="a diffusers folder in place of the narrow model")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--only", help="settings whose names have this text")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(json.loads(arguments.one))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        base, photos = Path(place), draw_photos(Path(place) / "photos")
        class_images = draw_photos(base / "class")
        model = arguments.model or make_model(base / "model")
        for number, (name, changes) in enumerate(SETTINGS.items()):
            if arguments.only and arguments.only not in name:
                continue
            settings = {
                "pretrained_model_name_or_path": str(model),
                "instance_data_dir": str(photos),
                "instance_prompt": "a photo of zwx thing",
                "output_dir": str(base / "runs" / str(number)),
                "max_train_steps": 3,
                "auto_test_model": False,
                "device": arguments.device,
                **changes,
                "resolution": int(arguments.resolution * changes.get("resolution", 1)),
            }
            if changes.get("with_prior_preservation"):
                settings["class_data_dir"] = str(class_images)
            estimate, measured = in_a_process(settings, DBKIT_ESTIMATE="1"), in_a_process(settings)["measured"]
            rows.append((name, estimate["phase"], estimate["estimated"], measured, estimate.get("libraries", 0)))
            print(f"{name}: {estimate} {measured}", file=sys.stderr, flush=True)
    print(f"\nMade by `python benchmarks/memory.py` on {platform.machine()}, {os.cpu_count()} cores.\n")
    print("| settings | estimated, MB | in | measured, MB | estimated / measured | without the libraries |")
    print("| :-- | --: | :-- | --: | --: | --: |")
    for name, phase, estimated, measured, libraries in rows:
        alone = (estimated - libraries) / (measured - libraries)
        ratios = f"{estimated / measured:.2f} | {alone:.2f}"
        print(f"| {name} | {estimated / 1e6:.0f} | {phase} | {measured / 1e6:.0f} | {ratios} |")


if __name__ == "__main__":
    main()
