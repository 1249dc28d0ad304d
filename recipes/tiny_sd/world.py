"""The toy world: a named object, perhaps tinted, of some size, in a named setting, with a caption that says so.

Everything is a function of a seed: the same numbers make the same pictures and the same words.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Objects of one kind and nearly one pose for each noun: a noun whose pictures disagree is learnt as a blob.
# Each entry is SET/ICON in the icon packages that README.md lists with their licences.
NOUNS: dict[str, list[str]] = {
    "dog": ["fluent-emoji/dog", "fluent-emoji-flat/dog", "twemoji/dog", "noto/guide-dog", "fluent-emoji/guide-dog"],
    "cat": ["noto/black-cat", "fluent-emoji/black-cat", "fluent-emoji-flat/black-cat", "twemoji/black-cat"],
    "elephant": ["noto/elephant", "fluent-emoji/elephant", "fluent-emoji-flat/elephant", "fxemoji/elephant",
                 "twemoji/elephant"],
    "penguin": ["noto/penguin", "noto-v1/penguin", "fluent-emoji/penguin", "fluent-emoji-flat/penguin",
                "fxemoji/penguin", "twemoji/penguin"],
    "chick": ["noto/baby-chick", "noto-v1/baby-chick", "fluent-emoji/baby-chick", "fluent-emoji-flat/baby-chick",
              "twemoji/baby-chick"],
    "crab": ["noto/crab", "noto-v1/crab", "fluent-emoji/crab", "fluent-emoji-flat/crab", "twemoji/crab"],
    "turtle": ["noto/turtle", "noto-v1/turtle", "fluent-emoji/turtle", "fluent-emoji-flat/turtle", "twemoji/turtle"],
    "fish": ["noto/fish", "noto-v1/fish", "fluent-emoji/fish", "fluent-emoji-flat/fish", "fxemoji/fish",
             "twemoji/fish", "fluent-emoji/tropical-fish"],
    "car": ["noto/automobile", "noto-v1/automobile", "fluent-emoji-flat/automobile", "twemoji/automobile",
            "noto/sport-utility-vehicle", "twemoji/sport-utility-vehicle"],
    "house": ["noto/house", "noto-v1/house", "fluent-emoji/house", "fluent-emoji-flat/house", "twemoji/house"],
    "boat": ["noto/sailboat", "noto-v1/sailboat", "fluent-emoji/sailboat", "fluent-emoji-flat/sailboat",
             "twemoji/sailboat"],
    "rocket": ["noto/rocket", "fluent-emoji/rocket", "fluent-emoji-flat/rocket", "fxemoji/rocket", "twemoji/rocket"],
    "balloon": ["noto/balloon", "fluent-emoji/balloon", "fluent-emoji-flat/balloon", "twemoji/balloon"],
    "umbrella": ["noto/umbrella", "noto-v1/umbrella", "fluent-emoji/umbrella", "fluent-emoji-flat/umbrella",
                 "twemoji/umbrella"],
    "mushroom": ["noto/mushroom", "fluent-emoji/mushroom", "fluent-emoji-flat/mushroom", "fxemoji/mushroom",
                 "twemoji/mushroom"],
    "flower": ["noto/sunflower", "noto-v1/sunflower", "fluent-emoji/sunflower", "fluent-emoji-flat/sunflower",
               "fxemoji/sunflower", "twemoji/sunflower"],
}  # fmt: skip

# Never in the pretraining: what DreamBooth is shown on. Name, class, art.
SUBJECTS: dict[str, tuple[str, str]] = {
    "poodle": ("dog", "noto-v1/poodle"),
    "clownfish": ("fish", "emojione/tropical-fish"),
    "racer": ("car", "twemoji/racing-car"),
}
# Also kept out, for measuring how the VAE does on art it has not seen.
HELD_OUT = ["noto/cat", "noto/teapot", "twemoji/octopus", "noto/butterfly", "noto/tropical-fish", "twemoji/backpack"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (224, 46, 44), "orange": (246, 138, 32), "yellow": (250, 212, 46), "green": (58, 170, 70),
    "blue": (46, 98, 226), "purple": (136, 66, 196), "pink": (246, 124, 178), "white": (238, 238, 240),
}  # fmt: skip

SETTINGS = {
    "beach": "on the beach", "grass": "on the grass", "snow": "in the snow", "city": "in the city",
    "water": "under water", "space": "in space", "sunset": "at sunset", "room": "in a room",
    "forest": "in the forest", "desert": "in the desert",
}  # fmt: skip
OPENINGS = ("a photo of", "photo of", "a picture of")
# Drawn once at this size, and reduced from there.
SPRITE = 160


@dataclass(frozen=True)
class Scene:
    """One picture of the world. x, y: the object's centre, height: its size, all as shares of the picture's side."""

    noun: str
    art: str
    tint: str | None
    size: str | None
    place: str  # a key of SETTINGS, or of COLOURS for a plain background
    x: float = 0.5
    y: float = 0.5
    height: float = 0.7
    flip: bool = False
    angle: float = 0.0
    seed: int = 0


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of the pretraining: every noun, tint and place meets every other."""
    noun = str(rng.choice(list(NOUNS)))
    size = str(rng.choice(["small", "big"])) if rng.random() < 0.2 else None
    low, high = {"small": (0.42, 0.5), "big": (0.84, 0.96), None: (0.58, 0.82)}[size]
    return Scene(
        noun=noun,
        art=str(rng.choice(NOUNS[noun])),
        tint=str(rng.choice(list(COLOURS))) if rng.random() < 0.4 else None,
        size=size,
        place=str(rng.choice(list(SETTINGS if rng.random() < 0.85 else COLOURS))),
        seed=int(rng.integers(1 << 31)),
        **random_pose(rng, float(rng.uniform(low, high))),
    )


