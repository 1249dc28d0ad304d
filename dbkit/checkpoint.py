"""Checkpoints that are whole or not there: commit, verify, find the newest valid one, rotate.

A checkpoint exists when its manifest does. It is written under a temporary name, synced, hashed and renamed; the
manifest, with every file's size and SHA-256, comes last. Whoever reads one checks it against its manifest first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit.errors import DbkitError
from dbkit.files import full_disk_is_a_sentence, sha256, sync, sync_folder, write_text

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A committed folder and what its manifest says of it."""

    folder: Path
    step: int
    facts: dict[str, Any]


def step_folder(parent: Path, step: int) -> Path:
    """The folder of one step's checkpoint."""
    return parent / f"step_{step:06d}"


def commit(folder: Path, step: int, write: Callable[[Path], None], facts: dict[str, Any]) -> Checkpoint:
    """Let write(temporary folder) fill a folder, then make that the checkpoint `folder`, replacing an earlier one.

    Returns only when what is on disk has been read back and found equal to its manifest.
    """
    partial = folder.with_name(folder.name + ".partial")
    with full_disk_is_a_sentence(folder.parent):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            write(partial)
            listed = {}
            for path in sorted(path for path in partial.rglob("*") if path.is_file()):
                sync(path)
                name = path.relative_to(partial).as_posix()
                listed[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if folder.exists():
            _remove(folder)
        partial.rename(folder)
        sync_folder(folder.parent)
        write_text(folder / MANIFEST, json.dumps({"step": step, "facts": facts, "files": listed}, indent=1))
    fault = find_fault(folder)
    if fault:
        raise DbkitError(
            f"the checkpoint {folder} reads back wrong ({fault}); the disk may be failing, choose another output_dir"
        )
    return Checkpoint(folder, step, facts)


def find_fault(folder: Path) -> str | None:
    """Why a folder is not a valid checkpoint, in a few words; None if every file is as its manifest says."""
    manifest = _manifest(folder)
    if manifest is None:
        return "it has no readable manifest, so it was never finished"
    for name, wanted in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["size"] or sha256(path) != wanted["sha256"]:
            return f"{name} has changed or is damaged"
    return None


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if {"step", "facts", "files"} <= manifest.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def newest_valid(parent: Path) -> tuple[Checkpoint | None, list[str]]:
    """The valid checkpoint with the highest step, or None, and a sentence for each newer one that was skipped."""
    skipped = []
    for folder in sorted(parent.glob("step_*"), reverse=True):
        if folder.name.endswith(".partial") or not folder.is_dir():
            continue
        fault = find_fault(folder)
        if fault is None:
            manifest = _manifest(folder)
            return Checkpoint(folder, manifest["step"], manifest["facts"]), skipped
        skipped.append(f"skipping {folder}: {fault}")
    return None, skipped


def rotate(parent: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what killed runs left half written. The newest was verified."""
    folders = sorted(folder for folder in parent.glob("step_*") if folder.is_dir())
    for folder in folders:
        if folder.name.endswith(".partial"):
            shutil.rmtree(folder, ignore_errors=True)
    committed = [folder for folder in folders if (folder / MANIFEST).is_file()]
    for folder in committed[:-keep]:
        _remove(folder)


def _remove(folder: Path) -> None:
    # The manifest goes first: a kill in between leaves something that nobody takes for a checkpoint.
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def save_state(folder: Path, modules: dict[str, torch.nn.Module], others: dict[str, dict[str, Any]]) -> None:
    """Write what a run needs to continue exactly: fp32 weights, and the states of optimizer and gradient scaler."""
    import torch
    from safetensors.torch import save_file

    from dbkit.models import state_dict

    for part, module in modules.items():
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict(module, part).items()}
        save_file(weights, folder / f"{part}.safetensors")
    for name, state in others.items():
        torch.save(state, folder / f"{name}.pt")


def load_state(checkpoint: Checkpoint, modules: dict[str, torch.nn.Module]) -> dict[str, dict[str, Any]]:
    """Put the saved weights into the modules and return the other states. Pickled files are read as data only."""
    import torch
    from safetensors.torch import load_file

    from dbkit.models import load_state_dict

    for part, module in modules.items():
        load_state_dict(module, part, load_file(checkpoint.folder / f"{part}.safetensors"))
    return {
        path.stem: torch.load(path, map_location="cpu", weights_only=True)
        for path in sorted(checkpoint.folder.glob("*.pt"))
    }
