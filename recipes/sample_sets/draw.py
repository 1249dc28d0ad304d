"""Draws the sample sets in data_templates/: a toy robot in five places, and eight captioned pictures of one style.

    python recipes/sample_sets/draw.py

The same command makes the same files. The drawings are the project's own.
"""

import random
from pathlib import Path

from PIL import Image, ImageDraw

TEMPLATES = Path(__file__).parents[2] / "data_templates"
ZOOM = 4  # drawn large and reduced, for smooth edges

PLACES = {
    "beach": ("skyblue", "khaki"),
    "grass": ("lightcyan", "yellowgreen"),
    "room": ("bisque", "sienna"),
    "night": ("midnightblue", "darkslategray"),
    "snow": ("lightsteelblue", "snow"),
}
# Size of the picture, then centre and height of the robot as shares of it: wide, tall and square, near and far.
VIEWS = [((320, 240), 0.4, 0.6, 0.6), ((240, 320), 0.5, 0.65, 0.5), ((256, 256), 0.55, 0.55, 0.75),
         ((300, 240), 0.6, 0.62, 0.5), ((256, 256), 0.45, 0.6, 0.6)]  # fmt: skip


def robot(pen: ImageDraw.ImageDraw, x: float, y: float, height: float) -> None:
    """A teal robot with an orange antenna, yellow eyes and a red heart, centred at (x, y)."""
    unit = height / 12
    top = y - height / 2

    def box(left: float, up: float, right: float, down: float, colour: str, radius: float = 0.5) -> None:
        corners = (x + left * unit, top + up * unit, x + right * unit, top + down * unit)
        pen.rounded_rectangle(corners, radius * unit, fill=colour)

    box(-0.15, 0.8, 0.15, 2.2, "dimgray")
    box(-0.6, 0, 0.6, 1.2, "darkorange", 0.6)
    box(-3, 2, 3, 5.6, "teal", 1)
    for eye in (-1.9, 0.5):
        box(eye, 2.9, eye + 1.4, 4.3, "gold", 0.7)
        box(eye + 0.45, 3.3, eye + 0.95, 3.9, "black", 0.3)
    box(-2.6, 6, 2.6, 10, "cadetblue", 0.6)
    box(-0.9, 7, 0.1, 8, "crimson")
    box(-0.1, 7, 0.9, 8, "crimson")
    pen.polygon(
        [(x - 0.85 * unit, top + 7.8 * unit), (x + 0.85 * unit, top + 7.8 * unit), (x, top + 9 * unit)], "crimson"
    )
    for side in (-1, 1):
        box(min(side * 2.8, side * 3.8), 6.2, max(side * 2.8, side * 3.8), 9.2, "teal")
        box(min(side * 0.5, side * 2), 10.2, max(side * 0.5, side * 2), 12, "dimgray", 0.3)


def draw_subject() -> None:
    for (place, (sky, ground)), ((width, height), x, y, tall) in zip(PLACES.items(), VIEWS):
        image = Image.new("RGB", (width * ZOOM, height * ZOOM), sky)
        pen = ImageDraw.Draw(image)
        pen.rectangle((0, height * ZOOM * 0.7, width * ZOOM, height * ZOOM), fill=ground)
        robot(pen, x * width * ZOOM, y * height * ZOOM, tall * height * ZOOM)
        save(image, (width, height), TEMPLATES / "robot" / f"robot_{place}.png")


SCENES = ["a house", "a tree", "a boat", "a mountain", "a fish", "a flower", "the moon", "a cat"]


def draw_style() -> None:
    """Scenes laid out in coloured tiles, like a mosaic."""
    for number, scene in enumerate(SCENES):
        shape = Image.new("L", (16, 16), 0)
        _shapes(ImageDraw.Draw(shape), scene)
        chance = random.Random(number)
        image = Image.new("RGB", (256 * ZOOM, 256 * ZOOM), "#2b2b33")
        pen = ImageDraw.Draw(image)
        figure, ground = chance.sample(
            [(214, 92, 66), (236, 178, 62), (70, 130, 160), (92, 140, 88), (150, 96, 150)], 2
        )
        for row in range(16):
            for column in range(16):
                base = figure if shape.getpixel((column, row)) else ground
                colour = tuple(max(0, min(255, value + chance.randint(-26, 26))) for value in base)
                left, top, tile = column * 16 * ZOOM, row * 16 * ZOOM, 16 * ZOOM
                pen.rounded_rectangle((left + 3, top + 3, left + tile - 3, top + tile - 3), 8, fill=colour)
        path = TEMPLATES / "mosaic" / f"{scene.split()[-1]}.png"
        save(image, (256, 256), path)
        path.with_suffix(".txt").write_text(f"{scene}, in zwx mosaic style\n", encoding="utf-8", newline="\n")


def _shapes(pen: ImageDraw.ImageDraw, scene: str) -> None:
    match scene:
        case "a house":
            pen.polygon([(2, 7), (13, 7), (8, 2)], 1)
            pen.rectangle((4, 8, 12, 13), 1)
        case "a tree":
            pen.ellipse((3, 1, 12, 9), 1)
            pen.rectangle((7, 9, 8, 14), 1)
        case "a boat":
            pen.polygon([(2, 10), (13, 10), (11, 13), (4, 13)], 1)
            pen.polygon([(7, 1), (7, 9), (12, 9)], 1)
        case "a mountain":
            pen.polygon([(0, 14), (5, 4), (10, 14)], 1)
            pen.polygon([(6, 14), (11, 7), (15, 14)], 1)
        case "a fish":
            pen.ellipse((2, 4, 11, 11), 1)
            pen.polygon([(10, 8), (14, 4), (14, 12)], 1)
        case "a flower":
            for x, y in ((5, 2), (9, 2), (3, 6), (11, 6), (7, 7)):
                pen.ellipse((x - 1, y - 1, x + 2, y + 2), 1)
            pen.line((8, 9, 8, 14), 1)
        case "the moon":
            pen.ellipse((3, 2, 13, 12), 1)
            pen.ellipse((7, 1, 15, 10), 0)
        case "a cat":
            pen.polygon([(3, 7), (3, 1), (7, 5)], 1)
            pen.polygon([(12, 7), (12, 1), (8, 5)], 1)
            pen.ellipse((2, 4, 13, 13), 1)


def save(image: Image.Image, size: tuple[int, int], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    image.resize(size, Image.Resampling.LANCZOS).quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    draw_subject()
    draw_style()