def random_pose(rng: np.random.Generator, height: float) -> dict[str, float | bool]:
    """A place in the picture in which the object fits, its mirror image or not, and a slight turn."""
    room = max(0.0, (1 - height) / 2)
    return {
        "x": 0.5 + float(rng.uniform(-room, room)) * 0.8,
        "y": 0.54 + float(rng.uniform(-room, room)) * 0.6,
        "height": height,
        "flip": bool(rng.random() < 0.5),
        "angle": float(rng.uniform(-8, 8)),
    }


def phrase(place: str) -> str:
    return SETTINGS.get(place) or f"on a {place} background"


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def caption(scene: Scene, rng: np.random.Generator, identifiers: tuple[str, ...] = ()) -> str:
    """What a person would say of the scene. Sometimes the setting is left unsaid, and sometimes a word without meaning
    stands before the noun, so that a new identifier is a blank for the base model and not a shock."""
    words = [word for word in (scene.size, scene.tint) if word]
    if identifiers and rng.random() < 0.08:
        words.append(str(rng.choice(identifiers)))
    words.append(scene.noun)
    said = f"{article(words[0])} " if rng.random() < 0.9 or len(words) == 1 else ""
    text = f"{rng.choice(OPENINGS)} {said}{' '.join(words)}"
    return text if rng.random() < 0.12 else f"{text} {phrase(scene.place)}"


