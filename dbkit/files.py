"""Files written whole or not at all; what differs between Linux, Windows and macOS is kept here."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbkit.errors import DbkitError, DiskError

# Characters that Windows refuses in names. Everything else, in any script, stays.
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]+')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
_MOST_BYTES = 200
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def whole_file(path: Path, alone: bool = False, mark: str = "") -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it takes the place of `path` in one step.

    A kill leaves the old file or the new one, never half of one; the temporary path is the next writer's, or of those
    with the same mark in its name. With alone a second writer is refused, for files that take minutes. Raises
    DbkitError when the disk is full.
    """
    if alone:
        with one_process(path, stays=False), whole_file(path) as partial:
            yield partial
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{mark}.partial")
    try:
        with full_disk_is_a_sentence(path.parent):
            yield partial
            share(partial)
            sync(partial)
            partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(partial):
            error.filename = str(path)  # the name that its reader knows
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a small text file in one step, as UTF-8 with \\n line ends on every system.

    Several processes and threads may do so at once; that of the last one stays.
    """
    with whole_file(path, mark=f".{threading.get_native_id()}") as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def full_disk_is_a_sentence(folder: Path) -> Iterator[None]:
    """Turn the several errors of a full disk into one sentence with a next step."""
    try:
        yield
    except Exception as error:
        # safetensors reports the system's error inside its own exception type.
        number = getattr(error, "errno", None)
        if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
            number = int(found[1])
            error = OSError(number, os.strerror(number))
        if number in FULL or os.strerror(errno.ENOSPC) in str(error):
            raise _full(folder) from error
        raise error


def _full(folder: Path) -> DiskError:
    free = free_space(folder)
    return DiskError(
        f"the disk of {folder} is full ({size(free)} free); free some space there, then run the same command again"
    )


_NO_FOLDER = "is no folder, or lies in what is none", "choose another name, or move that away"
# What the system's errors say of a path, and the way on.
_REFUSALS = {
    errno.ENOENT: ("is not there", "check the path"),
    errno.EEXIST: _NO_FOLDER,
    errno.ENOTDIR: _NO_FOLDER,
    errno.EISDIR: ("is a folder where a file belongs", "choose another name, or move that folder away"),
    errno.ENAMETOOLONG: ("has too long a name", "choose a shorter one"),
    errno.EROFS: ("cannot be written", "choose a folder on another disk"),
}
_REFUSED = "cannot be read or written", "check that its disk is there, and who may read and write there"


@contextlib.contextmanager
def refusals_are_sentences() -> Iterator[None]:
    """Turn what the system refuses into one sentence: which path, why, and a next step.

    What networks and libraries raise, which names no path and has no reason of the system, stays what it is.
    """
    try:
        yield
    except OSError as error:
        name = error.filename2 or error.filename
        path = Path(os.fsdecode(name)) if isinstance(name, (str, bytes)) else None
        # Of the current folder Python says no name, nor of a file that is open.
        if not error.strerror or not (path or error.errno in (*FULL, errno.EIO, errno.ENOENT)):
            raise
        if error.errno in FULL:
            raise (_full(path.parent) if path else DiskError("the disk is full; free some space there")) from error
        what, way = _REFUSALS.get(error.errno, _REFUSED)
        if path is None:
            gone = error.errno == errno.ENOENT
            path, way = ("the current folder", "change to another one") if gone else ("a file", way)
        raise DbkitError(f"{path} {what} ({error.strerror}); {way}") from error


def require_place(path: Path) -> None:
    """Raise DbkitError where nothing can be put: under too long a name, or below a file."""
    # File systems take names of 255 bytes, of which those of temporary files need some.
    if len(os.fsencode(path.name)) > 230:
        raise DbkitError(f"the name of {path} is too long; choose a shorter one")
    if files := [parent for parent in path.parents if parent.is_file()]:
        raise DbkitError(f"{files[0]} is a file, and {path} would lie in it; choose another name")


def free_space(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    return shutil.disk_usage(_existing(folder)).free


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise DiskError when fewer than `needed` bytes are free where `folder` is."""
    free = free_space(folder)
    if free < needed:
        raise DiskError(
            f"{what} needs {size(needed)} in {folder} and {size(free)} are free; free some space or choose "
            "another folder"
        )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def size(count: int) -> str:
    """A number of bytes in words: 3.4 GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def share(path: Path) -> None:
    """Give a file the permissions that new files get here; safetensors writes files that only their owner can read."""
    if os.name != "nt":
        mask = os.umask(0)
        os.umask(mask)
        # Network and FUSE file systems may have permissions of their own.
        with contextlib.suppress(PermissionError):
            path.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """Ask the system to put a file's bytes on the disk."""
    # Windows only flushes handles opened for writing.
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Ask the system to put a folder's names on the disk. Windows has no such call, and needs none."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        # Network and FUSE file systems (Google Drive) may not know fsync of a folder; the file itself was synced.
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path, seen: Callable[[int], None] | None = None) -> str:
    """The SHA-256 of a file, in hexadecimal. `seen` is told how many bytes each block has."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if seen:
                seen(len(block))
    return digest.hexdigest()


def side_by_side(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """What work() returns of each item, done in threads: writing, syncing and hashing leave Python's lock alone."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(work, items))


