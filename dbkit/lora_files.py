"""LoRA files: adapters under kohya's names, which user interfaces read, and under diffusers', turned into each other.

In memory a layer goes by kohya's name, where an underscore stands for a dot or for itself. Its module's name is not
guessed from that: the layers of Stable Diffusion 1 and 2 are known.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dbkit.config import ConvertConfig
from dbkit.errors import DbkitError, counted, some
from dbkit.families import is_sd2
from dbkit.files import whole_file
from dbkit.models import TEXT_PREFIX, save_tensors
from dbkit.receipts import architecture, model_spec
from dbkit.tensor_files import is_finite

if TYPE_CHECKING:
    import torch

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
# What layers' names end in, by part; each choice of lora_modules takes those of the choices before it too.
_CHOICES = {
    "unet": {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "transformer": ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        "all": ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
    },
    "text_encoder": {"attention": ("q_proj", "k_proj", "v_proj", "out_proj"), "transformer": ("fc1", "fc2"), "all": ()},
}
# kohya's, PEFT's and both of diffusers' older spellings: X.lora_down, X.lora_A, X.lora.down, X.lora_linear_layer.down.
_WEIGHT = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.default)?\.weight")
# Every layer of Stable Diffusion 1 and 2 that can have an adapter.
_LAYERS = {
    "unet": re.compile(
        r"""conv_in | conv_out | time_embedding\.linear_[12]
        | ((down|up)_blocks\.\d+ | mid_block)\.(
            attentions\.\d+\.(
                proj_in | proj_out
                | transformer_blocks\.0\.(attn[12]\.to_(q|k|v|out\.0) | ff\.net\.(0\.proj|2))
            )
            | resnets\.\d+\.(conv1 | conv2 | conv_shortcut | time_emb_proj)
            | (down|up)samplers\.0\.conv
        )""",
        re.VERBOSE,
    ),
    "text_encoder": re.compile(r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"),
}
# The words in these names, those with underscores of their own before their pieces.
_WORD = re.compile(
    "down_blocks|up_blocks|mid_block|transformer_blocks|time_embedding|time_emb_proj|text_model|self_attn"
    r"|conv_(?:in|out|shortcut)|linear_\d|proj_(?:in|out)|to_(?:q|k|v|out)|(?:q|k|v|out)_proj|[^_]+"
)
# diffusers' note of what a file's tensors do not show: peft's settings, by part.
_NOTE = "lora_adapter_metadata"
# What the metadata of a file say that is true of its bytes alone.
_OF_BYTES = ("format", _NOTE, "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


# The layers that read the text's states, and how wide those are in Stable Diffusion XL.
_CROSS, _XL_WIDTH = re.compile(r"attn2_to_[kv]$"), 2048
# Settings of a conversion that are of whole models.
_OF_MODELS = ("pretrained_vae_name_or_path", "extract_ema", "tokenizer_name", "license")


class Adapter(NamedTuple):
    """The matrices of one layer: down of shape (rank, in, ...) and up of shape (out, rank, ...)."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float


def has_adapter(part: str, module: str, choice: str) -> bool:
    """Whether a choice of lora_modules takes the layer of this name."""
    choices = list(_CHOICES[part])
    taken = [end for each in choices[: choices.index(choice) + 1] for end in _CHOICES[part][each]]
    return module.endswith(tuple(f".{end}" for end in taken))


def kohya_name(part: str, module: str) -> str:
    """A layer's name in LoRA files; versions of transformers differ in the text encoder's prefix."""
    if part == "text_encoder":
        module = TEXT_PREFIX + module.removeprefix(TEXT_PREFIX)
    return PREFIXES[part] + module.replace(".", "_")


def module_name(name: str) -> tuple[str, str] | None:
    """Part and module of a layer by kohya's name, the text encoder's with its prefix; None where there is none."""
    for part, prefix in PREFIXES.items():
        module = ".".join(_WORD.findall(name.removeprefix(prefix)))
        if name.startswith(prefix) and _LAYERS[part].fullmatch(module) and kohya_name(part, module) == name:
            return part, module
    return None


