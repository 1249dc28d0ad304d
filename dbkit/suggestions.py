"""What a form shows before anyone has chosen: values read off the workspace, so that notebooks follow one another."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from dbkit import embedded
from dbkit.captions import read_caption
from dbkit.config import CaptionConfig, ConvertConfig, EvaluateConfig, PrepareConfig, PreviewConfig, TrainConfig
from dbkit.convert import convert
from dbkit.embedded import SAMPLE, data_templates
from dbkit.errors import DbkitError
from dbkit.images import list_images
from dbkit.libraries import choose_device
from dbkit.models import model_facts
from dbkit.planning import in_a_place
from dbkit.report import REPORT
from dbkit.run_folder import FIGURES, Saved, read_lines, run_settings
from dbkit.saved_models import saved_models
from dbkit.settings import Settings, read_yaml
from dbkit.status import status
from dbkit.workspace import Workspace

# What the notebooks convert to be tried with: never the base of real work.
_CONVERTED_SAMPLE = "sample-diffusers"
# The base model where there is a GPU and nothing was converted yet.
BASE_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def suggest(cls: type[Settings], workspace: Workspace, name: str, run: Path | None = None) -> dict[str, Any]:
    """Values for some of the settings of a form.

    Without photographs the sample subject is suggested, without a model and a GPU the embedded one, so that every
    notebook runs from an empty workspace. name tells the two forms of one class apart: convert and export. run is the
    one whose model is looked at or exported, if not the newest of the workspace.
    """
    if cls is PrepareConfig:
        return _for_prepare(workspace)
    if cls is CaptionConfig:
        # Run from top to bottom, a notebook must not download a captioner that nobody asked for.
        return {"folder": _dataset(workspace), "captioner": "none"}
    if cls is TrainConfig:
        return _for_train(workspace)
    if cls is PreviewConfig:
        return _for_preview(workspace, run or _newest_run(workspace))
    if cls is ConvertConfig and name == "export":
        run = run or _newest_run(workspace)
        return _for_export(workspace, run, status(run).best if run else None)
    if cls is ConvertConfig:
        source = (
            workspace.newest("models/*.safetensors") or workspace.newest("models/*.ckpt") or _sample_file(workspace)
        )
        return {"source": source, "destination": Path("models") / f"{source.stem}-diffusers", "overwrite": True}
    return {}


def export_of(workspace: Workspace, run: Path) -> ConvertConfig:
    """What makes a file for user interfaces of a run's recommended step, or of its last one if none is recommended.

    Raises DbkitError where the run has nothing whole to export.
    """
    best = status(run).best
    if best is None:
        raise DbkitError(f"{run} has no whole checkpoint and no finished model to export; run the training again")
    return workspace.anchor(ConvertConfig.from_dict(_for_export(workspace, run, best)))


def choices(cls: type[Settings], workspace: Workspace, name: str) -> dict[str, list[str]]:
    """What a form offers for some of its fields, beside what one may type: pictures, models, what runs have saved."""

    def inside(*patterns: str) -> list[str]:
        found = (path for pattern in patterns for path in sorted(workspace.path.glob(pattern)))
        return [path.relative_to(workspace.path).as_posix() for path in found if not path.name.startswith(".")]

    if cls is PrepareConfig:
        return {"source": inside("photos/*/", "photos/*.zip")}
    if cls is TrainConfig:
        models = [*inside("models/*/"), BASE_MODEL, embedded.NAME]
        return {"pretrained_model_name_or_path": models, "instance_data_dir": inside("datasets/*/", "photos/*/")}
    field = {ConvertConfig: "source", PreviewConfig: "model", EvaluateConfig: "model"}.get(cls)
    if not field or name == "convert":
        return {}
    saved = saved_models(workspace)
    # Those that are recommended come first, of the newest run before all.
    models = sorted(saved.models, key=lambda model: saved.best(model.run) != model)
    return {field: [model.folder.relative_to(workspace.path).as_posix() for model in models]}


def _for_prepare(workspace: Workspace) -> dict[str, Any]:
    source = _photos(workspace) or workspace.newest("photos/*.zip") or data_templates() / SAMPLE
    base, resolution = _base_model(workspace)
    return {
        "source": source,
        "destination": Path("datasets") / (source.name if source.is_dir() else source.stem),
        "resolution": resolution,
        "pretrained_model_name_or_path": base,
    }


def _for_train(workspace: Workspace) -> dict[str, Any]:
    base, resolution = _base_model(workspace)
    dataset = _dataset(workspace)
    values: dict[str, Any] = {"pretrained_model_name_or_path": base, "resolution": resolution, "auto": True}
    values |= {"instance_data_dir": dataset, "output_dir": Path("runs") / dataset.name}
    values["use_txt_as_label"] = False
    if dataset.name == SAMPLE:
        sample = read_yaml(data_templates() / "train_object.yaml")
        values |= {name: value for name, value in sample.items() if name != "instance_data_dir"}
    elif (images := list_images(dataset)) and all(read_caption(path) for path in images):
        values["use_txt_as_label"] = True
    if embedded.is_embedded(base):
        values |= {**embedded.TRAINING, "save_model_every_n_steps": embedded.TRAINING["max_train_steps"] // 2}
    return values


def _dataset(workspace: Workspace) -> Path:
    """The images that were prepared last, or photographs, or the sample subject."""
    report = workspace.newest(f"datasets/*/{REPORT}")
    return report.parent if report else _photos(workspace) or data_templates() / SAMPLE


def _photos(workspace: Workspace) -> Path | None:
    """Photographs that lie in photos/ itself, or its newest folder."""
    photos = workspace.path / "photos"
    return photos if list_images(photos) else workspace.newest("photos/*/")


def _newest_run(workspace: Workspace) -> Path | None:
    """The run that was worked on last of those that have saved a model."""
    return next((workspace.path / "runs" / model.run for model in saved_models(workspace).models), None)


def _for_export(workspace: Workspace, run: Path | None, best: Saved | None) -> dict[str, Any]:
    model = best.folder if best else _local_base(workspace)
    name = f"{run.name}-{best.step}" if best else model.name
    return {
        "source": model,
        "destination": Path("exports") / f"{name}.safetensors",
        "save_precision": "fp16",
        "overwrite": True,
    }


def _for_preview(workspace: Workspace, run: Path | None) -> dict[str, Any]:
    best = status(run).best if run else None
    if best is None:
        base = _local_base(workspace)
        return {"model": base, "prompt": ["photo of a dog"], "output": "preview.png", **_guidance(base, {})}
    settings = run_settings(best.folder)
    shown = {"model": best.folder, "prompt": _prompts(run, settings), "output": run / "preview.png"}
    return {**shown, **_guidance(settings.get("pretrained_model_name_or_path") or best.folder, settings)}


def _prompts(run: Path, settings: dict[str, Any]) -> list[str]:
    """What a run's previews showed; of a run without previews what its settings or its captions name."""
    measured = [line["previews"]["prompts"] for line in read_lines(run, FIGURES) if line.get("previews")]
    instance = settings.get("instance_prompt")
    prompts = measured[-1] if measured else [instance, instance and in_a_place(instance), settings.get("class_prompt")]
    # In a form each line is a prompt.
    if found := list(dict.fromkeys(" ".join(prompt.split()) for prompt in prompts if prompt)):
        return found
    data = Path(settings.get("instance_data_dir") or run / "none")
    images = list_images(data)[:1] if data.is_dir() else []
    captions = [image.stem if settings.get("use_filename_as_label") else read_caption(image) for image in images]
    return list(filter(None, captions))


