"""Checkpoints that are whole or not there: commit, verify, find the newest valid one, rotate.

A checkpoint exists when its manifest does. It is written under a temporary name, synced and hashed; the manifest, with
every file's size and SHA-256, comes last, and then the folder takes its name in one step. Whoever reads one checks it
against its manifest first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit.errors import DiskError
from dbkit.files import (
    full_disk_is_a_sentence,
    move_aside,
    reads_back_differently,
    sha256,
    side_by_side,
    sync,
    sync_folder,
    write_text,
)

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
# The manifest's name while the folder's files come or go: it is no checkpoint, and yet its files are known.
DRAFT = "manifest.json.partial"
# What stands, with a path, where a saved state had a tensor.
_TENSOR = "dbkit tensor"


@dataclass(frozen=True)
class Checkpoint:
    """A committed folder and what its manifest says of it."""

    folder: Path
    step: int
    facts: dict[str, Any]


def step_folder(parent: Path, step: int) -> Path:
    """The folder of one step's checkpoint."""
    return parent / f"step_{step:06d}"


def commit(
    folder: Path, step: int, write: Callable[[Path], dict[str, str] | None], facts: dict[str, Any]
) -> Checkpoint:
    """Let write(temporary folder) fill a folder, then make that the checkpoint `folder`, replacing an earlier one.

    write may return, by relative path, the SHA-256 of files that it has brought to the disk and read back, so that it
    is not done again here.
    Returns only when every file is on the disk, was read back, and is there under the final name.
    """
    partial = folder.with_name(folder.name + ".partial")
    with full_disk_is_a_sentence(folder.parent):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            known = write(partial) or {}
            paths = sorted(path for path in partial.rglob("*") if path.is_file())
            names = [path.relative_to(partial).as_posix() for path in paths]
            side_by_side(sync, [path for name, path in zip(names, paths) if name not in known])
            listed = {
                name: {"size": path.stat().st_size, "sha256": known.get(name) or sha256(path)}
                for name, path in zip(names, paths)
            }
            # Inside the temporary folder, so that a kill leaves no folder of the final name without its manifest.
            write_text(partial / MANIFEST, manifest_text(step, facts, listed))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        # The old one goes only when the new one has its name.
        old = folder.with_name(folder.name + ".old")
        if old.exists():
            remove_committed(old)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync_folder(folder.parent)
    # The bytes were read for their hashes; what is left to see is that they are there.
    fault = find_fault(folder, sizes_only=True)
    if fault is None and old.exists():
        remove_committed(old)
    if fault:
        if old.exists():
            shutil.rmtree(folder)
            old.rename(folder)
        raise DiskError(
            f"the checkpoint {folder} reads back wrong ({fault}); the disk may be failing, choose another output_dir"
        )
    return Checkpoint(folder, step, facts)


def find_fault(
    folder: Path, step: int | None = None, seen: Callable[[int], None] | None = None, sizes_only: bool = False
) -> str | None:
    """Why a folder is no valid checkpoint (of that step), in a few words; None if all is as its manifest says.

    `seen` is told of each block of bytes that was read. sizes_only is quick, and sees no byte that has changed.
    """
    try:
        return _find_fault(folder, step, seen, sizes_only)
    except OSError as error:
        # Of a bad spot some disks say so where others give wrong bytes. A disk that is gone is no fault of the folder.
        if error.errno != errno.EIO:
            raise
        return f"it cannot be read ({error.strerror})"


def _find_fault(folder: Path, step: int | None, seen: Callable[[int], None] | None, sizes_only: bool) -> str | None:
    if not (folder / MANIFEST).is_file():
        return "it has no readable manifest, so it was never finished"
    manifest = read_manifest(folder)
    if manifest is None:
        return f"it has no readable manifest: {MANIFEST} has changed or is damaged"
    if step is not None and manifest["step"] != step:
        return f"it is of step {manifest['step']}"
    for name, wanted in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["size"] or not (sizes_only or sha256(path, seen) == wanted["sha256"]):
            return f"{name} has changed or is damaged"
    return None