def read_lora(path: Path) -> dict[str, Adapter]:
    """The adapters of a LoRA file in any spelling, by kohya's names, in its own types.

    A missing alpha is the rank, so the scale is 1. Raises DbkitError for what is damaged, or other than plain LoRA.
    """
    return _adapters(*_read(path), path)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DbkitError(f"{path} is damaged or no .safetensors file ({error}); download or copy it again") from error


def _adapters(tensors: dict[str, torch.Tensor], metadata: dict[str, str], path: Path) -> dict[str, Adapter]:
    found: dict[str, dict[str, Any]] = {"down": {}, "up": {}, "alpha": {}}
    others = []
    for name, tensor in tensors.items():
        kind = None
        if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
            raise DbkitError(f"{path} has {name} in {str(tensor.dtype)[6:]}; take the file in fp16, bf16 or fp32")
        if (match := _WEIGHT.fullmatch(name)) and tensor.ndim > 1 and tensor.numel() and tensor.is_floating_point():
            kind, layer = "down" if match[2] in ("down", "A") else "up", match[1]
        elif name.endswith(".alpha") and tensor.numel() == 1:
            kind, layer = "alpha", name.removesuffix(".alpha")
        # A second spelling of the same layer would take the place of the first.
        if kind is None or (key := _from_any_spelling(layer)) in found[kind]:
            others.append(name)
        else:
            found[kind][key] = tensor
    downs, ups, alphas = found.values()
    if wide := [name for name in downs if _CROSS.search(name) and downs[name].shape[1] == _XL_WIDTH]:
        raise DbkitError(
            f"{path} is a LoRA of a Stable Diffusion XL model ({wide[0]} reads {_XL_WIDTH} values); dbkit takes "
            "those of Stable Diffusion 1 and 2"
        )
    if odd := [name for name in downs.keys() & ups.keys() if len(downs[name]) != ups[name].shape[1]]:
        ranks = f"rank {len(downs[min(odd)])} and {ups[min(odd)].shape[1]}"
        raise DbkitError(
            f"{path} has matrices that do not fit together ({ranks} in {some(sorted(odd))}); choose another file"
        )
    others += sorted(downs.keys() ^ ups.keys())
    if others or not downs:
        raise DbkitError(f"{path} is no plain LoRA{f'; it has {some(others)}' if others else ''}; choose another file")
    try:
        noted = json.loads(metadata.get(_NOTE) or "{}")
    except (ValueError, RecursionError) as error:
        raise DbkitError(f"{path} is damaged (its {_NOTE}: {error}); download or copy it again") from error
    adapters = {}
    for name, down in downs.items():
        alpha = float(alphas[name]) if name in alphas else _noted_alpha(noted, name, len(down))
        adapters[name] = Adapter(down, ups[name], alpha)
    if odd := [name for name, adapter in adapters.items() if not _finite(*adapter)]:
        raise DbkitError(f"{path} has weights that are not numbers ({some(odd)}); choose another file")
    return adapters


def _finite(down: torch.Tensor, up: torch.Tensor, alpha: float) -> bool:
    return is_finite(down) and is_finite(up) and math.isfinite(alpha)


def _from_any_spelling(name: str) -> str:
    """kohya's name for a layer, from its own or from diffusers' unet.X and text_encoder.X."""
    part, _, layer = name.partition(".")
    if part not in PREFIXES:
        return name
    layer = layer.replace(".processor.", ".")
    return kohya_name(part, layer + ".0" if layer.endswith(".to_out") else layer)


def _noted_alpha(noted: dict[str, Any], name: str, rank: int) -> float:
    """The alpha of a layer by diffusers' note in the file, else its rank."""
    part, module = module_name(name) or ("", "")
    try:
        patterns = noted.get(f"{part}.alpha_pattern") or {}
        own = [alpha for pattern, alpha in patterns.items() if _names(pattern, module)]
        alpha = float(own[0] if own else noted.get(f"{part}.lora_alpha", rank))
        # With this peft divides by the root of the rank.
        return alpha * rank**0.5 if noted.get(f"{part}.use_rslora") else alpha
    except (AttributeError, TypeError, ValueError):
        return math.nan


