"""Load and save the five parts of a Stable Diffusion model: tokenizer, text encoder, VAE, U-Net, noise scheduler."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dbkit import processes
from dbkit.embedded import local_folder
from dbkit.errors import DbkitError, reason_of, some
from dbkit.files import full_disk_is_a_sentence, sha256, side_by_side
from dbkit.libraries import hub_options, loading, quiet
from dbkit.tensor_files import Stored, is_finite, write_safetensors
from dbkit.text import check_clip_skip, clip_skip_of
from dbkit.tokenizer import clip_tokenizer, load_tokenizer, save_tokenizer
from dbkit.workspace import FOLDERS

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

Value = TypeVar("Value")

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
# The part that proves a folder to be what it says, and its configuration file.
CONFIGS = {
    "tokenizer": "tokenizer_config.json",
    "text_encoder": "config.json",
    "vae": "config.json",
    "unet": "config.json",
    "scheduler": "scheduler_config.json",
}
WEIGHTS = {
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
}
TEXT_PREFIX = "text_model."
# In the folder of a LoRA: which model it belongs to.
LORA_BASE = "lora.json"


@dataclass(frozen=True)
class Facts:
    """What the configuration files of a model folder tell before anything is loaded."""

    vae_scale_factor: int
    resolution: int
    prediction_type: str
    text_layers: int
    inpaints: bool = False

    @property
    def size_factor(self) -> int:
        """What sides of pictures are multiples of: of the VAE's factor, and of 8, which diffusers' pipeline wants."""
        return math.lcm(self.vae_scale_factor, 8)


@dataclass
class Models:
    """The parts, in memory. Weights are fp32 unless another type was asked for."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: SchedulerMixin
    # The scheduler's settings as the model came with them, so that its own sampler is saved again.
    scheduler_config: dict[str, Any]

    @property
    def vae_scale_factor(self) -> int:
        """Pixels for each latent along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def facts(self) -> Facts:
        """The same facts that model_facts() reads from a folder."""
        side = self.unet.config.sample_size * self.vae_scale_factor
        layers = self.text_encoder.config.num_hidden_layers
        prediction_type = self.noise_scheduler.config.prediction_type
        return Facts(self.vae_scale_factor, side, prediction_type, layers, self.inpaints)

    @property
    def inpaints(self) -> bool:
        """Whether the U-Net also reads a mask and the latents of what the mask leaves: 9 channels instead of 4."""
        return _inpaints(self.unet.config, self.vae.config)


def model_facts(name_or_path: str | Path) -> Facts | None:
    """Check a local model folder from its small files; None for a Hugging Face id, known only once downloaded.

    Raises DbkitError when a part is missing or the model is of a family that dbkit cannot train yet.
    """
    folder = local_folder(name_or_path)
    if folder.is_file():
        raise DbkitError(
            f"{folder} is a single file; convert it first: dbkit convert {folder} {folder.with_suffix('')}"
        )
    if not folder.is_dir():
        _require_hub_id(str(name_or_path))
        return None
    if (folder / "text_encoder_2").exists():
        raise DbkitError(f"{folder} is a Stable Diffusion XL model; dbkit trains Stable Diffusion 1.x and 2.x")
    if any((folder / "model" / name).is_file() for name in ("model_index.json", LORA_BASE)):
        raise DbkitError(f"{folder} is a run; its model is {folder / 'model'}")
    if (folder / LORA_BASE).is_file():
        raise DbkitError(f"{folder} is a LoRA and no whole model; make one of it first: dbkit merge {folder} FOLDER")
    if not any((folder / part).is_dir() for part in PARTS):
        raise DbkitError(f"{folder} is not a model folder, which has {', '.join(PARTS)} in it; check the path")
    missing = [f"{part}/{CONFIGS[part]}" for part in PARTS if not (folder / part / CONFIGS[part]).is_file()]
    missing += [f"{part} weights" for part in WEIGHTS if not weight_files(folder / part)]
    if missing:
        raise DbkitError(
            f"the model folder {folder} lacks {', '.join(missing)}; copy the model again, or convert the "
            "original file again"
        )
    vae, unet, scheduler, text = (read_config(folder, part) for part in ("vae", "unet", "scheduler", "text_encoder"))
    try:
        inpaints = _inpaints(unet, vae)
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        require_sample_size(unet)
        prediction_type, layers = scheduler.get("prediction_type", "epsilon"), text.get("num_hidden_layers", 12)
        facts = Facts(factor, unet["sample_size"] * factor, prediction_type, layers, inpaints)
    except (LookupError, TypeError, ValueError) as error:
        raise DbkitError(
            f"the settings of {folder} are not those of a model ({error}); copy the model again"
        ) from error
    if facts.prediction_type not in ("epsilon", "v_prediction"):
        raise DbkitError(f"{folder} predicts {facts.prediction_type!r}; dbkit trains models of epsilon or v_prediction")
    return facts


def require_sample_size(unet: Mapping[str, Any]) -> None:
    """Raise ValueError unless a U-Net's settings say for how large a side it was trained, in latents."""
    side = unet["sample_size"]
    if type(side) is not int or side < 1:
        raise ValueError(f"sample_size of its unet is {side!r} and no whole number above 0")


