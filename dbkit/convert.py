"""convert(): original Stable Diffusion files to diffusers folders and back, each result read back and compared."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit import keys
from dbkit.config import ConvertConfig
from dbkit.embedded import local_folder
from dbkit.errors import DbkitError, some
from dbkit.families import original_shapes, refuse_other_families, sd1_configs
from dbkit.files import full_disk_is_a_sentence, require_space, whole_file
from dbkit.libraries import library_errors, quiet
from dbkit.models import (
    TEXT_PREFIX,
    Models,
    model_facts,
    read_config,
    read_weights,
    require_replaceable,
    save_models,
)
from dbkit.settings import configured_by, replace
from dbkit.tokenizer import load_tokenizer, load_tokenizer_tables, tokenizer_tables

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

# The name under which files that dbkit writes carry what cannot be read off their shapes.
METADATA = "dbkit"
_FILES = (".safetensors", ".ckpt")


@configured_by(ConvertConfig)
def convert(config: ConvertConfig) -> Path:
    """Turn an original Stable Diffusion 1 file into a diffusers folder, or a folder into a file; returns what was made.

    The direction follows from the source. What was written is read back, renamed the other way and compared with the
    source tensor by tensor before it takes its final name. Raises DbkitError for other families and damaged files.
    """
    config = replace(config, source=local_folder(config.source))
    if config.source.is_dir():
        return _to_file(config)
    if not config.source.is_file():
        raise DbkitError(f"there is no file or folder {config.source}; check the path")
    return _to_folder(config)


def _to_file(config: ConvertConfig) -> Path:
    source, destination = config.source, config.destination
    if destination.suffix.lower() not in _FILES:
        raise DbkitError(
            f"{source} is a folder, so the destination is a file: end {destination} in .safetensors or .ckpt"
        )
    if destination.exists() and not config.overwrite:
        raise DbkitError(f"{destination} exists; choose another name, or set overwrite")
    model_facts(source)
    folder_weights = {part: _modern_names(part, read_weights(source, part)) for part in keys.PREFIXES}
    refuse_other_families(original_shapes(folder_weights), source)
    facts = _facts(source)
    _filled_modules(facts["configs"], folder_weights, source)
    tables = _tables({part: list(weights) for part, weights in folder_weights.items()}, original=False)
    original: Tensors = {}
    for part, weights in folder_weights.items():
        reverse = {diffusers: name for name, diffusers in tables[part].items()}
        for name, tensor in weights.items():
            renamed = keys.rename(name, reverse)
            if renamed is None:
                raise DbkitError(f"{source} has a tensor that Stable Diffusion 1 does not know: {part} {name}")
            original[keys.PREFIXES[part] + renamed] = _reshaped(
                part, renamed, _cast(tensor, name, config.half), original=True
            )
    require_space(destination.parent, sum(t.numel() * t.element_size() for t in original.values()), str(destination))
    with whole_file(destination) as partial:
        noted = json.dumps(facts, ensure_ascii=False, sort_keys=True)
        _write_file(original, noted, partial, destination.suffix.lower())
        _require_equal(_read_file(partial, destination.suffix.lower())[0], original, destination)
    return destination


def _to_folder(config: ConvertConfig) -> Path:
    source, destination = config.source, config.destination
    if source.suffix.lower() not in _FILES:
        raise DbkitError(f"{source} is neither a folder nor a .safetensors or .ckpt file; choose one of these")
    if destination.suffix.lower() in _FILES or destination.is_file():
        raise DbkitError(f"the source is a file, so the destination is a folder: {destination} is not one")
    require_replaceable(destination, config.overwrite, source)
    tensors, facts = _read_file(source, source.suffix.lower())
    refuse_other_families({name: tuple(tensor.shape) for name, tensor in tensors.items()}, source)
    parts = _split(tensors, source)
    tables = _tables({part: list(weights) for part, weights in parts.items()}, original=True)
    weights: dict[str, Tensors] = {}
    for part, original in parts.items():
        renamed = {name: keys.rename(name, tables[part]) for name in original}
        if unknown := [name for name, new in renamed.items() if new is None]:
            raise DbkitError(f"{source} has tensors that Stable Diffusion 1 does not know: {some(unknown, 10)}")
        weights[part] = {
            new: _reshaped(part, name, _cast(original[name], name, config.half), original=False)
            for name, new in renamed.items()
        }
    try:
        configs = facts["configs"] if facts else sd1_configs(weights)
    except KeyError as error:
        raise DbkitError(f"{source} is not a whole Stable Diffusion 1 model; it lacks {error}") from error
    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with full_disk_is_a_sentence(destination.parent):
            _write_folder(weights, configs, facts, config, partial)
            for part in keys.PREFIXES:
                _require_equal(read_weights(partial, part), weights[part], destination)
            old = destination.with_name(destination.name + ".old")
            if destination.exists():
                destination.rename(old)
            partial.rename(destination)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return destination


def _read_file(path: Path, suffix: str) -> tuple[Tensors, dict[str, Any] | None]:
    """The tensors of a file, and what dbkit noted in it if dbkit wrote it. Nothing in the file is run."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        if suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            metadata = loaded if isinstance(loaded, Mapping) else {}
            found = metadata.get("state_dict", metadata)
            tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
        facts = json.loads(metadata[METADATA]) if METADATA in metadata else None
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        LookupError,
        ValueError,
        AttributeError,
    ) as error:
        # The restricted reader says GLOBAL when it meets a name to import; its other complaints are about damage.
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise DbkitError(
                f"{path} holds more than tensors, which could run code when loaded, so it is refused; look for "
                "a .safetensors file of it"
            ) from error
        # torch's own text about pickles advises to lift the restriction.
        pickled = isinstance(error, pickle.UnpicklingError)
        reason = (
            "it is no plain pickle of tensors" if pickled else next(iter(str(error).splitlines()), "") or repr(error)
        )
        raise DbkitError(f"{path} is damaged or not a checkpoint ({reason}); download or copy it again") from error
    return tensors, facts


