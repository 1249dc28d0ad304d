"""A model's tensors in the two layouts: one original file with everything, and diffusers' parts.

Nothing is read here: tensors lie in their files (tensor_files.Stored) until someone writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dbkit import keys
from dbkit.errors import DbkitError, some
from dbkit.models import TEXT_PREFIX
from dbkit.tensor_files import Stored

if TYPE_CHECKING:
    Parts = dict[str, dict[str, Stored]]

_EMA = "model_ema."
# Stable Diffusion 2 was trained on the second-to-last of OpenCLIP's 24 layers, so diffusers leaves the last one out.
_OPEN_CLIP_LAYERS, _READ_LAYERS = 24, 23


def from_original(
    tensors: dict[str, Stored], family: str, source: Path, text_layers: int | None = None, extract_ema: bool = False
) -> Parts:
    """The parts under diffusers' names, without what no model needs. Raises DbkitError for names it does not know.

    text_layers is for narrow models, whose files do not show how many layers of OpenCLIP's are read.
    """
    parts: Parts = {part: {} for part in keys.PREFIXES}
    unknown = []
    prefixes = [*keys.PREFIXES.items(), ("text_encoder", keys.OPEN_CLIP)]
    for name, tensor in (_with_ema(tensors, source) if extract_ema else tensors).items():
        part, prefix = next(((part, prefix) for part, prefix in prefixes if name.startswith(prefix)), (None, ""))
        if part and not keys.IGNORED.fullmatch(name):
            parts[part][name.removeprefix(prefix)] = tensor
        elif not keys.IGNORED.fullmatch(name):
            unknown.append(name)
    if not unknown:
        tables = _tables(parts, original=True)
        parts["unet"], unknown = _renamed(parts["unet"], tables["unet"])
        parts["vae"], unknown_vae = _vae_renamed(parts["vae"])
        parts["text_encoder"], unknown_text = _text_renamed(parts["text_encoder"], text_layers)
        unknown += [*unknown_vae, *unknown_text]
    if unknown:
        raise DbkitError(f"{source} has tensors that {family} does not know: {some(unknown, 10)}")
    return {part: modern_names(part, weights) for part, weights in parts.items()}


def vae_from_original(tensors: dict[str, Stored], source: Path) -> dict[str, Stored]:
    """A VAE that is alone in its file, under original names with or without their prefix or under diffusers' names."""
    prefix = keys.PREFIXES["vae"]
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    weights = {name: tensor for name, tensor in weights.items() if not keys.IGNORED.fullmatch(name)}
    if not any(name.startswith("decoder.up_blocks.") for name in weights):
        weights, unknown = _vae_renamed(weights)
        if unknown or not weights:
            named = f" ({some(unknown)})" if unknown else ""
            raise DbkitError(f"{source} is not a VAE{named}; give a file or diffusers folder of a VAE alone")
    return modern_names("vae", weights)


def to_original(parts: Parts, open_clip: bool, family: str, source: Path) -> dict[str, Stored]:
    """Every tensor under the name that user interfaces look for. Raises DbkitError for names it does not know.

    With open_clip also those that nothing computes with, but that clients ask for: a last layer, which is a copy of the
    one before it, the projection and the scale.
    """
    tables = _tables(parts, original=False)
    original = {}
    for part, weights in parts.items():
        if part == "text_encoder" and open_clip:
            continue
        renamed, unknown = _renamed(weights, {new: old for old, new in tables[part].items()})
        if unknown:
            raise DbkitError(f"{source} has a tensor that {family} does not know: {part} {unknown[0]}")
        for name, tensor in renamed.items():
            four = _is_vae_attention(name) if part == "vae" else False
            original[keys.PREFIXES[part] + name] = _reshaped(tensor, (*tensor.shape[:2], 1, 1)) if four else tensor
    if open_clip:
        for name, tensor in _to_open_clip(parts["text_encoder"], source).items():
            original[keys.OPEN_CLIP + name] = tensor
    return original


