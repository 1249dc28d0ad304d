"""Stage 7, the files: the model and its judges in fp16 into dbkit/assets/, with a model card that has their hashes.

python recipes/tiny_sd/assemble.py --out build/tiny_sd
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from dbkit.embedded import ASSETS, CLIP, DINO, MODEL, NAME
from dbkit.families import scheduler_config
from dbkit.files import sha256
from dbkit.models import Models, load_models, save_models
from dbkit.tokenizer import save_tokenizer

from common import as_tensor, load_images, save_grid
from judges import text_encoder_of
from unet import PROMPTS, draw, gate, sampler
from vae import psnr

HERE = Path(__file__).parent
PREPROCESSOR = {
    "do_resize": True, "size": {"height": 32, "width": 32}, "resample": 3, "do_center_crop": False, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/tiny_sd"), help="where all stages work")
    out = parser.parse_args().out
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    clip = CLIPModel.from_pretrained(out / "clip")
    scheduler = scheduler_config("epsilon")
    models = Models(
        tokenizer,
        text_encoder_of(clip),
        AutoencoderKL.from_pretrained(out / "vae_finished"),
        UNet2DConditionModel.from_pretrained(out / "unet"),
        DDPMScheduler.from_config(scheduler),
        scheduler,
    )
    for part in (models.vae, models.unet):
        part.register_to_config(_name_or_path=NAME)  # not where it lay on this machine
    encoder = ViTModel.from_pretrained(out / "encoder", add_pooling_layer=False)
    shutil.rmtree(ASSETS, ignore_errors=True)
    save_models(models, MODEL, "fp16")
    clip.half().save_pretrained(CLIP)
    save_tokenizer(tokenizer, CLIP)
    encoder.half().save_pretrained(DINO)
    for folder, kind in ((CLIP, "CLIPImageProcessor"), (DINO, "ViTImageProcessor")):
        text = json.dumps({"image_processor_type": kind, **PREPROCESSOR}, indent=2)
        (folder / "preprocessor_config.json").write_text(text, "utf-8")
    pictures = draw(sampler(load_models(MODEL)), [prompt for _ in range(3) for prompt in PROMPTS], 1)
    save_grid(pictures, len(PROMPTS), HERE.parents[1] / "docs" / "tiny-sd.png", zoom=4)
    (MODEL / "README.md").write_text(card(out), encoding="utf-8", newline="\n")


def card(out: Path) -> str:
    """The model card, with figures that are measured here, on the files that were just written."""
    models, clip = load_models(MODEL), CLIPModel.from_pretrained(CLIP).float().eval()
    parts = {"U-Net": models.unet, "VAE": models.vae, "text encoder": models.text_encoder}
    counts = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items())
    found = [gate(sampler(models), clip, seed) for seed in (1, 2, 3)]
    noun, setting = (sum(figures[key] for figures in found) / len(found) for key in ("noun", "setting"))
    with torch.no_grad():
        unseen, seen = (
            psnr(models.vae, as_tensor(load_images(out / f"{n}.npz")["images"])) for n in ("heldout", "judge")
        )
    files = sorted(path for path in ASSETS.rglob("*") if path.is_file() and path.name != "README.md")
    hashes = "".join(
        f"| {path.relative_to(ASSETS).as_posix()} | {path.stat().st_size:,} | `{sha256(path)}` |\n" for path in files
    )
    done = {name: json.loads((out / f"{name}.jsonl").read_text().splitlines()[-1])["step"] for name in STAGES}
    return (HERE / "card.md").read_text(encoding="utf-8").format(
        parameters=counts, noun=noun, setting=setting, unseen=unseen, seen=seen, hashes=hashes, steps=done,
        size=sum(path.stat().st_size for path in files) / 1e6, prompts="; ".join(PROMPTS),
    )  # fmt: skip


STAGES = ("vae", "judges", "unet", "decoder")

if __name__ == "__main__":
    main()
