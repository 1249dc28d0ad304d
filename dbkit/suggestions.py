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
from dbkit.saved_models import SavedModel, saved_models
from dbkit.settings import Settings, read_yaml
from dbkit.workspace import Workspace

# What the notebooks convert to be tried with: never the base of real work.
_CONVERTED_SAMPLE = "sample-diffusers"
# The base model where there is a GPU and nothing was converted yet.
BASE_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def suggest(cls: type[Settings], workspace: Workspace, name: str) -> dict[str, Any]:
    """Values for some of the settings of a form. Paths in the workspace are relative to it.

    Without photographs the sample subject is suggested, without a model and a GPU the embedded one, so that every
    notebook runs from an empty workspace. name tells the two forms of one class apart: convert and export.
    """
    if cls is PrepareConfig:
        return _for_prepare(workspace)
    if cls is CaptionConfig:
        # Run from top to bottom, a notebook must not download a captioner that nobody asked for.
        return {"folder": _dataset(workspace), "captioner": "none"}
    if cls is TrainConfig:
        return _for_train(workspace)
    if cls is PreviewConfig:
        return _for_preview(workspace)
    if cls is ConvertConfig and name == "export":
        model = _finished_model(workspace) or _lora_file(workspace) or _local_base(workspace)
        run = next((path.parent for path in (model, model.parent) if path.name == "model"), None)
        stem = run.name if run else model.name
        best = saved_models(workspace).best(run.name) if run else None
        if best and best.folder != run / "model":
            model, stem = _to_convert(best), f"{stem}-{best.step}"
        return {
            "source": model,
            "destination": Path("exports") / f"{stem}.safetensors",
            "save_precision": "fp16",
            "overwrite": True,
        }
    if cls is ConvertConfig:
        source = (
            workspace.newest("models/*.safetensors") or workspace.newest("models/*.ckpt") or _sample_file(workspace)
        )
        return {"source": source, "destination": Path("models") / f"{source.stem}-diffusers", "overwrite": True}
    return {}


def choices(cls: type[Settings], workspace: Workspace, name: str) -> dict[str, list[str]]:
    """What a form offers for some of its fields, beside what one may type: the models that runs have saved."""
    field = {ConvertConfig: "source", PreviewConfig: "model", EvaluateConfig: "model"}.get(cls)
    if not field or name == "convert":
        return {}
    saved = saved_models(workspace)
    # Those that are recommended come first, of the newest run before all.
    models = sorted(saved.models, key=lambda model: saved.best(model.run) != model)
    folders = [_to_convert(model) if cls is ConvertConfig else model.folder for model in models]
    return {field: [folder.relative_to(workspace.path).as_posix() for folder in folders]}


def _to_convert(model: SavedModel) -> Path:
    """What is converted of a model: of a LoRA its file, though its folder is sampled."""
    return next(model.folder.glob("*.safetensors"), model.folder) if model.is_lora else model.folder


def _for_prepare(workspace: Workspace) -> dict[str, Any]:
    photos = workspace.path / "photos"
    newest = workspace.newest("photos/*/") or workspace.newest("photos/*.zip")
    source = photos if list_images(photos) else newest or data_templates() / SAMPLE
    return {
        "source": source,
        "destination": Path("datasets") / source.stem,
        "resolution": _base_model(workspace)[1],
        "pretrained_model_name_or_path": _base_model(workspace)[0],
    }


def _for_train(workspace: Workspace) -> dict[str, Any]:
    base, resolution = _base_model(workspace)
    dataset = _dataset(workspace)
    values: dict[str, Any] = {"pretrained_model_name_or_path": base, "resolution": resolution, "auto": True}
    values |= {"instance_data_dir": dataset, "output_dir": Path("runs") / dataset.name}
    if dataset.name == SAMPLE:
        sample = read_yaml(data_templates() / "train_object.yaml")
        values |= {name: value for name, value in sample.items() if name != "instance_data_dir"}
    elif all(read_caption(path) for path in list_images(dataset)):
        values["use_txt_as_label"] = True
    if embedded.is_embedded(base):
        values |= {**embedded.TRAINING, "save_model_every_n_steps": embedded.TRAINING["max_train_steps"] // 2}
    return values


def _dataset(workspace: Workspace) -> Path:
    """The images that were prepared last, or photographs, or the sample subject."""
    report = workspace.newest(f"datasets/*/{REPORT}")
    return report.parent if report else workspace.newest("photos/*/") or data_templates() / SAMPLE


def _for_preview(workspace: Workspace) -> dict[str, Any]:
    model = _finished_model(workspace, "*.json")
    if model is None:
        base = _local_base(workspace)
        return {"model": base, "prompt": ["photo of a dog"], "output": "preview.png", **_guidance(base, {})}
    settings = model.parent / "settings.yaml"
    run = read_yaml(settings) if settings.exists() else {}
    instance = run.get("instance_prompt")
    prompts = [instance, instance and in_a_place(instance), run.get("test_prompt"), run.get("class_prompt")]
    prompts = list(dict.fromkeys(prompt for prompt in prompts if prompt))
    if run.get("use_txt_as_label"):
        data = Path(run.get("instance_data_dir", ""))
        images = list_images(data) if data.is_dir() else []
        prompts = [read_caption(path) or "" for path in images[:1]] + prompts
    best = saved_models(workspace).best(model.parent.name)
    shown = best.folder if best else model
    return {"model": shown, "prompt": prompts, "output": model.parent / "preview.png", **_guidance(model, run)}


def _guidance(model: Path, run: dict[str, Any]) -> dict[str, Any]:
    suited = run.get("guidance_scale") or (embedded.GUIDANCE_SCALE if embedded.is_embedded(model) else None)
    return {"guidance_scale": [suited]} if suited else {}


def _finished_model(workspace: Workspace, file: str = "model_index.json") -> Path | None:
    """The model of the run that ended last: a whole one, or with any .json of its own a LoRA too."""
    index = workspace.newest(f"runs/*/model/{file}")
    return index.parent if index else None


def _lora_file(workspace: Workspace) -> Path | None:
    """The file of the LoRA whose training ended last."""
    return workspace.newest("runs/*/model/*.safetensors")


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
