"""LoRA (arXiv:2106.09685): small adapters beside frozen layers, trained, saved, loaded, and merged.

A layer with weight W computes (W + alpha / rank * up @ down) x. Layers have kohya's names, which every client knows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit import draws
from dbkit.checkpoint import commit
from dbkit.config import MergeConfig, TrainConfig
from dbkit.embedded import NAME, local_folder
from dbkit.errors import DbkitError, reason_of, some
from dbkit.files import safe_name, write_text
from dbkit.libraries import quiet
from dbkit.lora_files import PREFIXES, Adapter, has_adapter, kohya_metadata, kohya_name, read_lora
from dbkit.models import (
    LORA_BASE,
    Models,
    fingerprint,
    load_base,
    model_facts,
    require_replaceable,
    save_models,
    save_tensors,
)
from dbkit.settings import coerce, configured_by, field_type, is_path, plain
from dbkit.text import encode_prompts, tokenize

if TYPE_CHECKING:
    import torch

# Settings that are a folder of this machine or a Hugging Face id.
_NAMES = ("pretrained_model_name_or_path", "pretrained_vae_name_or_path", "tokenizer_name")


@dataclass(frozen=True)
class Source:
    """A model to sample: its base, what else the training took in place of the base's own, and a LoRA to put on it."""

    pretrained_model_name_or_path: str
    lora: Path | None = None
    revision: str | None = None
    tokenizer_name: str | None = None
    pretrained_vae_name_or_path: str | None = None
    clip_skip: int | None = None
    rescale_zero_terminal_snr: bool = False


def require_peft() -> None:
    """Raise DbkitError unless peft can put an adapter beside a layer: versions that do not go together say so late."""
    import torch

    try:
        _inject(torch.nn.Sequential(torch.nn.Linear(1, 1)), {"0": 1}, {"0": 1.0})
    except (ImportError, RuntimeError, AttributeError, TypeError) as error:
        raise DbkitError(
            f"LoRA needs peft, which does not work here ({reason_of(error)}); pip install --upgrade "
            '"peft>=0.12", then try again'
        ) from error


def has_peft() -> bool:
    """Whether peft can put an adapter beside a layer here."""
    try:
        require_peft()
    except DbkitError:
        return False
    return True


def add_lora(models: Models, config: TrainConfig) -> dict[str, torch.nn.ModuleDict]:
    """Freeze the parts that are trained and put new adapters beside their layers; returns these by part.

    The adapters are fp32 and where their layers are. They depend on the seed alone, and change no picture before the
    first step: up is zero, down uniform within 1 / sqrt(in).
    """
    import torch

    parts = ("unet", "text_encoder") if config.train_text_encoder else ("unet",)
    for part in parts:
        module = getattr(models, part).requires_grad_(False)
        names = [name for name, _ in module.named_modules() if has_adapter(part, name, config.lora_modules)]
        alpha = config.lora_alpha or config.lora_rank
        _inject(module, dict.fromkeys(names, config.lora_rank), dict.fromkeys(names, alpha))
    layers = lora_layers(models)
    for number, part in enumerate(parts):
        for sample, layer in enumerate(layers[part].values()):
            weight = layer["lora_down"].weight
            bound = weight[0].numel() ** -0.5
            drawn = draws.generator(config.seed, "lora", number, sample).uniform(-bound, bound, weight.shape)
            with torch.no_grad():
                weight.copy_(torch.from_numpy(drawn))
                layer["lora_up"].weight.zero_()
    return layers


def _inject(module: torch.nn.Module, ranks: dict[str, int], alphas: dict[str, float]) -> None:
    """Put an adapter beside each named layer of a module, in place."""
    import torch

    with quiet():
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import Conv2d, Linear

    settings = LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=alphas, lora_dropout=0.0)
    # Else peft asks every quantisation library for its layers, and fails where one is too old for it: torchao on Colab.
    settings._register_custom_module({torch.nn.Linear: Linear, torch.nn.Conv2d: Conv2d})
    # peft draws first weights from the global random state.
    with torch.random.fork_rng(devices=[]), quiet():
        inject_adapter_in_model(settings, module)


def lora_layers(models: Models) -> dict[str, torch.nn.ModuleDict]:
    """The live adapters of each part that has any, by kohya's names, each with its lora_down and lora_up."""
    import torch
    from peft.tuners.lora import LoraLayer

    layers = {}
    for part in PREFIXES:
        found = {name: layer for name, layer in getattr(models, part).named_modules() if isinstance(layer, LoraLayer)}
        if found:
            layers[part] = torch.nn.ModuleDict(
                {
                    kohya_name(part, name): torch.nn.ModuleDict(
                        {"lora_down": layer.lora_A["default"], "lora_up": layer.lora_B["default"]}
                    )
                    for name, layer in found.items()
                }
            )
    return layers


