"""The folder layout. Google Drive, Colab, Kaggle and local machines are told apart here and nowhere else."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dbkit import embedded
from dbkit.errors import DbkitError
from dbkit.files import refusals_are_sentences, size
from dbkit.settings import Settings, coerce, field_type, is_path

Config = TypeVar("Config", bound=Settings)

# Those of a workspace. A model whose name begins with one of them is meant as a path, not as a Hugging Face id.
FOLDERS = ("photos", "settings", "models", "datasets", "class_images", "runs", "exports")
# Settings that name a model by its path, its Hugging Face id or otherwise.
_MAY_BE_PATHS = (
    "source",
    "pretrained_model_name_or_path",
    "pretrained_vae_name_or_path",
    "tokenizer_name",
    "model",
    "clip",
    "dino",
)
_DRIVE = Path("/content/drive")
_DISK = Path("/content/dbkit_runs")
# What Kaggle keeps of a session.
_KAGGLE = Path("/kaggle/working/dbkit")


@dataclass(frozen=True)
class Workspace:
    """The one thing that notebooks share: a folder with everything a person makes."""

    path: Path

    def __post_init__(self) -> None:
        for folder in FOLDERS:
            try:
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DbkitError(
                    f"the workspace {self.path} cannot be made ({error.strerror}); set DBKIT_WORKSPACE to a "
                    "folder you can write to"
                ) from error

    def settings_file(self, name: str) -> Path:
        """Where the settings of one form are kept."""
        return self.path / "settings" / f"{name}.yaml"

    def newest(self, pattern: str) -> Path | None:
        """The path matching the pattern that changed last; a folder changes when it gets a file.

        Clutter is left out, as are links that lead nowhere.
        """
        found = (
            path
            for path in self.path.glob(pattern)
            if not any(map(_is_leftover, path.relative_to(self.path).parts)) and path.exists()
        )
        return max(found, key=lambda path: path.stat().st_mtime, default=None)

    def anchor(self, config: Config) -> Config:
        """The same settings with relative paths taken from the workspace instead of the current folder.

        Where they begin with the workspace's own name, as a page that shows the folder above has them, from there.
        """
        changes = {}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if is_path(field_type(type(config), field.name)) and value not in (None, Path(embedded.NAME)):
                changes[field.name] = self._inside(value)
        for name in _MAY_BE_PATHS:
            value = getattr(config, name, None)
            if not isinstance(value, str) or value in ("", embedded.NAME) or "://" in value:
                continue
            # Not Path.exists(), which raises where a name is longer than a file's can be.
            if os.path.exists(self._inside(value)):  # noqa: PTH110
                changes[name] = str(self._inside(value))
        return dataclasses.replace(config, **changes)

    def _inside(self, path: str | Path) -> Path:
        name = self.path.name
        twice = Path(path).parts[:1] == (name,) and not (self.path / name).exists()
        return (self.path.parent if twice else self.path) / path

    @refusals_are_sentences()
    def __str__(self) -> str:
        lines = [f"workspace: {self.path} ({size(shutil.disk_usage(self.path).free)} free)"]
        for folder in FOLDERS:
            inside = sorted(path.name for path in (self.path / folder).iterdir() if not path.name.startswith("."))
            lines.append(f"  {folder}: {', '.join(inside) or 'empty'}")
        return "\n".join(lines)


def _is_leftover(name: str) -> bool:
    """Whether a name is clutter, or what a killed command left half written."""
    return name.startswith(".") or name.endswith((".partial", ".old"))


def working_folder(home: Path, local_dir: Path | None) -> Path:
    """Where the run of that home works: in home itself, or in local_dir; on Colab's disk if home is on Google Drive."""
    if local_dir:
        run = (local_dir / home.name).absolute()
        one, other = run.resolve(), home.resolve()
        if one == other:
            return home
        if one in other.parents or other in one.parents:
            raise DbkitError(f"output_dir {home} and local_dir's {run} lie in one another; choose another local_dir")
        if blocking := next((path for path in (run, *run.parents) if path.is_file()), None):
            raise DbkitError(f"local_dir {local_dir} cannot be made, since {blocking} is a file; choose another one")
        return run
    if on_colab() and home.is_relative_to(_DRIVE):
        if not _is_mounted():
            raise DbkitError(f"{home} is on Google Drive, which is not mounted; run the first cell of notebook 1")
        return _DISK / home.relative_to(_DRIVE)
    return home