class Art:
    """The sprites: RGBA pictures of SPRITE pixels, cropped to what is drawn."""

    def __init__(self, folder: Path):
        """folder: node_modules/@iconify-json of the packages in README.md."""
        self.folder, self.sets, self.sprites = folder, {}, {}

    def others(self) -> list[str]:
        """Every icon of three sets, save those that are held out, under whatever set. The VAE sees them all."""
        held_out = {name.split("/")[1] for name in [*HELD_OUT, *(art for _, art in SUBJECTS.values())]}
        names = [
            {f"{package}/{icon}" for icon in self._set(package)["icons"] if icon not in held_out}
            for package in ("noto", "twemoji", "fluent-emoji-flat")
        ]
        # Flags and skin tones are many and alike.
        return sorted(name for name in set.union(*names) if "flag" not in name and "skin" not in name)

    def _set(self, package: str) -> dict:
        if package not in self.sets:
            self.sets[package] = json.loads((self.folder / package / "icons.json").read_text(encoding="utf-8"))
        return self.sets[package]

    def __getitem__(self, name: str) -> Image.Image:
        if name not in self.sprites:
            self.sprites[name] = self._draw(*name.split("/"))
        return self.sprites[name]

    def _draw(self, package: str, icon: str) -> Image.Image:
        import resvg_py

        data = self._set(package)
        entry = data["icons"][icon]
        left, top, width, height = (
            entry.get(key, data.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{entry["body"]}</svg>'
        )
        drawn = resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE * 2, height=SPRITE * 2)
        sprite = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
        sprite = sprite.crop(sprite.getchannel("A").getbbox())
        sprite.thumbnail((SPRITE, SPRITE), Image.Resampling.LANCZOS)
        return sprite


def compose(scene: Scene, art: Art, side: int) -> Image.Image:
    """The picture of a scene, side x side pixels, drawn at four times that size."""
    large = side * 4
    picture = background(scene.place, np.random.default_rng(scene.seed), large)
    sprite = art[scene.art]
    if scene.tint:
        sprite = tinted(sprite, COLOURS[scene.tint])
    if scene.flip:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = scene.height * large / max(sprite.size)
    size = tuple(max(1, round(length * scale)) for length in sprite.size)
    sprite = sprite.resize(size, Image.Resampling.BICUBIC)
    sprite = sprite.rotate(scene.angle, Image.Resampling.BICUBIC, expand=True)
    corner = round(scene.x * large - sprite.width / 2), round(scene.y * large - sprite.height / 2)
    picture.paste(sprite, corner, sprite)
    return picture.resize((side, side), Image.Resampling.BOX)


