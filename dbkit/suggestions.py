"""What a form shows before anyone has chosen: values read off the workspace, so that notebooks follow one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dbkit.captions import read_caption
from dbkit.config import ConvertConfig, PrepareConfig, PreviewConfig, TrainConfig
from dbkit.convert import convert
from dbkit.dataset import REPORT
from dbkit.demo import RESOLUTION, SAMPLE, data_templates, make_random_model
from dbkit.errors import DbkitError
from dbkit.images import list_images
from dbkit.libraries import choose_device
from dbkit.models import model_facts
from dbkit.settings import Settings, read_yaml
from dbkit.workspace import Workspace

# The base model where there is a GPU and nothing was converted yet.
# What the notebooks make to be tried with: never the base of real work.
_SAMPLES = ("small-random", "sample-diffusers")
BASE_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def suggest(cls: type[Settings], workspace: Workspace, name: str) -> dict[str, Any]:
    """Values for some of the settings of a form. Paths in the workspace are relative to it.

    Without photographs the sample subject is suggested, without a model and a GPU the small random one, so that every
    notebook runs from an empty workspace. name tells the two forms of one class apart: convert and export.
    """
    if cls is PrepareConfig:
        return _for_prepare(workspace)
    if cls is TrainConfig:
        return _for_train(workspace)
    if cls is PreviewConfig:
        return _for_preview(workspace)
    if cls is ConvertConfig and name == "export":
        model = _finished_model(workspace) or Path(_base_model(workspace)[0])
        stem = model.parent.name if model.name == "model" else model.name
        return {
            "source": model,
            "destination": Path("exports") / f"{stem}.safetensors",
            "half": True,
            "overwrite": True,
        }
    if cls is ConvertConfig:
        source = (
            workspace.newest("models/*.safetensors") or workspace.newest("models/*.ckpt") or _sample_file(workspace)
        )
        return {"source": source, "destination": Path("models") / f"{source.stem}-diffusers", "overwrite": True}
    return {}


def _for_prepare(workspace: Workspace) -> dict[str, Any]:
    photos = workspace.path / "photos"
    newest = workspace.newest("photos/*/") or workspace.newest("photos/*.zip")
    source = photos if list_images(photos) else newest or data_templates() / SAMPLE
    return {
        "source": source,
        "destination": Path("datasets") / source.stem,
        "resolution": _base_model(workspace)[1],
    }


def _for_train(workspace: Workspace) -> dict[str, Any]:
    base, resolution = _base_model(workspace)
    report = workspace.newest(f"datasets/*/{REPORT}")
    dataset = report.parent if report else workspace.newest("photos/*/") or data_templates() / SAMPLE
    values: dict[str, Any] = {"pretrained_model_name_or_path": base, "resolution": resolution}
    values |= {"instance_data_dir": dataset, "output_dir": Path("runs") / dataset.name}
    if dataset.name == SAMPLE:
        sample = read_yaml(data_templates() / "train_object.yaml")
        values |= {name: value for name, value in sample.items() if name != "instance_data_dir"}
    elif all(read_caption(path) for path in list_images(dataset)):
        values["use_txt_as_label"] = True
    if _is_small(base):
        # A minute on two cores, enough to see every part work.
        values |= {"max_train_steps": 60, "num_class_images": 8, "learning_rate": 1e-3, "save_model_every_n_steps": 30}
    return values


def _for_preview(workspace: Workspace) -> dict[str, Any]:
    model = _finished_model(workspace)
    if model is None:
        return {"model": _base_model(workspace)[0], "prompt": ["photo of a robot"], "output": "preview.png"}
    settings = model.parent / "settings.yaml"
    run = read_yaml(settings) if settings.exists() else {}
    prompts = [run[name] for name in ("instance_prompt", "test_prompt", "class_prompt") if run.get(name)]
    if run.get("use_txt_as_label"):
        data = Path(run.get("instance_data_dir", ""))
        images = list_images(data) if data.is_dir() else []
        prompts = [read_caption(path) or "" for path in images[:1]] + prompts
    return {"model": model, "prompt": prompts, "output": model.parent / "preview.png"}


def _finished_model(workspace: Workspace) -> Path | None:
    index = workspace.newest("runs/*/model/model_index.json")
    return index.parent if index else None


def _base_model(workspace: Workspace) -> tuple[str, int]:
    """The base model that was converted last, or one that suits the machine, and the size of its pictures."""
    index = workspace.newest("models/*/model_index.json")
    if (index is None or index.parent.name in _SAMPLES) and choose_device("auto").type != "cpu":
        return BASE_MODEL, 512
    folder = index.parent if index else _small_model(workspace)
    try:
        facts = model_facts(folder)
    except DbkitError:
        return str(folder), 512  # the notebook's own check says what is wrong with it
    return str(folder), facts.resolution if facts else 512


def _small_model(workspace: Workspace) -> Path:
    folder = workspace.path / "models" / _SAMPLES[0]
    return folder if (folder / "model_index.json").exists() else make_random_model(folder)


def _is_small(model: str) -> bool:
    return Path(model).is_dir() and model_facts(model).resolution <= RESOLUTION


def _sample_file(workspace: Workspace) -> Path:
    """A single-file checkpoint to try the conversion with."""
    path = workspace.path / "models" / "sample.safetensors"
    return convert(_small_model(workspace), path)