def modern_names(part: str, weights: dict[str, Stored]) -> dict[str, Stored]:
    """One spelling of what has had several: the text encoder's prefix, the VAE's attention, no position_ids.

    The VAE's attention was a convolution of one pixel in some files, and is a linear layer now.
    """
    if part == "text_encoder":
        weights = {name: tensor for name, tensor in weights.items() if not name.endswith("position_ids")}
        return _prefixed(weights)
    if part != "vae":
        return weights
    modern = {}
    for name, tensor in weights.items():
        for old, new in keys.OLD_VAE_ATTENTION.items():
            name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
        flat = ".attentions.0.to_" in name and tensor.shape[2:] == (1, 1)
        if name in modern:
            raise DbkitError(f"the VAE has {name} under two names; keep one set of its weights")
        modern[name] = _reshaped(tensor, tensor.shape[:2]) if flat else tensor
    return modern


def _prefixed(text: dict[str, Stored]) -> dict[str, Stored]:
    if twice := [name for name in text if TEXT_PREFIX + name in text]:
        raise DbkitError(
            f"the text encoder is there twice, with {TEXT_PREFIX}{twice[0]} and {twice[0]}; keep one set of its weights"
        )
    return {TEXT_PREFIX + name.removeprefix(TEXT_PREFIX): tensor for name, tensor in text.items()}


def _with_ema(tensors: dict[str, Stored], source: Path) -> dict[str, Stored]:
    """The same tensors, with the averages that training kept in place of the U-Net's own; their names have no dots."""
    prefix = keys.PREFIXES["unet"]
    copies = {name: _EMA + name.removeprefix("model.").replace(".", "") for name in tensors if name.startswith(prefix)}
    if lacking := [copy for copy in copies.values() if copy not in tensors]:
        what = "no EMA copy of its U-Net" if len(lacking) == len(copies) else f"no {some(lacking)} in its EMA copy"
        raise DbkitError(f"{source} has {what}; turn extract_ema off")
    return {name: tensors[copies.get(name, name)] for name in tensors}


def _renamed(weights: dict[str, Stored], table: dict[str, str]) -> tuple[dict[str, Stored], list[str]]:
    """The tensors under the table's names, and the names that are not in it."""
    names = {name: keys.rename(name, table) for name in weights}
    return {names[name]: tensor for name, tensor in weights.items() if names[name]}, [n for n in names if not names[n]]