def default_folder() -> Path:
    """DBKIT_WORKSPACE if set; on Colab with Drive mounted MyDrive/dbkit; on Kaggle what it keeps; else ./workspace."""
    if named := os.environ.get("DBKIT_WORKSPACE"):
        return _named(named, "DBKIT_WORKSPACE")
    if on_kaggle():
        return _KAGGLE
    if on_colab() and _is_mounted():
        return _DRIVE / "MyDrive" / "dbkit"
    return Path("workspace").absolute()


def on_colab() -> bool:
    """Whether this kernel is Google Colab's, which imports its own package before the first cell."""
    return "google.colab" in sys.modules and not on_kaggle()


def on_kaggle() -> bool:
    """Whether this is a notebook of Kaggle, whose machine is made from Colab's and has its package too."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def gpu_hint() -> str:
    """How one gets a GPU here, as the end of a sentence; nothing where there is nothing to choose."""
    if on_colab():
        return "; on Colab choose Runtime, Change runtime type, T4 GPU"
    return "; on Kaggle choose Settings, Accelerator, GPU T4 x2" if on_kaggle() else ""


def _is_mounted() -> bool:
    """Whether Google Drive is there and answers; a mount point that lost its Drive is there and fails."""
    try:
        return (_DRIVE / "MyDrive").is_dir()
    except OSError:
        return False


def require_download(wanted: bool) -> None:
    """Raise DbkitError where a download through the browser is wanted and this is not Colab."""
    if wanted and not on_colab():
        raise DbkitError("download is for Colab, and the file will be on this machine already; leave it off")


def download(path: Path) -> None:
    """Hand a file to the browser of a Colab notebook."""
    from google.colab import files

    files.download(str(path))


def colab_secret(name: str) -> str | None:
    """A secret of this Colab notebook; None where there is none, and elsewhere.

    Raises DbkitError where the notebook may not read it, or Colab does not answer.
    """
    if not on_colab():
        return None
    from google.colab import userdata

    try:
        return userdata.get(name)
    except userdata.SecretNotFoundError:
        return None
    except userdata.NotebookAccessError as error:
        raise DbkitError(
            f"this notebook may not read the secret {name}; click the key at Colab's left, turn on notebook access "
            "beside it, and run the cell again"
        ) from error
    except userdata.TimeoutException as error:
        raise DbkitError(
            f"Colab does not answer when asked for the secret {name}; open the notebook in Colab and run the cell again"
        ) from error


@refusals_are_sentences()
def open_workspace(folder: str | Path | None = None) -> Workspace:
    """Open the workspace, making what is missing. On Colab this mounts Google Drive first, unless a folder is given.

    Raises DbkitError where Drive is not mounted, the folder cannot be made, or it is no path.
    """
    if folder is None and on_colab() and "DBKIT_WORKSPACE" not in os.environ and not _is_mounted():
        _mount()
    return Workspace(_named(folder, "the workspace") if folder else default_folder())


def _named(folder: str | Path, what: str) -> Path:
    """A path that someone gave, as those of settings are read."""
    try:
        if isinstance(folder, (int, float)):  # which a setting takes for a name
            raise ValueError(f"is {folder!r}; write a path")
        return coerce(folder, Path).absolute()
    except ValueError as error:
        raise DbkitError(f"{what} {error}") from None


def _mount() -> None:
    """Mount Google Drive, which asks the person; also in place of one that was lost."""
    from google.colab import drive

    why = ""
    try:
        drive.mount(str(_DRIVE))
    except Exception as error:  # of several classes, of which the one for a refusal is private
        why = f" ({error})"
    if not _is_mounted():
        raise DbkitError(f"Google Drive is not mounted{why}; run the cell again and allow access")