def save_lora(models: Models, folder: Path, config: TrainConfig, name: str) -> None:
    """Write the live adapters as NAME.safetensors, read it back and compare, and note beside it which base it needs."""
    import torch

    tensors = {}
    for layers in lora_layers(models).values():
        tensors |= layers.state_dict()
        tensors |= {f"{layer}.alpha": torch.tensor(float(config.lora_alpha or config.lora_rank)) for layer in layers}
    path = folder / f"{safe_name(name)}.safetensors"
    save_tensors(tensors, path, "the LoRA", config.save_precision, _metadata(models, config, name))
    noted = {field: getattr(config, field) for field in asdict(Source("")) if field != "lora"}
    for field in _NAMES:
        # The embedded model goes by its name: each installation has it in a place of its own.
        if noted[field] not in (None, NAME) and Path(noted[field]).is_dir():
            noted[field] = str(Path(noted[field]).resolve())
    noted["fingerprint"] = fingerprint(config.pretrained_model_name_or_path, config.revision)
    write_text(folder / LORA_BASE, json.dumps(noted, indent=2))


def _metadata(models: Models, config: TrainConfig, name: str) -> dict[str, str]:
    """What user interfaces read of the LoRA, and the settings of its training."""
    is_v = models.facts.prediction_type == "v_prediction"
    more = {
        "trigger": config.instance_prompt,
        "ss_sd_model_name": without_folder(config.pretrained_model_name_or_path),
        "ss_seed": config.seed,
        "dbkit.train": json.dumps(_shareable(config), ensure_ascii=False),
    }
    alpha = config.lora_alpha or config.lora_rank
    is_sd2 = bool(models.unet.config.use_linear_projection)
    return kohya_metadata(name, config.lora_rank, alpha, is_sd2, is_v, config.size, **more)


def _shareable(config: TrainConfig) -> dict[str, Any]:
    """The settings that others may see: no secrets, no paths of this machine."""
    values = {name: value for name, value in plain(config).items() if not is_path(field_type(TrainConfig, name))}
    for name in _NAMES:
        values[name] = without_folder(values[name])
    return values


def without_folder(name: str | None) -> str | None:
    """A model's id, or the last name of its folder."""
    return Path(name).name if name and Path(name).exists() else name


def _fitted(models: Models, path: Path) -> list[tuple[str, str, torch.nn.Module, Adapter]]:
    """Part, name, layer and adapter of each layer in a LoRA file. Raises DbkitError unless all fit the model."""
    import torch

    there = {
        kohya_name(part, name): (part, name, layer)
        for part in PREFIXES
        for name, layer in getattr(models, part).named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
    }
    adapters = read_lora(path)
    faults = [f"this one has no {name}" for name in adapters if name not in there]
    faults += [
        f"{name} is {tuple(down.shape)} and {tuple(up.shape)} for a layer of {tuple(weight.shape)}"
        for name, (down, up, _) in adapters.items()
        if name in there and not _fits(down, up, weight := there[name][2].weight)
    ]
    if faults:
        raise DbkitError(
            f"{path} is a LoRA of another kind of model: {some(faults, 3)}; choose a model of the family that it was "
            "made for"
        )
    return [(*there[name], adapter) for name, adapter in adapters.items()]


