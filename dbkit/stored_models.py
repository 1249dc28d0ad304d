"""Whole models whose tensors still lie in their files: diffusers folders and original files, read and checked."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit import keys
from dbkit.config import ConvertConfig
from dbkit.downloads import fetch, find, is_folder
from dbkit.errors import DbkitError, reason_of
from dbkit.families import Family, find_family, hidden_act, model_configs, original_shapes, vae_config
from dbkit.layouts import from_original, modern_names, vae_from_original
from dbkit.libraries import library_errors, quiet
from dbkit.models import (
    load_state_dict,
    load_vae,
    model_facts,
    read_config,
    require_sample_size,
    state_dict,
    vae_folder,
    weight_files,
)
from dbkit.original_config import config_beside, read_prediction_type
from dbkit.tensor_files import PICKLES, SAFETENSORS, Stored, held, open_tensors
from dbkit.tokenizer import tokenizer_tables

if TYPE_CHECKING:
    import torch

    Parts = dict[str, dict[str, Stored]]

# The name under which files that dbkit writes carry what cannot be read off their shapes.
METADATA = "dbkit"
_PARTS_WITH_SETTINGS = ("unet", "vae", "text_encoder", "scheduler", "tokenizer")
_VAE_FILES = (SAFETENSORS, *PICKLES)
_MODELSPEC = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}


@dataclass(frozen=True)
class StoredModel:
    """A whole model under diffusers' names, whose tensors still lie in their files."""

    family: Family
    weights: Parts
    configs: dict[str, Any]
    # Vocabulary and merges, where they are not CLIP's.
    tokenizer: dict[str, Any] | None
    # For sentences: the VAE that takes the place of the model's own.
    other_vae: str | None = None


def read_folder(config: ConvertConfig) -> StoredModel:
    """A diffusers folder as a model. Raises DbkitError unless its settings and tensors fit each other exactly."""
    source = Path(config.source)
    model_facts(source)
    weights = {part: stored_weights(source / part, part) for part in keys.PREFIXES}
    family = find_family(original_shapes(weights), source)
    configs = {part: read_config(source, part) for part in _PARTS_WITH_SETTINGS}
    vocabulary, merges = tokenizer_tables(source / "tokenizer")
    # CLIP's tokenizer, which every Stable Diffusion model has, is known by a few of its tokens.
    usual = len(vocabulary) == 49408 and vocabulary.get("photo</w>") == 1125 and vocabulary.get("dog</w>") == 1929
    if config.prediction_type != "auto":
        configs["scheduler"]["prediction_type"] = config.prediction_type
    if config.pretrained_vae_name_or_path:
        weights["vae"], configs["vae"] = _other_vae(config.pretrained_vae_name_or_path)
    act = configs["text_encoder"].get("hidden_act", "quick_gelu")
    if act != hidden_act(family.is_sd2):
        raise DbkitError(
            f"the text encoder of {source} has hidden_act {act}, and user interfaces compute {family.name} with "
            f"{hidden_act(family.is_sd2)}; if the model was trained so, set that in its text_encoder/config.json"
        )
    tables = None if usual else {"vocab": vocabulary, "merges": merges}
    model = StoredModel(family, weights, configs, tables, _named(config))
    empty_modules(model, source)
    return model


def stored_weights(folder: Path, part: str) -> dict[str, Stored]:
    """The tensors of one part of a diffusers folder, which lies in a folder of whatever name."""
    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        tensors = open_tensors(path)[0]
        if twice := found.keys() & tensors.keys():
            raise DbkitError(f"{folder} has {min(twice)} in two files; keep one set of weights there")
        found |= tensors
    return modern_names(part, found)


def read_file(config: ConvertConfig, suffix: str = "") -> StoredModel:
    """An original file as a model, with the settings that dbkit noted in it or those of its family.

    suffix is for a file whose name lacks its own.
    """
    source, other_vae = Path(config.source), config.pretrained_vae_name_or_path
    tensors, metadata = open_tensors(source, suffix)
    facts = _noted(metadata, source)
    family = find_family({name: t.shape for name, t in tensors.items()}, source, without_vae=bool(other_vae))
    noted = facts["configs"] if facts else {}
    vae, noted_vae = _other_vae(other_vae) if other_vae else ({}, None)
    if other_vae:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(keys.PREFIXES["vae"])}
    text_layers = noted.get("text_encoder", {}).get("num_hidden_layers")
    weights = from_original(tensors, family.name, source, text_layers, config.extract_ema)
    weights["vae"] = vae or weights["vae"]
    prediction_type = _prediction_type(config, family, metadata, noted)
    try:
        configs = noted or model_configs(weights, family.is_sd2, prediction_type)
    except (KeyError, IndexError) as error:
        raise DbkitError(f"{source} is not a whole {family.name} model; it lacks {error}") from error
    configs = {**configs, "vae": noted_vae or configs["vae"]}
    configs["scheduler"] = {**configs["scheduler"], "prediction_type": prediction_type}
    return StoredModel(family, weights, configs, facts["tokenizer"] if facts else None, _named(config))


def _noted(metadata: dict[str, Any], source: Path) -> dict[str, Any] | None:
    """What dbkit noted in a file that it wrote."""
    if METADATA not in metadata:
        return None
    try:
        facts = json.loads(metadata[METADATA])
        if not all(isinstance(facts["configs"][part], dict) for part in _PARTS_WITH_SETTINGS):
            raise ValueError("its settings are none")
        said = facts["configs"]["scheduler"].get("prediction_type")
        if not (said is None or isinstance(said, str)):
            raise ValueError("its prediction_type is none")
        tables = facts["tokenizer"]
        if tables is not None and not (
            all(type(number) is int for number in tables["vocab"].values())
            and all(isinstance(merge, str) for merge in tables["merges"])
        ):
            raise ValueError("its tokenizer is none")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DbkitError(
            f"{source} is damaged or not a checkpoint (what dbkit noted in it: {error}); download or copy it again"
        ) from error
    return facts