def _vae_renamed(weights: dict[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    return _renamed(weights, _vae_table(weights, original=True))


def _text_renamed(weights: dict[str, Stored], layers: int | None) -> tuple[dict[str, Stored], list[str]]:
    if not any(name.startswith(keys.RESBLOCKS) for name in weights):
        return _prefixed(weights), []
    blocks = keys.count(weights, rf"{keys.RESBLOCKS}\.(\d+)\.")
    layers = layers or (_READ_LAYERS if blocks == _OPEN_CLIP_LAYERS else blocks)
    unread = tuple(f"{keys.RESBLOCKS}.{layer}." for layer in range(layers, blocks))
    table = keys.open_clip_table(layers)
    found, unknown = {}, []
    for name, tensor in weights.items():
        module, _, last = name.rpartition(".attn.")
        if name.startswith(unread):
            continue
        if name == keys.POSITIONS[0]:
            found[keys.POSITIONS[1]] = tensor
        elif last in keys.JOINED:
            layer = module.replace(keys.RESBLOCKS, keys.TEXT_LAYERS)
            for number, third in enumerate(keys.QKV):
                found[f"{layer}.self_attn.{third}.{keys.JOINED[last]}"] = _third(tensor, number)
        elif new := keys.rename(name, table):
            found[new] = tensor
        else:
            unknown.append(name)
    return found, unknown


def _to_open_clip(weights: dict[str, Stored], source: Path) -> dict[str, Stored]:
    layers = keys.count(weights, rf"{keys.TEXT_LAYERS}\.(\d+)\.")
    if layers >= _OPEN_CLIP_LAYERS:
        raise DbkitError(
            f"the text encoder of {source} has {layers} layers, and user interfaces read layer {_READ_LAYERS} of "
            "Stable Diffusion 2's; take a folder whose text encoder ends there"
        )
    reverse = {new: old for old, new in keys.open_clip_table(layers).items()}
    found = {}
    for name, tensor in weights.items():
        module, _, last = name.rpartition(".self_attn.")
        third, _, kind = last.partition(".")
        if name == keys.POSITIONS[1]:
            found[keys.POSITIONS[0]] = tensor
        elif third == keys.QKV[0]:
            joined = next(old for old, new in keys.JOINED.items() if new == kind)
            thirds = [weights.get(f"{module}.self_attn.{third}.{kind}") for third in keys.QKV]
            found[f"{module.replace(keys.TEXT_LAYERS, keys.RESBLOCKS)}.attn.{joined}"] = _joined(thirds)
        elif third in keys.QKV:
            continue
        elif original := keys.rename(name, reverse):
            found[original] = tensor
        else:
            raise DbkitError(f"{source} has a tensor that Stable Diffusion 2 does not know: text_encoder {name}")
    last, added = f"{keys.RESBLOCKS}.{layers - 1}.", f"{keys.RESBLOCKS}.{layers}."
    found |= {added + name.removeprefix(last): tensor for name, tensor in found.items() if name.startswith(last)}
    width, dtype = found["ln_final.weight"].shape[0], found["ln_final.weight"].dtype
    return found | {"text_projection": _ones((width, width), dtype), "logit_scale": _ones((), dtype)}


def _third(tensor: Stored, number: int) -> Stored:
    rows = tensor.shape[0] // 3
    # Its own memory: a view would keep the other two thirds.
    return tensor.changed(
        lambda joined: joined[number * rows : (number + 1) * rows].clone(), shape=(rows, *tensor.shape[1:])
    )


def _joined(thirds: list[Stored]) -> Stored:
    import torch

    shape = (sum(third.shape[0] for third in thirds), *thirds[0].shape[1:])
    return Stored(shape, thirds[0].dtype, lambda: torch.cat([third.read() for third in thirds]))


def _ones(shape: tuple[int, ...], dtype: object) -> Stored:
    import torch

    return Stored(shape, dtype, lambda: torch.ones(shape, dtype=dtype))


def _reshaped(tensor: Stored, shape: tuple[int, ...]) -> Stored:
    return tensor.changed(lambda values: values.reshape(shape), shape=shape)


def _is_vae_attention(original: str) -> bool:
    return ".mid.attn_1." in original and original.endswith(("q.weight", "k.weight", "v.weight", "proj_out.weight"))


def _tables(parts: Parts, original: bool) -> dict[str, dict[str, str]]:
    """The table of each part, for as many levels and layers as its names show on either side."""
    unet = parts["unet"]
    if original:
        levels = keys.count(unet, r"input_blocks\.(\d+)\.0\.op\.weight") + 1
        layers = (keys.count(unet, r"input_blocks\.(\d+)\.") - levels) // levels
    else:
        levels = keys.count(unet, r"down_blocks\.(\d+)\.")
        layers = keys.count(unet, r"down_blocks\.0\.resnets\.(\d+)\.")
    return {
        "unet": keys.unet_table(levels, layers) | keys.upsampler_table(levels, layers, unet),
        "vae": _vae_table(parts["vae"], original),
        "text_encoder": {"text_model": "text_model"},
    }


def _vae_table(vae: dict[str, Stored], original: bool) -> dict[str, str]:
    down, layer = ("down", "block") if original else ("down_blocks", "resnets")
    levels = keys.count(vae, rf"encoder\.{down}\.(\d+)\.")
    return keys.vae_table(levels, keys.count(vae, rf"encoder\.{down}\.0\.{layer}\.(\d+)\."))
