"""What the tests share: a small model of the real classes, a few drawn photographs, and short training settings."""

import json
import os
import shutil
from pathlib import Path

# Before the Hub's library is imported, which reads it once: no test asks the network for anything.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from PIL import Image, ImageDraw

from dbkit import TrainConfig
from dbkit.demo import make_random_model

# Bitwise comparisons hold for one number of threads at a time, and so small a model is fastest on one.
torch.set_num_threads(1)


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
        "save_precision": "fp32",
        "device": "cpu",
    }


@pytest.fixture
def config(settings) -> TrainConfig:
    """The short training as a settings object."""
    return TrainConfig(**settings)