def manifest_text(step: int, facts: dict[str, Any], files: dict[str, Any]) -> str:
    """A manifest as it is written, with the SHA-256 of the rest of it at its end."""
    content = {"step": step, "facts": facts, "files": files}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1)


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any] | None:
    """The manifest of a folder; None if there is none, or a byte of it is not as it was written."""
    try:
        text = (folder / name).read_text(encoding="utf-8")
        manifest = json.loads(text)
        step, facts, files = manifest["step"], manifest["facts"], manifest["files"]
        # The first manifests had no hash of their own.
        rest = json.dumps({"step": step, "facts": facts, "files": files}, indent=1)
        written = manifest_text(step, facts, files) if "sha256" in manifest else rest
        whole = (
            text == written
            and isinstance(step, int)
            and isinstance(facts, dict)
            and all({"size", "sha256"} <= f.keys() for f in files.values())
            # Names lead nowhere else: what a manifest lists may be deleted.
            and not any(Path(name).is_absolute() or ".." in Path(name).parts for name in files)
        )
        return manifest if whole else None
    except (FileNotFoundError, ValueError, AttributeError, KeyError, TypeError):
        return None


def newest_valid(parent: Path) -> tuple[Checkpoint | None, list[str]]:
    """The valid checkpoint with the highest step, or None, and a sentence for each newer one that was skipped."""
    skipped = []
    for step, folder in sorted(by_step(parent).items(), reverse=True):
        fault = find_fault(folder, step)
        if fault is None:
            manifest = read_manifest(folder)
            return Checkpoint(folder, manifest["step"], manifest["facts"]), skipped
        skipped.append(f"skipping {folder}: {fault}")
    return None, skipped


def rotate(
    parent: Path, newest: int, keep: int, spare: Callable[[Path], bool] | None = None, for_good: bool = False
) -> None:
    """Remove what is older than the last `keep` checkpoints up to `newest`, which was just verified, and leftovers.

    Folders of later steps are damaged, or of steps that are taken again: they must not push out a good one. What
    `spare` says yes to stays until the next time. `for_good` is that of remove_committed().
    """
    folders = by_step(parent)
    kept = [step for step in sorted(folders) if step <= newest and (folders[step] / MANIFEST).is_file()][-keep:]
    for step, folder in folders.items():
        if kept and step < kept[0] and not (spare and spare(folder)):
            remove_committed(folder, for_good)
    for partial in parent.glob("step_*.partial"):
        remove_committed(partial, for_good)


def by_step(parent: Path) -> dict[int, Path]:
    """The folders that step_folder() names; copies that someone made beside them are not ours."""
    found = ((folder, re.fullmatch(r"step_(\d{6,})", folder.name)) for folder in parent.glob("step_*"))
    return {int(match[1]): folder for folder, match in found if match and folder.is_dir()}


def remove_committed(folder: Path, for_good: bool = False) -> None:
    """Delete what was committed in a folder; a file that someone else put there stays, in the folder moved aside.

    With `for_good` the files are emptied first: what is deleted in Google Drive goes to its trash, which counts. That
    cannot be undone, so it is for files that a manifest lists.
    """
    if (folder / MANIFEST).exists():
        (folder / MANIFEST).replace(folder / DRAFT)
    listed = (read_manifest(folder, DRAFT) or {"files": {}})["files"]
    strangers = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).as_posix() not in {*listed, DRAFT}
    ]
    for name in listed:
        # A link may lead to a file that is not ours.
        if for_good and (folder / name).is_file() and not (folder / name).is_symlink():
            os.truncate(folder / name, 0)
        (folder / name).unlink(missing_ok=True)
    # Without any manifest it is no folder that dbkit left; with a damaged one it is.
    if strangers and (listed or not (folder / DRAFT).exists()) and not folder.name.endswith(".partial"):
        (folder / DRAFT).unlink(missing_ok=True)
        print(f"files that dbkit did not make are kept in {move_aside(folder)}")
    else:
        shutil.rmtree(folder)


