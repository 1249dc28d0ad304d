"""What dbkit carries, so that everything can be tried without a download: a small pretrained model, the networks that
judge its pictures, and sample pictures. recipes/tiny_sd says how the model was made."""

from __future__ import annotations

import json
from pathlib import Path

# Wherever a base model is asked for, this name will do.
NAME = "tiny-sd"
ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / NAME
CLIP = ASSETS / "tiny-clip"
DINO = ASSETS / "tiny-dino"
RESOLUTION = 32
# The subject that is shown first, and what is known of it.
SAMPLE = "poodle"
# What suits the model: more guidance overdoes its colours, and benchmarks/learning.py says what the training does.
GUIDANCE_SCALE = 3.0
TRAINING = {
    "train_text_encoder": True,
    "learning_rate": 2e-4,
    "train_batch_size": 4,
    "max_train_steps": 200,
    "num_class_images": 24,
    "guidance_scale": GUIDANCE_SCALE,
}


def data_templates() -> Path:
    """The sample pictures and settings: beside the package in a checkout, inside it once installed."""
    here = Path(__file__).parent
    return next(path for path in (here / "data_templates", here.parent / "data_templates") if path.is_dir())


def local_folder(name_or_path: str | Path) -> Path:
    """The folder that a model's name stands for: that of the embedded model for its name, else the path itself.

    Whatever lies in the current folder, or a run would go on from another model there; a folder of that name is reached
    by its full path.
    """
    return MODEL if str(name_or_path) == NAME else Path(name_or_path)


def is_embedded(name_or_path: str | Path) -> bool:
    """Whether a model folder is the embedded model or was trained from it: it has its tokenizer."""
    ours, theirs = (folder / "tokenizer" / "vocab.json" for folder in (MODEL, local_folder(name_or_path)))
    # Versions of transformers write the words in different orders.
    try:
        return theirs.is_file() and json.loads(theirs.read_bytes()) == json.loads(ours.read_bytes())
    except ValueError:  # a damaged file is said when the model is loaded
        return False