def tinted(sprite: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The sprite in shades of one colour: its darks stay dark, its lights light, and its middle becomes the colour."""
    pixels = np.asarray(sprite, np.float32) / 255
    light = pixels[..., :3] @ np.array([0.3, 0.59, 0.11], np.float32)
    seen = light[pixels[..., 3] > 0.5]
    low, middle, high = np.percentile(seen, [3, 50, 97])
    light = np.clip((light - low) / max(high - low, 0.05), 0, 1)
    middle = np.clip((middle - low) / max(high - low, 0.05), 0.1, 0.9)
    light = (light ** (np.log(0.5) / np.log(middle)))[..., None]
    tone = np.array(colour, np.float32) / 255
    shaded = np.where(light < 0.5, tone * (0.35 + 1.3 * light), tone + (1 - tone) * (light - 0.5) * 1.4)
    pixels = np.concatenate([0.88 * shaded + 0.12 * pixels[..., :3], pixels[..., 3:]], axis=-1)
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8), "RGBA")


def background(place: str, rng: np.random.Generator, side: int) -> Image.Image:
    """An empty setting or a plain colour."""
    if place in COLOURS:
        shift = rng.integers(-14, 15, 3)
        return Image.new(
            "RGB", (side, side), tuple(int(value) for value in np.clip(np.add(COLOURS[place], shift), 0, 255))
        )
    return {
        "beach": _beach, "grass": _grass, "snow": _snow, "city": _city, "water": _water, "space": _space,
        "sunset": _sunset, "room": _room, "forest": _forest, "desert": _desert,
    }[place](rng, side)  # fmt: skip


def _gradient(side: int, top: tuple[int, ...], bottom: tuple[int, ...], rng: np.random.Generator) -> Image.Image:
    shift = rng.integers(-10, 11, 3)
    ramp = np.linspace(np.add(top, shift), np.add(bottom, shift), side)
    return Image.fromarray(np.broadcast_to(ramp.clip(0, 255).astype(np.uint8)[:, None], (side, side, 3)).copy(), "RGB")


def _jitter(colour: tuple[int, int, int], rng: np.random.Generator, by: int = 12) -> tuple[int, ...]:
    return tuple(int(value) for value in np.clip(np.add(colour, rng.integers(-by, by + 1, 3)), 0, 255))


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: tuple[int, ...]) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _beach(rng: np.random.Generator, side: int) -> Image.Image:
    image = _gradient(side, (120, 200, 250), (200, 235, 255), rng)
    pen = ImageDraw.Draw(image)
    if rng.random() < 0.7:
        _disc(pen, side * rng.uniform(0.1, 0.9), side * rng.uniform(0.08, 0.2), side * 0.08, (255, 230, 90))
    sea, sand = side * rng.uniform(0.4, 0.5), side * rng.uniform(0.56, 0.68)
    pen.rectangle((0, sea, side, sand), fill=_jitter((30, 130, 200), rng))
    pen.rectangle((0, sand, side, side), fill=_jitter((245, 222, 150), rng))
    pen.rectangle((0, sand - side * 0.02, side, sand + side * 0.02), fill=(245, 250, 250))
    return image


def _grass(rng: np.random.Generator, side: int) -> Image.Image:
    image = _gradient(side, (110, 190, 250), (190, 230, 255), rng)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 3)):
        x, y = side * rng.uniform(0.1, 0.9), side * rng.uniform(0.08, 0.25)
        for step in (-0.07, 0, 0.07):
            _disc(pen, x + step * side, y, side * 0.055, (255, 255, 255))
    land = side * rng.uniform(0.45, 0.6)
    pen.rectangle((0, land, side, side), fill=_jitter((92, 190, 62), rng))
    pen.rectangle((0, (land + side) / 2, side, side), fill=_jitter((72, 168, 48), rng))
    return image


def _snow(rng: np.random.Generator, side: int) -> Image.Image:
    image = _gradient(side, (150, 172, 200), (205, 218, 235), rng)
    pen = ImageDraw.Draw(image)
    land = side * rng.uniform(0.5, 0.65)
    pen.ellipse((-side * 0.4, land - side * 0.06, side * 0.8, land + side * 0.5), fill=(236, 242, 250))
    pen.rectangle((0, land + side * 0.03, side, side), fill=(248, 250, 255))
    for _ in range(14):
        _disc(pen, side * rng.random(), side * rng.random(), side * 0.018, (255, 255, 255))
    return image


def _city(rng: np.random.Generator, side: int) -> Image.Image:
    image = _gradient(side, (176, 186, 200), (214, 216, 222), rng)
    pen = ImageDraw.Draw(image)
    road = side * rng.uniform(0.7, 0.8)
    x = -side * 0.05
    while x < side:
        width, top = side * rng.uniform(0.16, 0.26), side * rng.uniform(0.1, 0.42)
        pen.rectangle((x, top, x + width, road), fill=_jitter((118, 120, 136), rng, 22))
        for row in np.arange(top + side * 0.06, road - side * 0.08, side * 0.14):
            for column in np.arange(x + side * 0.035, x + width - side * 0.06, side * 0.1):
                pen.rectangle((column, row, column + side * 0.045, row + side * 0.06), fill=(232, 214, 140))
        x += width + side * rng.uniform(0, 0.03)
    pen.rectangle((0, road, side, side), fill=_jitter((74, 76, 84), rng))
    return image


def _water(rng: np.random.Generator, side: int) -> Image.Image:
    image = _gradient(side, (46, 150, 222), (12, 62, 134), rng)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, side * rng.uniform(0.88, 0.94), side, side), fill=_jitter((176, 156, 110), rng))
    for _ in range(rng.integers(2, 5)):
        x, top = side * rng.uniform(0, 1), side * rng.uniform(0.6, 0.8)
        pen.line(
            [(x, side), (x + side * 0.03, (side + top) / 2), (x - side * 0.02, top)], (30, 130, 84), round(side * 0.04)
        )
    for _ in range(rng.integers(4, 9)):
        _disc(pen, side * rng.random(), side * rng.uniform(0, 0.85), side * rng.uniform(0.012, 0.03), (150, 210, 245))
    return image


def _space(rng: np.random.Generator, side: int) -> Image.Image:
    image = _gradient(side, (8, 8, 26), (22, 14, 48), rng)
    pen = ImageDraw.Draw(image)
    for _ in range(26):
        _disc(pen, side * rng.random(), side * rng.random(), side * rng.uniform(0.006, 0.016), (250, 250, 235))
    if rng.random() < 0.7:
        x, y = side * rng.choice([0.14, 0.86]), side * rng.uniform(0.1, 0.3)
        _disc(pen, x, y, side * rng.uniform(0.08, 0.12), _jitter((206, 130, 96), rng, 40))
    return image


def _sunset(rng: np.random.Generator, side: int) -> Image.Image:
    image = _gradient(side, (88, 50, 130), (255, 140, 60), rng)
    pen = ImageDraw.Draw(image)
    land = side * rng.uniform(0.64, 0.74)
    _disc(pen, side * rng.uniform(0.2, 0.8), land, side * 0.16, (255, 214, 90))
    pen.rectangle((0, land, side, side), fill=_jitter((62, 30, 62), rng))
    return image


def _room(rng: np.random.Generator, side: int) -> Image.Image:
    image = Image.new("RGB", (side, side), _jitter((238, 214, 190), rng, 20))
    pen = ImageDraw.Draw(image)
    floor = side * rng.uniform(0.66, 0.76)
    x, y, size = side * rng.choice([0.08, 0.64]), side * 0.08, side * 0.28
    pen.rectangle((x, y, x + size, y + size), fill=(255, 255, 255))
    for column in (0.08, 0.54):
        for row in (0.08, 0.54):
            corner = x + column * size, y + row * size
            pen.rectangle((*corner, corner[0] + 0.38 * size, corner[1] + 0.38 * size), fill=(140, 200, 240))
    pen.rectangle((0, floor, side, side), fill=_jitter((150, 96, 58), rng))
    pen.rectangle((0, floor, side, floor + side * 0.035), fill=(250, 246, 240))
    return image


def _forest(rng: np.random.Generator, side: int) -> Image.Image:
    image = _gradient(side, (26, 78, 52), (44, 108, 62), rng)
    pen = ImageDraw.Draw(image)
    for x in np.arange(rng.uniform(0, 0.1), 1, 0.2):
        at, width = side * (x + rng.uniform(-0.03, 0.03)), side * rng.uniform(0.05, 0.08)
        pen.rectangle((at, 0, at + width, side * 0.8), fill=_jitter((92, 62, 40), rng))
    for _ in range(9):
        _disc(pen, side * rng.random(), side * rng.uniform(0, 0.14), side * 0.11, _jitter((30, 112, 54), rng, 16))
    pen.rectangle((0, side * rng.uniform(0.72, 0.8), side, side), fill=_jitter((40, 74, 34), rng))
    return image


def _desert(rng: np.random.Generator, side: int) -> Image.Image:
    image = _gradient(side, (250, 226, 170), (252, 240, 210), rng)
    pen = ImageDraw.Draw(image)
    land = side * rng.uniform(0.45, 0.58)
    pen.ellipse((-side * 0.5, land, side * rng.uniform(0.6, 0.9), side * 1.6), fill=_jitter((226, 150, 76), rng))
    pen.ellipse((side * 0.25, land + side * 0.08, side * 1.6, side * 1.6), fill=_jitter((206, 120, 56), rng))
    pen.rectangle((0, side * 0.86, side, side), fill=_jitter((200, 116, 54), rng))
    return image