def _inpaints(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> bool:
    """Whether these settings are of an inpainting model. Raises DbkitError where the two do not fit together."""
    channels, latent = unet["in_channels"], vae["latent_channels"]
    if channels not in (latent, 2 * latent + 1):
        raise DbkitError(
            f"the U-Net has {channels} input channels and the VAE {latent}; dbkit trains plain models ({latent}) and "
            f"inpainting models ({2 * latent + 1})"
        )
    return channels != latent


def _require_hub_id(name: str) -> None:
    if saved := models_beside(Path(name)):
        raise DbkitError(f"there is no model folder {name}; the run has {some(saved)}")
    looks_like_a_path = name.startswith((".", "/", "~")) or "\\" in name or name.partition("/")[0] in FOLDERS
    if name.count("/") != 1 or looks_like_a_path:
        raise DbkitError(
            f"there is no model folder {name}; check the path, or give a Hugging Face id such as owner/name"
        )


def models_beside(missing: Path) -> list[str]:
    """The models of the run that a folder which is not there would lie in; none where that is no run either."""
    for run in missing.absolute().parents[:2]:
        # In a run's folder too, owner/name is an id of the Hub.
        if missing.parent.is_dir() and (run / "settings.yaml").is_file():
            folders = [*sorted((run / "checkpoints").glob("step_*[0-9]")), run / "model"]
            return [folder.relative_to(run).as_posix() for folder in folders if folder.is_dir()][::-1]
    return []


def check_resolution(resolution: int, facts: Facts | None) -> None:
    """Raise DbkitError unless the VAE can encode images of this size, and diffusers' pipeline sample them."""
    if facts and resolution % facts.size_factor:
        factor = facts.size_factor
        nearest = max(1, round(resolution / factor)) * factor
        raise DbkitError(
            f"resolution is {resolution}; this model's pictures need a multiple of {factor}, for instance {nearest}"
        )


def size_warnings(resolution: int, facts: Facts | None) -> list[str]:
    """That pictures are far from the size for which the model was made."""
    if facts is None or facts.resolution / 2 < resolution < facts.resolution * 2:
        return []
    return [
        f"resolution is {resolution}, but this model draws pictures of {facts.resolution} px, and others badly; set "
        f"resolution to {facts.resolution}, or take a model for {resolution} px"
    ]


def check_zero_terminal_snr(wanted: bool, facts: Facts | None) -> None:
    """Raise DbkitError where rescale_zero_terminal_snr is asked of a model that predicts noise."""
    if wanted and facts and facts.prediction_type != "v_prediction":
        raise DbkitError(
            "rescale_zero_terminal_snr needs a model that predicts v: where the input is noise alone, there is nothing "
            "to learn from predicting it; turn it off for this model"
        )


def with_zero_terminal_snr(models: Models) -> None:
    """Rescale the noise schedule so that the last timestep has no signal left (Lin et al. 2023, arXiv:2305.08891).

    Saved with the model, whose samplers then have to begin at that timestep.
    """
    from diffusers import DDPMScheduler

    models.scheduler_config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    models.noise_scheduler = DDPMScheduler.from_config(models.scheduler_config)


def read_config(folder: Path, part: str, kind: str | None = None) -> dict[str, Any]:
    """The configuration of one part of a model folder, which may have another name than the part's kind."""
    path = folder / part / CONFIGS[kind or part]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError) as error:
        raise DbkitError(f"{path} is not readable ({error}); copy the model again") from error
    return config


