"""Copies of committed folders and of files, read back and compared before they count."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dbkit.checkpoint import DRAFT, MANIFEST, find_fault, read_manifest, remove_committed
from dbkit.errors import DbkitError
from dbkit.files import sha256, sync_folder

_BLOCK = 1 << 20

Count = Callable[[int], None]


def copy_committed(source: Path, target: Path, wrote: Count, seen: Count, for_good: bool = False) -> None:
    """Make `target` the committed folder that `source` is, file by file, each read back and compared.

    `wrote` and `seen` are told of each block that was written, or read to compare. Files that an earlier try left whole
    are not copied again. Raises OSError where the target fails, DbkitError where the source does.
    """
    listed = manifest_of(source)["files"]
    text = b"".join(_blocks(source / MANIFEST))
    partial, old = partial_of(target), target.with_name(target.name + ".old")
    restore(old)
    if not (_content(target / MANIFEST) == text and find_fault(target, seen=seen) is None):
        if partial.exists() and text not in (_content(partial / DRAFT), _content(partial / MANIFEST)):
            remove_committed(partial, for_good)
        partial.mkdir(exist_ok=True)
        _write_synced(partial / DRAFT, text)
        for name, wanted in listed.items():
            _copy_listed(source / name, partial / name, wanted, wrote, seen)
        (partial / DRAFT).replace(partial / MANIFEST)
        seen(0)
        if target.exists() and old.exists():
            remove_committed(target, for_good)  # the old one is whole, so this one is not
        elif target.exists():
            target.rename(old)
        partial.rename(target)
        sync_folder(target.parent)
        fault = "its manifest" if _content(target / MANIFEST) != text else find_fault(target, seen=seen)
        if fault:
            raise OSError(errno.EIO, f"it reads back differently: {fault}")
    if old.exists():
        remove_committed(old, for_good)


def restore(old: Path) -> None:
    """Give a folder its name back if a kill came before the new one took it."""
    if old.exists() and not old.with_suffix("").exists():
        old.rename(old.with_suffix(""))


def _copy_listed(source: Path, target: Path, wanted: dict[str, Any], wrote: Count, seen: Count) -> None:
    if target.is_file() and target.stat().st_size == wanted["size"] and sha256(target, seen) == wanted["sha256"]:
        wrote(wanted["size"])
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if _copy(source, target, wrote, seen) != wanted["sha256"]:
        raise DbkitError(f"{source} has changed or is damaged")


def copy_loose(source: Path, target: Path, wrote: Count, seen: Count) -> None:
    _copy(source, partial_of(target), wrote, seen)
    partial_of(target).replace(target)


def _copy(source: Path, target: Path, wrote: Count, seen: Count) -> str:
    """Copy one file, read the copy back, and return the SHA-256 of both."""
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for block in _blocks(source):
            digest.update(block)
            file.write(block)
            wrote(len(block))
        file.flush()
        os.fsync(file.fileno())
    if sha256(target, seen) != digest.hexdigest():
        raise OSError(errno.EIO, f"{target.name} reads back differently")
    return digest.hexdigest()


def _blocks(source: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block
    except OSError as error:
        raise DbkitError(f"{source} cannot be read ({reason_of(error)})") from error


def manifest_of(source: Path) -> dict[str, Any]:
    try:
        manifest = read_manifest(source)
    except OSError as error:
        raise DbkitError(f"{source} cannot be read ({reason_of(error)})") from error
    if manifest is None:
        raise DbkitError(f"{source} has no readable manifest")
    return manifest


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def reason_of(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
