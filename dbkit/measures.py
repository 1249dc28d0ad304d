"""What is measured of a picture before training: sharpness, light, bars, text, and a hash by which copies are known."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# Images are judged on a copy whose shorter side is at most so many pixels, so that no figure depends on the camera.
WORK_SIDE = 512
# Below, blur and text mean nothing: an edge is as wide as the picture's shapes, and a letter has no room.
LEAST_SIDE = 64

# The figures below were measured on the 14 photographs of three DreamBooth subjects (dog6, backpack_dog, duck_toy), on
# the 39 drawings in data_templates, on subjects cut out of the photographs, and on copies damaged by program.

# A cut-out's background touches most of the edge (at least 0.88; 0.55 in a photograph twice as bright, whose sky has
# burnt) and ends abruptly (over at least 0.99 of its outline; 0.69).
BACKGROUND_EDGE, BACKGROUND_ABRUPT = 0.60, 0.80
# Each bar takes at least 2 % of the side; thinner ones are lost with the crop's edge. Where it ends the picture differs
# over at least 0.83 of the length at one of the two bars of a pair; at a cut-out's background over 0.31 at most.
BAR_LEAST, BAR_EDGE, BAR_OTHER_EDGE = 0.02, 0.70, 0.40
# Of the hashes tried, phash of 256 bits parts copies from other pictures best.
HASH_SIDE = 16
# Where no text is, the reader sees some all the same: three letters or more with a certainty of 0.73 at most. Text that
# is there it reads with 0.92 at least.
TEXT_CERTAIN, TEXT_LETTERS = 0.9, 3
TEXT_SIDE = 736


@dataclass(frozen=True)
class Measures:
    """What is kept of one decoded image; shares are 0 to 1."""

    width: int
    height: int
    # 0 sharp, 1 blurred; 0 where the picture is too small to tell.
    blur: float
    # Of the pixels inside bars and frames, without a cut-out's white background: the share that is burnt, and the share
    # that glows beside it.
    burnt: float
    glow: float
    # Luma, 0 to 255, that 19 of 20 of the pixels stay below; without a cut-out's black background.
    light: float
    # Share of the picture that bars or a frame cover.
    border: float
    # Hex hashes of the picture inside bars and frames, and of its mirror image.
    phash: str
    mirrored: str
    # Share of the picture that text covers, None where no reader is installed; and what was read.
    text: float | None
    words: str = ""


def measure(image: Image.Image, *, text: bool = True) -> Measures:
    """Everything that is looked at in one image, which is upright and RGB. text=False spares its slowest part.

    Text is read by rapidocr, where that is installed.
    """
    import numpy as np
    from PIL import ImageOps

    work = _at_most(image, WORK_SIDE)
    left, top, right, bottom = _inside_bars(np.asarray(work).astype(np.int16))
    inside = work.crop((left, top, right, bottom))
    burnt, glow, light = _exposure(inside)
    share, words = _text(image) if text else (None, "")
    return Measures(
        width=image.width,
        height=image.height,
        blur=_blur(np.asarray(inside.convert("L"), dtype=np.float32)),
        burnt=burnt,
        glow=glow,
        light=light,
        border=1 - inside.width * inside.height / (work.width * work.height),
        phash=fingerprint(inside),
        mirrored=fingerprint(ImageOps.mirror(inside)),
        text=share,
        words=words,
    )


def fingerprint(image: Image.Image) -> str:
    """The picture's perceptual hash in hex, 256 bits: little changed by size, compression and light.

    Of the hashes tried (phash, dhash and whash, of 64 to 256 bits) this one parts copies from other pictures best.
    """
    import imagehash

    return str(imagehash.phash(image, hash_size=HASH_SIDE))


def _at_most(image: Image.Image, side: int) -> Image.Image:
    """The image, made smaller if its shorter side has more pixels."""
    from PIL import Image

    scale = side / min(image.size)
    if scale >= 1:
        return image
    # Each pixel the mean of those it stands for: straight edges stay straight, and nothing rings beside them.
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX)


def _blur(grey: np.ndarray) -> float:
    """How little of the steepest edges another blur takes away, 0 to 1; grey has shape (height, width), 0 to 255.

    The idea of Crete et al. 2007, "The blur effect", with two changes. Edges count by the cube of their height, so that
    the sharpest thing in a picture decides and neither a plain nor a blurred background, nor noise. And four directions
    are looked at and the worst is taken, so that motion is seen as well.
    """
    import numpy as np

    length = 9  # pixels that the other blur runs over
    if min(grey.shape) < LEAST_SIDE:
        return 0.0
    blurs = []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):

        def moved(steps: int, down: int = down, right: int = right) -> np.ndarray:
            height, width = grey.shape[0] - length * down, grey.shape[1] - length * abs(right)
            y, x = steps * down, steps * right if right >= 0 else length + steps * right
            return grey[y : y + height, x : x + width]

        edges = np.abs(moved(length // 2 + 1) - moved(length // 2)).astype(np.float64)
        # A running mean changes by the difference of what enters and what leaves, over its length.
        softened = np.abs(moved(length) - moved(0)) / length
        lost = np.maximum(edges - softened, 0)
        total = (edges**3).sum()
        blurs.append(1 - float((edges**2 * lost).sum() / total) if total else 1.0)
    return max(blurs)


def _exposure(image: Image.Image) -> tuple[float, float, float]:
    """The figures burnt, glow and light of Measures."""
    import numpy as np

    pixels = np.asarray(_at_most(image, 128)).astype(np.int16)
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    # The brightness keeps pure yellow, cyan and magenta out, which drawings use.
    burnt = (np.sort(pixels, axis=2)[..., 1] >= 253) & (luma >= 230)
    white = _reached(pixels.min(axis=2) >= 250)
    counts = ~white if _is_cut_out(white, pixels) else np.ones_like(white)
    seen = ~_reached(pixels.max(axis=2) <= 8)
    # Light that burns also leaves a glow around, which changes from pixel to pixel; a drawing's pale areas are even.
    uneven = np.abs(np.diff(luma, axis=0, append=luma[-1:])) + np.abs(np.diff(luma, axis=1, append=luma[:, -1:])) > 0.5
    glowing = (luma >= 215) & ~burnt & uneven
    share, glow = (float(part[counts].mean()) if counts.any() else 0.0 for part in (burnt, glowing))
    return share, glow, float(np.percentile(luma[seen], 95)) if seen.any() else 0.0


def _reached(mask: np.ndarray) -> np.ndarray:
    """What of the mask, shape (height, width), is connected with the picture's edge."""
    import numpy as np

    reached = mask.copy()
    reached[1:-1, 1:-1] = False
    while True:
        grown = _grown(reached) & mask
        if np.array_equal(grown, reached):
            return reached
        reached = grown