def _fits(down: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether up @ down has the size of the weight; 1 x 1 convolutions may be written as matrices."""
    return down[0].numel() == weight[0].numel() and up.flatten(1).shape == (len(weight), len(down))


def load_lora(models: Models, path: Path, scale: float = 1.0) -> None:
    """Put the adapters of a LoRA file beside the layers of a model that has none, by peft."""
    import torch

    fitted = _fitted(models, path)
    for part in PREFIXES:
        own = {name: adapter for of, name, _, adapter in fitted if of == part}
        if not own:
            continue
        module = getattr(models, part)
        ranks = {name: len(adapter.down) for name, adapter in own.items()}
        _inject(module, ranks, {name: scale * adapter.alpha for name, adapter in own.items()})
        for name, adapter in own.items():
            layer = module.get_submodule(name)
            with torch.no_grad():
                for weight, saved in ((layer.lora_A, adapter.down), (layer.lora_B, adapter.up)):
                    weight["default"].weight.copy_(saved.reshape(weight["default"].weight.shape))


def merge_lora(models: Models, path: Path, scale: float = 1.0) -> None:
    """Add a LoRA file to a model's own weights, in fp32: W + scale * alpha / rank * up @ down. peft is not needed."""
    import torch

    with torch.no_grad():
        for _, _, layer, (down, up, alpha) in _fitted(models, path):
            change = up.flatten(1).float() @ down.flatten(1).float()
            layer.weight += scale * alpha / len(down) * change.reshape(layer.weight.shape)


def find_source(model: str | Path, lora: Path | None = None) -> Source:
    """What to load for a model and maybe a LoRA; the folder or file of a LoRA run's result finds its base by itself."""
    if lora:
        # On another model too a LoRA is read as it was trained.
        trained = _note(lora)[0] if (_home(lora) / LORA_BASE).is_file() else Source("")
        return Source(
            str(model),
            lora_file(lora),
            clip_skip=trained.clip_skip,
            rescale_zero_terminal_snr=trained.rescale_zero_terminal_snr,
        )
    return noted_source(Path(model)) if (_home(Path(model)) / LORA_BASE).is_file() else Source(str(model))


def noted_source(lora: Path) -> Source:
    """A LoRA and the base it was trained on, by the note beside it. Raises DbkitError unless that is as it was."""
    source, wanted = _note(lora)
    name = source.pretrained_model_name_or_path
    if fingerprint(name, source.revision) != wanted:
        raise DbkitError(f"the model {name} that {lora} was trained on is not there, or has changed; {_instead(lora)}")
    return source


def _instead(lora: Path) -> str:
    return f"dbkit merge {lora} FOLDER --pretrained_model_name_or_path MODEL makes a whole model with one you choose"


def _note(lora: Path) -> tuple[Source, str]:
    """What is noted beside a LoRA, and the fingerprint of its base."""
    path = _home(lora) / LORA_BASE
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        wanted = noted.pop("fingerprint")
        known = {name: coerce(value, field_type(TrainConfig, name)) for name, value in noted.items()}
        return Source(lora=lora_file(lora), **known), wanted
    except OSError as error:
        raise DbkitError(f"there is no {path}, which says what model {lora} belongs to; {_instead(lora)}") from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DbkitError(
            f"{path}, which says what model {lora} belongs to, is damaged; copy it again, or delete it and name the "
            "model yourself"
        ) from error


def _home(lora: Path) -> Path:
    return lora if lora.is_dir() else lora.parent


def lora_file(path: Path) -> Path:
    """The LoRA file that a path names: itself, or the one in the folder."""
    if path.is_file():
        return path
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if len(found) != 1:
        raise DbkitError(
            f"{path} {'holds several files' if found else 'holds no LoRA' if path.is_dir() else 'is not there'}; give "
            "a .safetensors file, or the model/ of a run with adapter lora"
        )
    return found[0]


def load_source(source: Source) -> Models:
    """Load a model in fp32 on the CPU, its LoRA merged in."""
    models = load_base(source)
    if source.lora:
        merge_lora(models, source.lora)
    return models


@configured_by(MergeConfig)
def merge(config: MergeConfig) -> Path:
    """Put a LoRA into its base model for good and write that as a diffusers folder; returns the folder.

    Before it is written, what its U-Net and text encoder compute is compared with base and LoRA side by side.
    """
    require_peft()
    base = config.pretrained_model_name_or_path
    source = find_source(base, config.lora) if base else noted_source(config.lora)
    for needed in (source.lora, local_folder(source.pretrained_model_name_or_path)):
        require_replaceable(config.destination, config.overwrite, needed)
    model_facts(source.pretrained_model_name_or_path)
    models = load_base(source)
    load_lora(models, source.lora, config.scale)
    expected = probe(models)
    models = load_base(source)
    merge_lora(models, source.lora, config.scale)
    error = float((probe(models) - expected).abs().max() / expected.abs().max())
    if not error < 1e-3:
        raise DbkitError(
            f"the merged model differs from the base with its LoRA by {error:.1e} of its output, and nothing was "
            "written; choose a lower scale"
        )
    facts = {"lora": source.lora.name, "scale": config.scale}
    commit(config.destination, 0, lambda folder: save_models(models, folder, config.save_precision), facts)
    print(f"merged and separate weights compute the same within {error:.0e}")
    return config.destination


def probe(models: Models) -> torch.Tensor:
    """What the U-Net finds in fixed noise under a fixed prompt."""
    import torch

    side = models.unet.config.sample_size
    shape = (1, models.unet.config.in_channels, side, side)
    noise = torch.from_numpy(draws.generator(0, "lora").standard_normal(shape, dtype="float32"))
    with torch.no_grad():
        text = encode_prompts(models.text_encoder, tokenize(models.tokenizer, ["a photo"]))
        return models.unet(noise, 500, text).sample
