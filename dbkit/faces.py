"""Find the largest face and say where to cut: around it, its head alone, or what is beside it. Needs OpenCV."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit.errors import DbkitError

if TYPE_CHECKING:
    from PIL import Image

# In pixels: left, top, right, bottom.
Box = tuple[int, int, int, int]

# Faces are looked for in a copy whose longer side is at most so many pixels; the cascade's own window is 20.
SEARCH_SIDE = 640
# Neighbouring windows that must agree. Among 265 pictures without a human face (dogs, toys, drawings and cuttings of
# them) one face was seen with 7, none with 8; all of 30 drawn faces are still found with 20.
AGREE = 8
# A face smaller than this share of the shorter side is a passer-by, or no face at all.
LEAST_FACE = 0.08
# The cascade's box goes from the brows to the chin; the head, with its hair, is about so much larger.
HEAD = 1.8
# Half the width of shoulders, in widths of the face.
SHOULDERS = 1.5
_MISSING = 'faces are found by OpenCV before version 5, which {}; run pip install "opencv-python-headless<5"'


def largest_face(image: Image.Image) -> Box | None:
    """The box of the largest frontal face, in pixels of the image, which is upright; None where none is found.

    Raises DbkitError where OpenCV or its cascade is not installed.
    """
    import numpy as np

    cascade = _cascade()
    scale = min(SEARCH_SIDE / max(image.size), 1.0)
    small = image.convert("L").resize([max(round(side * scale), 1) for side in image.size])
    least = max(20, round(LEAST_FACE * min(small.size)))
    found = cascade.detectMultiScale(np.asarray(small), scaleFactor=1.1, minNeighbors=AGREE, minSize=(least, least))
    if not len(found):
        return None
    left, top, width, height = (float(number) / scale for number in max(found, key=lambda face: face[2] * face[3]))
    right, bottom = min(round(left + width), image.width), min(round(top + height), image.height)
    return round(left), round(top), right, bottom


@functools.cache
def _cascade() -> Any:
    """OpenCV's detector of frontal faces, by the file that its package carries."""
    try:
        import cv2
    except ImportError as error:
        raise DbkitError(_MISSING.format("is not installed")) from error
    folder = getattr(getattr(cv2, "data", None), "haarcascades", None)
    path = Path(folder or "") / "haarcascade_frontalface_alt2.xml"
    if folder is None or not path.is_file() or not hasattr(cv2, "CascadeClassifier"):
        raise DbkitError(_MISSING.format(f"this one ({cv2.__version__}) is not or lacks its detector"))
    return cv2.CascadeClassifier(str(path))


def face_place(image: Image.Image, face: Box | None) -> tuple[float, float]:
    """Where the largest square lies along each axis, 0 to 1 as in images.View, for the face to be centred.

    As far as the image reaches; (0.5, 0.5) without a face.
    """
    if face is None:
        return 0.5, 0.5
    left, top, right, bottom = face
    side = min(image.size)
    return _place((left + right) / 2, side, image.width), _place((top + bottom) / 2, side, image.height)


def _place(centre: float, side: int, length: int) -> float:
    room = length - side
    return min(max((centre - side / 2) / room, 0.0), 1.0) if room else 0.5


def head_box(image: Image.Image, face: Box | None) -> Box | None:
    """A square around the head of a face, kept inside the image; None without a face."""
    if face is None:
        return None
    left, top, right, bottom = face
    side = min(round(HEAD * max(right - left, bottom - top)), *image.size)
    # Hair takes more room above than a chin below.
    middle = (top + bottom) / 2 - 0.1 * (bottom - top)
    x = min(max(round((left + right - side) / 2), 0), image.width - side)
    y = min(max(round(middle - side / 2), 0), image.height - side)
    return x, y, x + side, y + side


def background_box(image: Image.Image, face: Box | None) -> Box | None:
    """The largest square beside the person with this face: beside the column that the shoulders take.

    None without a face, or where the square's side is less than a quarter of the image's shorter side.
    """
    if face is None:
        return None
    left, _, right, _ = face
    centre, half = (left + right) / 2, SHOULDERS * (right - left)
    before, after = max(int(centre - half), 0), min(int(centre + half) + 1, image.width)
    room = max(before, image.width - after)
    side = min(room, image.height)
    if side < min(image.size) / 4:
        return None
    # At the far edge, away from the person, and half way up.
    x = 0 if before == room else image.width - side
    y = (image.height - side) // 2
    return x, y, x + side, y + side
