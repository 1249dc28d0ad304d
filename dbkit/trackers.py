"""Trackers beside log.jsonl: TensorBoard and Weights & Biases. They are told the same and show it elsewhere."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from dbkit import processes
from dbkit.errors import DbkitError, reason_of
from dbkit.files import write_text
from dbkit.settings import plain
from dbkit.train_config import TrainConfig

# Takes a step and its values by name; called without values for the last time, to close.
Tracker = Callable[[int, dict[str, float | None]], None]
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def require_tracker(config: TrainConfig, run: Path) -> None:
    """Raise DbkitError where the tracker that is asked for is not installed, or its folder cannot be made."""
    package = _PACKAGES.get(config.log_with)
    if package is None:
        return
    if importlib.util.find_spec(package) is None:
        raise DbkitError(f"log_with is {config.log_with}, which is not installed; pip install {package}")
    folder = _folder(config, run)
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise DbkitError(f"logging_dir {folder} cannot be made, since {parent} cannot be written to; choose another")


def _folder(config: TrainConfig, run: Path) -> Path:
    """Where the tracker's files go: each run has a folder of its own, since TensorBoard takes a folder for one run."""
    return (config.logging_dir / run.name if config.logging_dir else run / "logs").absolute()


def make_tracker(config: TrainConfig, run: Path, done: int) -> Tracker:
    """The tracker of a run that goes on after `done` steps; one that does nothing where none is asked for."""
    folder = _folder(config, run)
    if processes.rank() > 0:
        return lambda step, values: None
    if config.log_with == "tensorboard":
        return _tensorboard(folder, done)
    if config.log_with == "wandb":
        return _wandb(config, run, folder)
    return lambda step, values: None


def _tensorboard(folder: Path, done: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # Steps after the state that is continued from are taken again: what was logged of them is dropped.
    writer = SummaryWriter(str(folder), purge_step=done + 1)

    def track(step: int, values: dict[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                writer.add_scalar(name, value, step)
        if values:
            writer.flush()
        else:
            writer.close()

    return track


def _wandb(config: TrainConfig, run: Path, folder: Path) -> Tracker:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    # One run there for one here, however often it is interrupted.
    note = run / "wandb_id.txt"
    if not note.is_file():
        write_text(note, secrets.token_hex(4))
    try:
        started = wandb.init(
            project="dbkit",
            name=run.name,
            id=note.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=plain(config),
        )
    except (wandb.errors.Error, ValueError) as error:
        raise DbkitError(
            f"wandb cannot start ({reason_of(error)}); wandb login, or set WANDB_MODE=offline, or leave log_with at "
            "none"
        ) from error

    def track(step: int, values: dict[str, float | None]) -> None:
        if values:
            started.log({name: value for name, value in values.items() if value is not None}, step=step)
        else:
            started.finish()

    return track