def weight_files(folder: Path) -> list[Path]:
    """The weight files of one part, of which there may be several sets."""
    return [folder / name for name in weight_names(path.name for path in folder.glob("*"))]


def weight_names(names: Iterable[str]) -> list[str]:
    """Which of a part's files are its weights: safetensors before pickled ones, full precision before variants."""
    names = sorted(name for name in names if not name.startswith("."))
    for suffix in (".safetensors", ".bin"):
        files = [name for name in names if name.endswith(suffix)]
        whole = [name for name in files if ".fp16" not in name and "non_ema" not in name]
        if whole or files:
            return whole or files
    return []


def load_models(
    name_or_path: str | Path,
    revision: str | None = None,
    tokenizer_name: str | None = None,
    vae_name: str | None = None,
    clip_skip: int | None = None,
) -> Models:
    """Load the parts in fp32 on the CPU. The U-Net and the text encoder are in training mode off.

    tokenizer_name and vae_name are folders or Hugging Face ids of others, in place of the model's own; clip_skip is
    noted in the text encoder's settings.
    Raises DbkitError when a part is missing, damaged or cannot be downloaded.
    """
    with quiet():
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel

    name_or_path = folder if (folder := local_folder(name_or_path)).is_dir() else name_or_path
    options: dict[str, Any] = {"revision": revision} if revision else {}
    if model_facts(name_or_path) is None:
        # The part that is read last: where it is, all are.
        options |= hub_options(str(name_or_path), f"scheduler/{CONFIGS['scheduler']}", revision)
    with loading(name_or_path):
        variant = _variant(Path(name_or_path))
        if tokenizer_name:
            tokenizer = load_tokenizer(tokenizer_name)
        else:
            tokenizer = clip_tokenizer(name_or_path, subfolder="tokenizer", **options)
        text_encoder = _whole(CLIPTextModel, name_or_path, "text_encoder", **options, **variant)
        vae = None if vae_name else _whole(AutoencoderKL, name_or_path, "vae", **options, **variant)
        unet = _whole(UNet2DConditionModel, name_or_path, "unet", **options, **variant)
        scheduler_config = DDPMScheduler.load_config(name_or_path, subfolder="scheduler", **options)
        noise_scheduler = DDPMScheduler.from_config(scheduler_config)
    vae = vae or load_vae(vae_name)
    models = Models(tokenizer, text_encoder, vae, unet, noise_scheduler, dict(scheduler_config))
    for module in (text_encoder, vae, unet):
        module.float().eval().requires_grad_(False)
    _check_family(models, name_or_path)
    check_clip_skip(clip_skip, text_encoder.config.num_hidden_layers)
    text_encoder.config.clip_skip = clip_skip or clip_skip_of(text_encoder.config)
    return models


def load_base(settings: Any) -> Models:
    """The base model that settings describe by TrainConfig's names: a training's own, or those noted beside a LoRA."""
    models = load_models(
        settings.pretrained_model_name_or_path,
        settings.revision,
        settings.tokenizer_name,
        settings.pretrained_vae_name_or_path,
        settings.clip_skip,
    )
    if settings.rescale_zero_terminal_snr:
        with_zero_terminal_snr(models)
    return models


def vae_folder(name: str) -> Path | None:
    """The folder of a VAE, by itself or in a model folder; None for a Hugging Face id. Raises DbkitError otherwise."""
    folder = local_folder(name)
    if not folder.is_dir():
        _require_hub_id(name)
        return None
    here = folder / "vae" if (folder / "vae").is_dir() else folder
    config = here / CONFIGS["vae"]
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind != "AutoencoderKL" or not weight_files(here):
        raise DbkitError(f"pretrained_vae_name_or_path {name} has no VAE in it; give a folder with its config.json")
    return here


def load_vae(name: str) -> AutoencoderKL:
    """A VAE by itself, in fp32 or as it is stored: of a folder or a Hugging Face id."""
    from diffusers import AutoencoderKL

    folder = vae_folder(name)
    options = {} if folder else hub_options(name, "config.json")
    with loading(name):
        return _whole(AutoencoderKL, folder or name, None, **options)


