"""Read images safely, upright and in RGB; crop and resize without distortion. Pillow only."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from dbkit.errors import DbkitError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
# 100 million pixels: every camera's photograph passes, and decoding one takes at most 400 MB.
MAX_PIXELS = 100_000_000
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
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            if image.width * image.height > MAX_PIXELS:
                raise DbkitError(
                    f"{path.name} has {image.width} x {image.height} pixels; make it smaller than 100 million"
                )
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(upright)
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DbkitError(f"{path.name} cannot be read as an image ({reason}); replace it or take it out") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        # 16-bit grey, from scanners: Pillow's own conversion would clip everything above 255 to white.
        import numpy as np

        values = np.asarray(image, dtype=np.float32)
        scale = 257.0 if values.max(initial=0) > 255 else 1.0
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