def _write_file(tensors: Tensors, facts: str, path: Path, suffix: str) -> None:
    import torch
    from safetensors.torch import save_file

    if suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt", METADATA: facts})
    else:
        # AUTOMATIC1111 refuses the zip files that torch.save writes today; the older format passes its check.
        torch.save({"state_dict": tensors, METADATA: facts}, path, _use_new_zipfile_serialization=False)


def _facts(folder: Path) -> dict[str, Any]:
    """What a file must carry to become the same folder again: the parts' settings and an unusual tokenizer."""
    configs = {part: read_config(folder, part) for part in ("unet", "vae", "text_encoder", "scheduler", "tokenizer")}
    vocabulary, merges = tokenizer_tables(folder / "tokenizer")
    # The tokenizer of CLIP ViT-L/14, which every Stable Diffusion 1 model has, is known by a few of its tokens.
    usual = len(vocabulary) == 49408 and vocabulary.get("photo</w>") == 1125 and vocabulary.get("dog</w>") == 1929
    return {"configs": configs, "tokenizer": None if usual else {"vocab": vocabulary, "merges": merges}}


def _split(tensors: Tensors, source: Path) -> dict[str, Tensors]:
    """The tensors of each part without their prefix; what no model needs is left out, what is unknown is named."""
    parts: dict[str, Tensors] = {part: {} for part in keys.PREFIXES}
    unknown = []
    for name, tensor in tensors.items():
        if keys.IGNORED.fullmatch(name):
            continue
        part = next((part for part, prefix in keys.PREFIXES.items() if name.startswith(prefix)), None)
        if part is None:
            unknown.append(name)
        else:
            parts[part][name.removeprefix(keys.PREFIXES[part])] = tensor
    if unknown:
        raise DbkitError(f"{source} has tensors that Stable Diffusion 1 does not know: {some(unknown, 10)}")
    parts["text_encoder"] = _modern_names("text_encoder", parts["text_encoder"])
    return parts


def _modern_names(part: str, weights: Tensors) -> Tensors:
    """One spelling of what has had several: the text encoder's prefix, the VAE's attention, no position_ids."""
    if part == "text_encoder":
        weights = {name: tensor for name, tensor in weights.items() if not name.endswith("position_ids")}
        return {TEXT_PREFIX + name.removeprefix(TEXT_PREFIX): tensor for name, tensor in weights.items()}
    if part == "vae":
        modern = {}
        for name, tensor in weights.items():
            for old, new in keys.OLD_VAE_ATTENTION.items():
                name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
            modern[name] = tensor
        return modern
    return weights