def _grown(mask: np.ndarray) -> np.ndarray:
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _is_cut_out(white: np.ndarray, pixels: np.ndarray) -> bool:
    """Whether the white that reaches the edge is a background put there, and not a sky that burnt."""
    import numpy as np

    edge = np.concatenate([white[0], white[-1], white[:, 0], white[:, -1]])
    # Three pixels off, beyond what resizing and JPEG blend.
    near = _grown(_grown(white))
    outline = _grown(near) & ~near
    if edge.mean() < BACKGROUND_EDGE or not outline.any():
        return False
    return bool((pixels.min(axis=2)[outline] < 215).mean() >= BACKGROUND_ABRUPT)


def _inside_bars(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) inside bars and frames; everything where there are none.

    pixels have shape (height, width, 3).

    Bars come in pairs of one colour, left and right or top and bottom, and the picture begins abruptly at a straight
    line. Before a cut-out's background it is the subject that begins, which takes little of that line.
    """
    height, width = pixels.shape[:2]
    turned = pixels.swapaxes(0, 1)
    strips = [_strip(side) for side in (turned, pixels, turned[::-1], pixels[::-1])]
    left, top, right, bottom = (deep for deep, _ in strips)
    if left + right >= width or top + bottom >= height:
        return 0, 0, width, height  # one colour and nothing else
    tall = _are_bars(strips[0], strips[2], turned[:, top : height - bottom])
    wide = _are_bars(strips[1], strips[3], pixels[:, left : width - right])
    box = (left if tall else 0, top if wide else 0, width - right * tall, height - bottom * wide)
    return box


def _strip(pixels: np.ndarray) -> tuple[int, np.ndarray]:
    """How many rows from the first on are of one colour, and the colour, shape (3,)."""
    import numpy as np

    colour = np.median(pixels[0], axis=0)
    # JPEG blurs a bar's corners and dust sits on scans, so a few pixels of each row may differ.
    alike = (np.abs(pixels - colour).max(axis=2) <= 12).mean(axis=1) >= 0.97
    return len(alike) if alike.all() else int(alike.argmin()), colour


def _are_bars(first: tuple[int, np.ndarray], last: tuple[int, np.ndarray], pixels: np.ndarray) -> bool:
    """Whether two strips, at the first and at the last rows, are bars that belong together."""
    import numpy as np

    deep, others = (first[0], last[0]), (pixels, pixels[::-1])
    if min(deep) < max(BAR_LEAST * len(pixels), 2) or np.abs(first[1] - last[1]).max() > 16:
        return False
    # Two rows further in, beyond what resizing and JPEG blend.
    rows = [side[min(at + 2, len(side) - 1)] for side, at in zip(others, deep)]
    edges = [(np.abs(row - colour).max(axis=1) > 24).mean() for row, (_, colour) in zip(rows, (first, last))]
    # Where a dark picture meets a black bar only the other edge shows; then the two must be equally thick.
    return max(edges) >= BAR_EDGE and (min(edges) >= BAR_OTHER_EDGE or max(deep) <= 1.15 * min(deep))


def _text(image: Image.Image) -> tuple[float | None, str]:
    """The share of the picture that text covers, and what was read; None and nothing where no reader is installed."""
    import numpy as np

    reader = _reader()
    if reader is None or min(image.size) < LEAST_SIDE:
        return (None if reader is None else 0.0), ""
    small = _at_most(image, TEXT_SIDE)
    with _silenced():
        # Detection alone would be faster, but takes dogs and walls for text; what it finds must be readable.
        result = reader(np.asarray(small)[..., ::-1], use_det=True, use_cls=False, use_rec=True)
    texts, boxes = getattr(result, "txts", None), getattr(result, "boxes", None)
    if texts is None or boxes is None:
        return 0.0, ""
    read = [
        (word, _area(np.asarray(box)))
        for word, score, box in zip(texts, result.scores, boxes)
        if score >= TEXT_CERTAIN and sum(letter.isalnum() for letter in word) >= TEXT_LETTERS
    ]
    share = sum(area for _, area in read) / (small.width * small.height)
    return min(share, 1.0), " ".join(word for word, _ in read)


def _area(corners: np.ndarray) -> float:
    """The area of a polygon, by the shoelace formula; corners has shape (n, 2)."""
    import numpy as np

    x, y = corners.astype(np.float64).T
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


@functools.cache
def _reader() -> Any | None:
    """The reader of text, with the models that its package carries; None where the package is not installed."""
    try:
        with _silenced():
            # What it computes with is a package of its own, which it would only miss at the first picture.
            import onnxruntime  # noqa: F401
            from rapidocr import RapidOCR

            return RapidOCR()
    except ImportError:
        return None


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """The reader reports each model that it loads and warns of each picture without text."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