def _guidance(model: str | Path, run: dict[str, Any]) -> dict[str, Any]:
    suited = run.get("guidance_scale") or (embedded.GUIDANCE_SCALE if embedded.is_embedded(model) else None)
    return {"guidance_scale": [suited]} if suited else {}


def _base_model(workspace: Workspace) -> tuple[str, int]:
    """The base model that was converted last, or one that suits the machine, and the size of its pictures."""
    index = workspace.newest("models/*/model_index.json")
    if (index is None or index.parent.name == _CONVERTED_SAMPLE) and choose_device("auto").type != "cpu":
        return BASE_MODEL, 512
    name = str(index.parent) if index else embedded.NAME
    try:
        facts = model_facts(name)
    except DbkitError:
        return name, 512  # the notebook's own check says what is wrong with it
    return name, facts.resolution if facts else 512


def _local_base(workspace: Workspace) -> Path:
    """A base model that lies here: what is previewed or exported before anything was trained."""
    folder = embedded.local_folder(_base_model(workspace)[0])
    return folder if folder.is_dir() else embedded.MODEL


def _sample_file(workspace: Workspace) -> Path:
    """A single-file checkpoint to try the conversion with."""
    path = workspace.path / "models" / "sample.safetensors"
    # A form is no place for the lines of a conversion.
    with contextlib.redirect_stdout(io.StringIO()):
        return convert(embedded.MODEL, path)
