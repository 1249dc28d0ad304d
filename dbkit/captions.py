"""Captions: text files beside the images."""

from __future__ import annotations

import codecs
from pathlib import Path

from dbkit.errors import DbkitError

# A caption is a sentence or a list of tags; a text file of more than this is something else.
MOST_BYTES = 100_000


def caption_file(image: Path) -> Path | None:
    """The caption's file: dog.png.txt, which names its image exactly, before dog.txt. None if there is neither."""
    for path in (image.with_name(f"{image.name}.txt"), image.with_suffix(".txt")):
        if path.is_file():
            return path
    return None


def read_caption(image: Path) -> str | None:
    """The caption beside an image, on one line; None if there is no file.

    UTF-8, and UTF-16 with its mark. Raises DbkitError if the file is something else or cannot be read.
    """
    path = caption_file(image)
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise DbkitError(f"the caption {path} cannot be read ({error.strerror}); check who may read it") from error
    return _text(content, path)


def caption_bytes(text: str, path: Path) -> bytes:
    """A caption of one line as the content of its file. Raises DbkitError where read_caption() would refuse that."""
    try:
        content = f"{text}\n".encode() if text else b""
    except UnicodeEncodeError as error:
        character = ascii(text[error.start])
        raise DbkitError(f"the caption for {path} has half a character in it ({character}); take it out") from error
    _text(content, path)
    return content


def _text(content: bytes, path: Path) -> str:
    """What a caption's file says, on one line."""
    if len(content) > MOST_BYTES:
        raise DbkitError(f"the text {path} is too long to be a caption; replace it or take it out")
    try:
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DbkitError(f"the caption {path} is not UTF-8 text; save it again as UTF-8") from error
    if "\0" in text:
        raise DbkitError(f"the caption {path} is not text; save it again as UTF-8")
    return " ".join(text.split())
