"""saved_models(): what the runs of a workspace have saved, each step with its preview and figures, to choose from."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from pathlib import Path

from dbkit import run_folder
from dbkit.errors import counted
from dbkit.files import size
from dbkit.images import as_html
from dbkit.models import LORA_BASE
from dbkit.workspace import Workspace


@dataclass(frozen=True)
class SavedModel:
    """A usable model of a run: its folder, step, bytes, the preview of its step, and the mean of the losses before it.

    is_lora: the folder holds one file that goes with a model, and is used as it is.
    """

    folder: Path
    run: str
    step: int
    size: int
    preview: Path | None
    loss: float | None
    is_lora: bool

    def __str__(self) -> str:
        loss = f", loss {self.loss:.4f}" if self.loss is not None else ""
        return f"step {self.step}, {size(self.size)}{loss}{', a LoRA' if self.is_lora else ''}"


@dataclass(frozen=True)
class SavedModels:
    """The models of a workspace, those of the newest run first. Shows the pictures in a notebook."""

    workspace: Path
    models: list[SavedModel]

    def __str__(self) -> str:
        lines = [f"{counted(len(self.models), 'model')} in {self.workspace / 'runs'}"]
        return "\n".join([*lines, *(f"  {self._name(model)}: {model}" for model in self.models)])

    def _name(self, model: SavedModel) -> str:
        return model.folder.relative_to(self.workspace).as_posix()

    def _repr_html_(self) -> str:
        shown = ""
        for run in dict.fromkeys(model.run for model in self.models):
            cards = "".join(self._card(model) for model in self.models if model.run == run)
            shown += f"<p><b>{html.escape(run)}</b></p><div style='display:flex;flex-wrap:wrap;gap:12px'>{cards}</div>"
        return shown or f"<p>There is no finished model in {html.escape(str(self.workspace / 'runs'))} yet.</p>"

    def _card(self, model: SavedModel) -> str:
        picture = as_html(model.preview, 320, f"preview of step {model.step}") if model.preview else ""
        return f"<div><code>{html.escape(self._name(model))}</code><br>{html.escape(str(model))}<br>{picture}</div>"


def saved_models(workspace: Workspace) -> SavedModels:
    """The whole checkpoints and finished models in the workspace's runs, by their files; nothing is written."""
    folder = workspace.path / "runs"
    runs = sorted(run_folder.runs_in(folder), key=lambda name: run_folder.log_age(folder / name) or math.inf)
    return SavedModels(workspace.path, [model for name in runs for model in _of_run(folder / name)])


def _of_run(run: Path) -> list[SavedModel]:
    place = run_folder.read_place(run, verify=False)
    lines = [line for line in run_folder.read_lines(run) if run_folder.finite(line.get("loss"))]
    models = []
    for saved in [*place.checkpoints, *([place.model] if place.model else [])]:
        preview = run_folder.preview_of(run, saved.step)
        if not saved.fault:
            models.append(
                SavedModel(
                    saved.folder,
                    run.name,
                    saved.step,
                    saved.size,
                    preview if preview.is_file() else None,
                    run_folder.recent_loss([line["loss"] for line in lines if line["step"] <= saved.step]),
                    (saved.folder / LORA_BASE).is_file(),
                )
            )
    return models
