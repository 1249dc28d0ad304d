"""Read images safely, upright and in RGB; crop, resize and vary them without distortion."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import math
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dbkit import draws
from dbkit.errors import DbkitError, reason_of

if TYPE_CHECKING:
    from PIL import Image

Decoded = TypeVar("Decoded")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".heif"})
# 100 million pixels: every camera's photograph passes, and decoding one takes at most 400 MB.
MAX_PIXELS = 100_000_000
LEAST_SIDE = 8
# Photographs that are not read yet: they are named, so that none is missed silently.
OTHER_SUFFIXES = frozenset({".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".psd"})
UNREAD = "{} is of a kind that dbkit does not read; save it as JPEG or PNG"
# No others, whatever a file is called: some of Pillow's readers start programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_HEIC = (".heic", ".heif")
# What stands in bytes 4 to 12 of a HEIC file, which may be called .jpg.
_HEIC_MARKS = {b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"mif1")}
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


def printable(name: str) -> str:
    """A file's name as it can be shown: on Linux it may be any bytes, of which those that are no text are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def is_text(name: str) -> bool:
    """Whether a file's name is text."""
    return printable(name) == name


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
    return _decoded(path, _to_rgb)


def read_mask(path: Path) -> Image.Image:
    """A mask of 8-bit greys, upright: the opacity of a picture that is transparent in places, else its light.

    Raises DbkitError as read_image() does.
    """
    return _decoded(path, lambda image: _opacity(image) if _is_transparent(image) else _to_rgb(image).convert("L"))


def mask_of(path: Path) -> Path | None:
    """The picture that says what counts in an image: masks/NAME.png beside it, or itself if it is see-through.

    Of dog.jpg and dog.png each may have its own: masks/dog.jpg.png goes before masks/dog.png.
    """
    beside = (path.parent / "masks" / f"{name}.png" for name in (path.name, path.stem))
    found = next((mask for mask in beside if mask.is_file()), None)
    # A JPEG has no opacity, and need not be decoded to know it.
    return found or (path if kind_of(path) != "JPEG" and _decoded(path, _is_transparent) else None)


def usable_mask(path: Path, size: tuple[int, int] | None = None) -> tuple[Path, Image.Image] | None:
    """The mask of an image, of that size if it is known already, or None if it has none.

    Raises DbkitError when it cannot be read, has another shape, or leaves nothing of the image.
    """
    mask = mask_of(path)
    if mask is None:
        return None
    name = path.name if mask == path else f"masks/{mask.name}"
    try:
        grey = read_mask(mask)
    except DbkitError as error:
        raise DbkitError(str(error).replace(mask.name, name, 1)) from error
    # A picture's own opacity has its shape; those of others may differ, at one scale by a pixel's rounding.
    size = grey.size if mask == path else size or read_image(path).size
    if abs(size[0] * grey.height - size[1] * grey.width) > max(*size, *grey.size):
        raise DbkitError(
            f"{name} is {grey.width} x {grey.height} and {path.name} {size[0]} x {size[1]}, which is another shape; "
            "make the mask anew"
        )
    if grey.getextrema()[1] == 0:
        what = "transparent" if mask == path else "black"
        raise DbkitError(
            f"{name} is {what} all over, so nothing of the picture would count; take it out, or mask what is to be "
            "learnt in white"
        )
    return mask, grey


def _is_transparent(image: Image.Image) -> bool:
    return image.has_transparency_data and _opacity(image).getextrema()[0] < 255


