"""extract_lora(): the LoRA nearest to the difference between a trained model and its base.

Of all matrices of a rank, the one of a difference's largest singular values is nearest to it (Eckart and Young 1936).
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dbkit.config import ExtractLoraConfig
from dbkit.embedded import local_folder
from dbkit.errors import DbkitError, counted, some
from dbkit.families import is_sd2
from dbkit.files import whole_file
from dbkit.libraries import hub_options, loading
from dbkit.lora import Source, merge_lora, probe, without_folder
from dbkit.lora_files import (
    PREFIXES,
    Adapter,
    has_adapter,
    kohya_metadata,
    kohya_name,
    kohya_tensors,
    require_destination,
    write_lora,
)
from dbkit.models import WEIGHTS, load_base, model_facts
from dbkit.receipts import RECEIPT, run_receipt
from dbkit.run_folder import run_settings
from dbkit.settings import configured_by
from dbkit.stored_models import stored_weights
from dbkit.text import clip_skip_of

if TYPE_CHECKING:
    import torch

    from dbkit.models import Facts
    from dbkit.tensor_files import Stored


@dataclass
class _Difference:
    """The adapters, and what of the squares of all differences they keep, miss in their layers and cannot reach."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    kept: float = 0.0
    missed: float = 0.0
    # Tensors without an adapter, each with its kind and the squares of its difference.
    left_out: dict[str, tuple[str, float]] = field(default_factory=dict)


@configured_by(ExtractLoraConfig)
def extract_lora(config: ExtractLoraConfig) -> Path:
    """Write the LoRA nearest to what a training changed in the U-Net and text encoder of its base; returns the file.

    Before it takes its name it is read back, and base and LoRA are compared with the model. Raises DbkitError where the
    two are models of different kinds, or the same.
    """
    model, run = local_folder(config.model), run_settings(config.model)
    require_destination(config.destination, config.overwrite, model)
    facts = model_facts(model)
    if facts is None:
        raise DbkitError(f"there is no model folder {model}; give a run's model/ or one of its checkpoints")
    name = config.pretrained_model_name_or_path or run.get("pretrained_model_name_or_path")
    if not name:
        raise DbkitError(
            "pretrained_model_name_or_path cannot be read from a run's settings.yaml beside "
            f"{config.model}; give the model that it was trained from"
        )
    base = _folder(name, run.get("revision"))
    weights = {part: (stored_weights(model / part, part), stored_weights(base / part, part)) for part in PREFIXES}
    for part, (trained, untrained) in weights.items():
        _require_same_shapes(part, trained, untrained, f"{model} and its base {name}")
    difference = _difference(weights, config)
    if not difference.adapters:
        raise DbkitError(
            f"no layer of {model} that lora_modules {config.lora_modules} takes differs from {name}, so there is "
            "nothing to extract; give the model that it was trained from"
        )
    print(_summary(difference, config))
    adapters, second = difference.adapters, is_sd2({n: tensor.shape for n, tensor in weights["unet"][0].items()})
    with whole_file(config.destination, alone=True) as partial:
        noted = _metadata(config, model, str(name), facts, second)
        write_lora(kohya_tensors(adapters), adapters, partial, config.save_precision, noted)
        _prove(partial, model, Source(str(name), revision=run.get("revision")))
    return config.destination


def _metadata(config: ExtractLoraConfig, model: Path, base: str, facts: Facts, second: bool) -> dict[str, str]:
    """What user interfaces read of the LoRA, and the receipt of the run that the model comes from."""
    receipt = run_receipt(model)
    more = {RECEIPT: json.dumps(receipt, ensure_ascii=False, sort_keys=True)} if receipt else {}
    return kohya_metadata(
        config.destination.stem,
        config.rank,
        config.rank,
        second,
        facts.prediction_type == "v_prediction",
        (facts.resolution, facts.resolution),
        receipt["settings"].get("instance_prompt") if receipt else None,
        ss_sd_model_name=without_folder(base),
        **more,
    )


def _folder(name: str, revision: str | None) -> Path:
    """Where the weights of the base lie; those of a Hugging Face id are in its cache, or come there."""
    if model_facts(name):
        return local_folder(name)
    from huggingface_hub import snapshot_download

    files = [f"{part}/{file}" for part in PREFIXES for file in ("config.json", WEIGHTS[part])]
    options = hub_options(name, "unet/config.json", revision)
    with loading(name):
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, **options))


def _require_same_shapes(part: str, trained: dict[str, Stored], untrained: dict[str, Stored], both: str) -> None:
    names = sorted(trained.keys() ^ untrained.keys())
    names += [name for name in trained.keys() & untrained.keys() if trained[name].shape != untrained[name].shape]
    if names:
        raise DbkitError(
            f"{both} are of different kinds: their {part} differs in {some(sorted(names), 3)}; give the model that it "
            "was trained from"
        )


