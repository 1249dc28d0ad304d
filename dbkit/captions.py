"""Captions: text files beside the images."""

from __future__ import annotations

from pathlib import Path

from dbkit.errors import DbkitError


def caption_file(image: Path) -> Path | None:
    """The caption's file: dog.png.txt, which names its image exactly, before dog.txt. None if there is neither."""
    for path in (image.with_name(f"{image.name}.txt"), image.with_suffix(".txt")):
        if path.is_file():
            return path
    return None


def read_caption(image: Path) -> str | None:
    """The caption beside an image, on one line; None if there is no file. Raises DbkitError if it is not UTF-8."""
    path = caption_file(image)
    if path is None:
        return None
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise DbkitError(f"the caption {path} is not UTF-8 text; save it again as UTF-8") from error
