"""saved_models(): what the runs of a workspace have saved, each step with its previews and figures, to choose from."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbkit import run_folder
from dbkit.best_step import MEANINGS, Recommendation, recommend
from dbkit.charts import chart
from dbkit.errors import counted
from dbkit.files import size
from dbkit.images import as_html
from dbkit.models import LORA_BASE
from dbkit.workspace import Workspace

# Pictures of a step that are shown: one of each prompt, the first ones.
_MOST_PROMPTS = 9
# Moves through the steps of a grid; at its left end all are shown. Where a page runs no scripts, they are as well.
_SLIDE = "const n=+this.value;[...this.parentNode.nextElementSibling.children].forEach((e,i)=>e.hidden=n&&i!=n-1)"


@dataclass(frozen=True)
class SavedModel:
    """A usable model of a run: its folder, step, bytes, the preview of its step, and the mean of the losses before it.

    is_lora: the folder holds one file that goes with a model, and is used as it is. figures are those of the step, by
    name (best_step.MEANINGS).
    """

    folder: Path
    run: str
    step: int
    size: int
    preview: Path | None
    loss: float | None
    is_lora: bool
    figures: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        known = {"loss": self.loss} if self.loss is not None else {}
        known |= {name.replace("_", " "): value for name, value in self.figures.items()}
        words = "".join(f", {name} {value:.{4 if 'loss' in name else 2}f}" for name, value in known.items())
        return f"step {self.step}, {size(self.size)}{words}{', a LoRA' if self.is_lora else ''}"


@dataclass(frozen=True)
class SavedModels:
    """The models of a workspace, those of the newest run first. In a notebook it shows pictures, step by step.

    measured has the figures of all steps of each run, recommended the step to use of each run that was measured.
    """

    workspace: Path
    models: list[SavedModel]
    measured: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    recommended: dict[str, Recommendation] = field(default_factory=dict)

    def best(self, run: str) -> SavedModel | None:
        """The recommended model of a run; the finished one is listed last, and taken where two are of one step."""
        wanted = self.recommended.get(run)
        return next((m for m in reversed(self.models) if m.run == run and wanted and m.step == wanted.step), None)

    def __str__(self) -> str:
        lines = [f"{counted(len(self.models), 'model')} in {self.workspace / 'runs'}"]
        lines += [f"  {self._name(model)}: {model}" for model in self.models]
        return "\n".join([*lines, *(f"  of {run} {found}" for run, found in self.recommended.items())])

    def _name(self, model: SavedModel) -> str:
        return model.folder.relative_to(self.workspace).as_posix()

    def _repr_html_(self) -> str:
        shown = "".join(self._run(run) for run in dict.fromkeys(model.run for model in self.models))
        return shown or f"<p>There is no finished model in {html.escape(str(self.workspace / 'runs'))} yet.</p>"

    def _run(self, run: str) -> str:
        """One run: what is recommended and why, the curves of its figures, and the grid of its previews."""
        models, found = [model for model in self.models if model.run == run], self.recommended.get(run)
        words = f"<p>{html.escape(str(found)[:1].upper() + str(found)[1:])}.</p>" if found else ""
        slider = ""
        if len(models) > 1:
            slider = f"min='0' max='{len(models)}' value='0' oninput=\"{html.escape(_SLIDE)}\""
            # Without that attribute JupyterLab takes the arrow keys for itself.
            slider = f"<input type='range' {slider} data-lm-suppress-shortcuts='true'>"
            slider = f"<div style='margin-top:12px'>all steps {slider} one after the other</div>"
        rows = "".join(self._row(model) for model in models)
        return f"<p><b>{html.escape(run)}</b></p>{words}{self._curves(run)}{slider}<div>{rows}</div>"

    def _curves(self, run: str) -> str:
        mark = self.recommended[run].step if run in self.recommended else None
        curves = ""
        for name, meaning in MEANINGS.items():
            points = [
                (line["step"], line[name]) for line in self.measured.get(run, []) if run_folder.finite(line.get(name))
            ]
            if picture := chart(points, name.replace("_", " "), mark=mark, width=300, height=100):
                title = html.escape(name.replace("_", " "))
                curves += f"<div style='max-width:300px'><b>{title}</b>: {html.escape(meaning)}{picture}</div>"
        return f"<div style='display:flex;flex-wrap:wrap;gap:16px;align-items:end'>{curves}</div>"

    def _row(self, model: SavedModel) -> str:
        best = " ★ recommended" if self.best(model.run) == model else ""
        pictures = "".join(
            as_html(path, 160, f"{path.stem}, step {model.step}", width=160) for path in _pictures(model)
        )
        name = f"<code>{html.escape(self._name(model))}</code><b>{best}</b>"
        return (
            f"<div style='margin-top:12px'>{name}<br>{html.escape(str(model))}"
            f"<div style='display:flex;flex-wrap:wrap;gap:4px;image-rendering:pixelated'>{pictures}</div></div>"
        )


def saved_models(workspace: Workspace) -> SavedModels:
    """The whole checkpoints and finished models in the workspace's runs, by their files; nothing is written.

    Of each run that was measured while it trained one step is recommended, by the rule of best_step.recommend().
    """
    folder = workspace.path / "runs"
    ages = {name: run_folder.log_age(folder / name) for name in run_folder.runs_in(folder)}
    runs = sorted(ages, key=lambda name: math.inf if ages[name] is None else ages[name])
    measured = {name: run_folder.read_lines(folder / name, run_folder.FIGURES) for name in runs}
    models = [model for name in runs for model in _of_run(folder / name, measured[name])]
    found = {name: recommend(measured[name], {m.step for m in models if m.run == name}) for name in runs}
    return SavedModels(workspace.path, models, measured, {name: best for name, best in found.items() if best})


def _of_run(run: Path, measured: list[dict[str, Any]]) -> list[SavedModel]:
    lines = [line for line in run_folder.read_lines(run) if run_folder.finite(line.get("loss"))]
    figures = {line["step"]: line for line in measured}
    models = []
    for saved in run_folder.read_place(run, verify=False).usable:
        preview = run_folder.preview_of(run, saved.step)
        own = figures.get(saved.step, {})
        models.append(
            SavedModel(
                saved.folder,
                run.name,
                saved.step,
                saved.size,
                preview if preview.is_file() else None,
                run_folder.recent_loss([line["loss"] for line in lines if line["step"] <= saved.step]),
                (saved.folder / LORA_BASE).is_file(),
                {name: own[name] for name in MEANINGS if run_folder.finite(own.get(name))},
            )
        )
    return models


def _pictures(model: SavedModel) -> list[Path]:
    """The first single picture of each prompt; of a preview without them the grid."""
    if model.preview is None:
        return []
    try:
        # Their names begin with the number of the prompt.
        first = {
            path.name.partition("-")[0]: path
            for path in sorted(model.preview.with_suffix("").glob("*.png"), reverse=True)
        }
    except OSError:
        first = {}
    return [first[number] for number in sorted(first)[:_MOST_PROMPTS]] or [model.preview]
