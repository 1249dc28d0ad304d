"""Read images safely, upright and in RGB; crop and resize without distortion. Pillow only."""

from __future__ import annotations

import hashlib
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from dbkit import draws
from dbkit.errors import DbkitError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
# 100 million pixels: every camera's photograph passes, and decoding one takes at most 400 MB.
MAX_PIXELS = 100_000_000
# Photographs that are not read yet: they are named, so that none is missed silently.
OTHER_SUFFIXES = frozenset({".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".psd"})
UNREAD = "{} is of a kind that dbkit does not read; save it as JPEG or PNG"
# No others, whatever a file is called: some of Pillow's readers start programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# What each orientation in a photograph's EXIF asks for.
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_JUNK = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


def is_hidden(path: Path) -> bool:
    """Whether a path below a data folder is system clutter: .DS_Store, .ipynb_checkpoints, Thumbs.db, __MACOSX."""
    return any(part.startswith(".") or part.lower() in _JUNK for part in path.parts)


def list_images(folder: Path) -> list[Path]:
    """The image files directly in a folder, by name."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not is_hidden(Path(path.name)) and path.is_file()
    )


def read_image(path: Path) -> Image.Image:
    """The decoded image: upright by its EXIF orientation, alpha flattened on white, RGB with 8 bits a channel.

    Raises DbkitError when the file is not an image, is damaged, or has more than MAX_PIXELS pixels.
    """
    from PIL import ExifTags, Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DbkitError(
                        f"{path.name} has {image.width} x {image.height} pixels; make it smaller than 100 million"
                    )
                image.load()
                # ImageOps.exif_transpose would also write the EXIF anew, which fails on the odd tags of some cameras.
                turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
                return _to_rgb(image.transpose(Image.Transpose[turn]) if turn else image)
    except Image.DecompressionBombError as error:
        raise DbkitError(f"{path.name} has far too many pixels; make it smaller than 100 million") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        struct.error,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DbkitError(f"{path.name} cannot be read as an image ({reason}); replace it or take it out") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        # 16-bit grey, from scanners: Pillow's own conversion would clip everything above 255 to white.
        import numpy as np

        values = np.asarray(image, dtype=np.float32)
        most = values.max(initial=0)
        scale = 257.0 if most > 255 else 1.0 if most > 1 else 1 / 255
        image = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def square(image: Image.Image, side: int, place: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """The largest square of the image, resized to side × side pixels; nothing is stretched.

    place says where the square lies along each axis: 0 is left or top, 0.5 the centre, 1 right or bottom.
    """
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (side, side), method=Image.Resampling.LANCZOS, centering=place)


def crop_place(center_crop: bool, seed: int, name: str) -> tuple[float, float]:
    """Where the square lies in an image: the centre, or a place that depends on the seed and the image's name alone."""
    if center_crop:
        return 0.5, 0.5
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    x, y = draws.generator(seed, "crop", sample=number).random(2)
    return float(x), float(y)
