"""The folder or zip that photographs come in: what is in it, what is not read, and why. Nothing in it is changed."""

from __future__ import annotations

import contextlib
import lzma
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from dbkit.errors import DbkitError
from dbkit.files import full_disk_is_a_sentence, require_space
from dbkit.images import OTHER_SUFFIXES, SUFFIXES, UNREAD, is_hidden, is_text, kind_of, printable

# Photographs are at most a few MB each; a zip that unpacks to more than this is not a photo collection.
MAX_UNPACKED = 20 * 10**9
MAX_FILE = 10**9
MAX_MEMBERS = 100_000
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class Source:
    """What a source holds. Names are relative to it, with slashes.

    refused are pictures that cannot be used, ignored what is no picture and no caption of one; both with the reason.
    """

    folder: Path
    images: list[Path]
    refused: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def opened(source: Path) -> Iterator[Source]:
    """Look through a folder, or through a zip, which is unpacked into a temporary folder for the time of the block."""
    if source.is_file() and source.suffix.lower() in SUFFIXES:
        raise DbkitError(f"{source} is one picture; give the folder that it is in")
    if source.is_dir():
        yield look_through(source)
        return
    if not (source.is_file() and source.suffix.lower() == ".zip"):
        raise DbkitError(f"there is no folder or .zip {source}; check the path")
    with tempfile.TemporaryDirectory(prefix="dbkit-") as name:
        refused, ignored = _unpack(source, Path(name))
        found = look_through(Path(name))
        # What was unpacked of a damaged file is no picture.
        whole = [path for path in found.images if path.relative_to(name).as_posix() not in refused]
        yield Source(found.folder, whole, found.refused | refused, found.ignored | ignored)


def look_through(folder: Path) -> Source:
    """Every picture below a folder, by name, and everything else that is not clutter. Links to folders stay closed.

    Clutter is what systems and notebooks leave: .DS_Store, Thumbs.db, .ipynb_checkpoints and the like.
    """
    found = Source(folder, [])
    texts: list[Path] = []

    def name_of(path: Path) -> str:
        return path.relative_to(folder).as_posix()

    def unreadable(error: OSError) -> None:
        found.refused[name_of(Path(error.filename))] = f"{error.filename} cannot be opened ({error.strerror})"

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        for name in folders:
            path = Path(parent, name)
            if path.is_symlink() and not is_hidden(path.relative_to(folder)):
                found.ignored[name_of(path)] = "a link to a folder, which is not followed; give that folder itself"
        for name in files:
            path = Path(parent, name)
            if not is_hidden(path.relative_to(folder)):
                _sort(path, name_of(path), found, texts)
    pictures = {path.with_suffix("") for path in found.images}
    # A mask is no picture to learn: it comes along with the one that it belongs to.
    masked = pictures | set(found.images)
    found.images[:] = [p for p in found.images if p.parent.name != "masks" or p.parents[1] / p.stem not in masked]
    found.images.sort(key=name_of)
    beside = {path.parent for path in found.images}
    for path in [p for p in found.images if p.parent.name == "masks" and p.parents[1] in beside]:
        found.images.remove(path)
        found.ignored[name_of(path)] = "a mask without a picture of its name"
    named = {path.with_suffix("") for path in found.images} | set(found.images)
    for path in texts:
        if path.with_suffix("") not in named:
            found.ignored[name_of(path)] = "a text without a picture of its name"
    return found


def _sort(path: Path, name: str, found: Source, texts: list[Path]) -> None:
    """Put one file where it belongs."""
    suffix = path.suffix.lower()
    if not is_text(name):
        shown = printable(name)
        found.refused[shown] = f"{shown} has a name that is no text; rename it"
    elif suffix == ".txt":
        texts.append(path)
    elif suffix in OTHER_SUFFIXES:
        found.refused[name] = UNREAD.format(name)
    elif suffix not in SUFFIXES:
        found.ignored[name] = _why_ignored(path)
    elif path.is_file():
        found.images.append(path)
    else:
        found.refused[name] = f"{name} is a link that leads nowhere, or no file; copy the picture itself there"


def _why_ignored(path: Path) -> str:
    if path.suffix.lower() == ".zip":
        return "a zip inside; unpack it, or give it as the source"
    if path.is_file() and (kind := kind_of(path)):
        return f"a {kind} picture by another name; rename it to end in .{kind.lower()}"
    return "not a picture by its name"


def _unpack(source: Path, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Unpack a zip's pictures and texts. Returns what is refused and what is ignored, with the reasons."""
    refused, ignored = {}, {}
    try:
        with zipfile.ZipFile(source) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            # Windows writes backslashes into some zips.
            outside = [m for m in members if ".." in PureWindowsPath(m.filename).parts]
            refused |= {m.filename: f"{m.filename} would lie outside the zip's folder; rename it" for m in outside}
            members = [m for m in members if m not in outside and not is_hidden(Path(m.filename))]
            data = [m for m in members if Path(m.filename).suffix.lower() in {*SUFFIXES, *OTHER_SUFFIXES, ".txt"}]
            ignored |= {m.filename: "not a picture by its name" for m in members if m not in data}
            _check_size(source, folder, data)
            for member in data:
                if reason := _extract(archive, member, folder):
                    refused[member.filename] = reason
    except _DAMAGED as error:
        raise DbkitError(f"{source} cannot be unpacked ({error}); make the zip again") from error
    return refused, ignored


def _check_size(source: Path, folder: Path, members: list[zipfile.ZipInfo]) -> None:
    if len(members) > MAX_MEMBERS:
        raise DbkitError(f"{source} holds {len(members)} files; zip only the photographs")
    total = sum(member.file_size for member in members)
    if total > MAX_UNPACKED:
        raise DbkitError(f"{source} unpacks to more than 20 GB; zip only the photographs")
    require_space(folder, total, f"unpacking {source}")


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> str | None:
    """Unpack one file. Returns why it could not be, or None."""
    if member.file_size > MAX_FILE:
        return f"{member.filename} unpacks to more than 1 GB, which no photograph does; take it out of the zip"
    try:
        with full_disk_is_a_sentence(folder):
            # ZipFile.extract drops drive letters, leading slashes and "..", so nothing lands outside.
            archive.extract(member, folder)
    except _DAMAGED as error:
        return f"{member.filename} cannot be unpacked ({error}); make the zip again, without a password"
    return None
