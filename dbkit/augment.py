"""Augmentation: the versions of an image that training sees, decided once, so that their latents can be cached."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from dbkit import draws
from dbkit.images import View
from dbkit.train_config import TrainConfig

if TYPE_CHECKING:
    import numpy as np

_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


def views_of(config: TrainConfig, name: str, place: tuple[float, float], caption: str) -> tuple[View, ...]:
    """The views of the image of this name: the plain one first, then those that the settings ask for.

    Each is drawn by the seed, the name and its number alone. A caption that tells left from right forbids mirroring.
    """
    plain = View(place)
    mirrored = config.hflip and not _SIDES.search(caption)
    others = (config.augment_rotation, config.augment_brightness, config.augment_contrast, config.augment_crop)
    if not any(others):
        return (plain, View(place, flip=True)) if mirrored else (plain,)
    number = key_of(name)
    return plain, *(_draw(config, number, n, place, mirrored) for n in range(1, config.augment_variants))


def key_of(name: str) -> int:
    """A number for a name, the same everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _draw(config: TrainConfig, number: int, n: int, place: tuple[float, float], mirrored: bool) -> View:
    random = draws.generator(config.seed, "augment", step=n, sample=number)
    turn, brightness, contrast, cut, x, y = random.uniform(-1, 1, 6).tolist()
    return View(
        # A smaller crop may lie anywhere; a whole one stays where it was.
        place=((x + 1) / 2, (y + 1) / 2) if config.augment_crop else place,
        share=1 - config.augment_crop * abs(cut),
        # Every other variant, so that both ways are seen equally often.
        flip=mirrored and n % 2 == 1,
        degrees=config.augment_rotation * turn,
        brightness=1 + config.augment_brightness * brightness,
        contrast=1 + config.augment_contrast * contrast,
    )


def holes_of(config: TrainConfig, name: str, size: tuple[int, int]) -> list[np.ndarray]:
    """What an inpainting model does not see of an image, in turn: (H, W) arrays, 1 where it is hidden, for (W, H).

    A quarter of them hides everything, as in the training of the base models; the others a rectangle or an ellipse.
    """
    number = key_of(name)
    return [_hole(draws.generator(config.seed, "holes", n, number), size, n) for n in range(config.inpainting_masks)]


def _hole(random: np.random.Generator, size: tuple[int, int], n: int) -> np.ndarray:
    import numpy as np

    width, height = size
    if n % 4 == 0:
        return np.ones((height, width), np.float32)
    sides = np.array([height, width])
    half = np.maximum(0.5, random.uniform(0.2, 0.8, 2) * sides / 2)
    middle = half + random.random(2) * (sides - 2 * half)
    # The distance of each place from the middle, in half sides.
    down, across = (np.abs(np.mgrid[:height, :width] + 0.5 - middle[:, None, None])) / half[:, None, None]
    inside = across**2 + down**2 <= 1 if random.random() < 0.5 else np.maximum(across, down) <= 1
    return inside.astype(np.float32)


def tag_variants(config: TrainConfig, name: str, text: str) -> list[str]:
    """The versions of a text of comma-separated tags: itself first, then shuffled and thinned ones, each once.

    The first keep_tags tags stay where they are; of the others at least one is left.
    """
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    fixed, free = tags[: config.keep_tags], tags[config.keep_tags :]
    if not (config.shuffle_tags or config.tag_dropout) or not free:
        return [text]
    versions = [text]
    for n in range(1, config.caption_variants):
        random = draws.generator(config.seed, "tags", step=n, sample=key_of(name))
        order = random.permutation(len(free)) if config.shuffle_tags else range(len(free))
        kept = random.random(len(free)) >= config.tag_dropout
        kept[random.integers(len(free))] = True
        versions.append(", ".join([*fixed, *(free[k] for k in order if kept[k])]))
    return list(dict.fromkeys(versions))
