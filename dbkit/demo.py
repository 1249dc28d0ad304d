"""The main job on what dbkit carries: a small random model and sample pictures. No download, no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dbkit.checkpoint import find_fault
from dbkit.class_images import generate_class_images
from dbkit.config import DemoConfig
from dbkit.convert import convert
from dbkit.dataset import prepare_dataset
from dbkit.libraries import quiet
from dbkit.models import Models, save_models
from dbkit.preview import preview
from dbkit.settings import configured_by, read_yaml
from dbkit.tokenizer import load_tokenizer_tables
from dbkit.train import train
from dbkit.workspace import default_folder

# The sample subject, and the size that the small model works at.
SAMPLE = "robot"
RESOLUTION = 64


@dataclass(frozen=True)
class Demo:
    """What the demo made."""

    grid: Path
    model: Path
    checkpoint: Path

    def __str__(self) -> str:
        return f"preview grid: {self.grid}\nmodel folder: {self.model}\ncheckpoint:   {self.checkpoint}"


@configured_by(DemoConfig)
def demo(config: DemoConfig) -> Demo:
    """Prepare, generate class images, train, preview and convert, on the small random model and the sample subject."""
    folder = config.folder or default_folder() / "demo"
    print(
        "The demo's model is small and its weights are random: it shows that every step runs and what each one makes.\n"
        "Its pictures are patterns, not subjects; for those, train a pretrained model."
    )
    base = folder / "models" / "small-random"
    if not (base / "model_index.json").exists():
        make_random_model(base)
    subject = read_yaml(data_templates() / "train_object.yaml")
    print(prepare_dataset(data_templates() / SAMPLE, folder / "datasets" / SAMPLE, resolution=RESOLUTION))
    settings = {"pretrained_model_name_or_path": str(base), "resolution": RESOLUTION, "num_class_images": 8}
    settings |= {name: subject[name] for name in ("class_prompt",)} | {"class_data_dir": folder / "class_images"}
    print(generate_class_images(**settings))
    run = folder / "runs" / SAMPLE
    model = train(
        **settings,
        instance_data_dir=folder / "datasets" / SAMPLE,
        instance_prompt=subject["instance_prompt"],
        with_prior_preservation=True,
        output_dir=run,
        max_train_steps=config.max_train_steps,
        learning_rate=1e-3,
        save_model_every_n_steps=max(1, config.max_train_steps // 2),
    )
    prompts = (subject["instance_prompt"], subject["class_prompt"])
    grid = preview(model, prompt=prompts, output=run / "preview.png").grid
    checkpoint = convert(model, folder / "exports" / f"{SAMPLE}.safetensors", overwrite=True)
    assert find_fault(model) is None and checkpoint.stat().st_size and grid.stat().st_size
    return Demo(grid, model, checkpoint)


def data_templates() -> Path:
    """The sample pictures and settings: beside the package in a checkout, inside it once installed."""
    here = Path(__file__).parent
    return next(path for path in (here / "data_templates", here.parent / "data_templates") if path.is_dir())


def make_random_model(folder: Path, seed: int = 0) -> Path:
    """Write a small model of the real classes with random weights, in the layout of Stable Diffusion 1.

    Same block types, levels and tensor names as the real one, about 1/8 of its width, for 64 px pictures.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel

    with quiet():
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

    from dbkit.families import sd1_scheduler

    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = load_tokenizer_tables(
        {word: number for number, word in enumerate(words)},
        [],
        {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"},
    )
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                bos_token_id=len(words) - 2,
                eos_token_id=len(words) - 1,
                pad_token_id=len(words) - 1,
            )
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 64, 96, 96),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=RESOLUTION,
        )
        unet = UNet2DConditionModel(
            sample_size=RESOLUTION // 8,
            block_out_channels=(32, 64, 96, 96),
            cross_attention_dim=64,
            attention_head_dim=8,
        )
    scheduler_config = sd1_scheduler()
    models = Models(tokenizer, text_encoder, vae, unet, DDPMScheduler.from_config(scheduler_config), scheduler_config)
    save_models(models, folder)
    return folder