def _prediction_type(config: ConvertConfig, family: Family, metadata: dict[str, Any], noted: dict[str, Any]) -> str:
    """epsilon or v_prediction, by what is stated. Raises DbkitError where statements differ or nothing is known."""
    if config.prediction_type != "auto":
        return config.prediction_type
    beside = config_beside(Path(config.source))
    stated = {
        "the settings in it": noted.get("scheduler", {}).get("prediction_type"),
        "its modelspec.prediction_type": _MODELSPEC.get(str(metadata.get("modelspec.prediction_type"))),
        str(beside): read_prediction_type(beside),
    }
    stated = {where: what for where, what in stated.items() if what}
    if len(set(stated.values())) > 1:
        said = " and ".join(f"{what} by {where}" for where, what in stated.items())
        raise DbkitError(f"{config.source} predicts {said}; set prediction_type to the right one")
    if stated:
        return next(iter(stated.values()))
    if family.is_sd2:
        raise DbkitError(
            f"nothing says whether {config.source} predicts noise or v, which its tensors do not show; set "
            "prediction_type to v_prediction for models of 768 px, epsilon for the base models of 512 px, or put the "
            f"model's .yaml beside it as {beside.name}"
        )
    return "epsilon"


def _named(config: ConvertConfig) -> str | None:
    """What sentences call the VAE that is put in; addresses without their queries."""
    name = config.pretrained_vae_name_or_path
    return str(find(name, _VAE_FILES)) if name else None


def _other_vae(name: str) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The tensors and settings of a VAE by itself: a file, a folder, a Hugging Face id or the address of a file."""
    place = find(name, _VAE_FILES)
    if not is_folder(place):
        path = fetch(place, _VAE_FILES)
        if path.suffix.lower() not in _VAE_FILES:
            raise DbkitError(f"pretrained_vae_name_or_path {name} is no .safetensors, .ckpt or .pt file; choose one")
        weights = vae_from_original(open_tensors(path)[0], path)
        try:
            return weights, vae_config(weights)
        except (KeyError, IndexError) as error:
            raise DbkitError(f"{path} is not a whole VAE; it lacks {error}") from error
    if folder := vae_folder(name):
        return stored_weights(folder, "vae"), read_config(folder.parent, folder.name, "vae")
    vae = load_vae(name)
    return {name: held(tensor) for name, tensor in state_dict(vae, "vae").items()}, dict(vae.config)


def empty_modules(model: StoredModel, source: Path) -> dict[str, torch.nn.Module]:
    """The real classes built from the settings, without values; the tensors must fit them exactly."""
    import torch
    from accelerate import init_empty_weights

    with quiet():
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

    configs, name = model.configs, model.family.name
    for part, weights in model.weights.items():
        for key, tensor in weights.items():
            if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise DbkitError(
                    f"{source} has {part} {key} in {kind}, as quantised models do; take one in fp16, bf16 or fp32"
                )
    _require_settings(configs, source)
    latents = configs["vae"].get("latent_channels"), configs["unet"].get("out_channels")
    if model.other_vae and latents[0] != latents[1]:
        raise DbkitError(
            f"the VAE {model.other_vae} has {latents[0]} latent channels and {source} {latents[1]}; choose one of "
            f"{name}"
        )
    try:
        with quiet(), init_empty_weights(include_buffers=False):
            modules = {
                "unet": UNet2DConditionModel.from_config(configs["unet"]),
                "vae": AutoencoderKL.from_config(configs["vae"]),
                "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"])),
            }
    except (*library_errors(), LookupError, TypeError, AttributeError) as error:
        raise DbkitError(
            f"{source} has the widths of no {name} model ({reason_of(error)}), and nothing in the file says more; "
            "convert the folder it was made from again with dbkit, which writes them down"
        ) from error
    for part, module in modules.items():
        shapes = {
            key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for key, tensor in model.weights[part].items()
        }
        try:
            load_state_dict(module, part, shapes, assign=True)
        except RuntimeError as error:
            lines = " ".join(str(error).strip().splitlines()[1:4])
            reason = textwrap.shorten(lines, 300, placeholder=" …")
            if part == "vae" and model.other_vae:
                fault = f"the VAE {model.other_vae} is not a whole one of {name}: {reason}"
            else:
                fault = f"{source} is not a whole {name} model; its {part}: {reason}"
            raise DbkitError(fault) from error
    return modules


def _require_settings(configs: dict[str, Any], source: Path) -> None:
    """Raise DbkitError for settings of the scheduler, and a size, that cannot be."""
    with quiet():
        from diffusers import DDPMScheduler

    settings = configs["scheduler"]
    try:
        require_sample_size(configs["unet"])
        if not isinstance(settings.get("_class_name", ""), str):
            raise ValueError(f"_class_name of its scheduler is {settings['_class_name']!r}")
        if (said := settings.get("prediction_type", "epsilon")) not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type of its scheduler is {said!r}")
        with quiet():
            DDPMScheduler.from_config(settings)
    except (*library_errors(), LookupError, TypeError, AttributeError) as error:
        raise DbkitError(
            f"the settings of {source} are not those of a model ({reason_of(error)}); copy the model again"
        ) from error
