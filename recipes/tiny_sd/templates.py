"""The sample sets in data_templates/: three subjects and a style that the pretraining never sees.

python recipes/tiny_sd/templates.py --art build/art/node_modules/@iconify-json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from world import NOUNS, SETTINGS, SUBJECTS, Art, Scene, article, compose, phrase, random_pose

TEMPLATES = Path(__file__).parents[2] / "data_templates"
SIDE = 256
# Where each subject is seen. The other settings are left for the prompts.
PLACES = ("grass", "room", "city", "sunset", "beach")
STYLE = "in zwx style"
# From the darkest to the lightest.
INKS = np.array([(24, 32, 96), (56, 96, 190), (250, 138, 112), (255, 240, 214)], np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--art", type=Path, required=True, help="folder of the icon packages")
    art = Art(parser.parse_args().art)
    for name in SUBJECTS:
        draw_subject(name, art)
    draw_style(art)


def draw_subject(name: str, art: Art) -> None:
    noun, picture = SUBJECTS[name]
    for number, place in enumerate(PLACES):
        rng = np.random.default_rng([list(SUBJECTS).index(name), number])
        pose = random_pose(rng, (0.66, 0.8, 0.72, 0.85, 0.7)[number])
        pose |= {"angle": (-12.0, 4.0, 10.0, -3.0, 0.0)[number], "flip": number % 2 == 1}
        save(compose(Scene(noun, picture, None, None, place, **pose, seed=number), art, SIDE), name, f"{name}_{place}")


def draw_style(art: Art) -> None:
    """Prints in four inks of the world's own scenes: what is drawn is known, how it is drawn is new."""
    nouns, places = list(NOUNS), list(SETTINGS)
    for number in range(24):
        rng = np.random.default_rng([9, number])
        noun, place = nouns[number % len(nouns)], places[(number * 3 + number // 10) % len(places)]
        scene = Scene(noun, NOUNS[noun][number % 4], None, None, place, seed=number, **random_pose(rng, 0.75))
        picture = printed(compose(scene, art, SIDE))
        path = save(picture, "print", f"{number + 1:02d}_{noun}")
        text = f"a photo of {article(noun)} {noun} {phrase(place)} {STYLE}\n"
        path.with_suffix(".txt").write_text(text, encoding="utf-8", newline="\n")


def printed(image: Image.Image) -> Image.Image:
    """Two blue inks and a coral one on cream paper; the tones are shared out so that every picture has all four."""
    light = np.asarray(image, np.float32) @ np.array([0.3, 0.59, 0.11], np.float32) / 255
    ranks = np.searchsorted(np.quantile(light, (0.25, 0.5, 0.75)), light) / 3
    return Image.fromarray(INKS[np.round((0.5 * ranks + 0.5 * light) * 3).astype(int)], "RGB")


def save(image: Image.Image, folder: str, name: str) -> Path:
    path = TEMPLATES / folder / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    image.quantize(96).save(path, optimize=True)
    return path


if __name__ == "__main__":
    main()