def _names(pattern: str, module: str) -> bool:
    """Whether peft's pattern, a module's name or its end, means a module; ^ begins one that is not an end."""
    ends = () if pattern.startswith("^") else (f".{pattern}",)
    return pattern.removeprefix("^") in (module, module.removeprefix(TEXT_PREFIX)) or module.endswith(ends)


def kohya_metadata(
    title: str,
    rank: object,
    alpha: object,
    is_sd2: bool,
    is_v: bool,
    size: tuple[int, int],
    trigger: str | None = None,
    **more: object,
) -> dict[str, str]:
    """What user interfaces read of a LoRA, and more. A client hides files that say another version than its model's.

    ss_ names are those of sd-scripts, modelspec those of the Stability AI model metadata standard.
    """
    kind = f"{architecture(is_sd2, is_v)}/lora"
    facts = {
        "format": "pt",
        "ss_output_name": title,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_v2": is_sd2,
        "ss_base_model_version": f"sd_v{2 if is_sd2 else 1}{'_v' if is_v else ''}",
        **model_spec(title, kind, is_v, size, trigger, implementation="diffusers"),
        **more,
    }
    return {key: str(value) for key, value in facts.items() if value is not None}


def kohya_tensors(adapters: dict[str, Adapter]) -> dict[str, torch.Tensor]:
    """The tensors of a file with kohya's names."""
    import torch

    tensors = {}
    for name, (down, up, alpha) in adapters.items():
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        # In the layer's type, as kohya has it, unless that would change it.
        own = torch.tensor(alpha, dtype=down.dtype)
        tensors[f"{name}.alpha"] = own if float(own) == alpha else torch.tensor(alpha)
    return tensors


def convert_lora(config: ConvertConfig, of_run: bool = False) -> Path:
    """Write a LoRA file under diffusers' names if its own are kohya's, else under kohya's; returns the new file.

    With of_run, for the file that a run left, they are kohya's in any case. It is read back and compared adapter by
    adapter before it takes its name. Raises DbkitError for layers that Stable Diffusion 1 and 2 do not have.
    """
    source, destination = Path(config.source), config.destination
    if useless := [name for name in _OF_MODELS if getattr(config, name)]:
        raise DbkitError(f"{' and '.join(useless)} is for whole models, and {source} is a LoRA; leave it out")
    require_destination(destination, config.overwrite, source)
    tensors, metadata = _read(source)
    adapters = _adapters(tensors, metadata, source)
    if unknown := [name for name in adapters if not module_name(name)]:
        raise DbkitError(
            f"{source} has layers that Stable Diffusion 1 and 2 do not have: {some(unknown)}; dbkit converts LoRAs of "
            "these, under kohya's names or diffusers'"
        )
    kept = {key: value for key, value in metadata.items() if key not in _OF_BYTES}
    if not of_run and any(name.startswith(tuple(PREFIXES.values())) for name in tensors):
        names, made, noted = "diffusers'", _diffusers_tensors(adapters), {"format": "pt", **kept, **_note(adapters)}
    else:
        names, made, noted = "kohya's", kohya_tensors(adapters), {**_kohya_metadata(adapters, kept, config), **kept}
    with whole_file(destination, alone=True) as partial:
        write_lora(made, adapters, partial, config.save_precision, noted)
    other = f"; user interfaces load {source} as it is" if names == "diffusers'" else ""
    print(f"{counted(len(adapters), 'layer')} under {names} names, read back and equal{other}")
    return destination


def require_destination(destination: Path, overwrite: bool, source: Path) -> None:
    """Raise DbkitError unless a LoRA file made of the source may go there."""
    if destination.suffix.lower() != ".safetensors" or destination.is_dir():
        raise DbkitError(f"a LoRA is a file of its own, and {destination} is none; end it in .safetensors")
    if destination.exists() and destination.samefile(source):
        raise DbkitError(f"{destination} is the source, which would be replaced; choose another destination")
    if destination.exists() and not overwrite:
        raise DbkitError(f"{destination} exists; choose another name, or set overwrite")