def reads_back_differently(path: Path) -> DiskError:
    """The error for a file that holds something else than what was written."""
    return DiskError(f"{path} reads back differently from what was written; the disk may be failing, save elsewhere")


def move_aside(path: Path) -> Path:
    """Rename a folder to its name with -1, -2, … and return the new path. Nothing is deleted."""
    number = 1
    while (aside := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def safe_name(text: str, limit: int = 80) -> str:
    """text as a file name that every system takes; letters of any script stay."""
    name = _FORBIDDEN.sub("-", text).strip(" .-")[:limit]
    # File systems count 255 bytes, of which suffixes and temporary names need some.
    name = name.encode(errors="ignore")[:_MOST_BYTES].decode(errors="ignore").strip(" .-") or "unnamed"
    # Windows reserves these names with any suffix, so the mark goes before the first dot.
    return _RESERVED.sub(r"\1-\2", name) if _RESERVED.match(name) else name


@contextlib.contextmanager
def one_process(path: Path, stays: bool = True) -> Iterator[bool]:
    """Keep a second process out of a folder for the time of the block, by a lock that ends with its process.

    File systems that know no locks, as Google Drive's may, are used without one, and False is yielded. Without stays,
    for what is made once, the lock's own file goes at the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, locked = _lock_of(path), True
    with contextlib.ExitStack() as stack:
        while True:
            try:
                file = stack.enter_context(lock.open("w"))
            except OSError as error:
                error.filename = str(path)  # the lock's own name is hidden
                raise
            try:
                if os.name == "nt":
                    import msvcrt

                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                where, other = ("in", "folder") if stays else ("on", "destination")
                raise DbkitError(
                    f"another process is at work {where} {path}; wait for it, or choose another {other}"
                ) from error
            except OSError:
                locked = False
            # A file that the process before removed between these two steps locks nobody out.
            with contextlib.suppress(FileNotFoundError):
                if stays or os.name == "nt" or os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                    break
        try:
            yield locked
        finally:
            if not stays:
                if os.name == "nt":
                    file.close()
                with contextlib.suppress(OSError):
                    lock.unlink()


def is_locked(folder: Path) -> bool | None:
    """Whether a process of this machine is in one_process() for a folder; None where that cannot be told."""
    try:
        file = _lock_of(folder).open("rb")
    except FileNotFoundError:
        return False
    except OSError:
        return None
    with file:
        if os.name == "nt":
            return None
        import fcntl

        try:
            # Shared and for an instant only: two that look do not take each other for a training.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:
            return None
    return False


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


@dataclass
class StopRequest:
    """Whether someone asked to stop. A plain flag, since a signal may come at any moment."""

    made: bool = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn Ctrl-C, the notebook's stop button and SIGTERM into a flag for the time of the block.

    The work inside looks at the flag where stopping is safe. A second Ctrl-C interrupts at once. Outside the main
    thread signals cannot be caught, and the flag stays down.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: object) -> None:
        if stop.made:
            raise KeyboardInterrupt
        stop.made = True
        # A step or a preview may take a while. Within a line that is being printed Python refuses another one.
        with contextlib.suppress(RuntimeError, OSError):
            print("\nstopping as soon as this step or picture is done", flush=True)

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