def _whole(cls: type, name: str | Path, part: str | None, **options: Any) -> torch.nn.Module:
    """A part whose weights are all there: the libraries fill gaps with random numbers and only warn."""
    module, found = cls.from_pretrained(name, subfolder=part, output_loading_info=True, **options)
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(key) for key in found.get(kind, ()) if not str(key).endswith("position_ids"))
        if names:
            raise OSError(f"its {part or 'VAE'} has {kind.replace('_keys', '')} weights: {', '.join(names[:5])}")
    return module


def _variant(folder: Path) -> dict[str, str]:
    """diffusers only looks at *.fp16.safetensors when told to."""
    files = weight_files(folder / "unet") if folder.is_dir() else []
    return {"variant": "fp16"} if files and all(".fp16" in path.name for path in files) else {}


def _check_family(models: Models, name: str | Path) -> None:
    text, unet = models.text_encoder.config.hidden_size, models.unet.config
    if unet.cross_attention_dim != text:
        raise DbkitError(
            f"{name} does not fit together: its U-Net expects text states of width {unet.cross_attention_dim}, "
            f"its text encoder gives {text}; take both from one model"
        )
    _inpaints(unet, models.vae.config)
    vocabulary = models.text_encoder.config.vocab_size
    if len(models.tokenizer) > vocabulary:
        raise DbkitError(
            f"the tokenizer knows {len(models.tokenizer)} tokens and the text encoder {vocabulary}; take "
            "both from one model"
        )


def require_replaceable(destination: Path, overwrite: bool, source: Path) -> None:
    """Raise DbkitError unless a model folder made of the source may go there: nothing but a model is ever replaced."""
    if source.resolve().is_relative_to(destination.resolve()):
        raise DbkitError(f"{source} lies in {destination}, which would be replaced; choose another destination")
    if destination.is_file():
        raise DbkitError(f"{destination} is a file; choose the name of a folder")
    if destination.is_dir() and any(destination.iterdir()):
        if not overwrite:
            raise DbkitError(f"{destination} exists; choose another name, or set overwrite")
        known = {"model_index.json", "manifest.json", *PARTS}
        if strangers := sorted(path.name for path in destination.iterdir() if path.name not in known):
            raise DbkitError(
                f"{destination} holds more than a model ({strangers[0]}), so it is not replaced; choose another"
            )
        if not (destination / "model_index.json").exists():
            raise DbkitError(f"{destination} is not a model folder, so it is not replaced; choose another name")


def save_models(models: Models, folder: Path, precision: str | None = None) -> dict[str, str]:
    """Write a diffusers folder with the weights in fp16, bf16, fp32 or as they are, read them back and compare.

    Returns the SHA-256 of each file of weights, as commit() takes them.

    The text encoder's keys carry their `text_model.` prefix: transformers before version 5 loads a folder without it
    as a random text encoder. The tokenizer is written in both of its formats.
    """
    with full_disk_is_a_sentence(folder):
        save_all_but_weights(models, folder)

        def save(part: str) -> str:
            weights = state_dict(getattr(models, part), part)
            return save_tensors(weights, folder / part / WEIGHTS[part], f"the {part}", precision, {"format": "pt"})

        digests = side_by_side(save, WEIGHTS)
        return {f"{part}/{WEIGHTS[part]}": digest for part, digest in zip(WEIGHTS, digests)}


def save_all_but_weights(models: Models, folder: Path) -> None:
    """Write the settings of a diffusers folder, its tokenizer and scheduler. The modules may be on the meta device."""
    for part in WEIGHTS:
        _save_settings(getattr(models, part), folder / part, part)
    save_tokenizer(models.tokenizer, folder / "tokenizer")
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / CONFIGS["scheduler"], models.scheduler_config)
    _write_json(folder / "model_index.json", _model_index(models))


