"""What the tests share: a small model of the real classes, a few drawn photographs, and short training settings."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Before the Hub's library is imported, which reads it once: no test asks the network for anything.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image, ImageDraw
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel

from dbkit import TrainConfig
from dbkit.families import scheduler_config
from dbkit.libraries import quiet
from dbkit.models import Models, save_models
from dbkit.tokenizer import load_tokenizer_tables

# Bitwise comparisons hold for one number of threads at a time, and so small a model is fastest on one.
torch.set_num_threads(1)


# Files of few and long tests. They begin first, so that no process ends up alone with one of them.
LONG = ["learning", "processes", "pipeline", "notebooks", "keeper", "train", "every_setting", "kill", "demo"]
LONG += ["downloads", "convert_check", "hub", "objectives", "synchronisations"]


def pytest_collection_modifyitems(items):
    """Order the files; within a file nothing changes."""
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def workspace_folder(tmp_path, monkeypatch):
    """Every test has a workspace of its own, and never the user's."""
    folder = tmp_path / "workspace"
    monkeypatch.setenv("DBKIT_WORKSPACE", str(folder))
    # Relative paths of a test land in its own folder too.
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A diffusers folder with the real classes at small size, predicting epsilon, for 64 px. Do not change it."""
    return make_random_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def v_model(model, tmp_path_factory) -> Path:
    """The same model, said to predict v."""
    folder = tmp_path_factory.mktemp("models") / "small-v"
    shutil.copytree(model, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    return folder


@pytest.fixture(scope="session")
def inpainting_model(model, tmp_path_factory) -> Path:
    """The same model with a U-Net that also reads a mask and the latents of what the mask leaves: 9 channels."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("models") / "small-inpainting")
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = json.loads((folder / "unet" / "config.json").read_text())
        UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="session")
def sd2_model(tmp_path_factory) -> Path:
    """A narrow Stable Diffusion 2 with all 23 layers of its text encoder, predicting epsilon. Do not change it."""
    return make_random_model(tmp_path_factory.mktemp("models") / "sd2", is_sd2=True)


@pytest.fixture(scope="session")
def sd2_v_model(sd2_model, tmp_path_factory) -> Path:
    """The same, said to predict v. Do not change it."""
    folder = shutil.copytree(sd2_model, tmp_path_factory.mktemp("models") / "sd2-v")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(scheduler_config("v_prediction")))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def smaller_model(model, tmp_path_factory) -> Path:
    """The same model with a U-Net of two levels, for many trainings."""
    return with_smaller_unet(model, tmp_path_factory.mktemp("models") / "smaller")


def with_smaller_unet(base: Path, folder: Path) -> Path:
    """A copy of the small model whose U-Net has two levels and random weights."""
    shutil.copytree(base, folder)
    shutil.rmtree(folder / "unet")
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=64,
            attention_head_dim=8,
        )
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture
def copied(model, tmp_path):
    """A copy of the small model that a test may change."""
    return shutil.copytree(model, tmp_path / "copied")


def draw_photo(path: Path, size=(96, 80), colour="teal") -> Path:
    """Save a picture with something off-centre in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((5, 10, size[0] // 2, size[1] - 20), fill=colour)
    image.save(path)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of three photographs, each with a caption."""
    folder = tmp_path / "photos"
    for colour in ("teal", "crimson", "gold"):
        draw_photo(folder / f"{colour}.png", colour=colour)
        (folder / f"{colour}.txt").write_text(f"a {colour} thing\n", encoding="utf-8")
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 kB."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("a small disk can only be mounted as root on Linux")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "dbkit-test", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this system does not let a small disk be mounted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def settings(model, photos, tmp_path) -> dict:
    """Settings of a short native training on the CPU that ends within seconds."""
    return {
        "pretrained_model_name_or_path": str(model),
        "instance_data_dir": photos,
        "instance_prompt": "photo of zwx thing",
        "output_dir": tmp_path / "run",
        "resolution": 64,
        "max_train_steps": 2,
        "learning_rate": 1e-4,
        "auto_test_model": False,
        "judge_steps": False,
        "save_precision": "fp32",
        "device": "cpu",
    }


@pytest.fixture
def config(settings) -> TrainConfig:
    """The short training as a settings object."""
    return TrainConfig(**settings)


@pytest.fixture
def prior(tmp_path) -> dict:
    """Settings of prior preservation with two class images, so that none have to be generated."""
    for colour in ("navy", "olive"):
        draw_photo(tmp_path / "class" / f"{colour}.png", colour=colour)
    return {
        "with_prior_preservation": True,
        "class_prompt": "photo of a thing",
        "class_data_dir": tmp_path / "class",
        "num_class_images": 2,
    }


@pytest.fixture
def mixed(tmp_path) -> dict:
    """Settings of two concepts of several shapes, with tags, augmentation, buckets and class images."""
    tags = "zwx thing, red, round, small, on white"
    for name, sizes in (("one", [(96, 80), (60, 120), (64, 64)]), ("two", [(130, 60), (80, 96)])):
        for number, size in enumerate(sizes):
            path = draw_photo(tmp_path / "sets" / name / f"{number}.png", size, colour="crimson" if number else "gold")
            path.with_suffix(".txt").write_text(f"{tags}, number {number}")
            draw_photo(tmp_path / "sets" / f"class of {name}" / f"{number}.png", size, colour="navy")
    concepts = [
        {
            "instance_prompt": f"photo of {word} thing",
            "class_prompt": f"photo of a {name} thing",
            "instance_data_dir": name,
            "class_data_dir": f"class of {name}",
            "weight": weight,
        }
        for name, word, weight in (("one", "zwx", 2), ("two", "ukj", 1))
    ]
    (tmp_path / "sets" / "concepts_list.json").write_text(json.dumps(concepts))
    return {
        "instance_data_dir": None,
        "instance_prompt": None,
        "concepts_list": tmp_path / "sets" / "concepts_list.json",
        "with_prior_preservation": True,
        "num_class_images": 2,
        "use_aspect_ratio_bucket": True,
        "combine_prompt_from_txt": True,
        "shuffle_tags": True,
        "tag_dropout": 0.3,
        "hflip": True,
        "augment_rotation": 5,
        "augment_crop": 0.2,
        "augment_brightness": 0.1,
        "train_batch_size": 2,
    }


def make_random_model(folder: Path, seed: int = 0, is_sd2: bool = False) -> Path:
    """Write a small model of the real classes with random weights, in the layout of Stable Diffusion 1 or 2.

    Same block types, levels and tensor names as the real one, about 1/8 of its width, for 64 px pictures. Where a test
    asks whether something runs and not whether anything is learnt, it is enough.
    """
    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = load_tokenizer_tables(
        {word: number for number, word in enumerate(words)},
        [],
        {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **({"pad_token": "!"} if is_sd2 else {})},
    )
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=23 if is_sd2 else 2,
                num_attention_heads=16 if is_sd2 else 4,
                hidden_act="gelu" if is_sd2 else "quick_gelu",
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
            sample_size=64,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64, 128, 128) if is_sd2 else (32, 64, 96, 96),
            cross_attention_dim=64,
            attention_head_dim=[1, 1, 2, 2] if is_sd2 else 8,
            use_linear_projection=is_sd2,
        )
    schedule = scheduler_config("epsilon")
    models = Models(tokenizer, text_encoder, vae, unet, DDPMScheduler.from_config(schedule), schedule)
    save_models(models, folder)
    return folder