def _tables(names: dict[str, list[str]], original: bool) -> dict[str, dict[str, str]]:
    """The table of each part, for as many levels and layers as its names show on either side."""
    unet, vae = names["unet"], names["vae"]
    if original:
        levels = keys.count(unet, r"input_blocks\.(\d+)\.0\.op\.weight") + 1
        layers = (keys.count(unet, r"input_blocks\.(\d+)\.") - levels) // levels
        vae_levels = keys.count(vae, r"encoder\.down\.(\d+)\.")
        vae_layers = keys.count(vae, r"encoder\.down\.0\.block\.(\d+)\.")
    else:
        levels = keys.count(unet, r"down_blocks\.(\d+)\.")
        layers = keys.count(unet, r"down_blocks\.0\.resnets\.(\d+)\.")
        vae_levels = keys.count(vae, r"encoder\.down_blocks\.(\d+)\.")
        vae_layers = keys.count(vae, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    return {
        "unet": keys.unet_table(levels, layers) | keys.upsampler_table(levels, layers, unet),
        "vae": keys.vae_table(vae_levels, vae_layers),
        "text_encoder": {"text_model": "text_model"},
    }


def _reshaped(part: str, original_name: str, tensor: torch.Tensor, original: bool) -> torch.Tensor:
    """The VAE's attention is a convolution (C, C, 1, 1) in original files and a linear layer (C, C) in folders."""
    if (
        part == "vae"
        and ".mid.attn_1." in f".{original_name}"
        and original_name.endswith(("q.weight", "k.weight", "v.weight", "proj_out.weight"))
    ):
        return tensor.reshape(*tensor.shape[:2], *([1, 1] if original else []))
    return tensor


def _cast(tensor: torch.Tensor, name: str, half: bool) -> torch.Tensor:
    import torch

    if not half or not tensor.is_floating_point():
        return tensor.contiguous()
    cast = tensor.to(torch.float16).contiguous()
    if not cast.isfinite().all():
        raise DbkitError(f"{name} has values that do not fit in fp16; convert without half")
    return cast


def _require_equal(written: Tensors, wanted: Tensors, destination: Path) -> None:
    import torch

    different = sorted(written.keys() ^ wanted.keys())
    different += [name for name in wanted if name in written and not torch.equal(written[name], wanted[name])]
    if different:
        raise DbkitError(
            f"{destination} reads back differently from its source ({some(different, 10)}); the disk may be "
            "failing, write elsewhere"
        )


def _write_folder(
    weights: dict[str, Tensors],
    configs: dict[str, Any],
    facts: dict[str, Any] | None,
    config: ConvertConfig,
    folder: Path,
) -> None:
    with quiet():
        from diffusers import DDPMScheduler

    modules = _filled_modules(configs, weights, config.source)
    if facts and facts["tokenizer"]:
        tables = facts["tokenizer"]
        tokenizer = load_tokenizer_tables(tables["vocab"], tables["merges"], configs["tokenizer"])
    else:
        tokenizer = load_tokenizer(config.tokenizer_name)
    with quiet():
        noise_scheduler = DDPMScheduler.from_config(configs["scheduler"])
    save_models(
        Models(tokenizer=tokenizer, noise_scheduler=noise_scheduler, scheduler_config=configs["scheduler"], **modules),
        folder,
    )


def _filled_modules(configs: dict[str, Any], weights: dict[str, Tensors], source: Path) -> dict[str, torch.nn.Module]:
    """The real classes built from the settings, with the tensors in, which must fit exactly."""
    import torch

    with quiet():
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

    from dbkit.models import load_state_dict

    try:
        with quiet(), torch.device("meta"):
            modules = {
                "unet": UNet2DConditionModel.from_config(configs["unet"]),
                "vae": AutoencoderKL.from_config(configs["vae"]),
                "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"])),
            }
    except (*library_errors(), TypeError) as error:
        reason = " ".join(str(error).split())
        raise DbkitError(
            f"{source} has the widths of no Stable Diffusion 1 model ({reason}), and nothing in the file says more; "
            "convert the folder it was made from again with dbkit, which writes them down"
        ) from error
    for part, module in modules.items():
        try:
            load_state_dict(module, part, weights[part], assign=True)
        except RuntimeError as error:
            lines = str(error).strip().splitlines()[1:11]
            raise DbkitError(
                f"{source} is not a whole Stable Diffusion 1 model; its {part}: "
                f"{' '.join(' '.join(lines).split())[:600]}"
            ) from error
    return modules