def _opacity(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").getchannel("A")


def _decoded(path: Path, convert: Callable[[Image.Image], Decoded]) -> Decoded:
    """What convert() makes of the image once it is decoded and upright."""
    from PIL import ExifTags, Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_formats(path)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DbkitError(
                        f"{path.name} has {image.width} x {image.height} pixels; make it smaller than 100 million"
                    )
                image.load()
                # ImageOps.exif_transpose would also write the EXIF anew, which fails on the odd tags of some cameras.
                turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
                return convert(image.transpose(Image.Transpose[turn]) if turn else image)
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
        raise DbkitError(
            f"{path.name} cannot be read as an image ({reason_of(error)}); replace it or take it out"
        ) from error


def read_usable(path: Path) -> Image.Image:
    """read_image(), but a picture of fewer than LEAST_SIDE pixels along a side is refused too."""
    image = read_image(path)
    if min(image.size) < LEAST_SIDE:
        raise DbkitError(f"{path.name} has {image.width} x {image.height} pixels; too small to learn from")
    return image


def thumbnail(path: Path, side: int) -> Image.Image:
    """The whole picture, no wider and no higher than `side` pixels."""
    image = read_image(path)
    image.thumbnail((side, side))
    return image


def jpeg(image: Image.Image, quality: int = 75) -> bytes:
    """An image as the bytes of a JPEG file, for instance to show it in a notebook."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def as_html(path: Path, side: int, name: str, width: int | None = None) -> str:
    """A picture for a notebook, in itself, no larger than `side` pixels; nothing if it is gone or damaged by now.

    width is that on the page, if it is to be another one than the picture's.
    """
    shown = f' width="{width}"' if width else ""
    try:
        return f'<img src="{data_url(path, side, quality=85)}" alt="{html.escape(name)}"{shown}>'
    except (DbkitError, OSError):
        return ""


def data_url(path: Path, side: int, quality: int = 75) -> str:
    """A picture as an address that holds all of it, no larger than `side` pixels."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg(thumbnail(path, side), quality)).decode()}"


def kind_of(path: Path) -> str | None:
    """The format of a file by what it begins with, for instance JPEG; None if it is not a picture that is read."""
    from PIL import Image

    try:
        with Image.open(path, formats=_FORMATS) as image:
            return image.format
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _formats(path: Path) -> tuple[str, ...]:
    with path.open("rb") as file:
        marked = file.read(12)[4:] in _HEIC_MARKS
    if path.suffix.lower() not in _HEIC and not marked:
        return _FORMATS
    try:
        import pillow_heif
    except ImportError:
        raise DbkitError(
            f"{path.name} is a HEIC photograph; pip install pillow-heif, or save it as JPEG or PNG"
        ) from None
    pillow_heif.register_heif_opener()
    # A JPEG that is called .heic is common too.
    return (*_FORMATS, "HEIF")


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


@dataclass(frozen=True)
class View:
    """One version of an image: which part of it is seen, and how it is changed.

    place says where the crop lies along each axis: 0 is left or top, 0.5 the centre, 1 right or bottom. share is the
    part of the largest possible crop's side that is kept, degrees the rotation; brightness and contrast are factors.
    """

    place: tuple[float, float] = (0.5, 0.5)
    share: float = 1.0
    flip: bool = False
    degrees: float = 0.0
    brightness: float = 1.0
    contrast: float = 1.0


def render(image: Image.Image, size: tuple[int, int], view: View = View()) -> Image.Image:
    """What a view shows of an image, resized to (width, height) pixels: cut to that shape, never stretched.

    A rotated crop is as large as fits into the image, so that no empty corner is seen.
    """
    from PIL import Image, ImageEnhance, ImageOps

    centre, crop = crop_of(image.size, size, view)
    if view.degrees:
        image = image.rotate(view.degrees, Image.Resampling.BICUBIC, center=centre)
    (x, y), (width, height) = centre, crop
    box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    # Half a pixel's rounding must not put the box outside the image, which Pillow refuses.
    box = tuple(min(max(0, edge), image.size[n % 2]) for n, edge in enumerate(box))
    seen = image.resize(size, Image.Resampling.LANCZOS, box=box)
    if view.brightness != 1:
        seen = ImageEnhance.Brightness(seen).enhance(view.brightness)
    if view.contrast != 1:
        seen = ImageEnhance.Contrast(seen).enhance(view.contrast)
    return ImageOps.mirror(seen) if view.flip else seen


def render_mask(mask: Image.Image, size: tuple[int, int], view: View) -> Image.Image:
    """What a view shows of an image's mask."""
    return render(mask, size, dataclasses.replace(view, brightness=1, contrast=1))


def crop_of(
    image_size: tuple[int, int], size: tuple[int, int], view: View
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Centre and (width, height) of a view's crop, in pixels of the image, before the rotation about that centre."""
    # The interpolation of a rotation reaches two pixels further than the crop.
    margin = 2 if view.degrees else 0
    (width, height), shape = (side - 2 * margin for side in image_size), size[0] / size[1]
    cos, sin = math.cos(math.radians(view.degrees)), abs(math.sin(math.radians(view.degrees)))
    # The rotated crop's bounding box has to fit: crop_width cos + crop_height sin wide, and so on.
    crop_height = view.share * min(width / (shape * cos + sin), height / (shape * sin + cos))
    crop_width = shape * crop_height
    across, down = crop_width * cos + crop_height * sin, crop_width * sin + crop_height * cos
    x = margin + across / 2 + view.place[0] * max(0.0, width - across)
    y = margin + down / 2 + view.place[1] * max(0.0, height - down)
    return (x, y), (crop_width, crop_height)


def crop_place(center_crop: bool, seed: int, name: str) -> tuple[float, float]:
    """Where the square lies in an image: the centre, or a place that depends on the seed and the image's name alone."""
    if center_crop:
        return 0.5, 0.5
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    x, y = draws.generator(seed, "crop", sample=number).random(2)
    return float(x), float(y)
