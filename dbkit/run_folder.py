"""What a run's folder holds, read while a training may be writing, renaming and deleting there; nothing is written.

Reading a file that is gone by then is no error here: it is as if it had not been there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbkit.checkpoint import MANIFEST, by_step, find_fault, read_manifest, step_folder
from dbkit.errors import DbkitError
from dbkit.log import read_log
from dbkit.mirror import MIRROR
from dbkit.settings import closest, read_yaml
from dbkit.workspace import default_folder

# How many lines of the log count for what is said of now.
RECENT = 10
# A line of figures for each step that was measured, beside the log and in its format.
FIGURES = "figures.jsonl"
_MARKS = ("settings.yaml", "log.jsonl", "resume", MIRROR)


@dataclass(frozen=True)
class Saved:
    """A committed folder: its step, size in bytes, age in seconds, and why it cannot be used (None: it can)."""

    folder: Path
    step: int
    size: int = 0
    age: float = 0.0
    fault: str | None = None


@dataclass(frozen=True)
class Place:
    """What one folder of a run holds: states to resume from and usable checkpoints by step, the finished model.

    unreadable is the system's reason where the folder cannot be read, as that of a Drive that is gone.
    """

    folder: Path
    states: list[Saved]
    checkpoints: list[Saved]
    model: Saved | None
    unreadable: str | None = None

    @property
    def last(self) -> Saved | None:
        """The newest valid state, from which training would go on."""
        return next((state for state in reversed(self.states) if not state.fault), None)

    @property
    def usable(self) -> list[Saved]:
        """The checkpoints and the finished model that are whole."""
        return [saved for saved in (*self.checkpoints, self.model) if saved and not saved.fault]

    @property
    def damaged(self) -> list[Saved]:
        """What was saved and cannot be used."""
        return [saved for saved in (*self.states, *self.checkpoints, self.model) if saved and saved.fault]


@dataclass(frozen=True)
class Mirror:
    """The copying of commits from a local folder to the run's home, as mirror.json said `age` seconds ago.

    copying is (name, bytes done, bytes in all) of what is being copied; failed is a sentence.
    """

    home: Path
    local: Path
    copying: tuple[str, int, int] | None
    waiting: list[str]
    failed: str | None
    age: float


def find_run(run: Path | None) -> Path:
    """The folder of a run; None: of the one in the workspace that was worked on last. Raises DbkitError without one."""
    if run is None:
        folder = default_folder() / "runs"
        runs = [folder / name for name in runs_in(folder)]
        if not runs:
            raise DbkitError(f"there is no run in {folder} yet; train one, or give the folder of a run")
        return max(runs, key=lambda path: max(_modified(path / name) for name in _MARKS))
    run = run.absolute()
    if _is_run(run):
        return run
    if not run.exists():
        raise DbkitError(f"there is no run {run}{closest(run.name, runs_in(run.parent)) or '; check the path'}")
    inside = runs_in(run)
    hint = f"give one of the runs in it: {', '.join(inside)}" if inside else "give the output_dir of a training"
    raise DbkitError(f"{run} is no folder of a run; {hint}")


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in _MARKS)


def runs_in(folder: Path) -> list[str]:
    """The names of the runs in a folder; none where it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir() if _is_run(path))
    except OSError:
        return []