def save_state(
    folder: Path,
    modules: dict[str, torch.nn.Module],
    others: dict[str, dict[str, Any]],
    prefix: str = "",
    precision: str | None = None,
) -> dict[str, str]:
    """Write weights, in a precision or as they are, each module's in a file of its name after the prefix, and others.

    Others are nested states: their tensors go to files by what they are, such as optimizer.exp_avg.safetensors, and
    the rest is what torch saves. All is read back and compared; DiskError says which file differs. Returns the SHA-256
    of each file of tensors, as commit() takes them.
    """
    import torch

    from dbkit.models import save_tensors, state_dict

    files = {
        # As they are they may be anything; what a precision cannot hold is an error.
        f"{prefix}{part}": (state_dict(module, part), f"the {part}" if precision else None, precision)
        for part, module in modules.items()
    }
    for name, state in others.items():
        tensors: dict[str, torch.Tensor] = {}
        rest = _without_tensors(state, "", tensors)
        for path, tensor in tensors.items():
            files.setdefault(f"{name}.{path.rpartition('.')[2]}", ({}, None, None))[0][path] = tensor
        with (folder / f"{name}.pt").open("wb") as file:
            try:
                torch.save(rest, file)
            except RuntimeError as error:
                # torch hides the system's error, a full disk for instance, behind one of its own.
                raise error.__context__ or error from error
        if not _is_whole(folder / f"{name}.pt"):
            raise reads_back_differently(folder / f"{name}.pt")

    def save(name: str) -> str:
        tensors, owner, precision = files[name]
        return save_tensors(tensors, folder / f"{name}.safetensors", owner, precision, {})

    return {f"{name}.safetensors": digest for name, digest in zip(files, side_by_side(save, files))}


def _is_whole(path: Path) -> bool:
    """Whether what torch saved reads back: a zip, whose sums are those of the bytes as they were in memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


def _without_tensors(state: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A nested state whose tensors are put into `tensors` under their paths, which take their places."""
    import torch

    # What is more than a tensor, such as an 8-bit state of torchao, stays where it is.
    if type(state) in (torch.Tensor, torch.nn.Parameter):
        tensors[path] = state
        return (_TENSOR, path)
    return _mapped(state, lambda part, key: _without_tensors(part, f"{path}.{key}" if path else str(key), tensors))


def _with_tensors(state: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(state, tuple) and len(state) == 2 and state[0] == _TENSOR:
        return tensors[state[1]]
    return _mapped(state, lambda part, _: _with_tensors(part, tensors))


def _mapped(state: Any, change: Callable[[Any, Any], Any]) -> Any:
    """A nested state with each part changed; change takes a part and its key."""
    if isinstance(state, dict):
        return {key: change(value, key) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(change(value, number) for number, value in enumerate(state))
    return state


def load_state(
    checkpoint: Checkpoint, modules: dict[str, torch.nn.Module], prefix: str = ""
) -> dict[str, dict[str, Any]]:
    """Put the saved weights into the modules and return the other states. Pickled files are read as data only."""
    import torch
    from safetensors.torch import load_file

    from dbkit.models import load_state_dict

    for part, module in modules.items():
        load_state_dict(module, part, load_file(checkpoint.folder / f"{prefix}{part}.safetensors"))
    others = {}
    for path in sorted(checkpoint.folder.glob("*.pt")):
        tensors: dict[str, torch.Tensor] = {}
        for file in checkpoint.folder.glob(f"{path.stem}.*.safetensors"):
            tensors |= load_file(file)
        others[path.stem] = _with_tensors(torch.load(path, map_location="cpu", weights_only=True), tensors)
    return others