def _model_index(models: Models) -> dict[str, Any]:
    import diffusers

    return {
        "_class_name": "StableDiffusionInpaintPipeline" if models.inpaints else "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", models.scheduler_config.get("_class_name", "DDPMScheduler")],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _save_settings(module: torch.nn.Module, target: Path, part: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    if part == "text_encoder":
        module.config.architectures = ["CLIPTextModel"]
        module.config.save_pretrained(target)
    else:
        module.save_config(target)
    _forget_origin(target / CONFIGS[part])


def precision_dtype(precision: str | None) -> torch.dtype | None:
    """The type of a save_precision; None, for tensors that stay as they are, where that is empty."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}.get(precision)


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, owner: str | None, precision: str | None, metadata: dict[str, str]
) -> str:
    """Write a safetensors file in fp16, bf16, fp32 or as the tensors are, read it back and compare.

    Returns the SHA-256 of what was read, of a file that is on the disk. owner is what has the weights, which must be
    numbers; without one any value passes.
    """
    dtype = precision_dtype(precision)

    def cast(name: str) -> torch.Tensor:
        tensor = tensors[name].detach().to("cpu", stored[name].dtype)
        if owner and not is_finite(tensor):
            raise DbkitError(
                f"the weight {name} of {owner} is no number or does not fit in {precision or 'its type'}; set "
                "save_precision to bf16 or fp32, or train again at a lower learning_rate"
            )
        return tensor

    # One at a time: of tensors on a GPU, or in another precision, there is never a second copy in memory.
    stored = {
        name: Stored(
            tuple(tensor.shape),
            dtype if dtype and tensor.is_floating_point() else tensor.dtype,
            lambda name=name: cast(name),
        )
        for name, tensor in tensors.items()
    }
    digest = hashlib.sha256()
    write_safetensors(stored, path, metadata, digest=digest)
    return digest.hexdigest()


def _forget_origin(path: Path) -> None:
    """Take out of a configuration where the part was loaded from: a path of this machine is nobody's business."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("_name_or_path", None) is not None:
        _write_json(path, config)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def state_dict(module: torch.nn.Module, part: str) -> dict[str, torch.Tensor]:
    """A part's weights under the names that every version of the libraries knows."""
    weights = module.state_dict()
    if part != "text_encoder":
        return weights
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("position_ids")}
    return {name if name.startswith(TEXT_PREFIX) else TEXT_PREFIX + name: tensor for name, tensor in weights.items()}


def load_state_dict(module: torch.nn.Module, part: str, weights: dict[str, torch.Tensor], assign: bool = False) -> None:
    """Put weights saved by state_dict() into a part, by copy or by assignment; missing and unknown names raise."""
    weights, own = under_own_names(module, part, weights), module.state_dict()
    weights = {name: processes.spread(tensor, own.get(name)) for name, tensor in weights.items()}
    module.load_state_dict(weights, strict=True, assign=assign)


def under_own_names(module: torch.nn.Module, part: str, weights: dict[str, Value]) -> dict[str, Value]:
    """What goes by state_dict()'s names, by those that the installed libraries have in this part."""
    if part == "text_encoder" and not next(iter(module.state_dict())).startswith(TEXT_PREFIX):
        return {name.removeprefix(TEXT_PREFIX): value for name, value in weights.items()}
    return weights


def read_weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """The weights of one part of a model folder exactly as they are stored. Pickled files are read as data only."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights = {}
    for path in weight_files(folder / part):
        try:
            safe = path.suffix == ".safetensors"
            weights |= load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise DbkitError(f"{path} cannot be read ({reason_of(error)}); copy the model again") from error
    return weights


def vae_fingerprint(name: str | None) -> str | None:
    """What tells one VAE from another: for a folder a hash of its weights, else its id."""
    folder = vae_folder(name) if name else None
    if folder is None:
        return name
    files = [(path, path.stat()) for path in weight_files(folder)]
    return "".join(_sha256_once(path, found.st_size, found.st_mtime_ns) for path, found in files)


@functools.cache
def _sha256_once(path: Path, size: int, changed: int) -> str:
    """A form asks at each change, and a file on a Drive takes a while."""
    return sha256(path)


def fingerprint(name_or_path: str | Path, revision: str | None = None) -> str:
    """What tells one base model from another: for a folder a hash of its weights' samples, else id and revision.

    Any training changes every weight, so 16 samples of 64 KB from each file are enough, and a 4 GB model on Drive
    is told apart in a second.
    """
    folder = local_folder(name_or_path)
    if not folder.is_dir():
        return f"{name_or_path}@{revision or 'main'}"
    digest = hashlib.sha256()
    for path in (folder / "scheduler" / CONFIGS["scheduler"], folder / "tokenizer" / "vocab.json"):
        digest.update(path.read_bytes() if path.is_file() else b"")
    for part in WEIGHTS:
        for path in weight_files(folder / part):
            length = path.stat().st_size
            digest.update(f"{part}/{length}".encode())
            with path.open("rb") as file:
                for number in range(16):
                    file.seek(math.floor(length * number / 16))
                    digest.update(file.read(1 << 16))
    return digest.hexdigest()