def _modified(path: Path) -> float:
    """When a file was last written, in seconds since 1970; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def find_local(run: Path) -> tuple[Path, Path | None]:
    """(home, local): where a run's commits are kept, and the folder of this machine where a training of it works.

    Each folder's mirror.json names both, and only where the two agree are they one run: on another machine, or after a
    new start, the local folder is not there or of another run.
    """
    said = read_mirror(run)
    if said and _same(said.local, run) and not _same(said.home, run):
        return said.home, run
    own = read_mirror(said.local) if said and not _same(said.local, run) else None
    return run, said.local if own and _same(own.home, run) else None


def _same(one: Path, other: Path) -> bool:
    try:
        return one.resolve() == other.resolve()
    except (OSError, ValueError, RuntimeError):  # a loop of links, or no path at all
        return False


def read_mirror(folder: Path) -> Mirror | None:
    """What a folder's mirror.json says; None if there is none or it is damaged."""
    try:
        facts = json.loads((folder / MIRROR).read_text(encoding="utf-8"))
        now = facts["copying"]
        return Mirror(
            home=Path(facts["home"]),
            local=Path(facts["local"]),
            copying=now and (str(now["name"]), int(now["done"]), int(now["size"])),
            waiting=[str(name) for name in facts["waiting"]],
            failed=facts["failed"] and str(facts["failed"]),
            age=_age(float(facts["updated"])),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _age(then: float) -> float:
    """Seconds since then; 0 where the clock of who wrote it is ahead."""
    return max(0.0, time.time() - then)


def read_place(folder: Path, verify: bool) -> Place:
    """What a folder of a run holds. Files are there in the right size, or with verify have the right SHA-256."""
    try:
        states, checkpoints = (_committed(folder / name, verify) for name in ("resume", "checkpoints"))
        model = _read_saved(folder / "model", None, verify) if (folder / "model").is_dir() else None
    except OSError as error:
        return Place(folder, [], [], None, error.strerror)
    return Place(folder, states, checkpoints, model)


def _committed(parent: Path, verify: bool) -> list[Saved]:
    """What was committed in a folder, by step."""
    folders, found = by_step(parent), []
    for _ in range(5):
        found = [_read_saved(folder, step, verify) for step, folder in sorted(folders.items())]
        whole = bool(found) and not any(saved.fault for saved in found)
        # What was committed or rotated away meanwhile would look damaged, or be missed: look again.
        before, folders = folders, by_step(parent)
        if whole or before == folders:
            break
    newest = max((saved.step for saved in found if not saved.fault), default=-1)
    # Rotation takes the manifest first: an older folder without one is being removed, and no damage. The recommended
    # checkpoint stays, so what goes may lie between two that are whole.
    return [s for s in found if not s.fault or s.step > newest or (s.folder / MANIFEST).exists()]


def _read_saved(folder: Path, step: int | None, verify: bool) -> Saved:
    """One committed folder by its manifest; step is the one that its name says."""
    try:
        manifest = read_manifest(folder)
        fault = find_fault(folder, step, sizes_only=not verify)
    except OSError as error:
        return Saved(folder, step or 0, fault=f"it cannot be read ({error.strerror})")
    if manifest is None:
        return Saved(folder, step or 0, fault=fault)
    size = sum(facts["size"] for facts in manifest["files"].values())
    age = _age(_modified(folder / MANIFEST))
    return Saved(folder, manifest["step"] if step is None else step, size, age, fault)


def read_lines(folder: Path, name: str = "log.jsonl") -> list[dict]:
    """The lines of the log, or of another file of its kind; none where it cannot be read."""
    try:
        return read_log(folder / name)
    except OSError:
        return []


def log_age(folder: Path) -> float | None:
    """Seconds since the log was written; None if there is none."""
    written = _modified(folder / "log.jsonl")
    return _age(written) if written else None


def total_steps(folder: Path) -> int | None:
    """How many optimizer steps the settings ask for; None where they give epochs, or cannot be read."""
    try:
        total = read_yaml(folder / "settings.yaml").get("max_train_steps")
    except (DbkitError, OSError):
        return None
    return total if isinstance(total, int) and total > 0 else None


def run_settings(model: Path) -> dict[str, Any]:
    """The settings of the run that a model or a checkpoint lies in; none for a model from elsewhere."""
    paths = (folder / "settings.yaml" for folder in model.absolute().parents[:2])
    return next((read_yaml(path) for path in paths if path.is_file()), {})


def finite(value: object) -> bool:
    """Whether a value of a log is a number that one can reckon with: sums and ratios of such numbers are numbers."""
    return isinstance(value, float) and abs(value) < 1e100


def recent_loss(losses: Sequence[float]) -> float | None:
    """The mean of the last losses, for one step's is mostly that of its random timesteps. None where there are none."""
    recent = losses[-RECENT:]
    return sum(recent) / len(recent) if recent else None


def preview_of(run: Path, step: int) -> Path:
    """The preview picture of a step; its single pictures lie in a folder of that name without the suffix."""
    return step_folder(run / "previews", step).with_suffix(".png")


def newest_preview(folder: Path) -> Path | None:
    """The preview picture of the highest step."""
    # Names are padded to six digits: a longer one is of a higher step.
    try:
        return max((folder / "previews").glob("step_*.png"), key=lambda path: (len(path.name), path.name), default=None)
    except OSError:
        return None