def write_lora(
    tensors: dict[str, torch.Tensor],
    adapters: dict[str, Adapter],
    path: Path,
    precision: str | None,
    metadata: dict[str, str],
) -> None:
    """Write a LoRA file and read it back. Raises DbkitError unless it holds these adapters in that precision."""
    save_tensors(tensors, path, "the LoRA", precision, metadata)
    found = read_lora(path)
    different = found.keys() ^ adapters.keys()
    different |= {name for name in found.keys() & adapters.keys() if not _same(found[name], adapters[name])}
    if different:
        raise DbkitError(
            f"{path} reads back as another LoRA ({some(sorted(different))}); the disk may be failing, write elsewhere"
        )


def _same(written: Adapter, adapter: Adapter) -> bool:
    import torch

    # An alpha has no more digits than the precision that it was written in.
    alike = math.isclose(written.alpha, adapter.alpha, rel_tol=max(torch.finfo(written.down.dtype).eps, 1e-7))
    pairs = ((written.down, adapter.down), (written.up, adapter.up))
    return alike and all(torch.equal(one, other.to(one.dtype)) for one, other in pairs)


def _diffusers_tensors(adapters: dict[str, Adapter]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (down, up, _) in adapters.items():
        layer = ".".join(module_name(name))
        tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    return tensors


def _note(adapters: dict[str, Adapter]) -> dict[str, str]:
    """diffusers' note where tensors do not say all: they are read as layers of one rank whose alpha is the rank."""
    if len({number for down, _, alpha in adapters.values() for number in (len(down), alpha)}) == 1:
        return {}
    noted: dict[str, Any] = {}
    for part in PREFIXES:
        # Without their prefix, names of the text encoder's modules mean those of every version of transformers.
        own = {module_name(name)[1].removeprefix(TEXT_PREFIX): a for name, a in adapters.items() if _part(name) == part}
        if not own:
            continue
        ranks, alphas = ({n: len(a.down) for n, a in own.items()}, {n: a.alpha for n, a in own.items()})
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        noted |= {
            f"{part}.r": rank,
            f"{part}.lora_alpha": alpha,
            f"{part}.rank_pattern": {n: other for n, other in ranks.items() if other != rank},
            f"{part}.alpha_pattern": {n: other for n, other in alphas.items() if other != alpha},
            f"{part}.target_modules": sorted(own),
        }
    return {_NOTE: json.dumps(noted, indent=2, sort_keys=True)}


def _part(name: str) -> str:
    return next(part for part, prefix in PREFIXES.items() if name.startswith(prefix))


def _kohya_metadata(adapters: dict[str, Adapter], kept: dict[str, str], config: ConvertConfig) -> dict[str, str]:
    """What a file without kohya's metadata needs. Whether a Stable Diffusion 2 predicts v is said only where known."""
    shapes = {
        ".".join(module_name(name)) + ".weight": (len(up), *down.shape[1:]) for name, (down, up, _) in adapters.items()
    }
    second = kept["ss_v2"] == "True" if "ss_v2" in kept else is_sd2(shapes)
    is_v = config.prediction_type == "v_prediction" or kept.get("modelspec.prediction_type") == "v"
    ranks, alphas = {len(down) for down, _, _ in adapters.values()}, {alpha for _, _, alpha in adapters.values()}
    rank, alpha = ranks.pop() if len(ranks) == 1 else "Dynamic", alphas.pop() if len(alphas) == 1 else "Dynamic"
    side = 768 if second and is_v else 512
    noted = kohya_metadata(config.destination.stem, rank, alpha, second, is_v, (side, side))
    if second and not is_v and config.prediction_type == "auto":
        return {key: value for key, value in noted.items() if not key.startswith("modelspec.")}
    return noted
