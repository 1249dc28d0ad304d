"""What training reads: the images of a folder, checked, each with its prompt."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from dbkit.captions import read_caption
from dbkit.config import TrainConfig
from dbkit.errors import DbkitError
from dbkit.files import sha256
from dbkit.images import OTHER_SUFFIXES, SUFFIXES, UNREAD, crop_place, list_images, read_image


@dataclass(frozen=True)
class Example:
    """One training image: checked, not held in memory. sha256 is that of the file."""

    path: Path
    prompt: str
    place: tuple[float, float]
    sha256: str


def instance_examples(config: TrainConfig) -> list[Example]:
    """The instance images with their resolved prompts. Every image is decoded once here, before any model is loaded.

    Raises DbkitError naming all unreadable images, or all images without a caption, at once.
    """
    paths = _training_images(config.instance_data_dir)
    if config.use_txt_as_label:
        prompts = {path: read_caption(path) for path in paths}
        if missing := [path.name for path, prompt in prompts.items() if not prompt]:
            raise DbkitError(
                f"{len(missing)} of {len(paths)} images in {config.instance_data_dir} have no caption "
                f"({_some(missing)}); write a .txt file of the same name beside each (notebook 3 helps)"
            )
    elif config.use_filename_as_label:
        prompts = {path: path.stem for path in paths}
    else:
        prompts = dict.fromkeys(paths, config.instance_prompt)
    return _checked_examples(paths, prompts, config)


def class_examples(config: TrainConfig, paths: list[Path]) -> list[Example]:
    """The class images, each with the class prompt, checked like the instance images."""
    return _checked_examples(paths, dict.fromkeys(paths, config.class_prompt), config)


def _training_images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DbkitError(f"instance_data_dir {folder} is not a folder; check the path, or make it with dbkit prepare")
    paths = list_images(folder)
    others = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in OTHER_SUFFIXES)
    if others:
        raise DbkitError(f"{len(others)} images in {folder} are not usable: {UNREAD.format(_some(others))}")
    if not paths:
        below = sorted({path.parent for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES})
        hint = f"there are some in {below[0]}: name that folder" if below else "put 5 to 20 photographs there"
        raise DbkitError(f"there are no images in instance_data_dir {folder}; {hint}")
    return paths


def _checked_examples(paths: list[Path], prompts: dict[Path, str], config: TrainConfig) -> list[Example]:
    examples, unreadable = [], []
    for path in paths:
        try:
            read_image(path)
        except DbkitError as error:
            unreadable.append(str(error))
        else:
            place = crop_place(config.center_crop, config.seed, path.name)
            examples.append(Example(path, prompts[path], place, sha256(path)))
    if unreadable:
        raise DbkitError(f"{len(unreadable)} of {len(paths)} images are not usable: {_some(unreadable)}")
    return examples


def _some(items: list[str], most: int = 5) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def fingerprint(examples: list[Example]) -> str:
    """A hash of what training sees of the data: image bytes, prompts, crops and their order, but not where they lie."""
    facts = [(example.sha256, example.prompt, example.place) for example in examples]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
