"""What files tell of themselves: the fields of ModelSpec, and the receipt of the run that a model comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dbkit.checkpoint import read_manifest
from dbkit.images import data_url
from dbkit.run_folder import preview_of
from dbkit.settings import field_type, is_path
from dbkit.train_config import TrainConfig

# Under this name files of whole models carry the receipt of their run.
RECEIPT = "dbkit.run"
# What a run's manifest says of models and data: hashes of what they hold, or ids, never where they lie.
_SOURCES = (
    "pretrained_model_name_or_path",
    "pretrained_vae_name_or_path",
    "tokenizer_name",
    "instance images or captions",
    "class images",
)


def architecture(is_sd2: bool, is_v: bool, inpaints: bool = False) -> str:
    """ModelSpec's name for a family."""
    name = f"stable-diffusion-v2-{'768-v' if is_v else '512'}" if is_sd2 else "stable-diffusion-v1"
    return name + ("-inpainting" if inpaints else "")


def model_spec(
    title: str, architecture: str, is_v: bool, resolution: tuple[int, int], trigger: str | None, **more: str | None
) -> dict[str, str]:
    """The fields of the Stability AI model metadata standard, version 1.0.0, all of them text; more are its others."""
    width, height = resolution
    facts = {
        "sai_model_spec": "1.0.0",
        "architecture": architecture,
        "title": title,
        "resolution": f"{width}x{height}",
        "prediction_type": "v" if is_v else "epsilon",
        "trigger_phrase": trigger,
        **more,
    }
    return {f"modelspec.{name}": value for name, value in facts.items() if value is not None}


def picture(folder: Path) -> str | None:
    """The first preview of the run and step that a model folder comes from, as ModelSpec has it; None without one."""
    manifest = read_manifest(folder)
    pictures = sorted(preview_of(_run_of(folder), manifest["step"]).with_suffix("").glob("*.png")) if manifest else []
    if not pictures:
        return None
    return data_url(pictures[0], 256)


def step_of(folder: Path) -> str | None:
    """Which step of which run a model folder is, in words; None if it is none, or lies in no run."""
    receipt, run = run_receipt(folder), _run_of(folder)
    return f"step {receipt['steps']} of the run {run.name}" if receipt and (run / "settings.yaml").is_file() else None


def _run_of(folder: Path) -> Path:
    """Where the run of a model folder lies, if it is one's model/ or checkpoint."""
    parent = folder.absolute().parent
    return parent.parent if parent.name == "checkpoints" else parent


def run_receipt(folder: Path) -> dict[str, Any] | None:
    """Steps, settings, base model and data of the run that a model folder comes from, by its manifest; None if of none.

    Nothing in it tells of this machine: no paths, no secrets.
    """
    manifest = read_manifest(folder)
    facts = manifest["facts"] if manifest else {}
    if not isinstance(facts.get("settings"), dict):
        return None
    known = {name for name in TrainConfig.__dataclass_fields__ if not is_path(field_type(TrainConfig, name))}
    settings = {name: value for name, value in facts["settings"].items() if name in known and value is not None}
    sources = {name: facts[name] for name in _SOURCES if facts.get(name)}
    return {"steps": manifest["step"], "settings": settings, **sources}