def _difference(
    weights: dict[str, tuple[dict[str, Stored], dict[str, Stored]]], config: ExtractLoraConfig
) -> _Difference:
    """The adapters of every layer that changed, one tensor in memory at a time."""
    import torch
    from tqdm import tqdm

    result = _Difference()
    wanted = [(part, name) for part, (trained, _) in weights.items() for name in trained]
    for part, name in tqdm(wanted, "extracting", file=sys.stdout, mininterval=1, leave=False):
        trained, untrained = (tensors[name].read() for tensors in weights[part])
        # A model saved in fp16 differs from its base in fp32 everywhere, by rounding: that is no training.
        if torch.equal(trained, untrained.to(trained.dtype)):
            continue
        change = trained.float() - untrained.float()
        squares = float(change.square().sum(dtype=torch.float64))
        if not math.isfinite(squares):
            raise DbkitError(f"{part} {name} holds values that are no numbers; copy both models again")
        module, _, kind = name.rpartition(".")
        if kind == "weight" and has_adapter(part, module, config.lora_modules):
            adapter, kept = nearest(change, config.rank)
            result.adapters[kohya_name(part, module)] = adapter
            result.kept += kept
            result.missed += squares - kept
        else:
            result.left_out[f"{part} {name}"] = _kind(name, change), squares
    return result


def nearest(change: torch.Tensor, rank: int) -> tuple[Adapter, float]:
    """The adapter of a rank nearest to a layer's difference, with its alpha the rank, and the squares that it keeps.

    change is (out, in, ...); the rank is never above the layer's own.
    """
    import torch

    flat = change.flatten(1)
    rank = min(rank, *flat.shape)
    # Randomised (arXiv:0909.4061). On one core, at rank 32, it takes 0.2 s for a layer of 1280 x 1280 and 1.4 s for
    # 10240 x 1280, torch.linalg.svd 1.4 and 5.5 s. It keeps over 0.9999 of what that one keeps where singular values
    # fall like 1 / sqrt(n), and 0.99 of pure noise; with half the passes it is 0.96 of noise.
    # Its first guess is drawn from the global random state.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        u, s, v = torch.svd_lowrank(flat, q=min(2 * rank + 8, *flat.shape), niter=8)
    # Half of each value on either side, which keeps both far from the ends of fp16.
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, (v[:, :rank] * root).T
    if change.ndim == 4:
        up, down = up[..., None, None], down.reshape(rank, *change.shape[1:])
    return Adapter(down, up, float(rank)), float(s[:rank].double().square().sum())


def _kind(name: str, change: torch.Tensor) -> str:
    if name.endswith(".bias"):
        return "bias vector"
    if change.ndim == 1:
        return "norm"
    return "convolution" if change.ndim == 4 else "embedding" if "embedding" in name else "linear layer"


def _summary(difference: _Difference, config: ExtractLoraConfig) -> str:
    """What the LoRA keeps of the difference, and what no LoRA of these layers can hold."""
    left = sum(squares for _, squares in difference.left_out.values())
    everything = difference.kept + difference.missed + left
    layers = counted(len(difference.adapters), "layer")
    kept = difference.kept / (difference.kept + difference.missed)
    lines = [
        f"of what the training changed in these {layers}, rank {config.rank} keeps {kept:.1%}, which is "
        f"{difference.kept / everything:.1%} of all that it changed (shares of the sum of squares)"
    ]
    if difference.left_out:
        kinds = Counter(kind for kind, _ in difference.left_out.values())
        names = sorted(difference.left_out, key=lambda name: -difference.left_out[name][1])
        lines.append(
            f"{left / everything:.1%} of all lies where this LoRA has no adapter: in "
            f"{', '.join(counted(n, kind) for kind, n in kinds.items())}; most in {some(names, 3)}"
            + ("" if config.lora_modules == "all" else "; with lora_modules set to all convolutions get adapters too")
        )
    return "\n".join(lines)


def _prove(lora: Path, model: Path, base: Source) -> None:
    """Compare what the U-Net makes of fixed noise: the model's, the base's, and the base's with the LoRA."""
    trained = load_base(Source(str(model)))
    wanted = probe(trained)
    # The same prompt has to be the same tokens and the same layer's states in both.
    read = {"tokenizer_name": str(model / "tokenizer"), "clip_skip": clip_skip_of(trained.text_encoder.config)}
    del trained
    models = load_base(Source(base.pretrained_model_name_or_path, revision=base.revision, **read))
    far = float((probe(models) - wanted).norm() / wanted.norm())
    merge_lora(models, lora)
    near = float((probe(models) - wanted).norm() / wanted.norm())
    if not near < far:
        raise DbkitError(
            f"the base with this LoRA is no nearer to {model} than without it (the U-Net's output differs by "
            f"{near:.2%} and {far:.2%}), and nothing was written; set lora_modules to all, or a higher rank"
        )
    print(f"the U-Net's output differs from the trained model's by {near:.2%} with the LoRA, by {far:.2%} without it")
