"""What a training holds in memory, counted before a model is loaded.

Of the model only its config.json files are read. The real modules then take a step on torch's meta device, whose
tensors have sizes and no contents, and every storage is followed from its first tensor to its last. What that device
lacks, autocast and fused attention, is put in its place here.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit.buckets import Size, sizes_of
from dbkit.counting import ACTIVATIONS, make_arithmetic, make_ledger, run_backward
from dbkit.embedded import local_folder
from dbkit.encoding import at_once
from dbkit.errors import DbkitError, reason_of
from dbkit.libraries import hub_errors, hub_options, loading, quiet
from dbkit.losses import add_noise, per_sample_loss
from dbkit.models import CONFIGS, WEIGHTS, Models, model_facts, read_config, vae_folder
from dbkit.optimizers import state_bytes
from dbkit.state import State, train_parts
from dbkit.text import clip_skip_of, encode_prompts
from dbkit.train_config import TrainConfig

if TYPE_CHECKING:
    import torch

# In bytes. OF_PROCESS is what a training on the CPU takes beside its tensors, in benchmarks/memory.py: about 530 MB of
# libraries, the rest free blocks that the C library keeps. OF_CUDA is what CUDA takes beside tensors,
# workspaces and fragments: assumed, as no GPU was at hand.
PROCESS_BYTES, CUDA_BYTES = 640_000_000, 1_100_000_000
# A part of what is free is left over, since the figures are approximate.
USABLE = 0.9
# What an optimizer holds beside its state while it steps, in bytes a parameter, by device: pytorch_optimizer works on
# all tensors at once where it can.
SCRATCH = {"lion": {"cuda": 4, "mps": 4, "cpu": 4}, "prodigy": {"cuda": 4}}
TRAINED, FROZEN, STATE, AVERAGES = "trained weights", "frozen weights", "optimizer state", "averages (EMA)"
GRADIENTS = "gradients"
CACHE, SAVED = "cached latents and texts", "copies for what is written"
OF_CUDA, OF_PROCESS = "CUDA, workspaces and fragments", "libraries and free blocks"
# The settings on which counts depend, beside model, sizes and arithmetic: of what is trained, and of a step.
_TRAINED = ("train_text_encoder", "memory", "adapter", "lora_rank", "lora_modules", "clip_skip")
_STEP = ("train_batch_size", "with_prior_preservation", "recomputes_activations", "pad_tokens", "loss_type")
_STEP += ("masked_loss",)
# Stable Diffusion 1, for a model of which nothing is known.
STABLE_DIFFUSION_1: dict[str, dict[str, Any]] = {
    "unet": {"cross_attention_dim": 768, "sample_size": 64},
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "hidden_act": "quick_gelu",
    },
}

Configs = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Peak:
    """The most that one phase of a run holds at once, in bytes by what they are for."""

    phase: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Place:
    """Where a training computes: "cuda", "mps" or "cpu", and the type of its matrix products."""

    kind: str
    dtype: torch.dtype


def read_configs(config: TrainConfig) -> Configs:
    """The config.json of U-Net, VAE and text encoder, of a folder, the Hub's cache or the Hub; no weights are read.

    Raises DbkitError where they cannot be had.
    """
    name = config.pretrained_model_name_or_path
    if model_facts(name):
        configs = {part: read_config(local_folder(name), part) for part in WEIGHTS}
    else:
        configs = {part: _from_hub(name, f"{part}/{CONFIGS[part]}", config.revision) for part in WEIGHTS}
    if vae := config.pretrained_vae_name_or_path:
        folder = vae_folder(vae)
        configs["vae"] = (
            read_config(folder.parent, folder.name, "vae") if folder else _from_hub(vae, CONFIGS["vae"], None)
        )
    return configs


def _from_hub(name: str, file: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    options = hub_options(name, file, revision)
    with loading(name):
        try:
            return json.loads(Path(hf_hub_download(name, file, revision=revision, **options)).read_text("utf-8"))
        except hub_errors() as error:
            raise OSError(f"its {file} cannot be had: {reason_of(error)}") from error


def sizes_of_parts(configs: Configs) -> dict[str, int]:
    """The number of parameters of each part."""
    return {part: sum(sizes) for part, sizes in _sizes(json.dumps(configs, sort_keys=True)).items()}


@functools.lru_cache
def _sizes(configs: str) -> dict[str, list[int]]:
    """How many numbers each tensor of each part has."""
    models = _on_meta(configs, None)
    return {part: [p.numel() for p in getattr(models, part).parameters()] for part in WEIGHTS}


def trained_tensors(config: TrainConfig, configs: Configs, place: Place) -> list[torch.Tensor]:
    """What the optimizer will move, as tensors without contents."""
    return _count_at_rest(config, configs, place)[1]


def device_peaks(config: TrainConfig, configs: Configs, place: Place, cached: int = 0, previews: int = 1) -> list[Peak]:
    """The peak of each phase of a training on its device, the step first; on the CPU it is that of the process.

    cached is what latents and texts take, previews how many pictures a preview makes.
    """
    return list(_phases(config, configs, place, cached, previews))


def fits(limit: float, config: TrainConfig, configs: Configs, place: Place, cached: int = 0, previews: int = 1) -> bool:
    """Whether every peak of device_peaks() is at most `limit` bytes. Nothing is counted once that is known."""
    least = _step_peak([_least(config, configs, place)], config, configs, place, cached)
    phases = _phases(config, configs, place, cached, previews)
    return least.total <= limit and all(peak.total <= limit for peak in phases)


def _phases(config: TrainConfig, configs: Configs, place: Place, cached: int, previews: int) -> Iterator[Peak]:
    yield step_peak(config, configs, place, cached)
    yield _encoding_peak(config, configs, place)
    if config.auto_test_model:
        batch = min(config.sample_batch_size, previews)
        held = {**_kept(config, configs, place), CACHE: cached}
        yield _sampling_peak("previews", config, configs, place, batch, held)
    if config.with_prior_preservation:
        batch = min(config.sample_batch_size, config.num_class_images)
        yield _sampling_peak("class images", config, configs, place, batch, None)
    if place.kind == "cpu":
        yield from process_peaks(config, configs, place, cached)


def step_peak(config: TrainConfig, configs: Configs, place: Place, cached: int = 0) -> Peak:
    """What an optimizer step holds at its peak, from the second one on: the first makes the optimizer's state."""
    moments = _count_step(config, configs, place, config.gradient_accumulation_steps != 1)
    return _step_peak([*moments, _least(config, configs, place)], config, configs, place, cached)


def _step_peak(moments: list[dict[str, int]], config: TrainConfig, configs: Configs, place: Place, cached: int) -> Peak:
    """The highest of a step's moments with what is there from step to step."""
    most = max(moments, key=lambda parts: sum(parts.values()))
    return _peak("a training step", {**most, **_kept(config, configs, place), CACHE: cached}, configs, place, most)


def _least(config: TrainConfig, configs: Configs, place: Place) -> dict[str, int]:
    """What a step holds while the optimizer steps, which is known without any pass."""
    at_rest, trained = _count_at_rest(config, configs, place)
    if config.memory == "tiny":  # block by block inside the backward pass
        return at_rest
    count = sum(parameter.numel() for parameter in trained)
    scratch = SCRATCH.get(config.chosen_optimizer, {}).get(place.kind, 0) * count
    if config.chosen_optimizer == "adafactor":  # one tensor after the other, with its squares and its update
        scratch = 12 * max(parameter.numel() for parameter in trained)
    return {**at_rest, GRADIENTS: _bytes(trained), ACTIVATIONS: scratch}


def _kept(config: TrainConfig, configs: Configs, place: Place) -> dict[str, int]:
    """What is there from step to step beside the weights."""
    trained = trained_tensors(config, configs, place)
    return {
        STATE: state_bytes(config.chosen_optimizer, trained),
        AVERAGES: _bytes(trained) if config.use_ema else 0,
    }


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _peak(phase: str, parts: dict[str, int], configs: Configs, place: Place, on_device: dict[str, int]) -> Peak:
    """A phase with what comes on top of its tensors: on the CPU all of the model and the libraries."""
    more: Counter[str] = Counter(parts)
    if place.kind == "cuda":
        more[OF_CUDA] += CUDA_BYTES
    else:
        more[OF_PROCESS] += PROCESS_BYTES
        model = 4 * sum(sizes_of_parts(configs).values())
        more[FROZEN] += max(0, model - on_device.get(TRAINED, 0) - on_device.get(FROZEN, 0))
    return Peak(phase, {kind: count for kind, count in more.items() if count})


def process_peaks(config: TrainConfig, configs: Configs, place: Place, cached: int = 0) -> list[Peak]:
    """What the process takes in RAM while it loads the model and while it saves, in fp32 and with its libraries."""
    parts = sizes_of_parts(configs)
    everything = 4 * sum(parts.values())
    trained = trained_tensors(config, configs, place)
    count = sum(parameter.numel() for parameter in trained)
    lora, on_cpu = config.adapter == "lora", place.kind == "cpu"
    each = 4 if config.save_precision == "fp32" else 2
    # Of each file that is written one tensor at a time is copied: what is cast, and what comes from a GPU.
    one = max(trained, key=lambda parameter: parameter.numel())
    largest = {part: max(sizes) for part, sizes in _sizes(json.dumps(configs, sort_keys=True)).items()}
    usable = one.numel() if lora else sum(largest.values())
    state = one.numel() if lora else largest["unet"] + largest["text_encoder"] * config.train_text_encoder
    copies = [0 if on_cpu and each == 4 else each * usable]
    copies.append(0 if on_cpu else 4 * state + state_bytes(config.chosen_optimizer, [one]))
    if config.resume_state == "small":  # all moments, before the first is written
        copies[-1] += 2 * count
    moved = 0 if on_cpu else 4 * (parts["unet"] + parts["text_encoder"] * config.train_text_encoder)
    kept = {**_kept(config, configs, place), CACHE: cached} if on_cpu else {}
    weights = {TRAINED: 4 * count * on_cpu, FROZEN: everything - moved - (0 if lora else 4 * count * on_cpu)}
    loading_parts = {FROZEN: everything, OF_PROCESS: PROCESS_BYTES}
    saving_parts = {**weights, **kept, SAVED: max(copies), OF_PROCESS: PROCESS_BYTES}
    return [
        Peak(phase, {kind: count for kind, count in held.items() if count})
        for phase, held in (("loading the model", loading_parts), ("saving", saving_parts))
    ]


def held(state: State) -> dict[str, int]:
    """What a training really holds now, in bytes by what it is for, of the kinds whose tensors are known."""
    trained = state.parameters
    moments = [value for values in state.optimizer.state.values() for value in values.values()]
    averages = [tensor for own in state.ema.averages.values() for tensor in own] if state.ema else []
    return {
        TRAINED: _bytes(trained),
        STATE: _bytes(value for value in moments if hasattr(value, "nbytes")),
        AVERAGES: _bytes(averages),
        GRADIENTS: _bytes(parameter.grad for parameter in trained if parameter.grad is not None),
    }


# The counts, each made once.


@functools.lru_cache(maxsize=1)
def _libraries() -> tuple[type, ...]:
    with quiet():
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel
    return UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextConfig


def _on_meta(configs: str, clip_skip: int | None) -> Models:
    """The modules that configurations describe, without contents, in evaluation mode. Random numbers are left alone."""
    import torch

    unet_class, vae_class, text_class, text_config = _libraries()
    parts = json.loads(configs)
    with quiet(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            unet, vae = (cls.from_config(parts[part]) for cls, part in ((unet_class, "unet"), (vae_class, "vae")))
            text_encoder = text_class(text_config.from_dict(parts["text_encoder"]))
        except (ValueError, TypeError, KeyError) as error:
            raise DbkitError(f"the settings of the model are not those of Stable Diffusion ({error})") from error
    text_encoder.config.clip_skip = clip_skip or clip_skip_of(text_encoder.config)
    for module in (unet, vae, text_encoder):
        module.eval().requires_grad_(False)
    return Models(None, text_encoder, vae, unet, None, {})


def _once(*names: str) -> Callable[[Callable], Callable]:
    """Keep what a function counts, by the settings of these names, which are all that it depends on."""

    def keeping(count: Callable) -> Callable:
        known: dict[tuple, Any] = {}

        @functools.wraps(count)
        def counted(config: TrainConfig, configs: Configs, place: Place, *others: Any) -> Any:
            settings = [getattr(config, name) for name in names]
            key = (json.dumps(configs, sort_keys=True), place, others, *settings, largest_size(config))
            if key not in known:
                known[key] = count(config, configs, place, *others)
            return known[key]

        return counted

    return keeping


def largest_size(config: TrainConfig) -> Size:
    """The largest of the sizes that a training may use."""
    return max(sizes_of(config), key=lambda size: size[0] * size[1])


@contextlib.contextmanager
def _counting(models: Models, parts: list[str], place: Place) -> Iterator[tuple[Any, Any]]:
    """Follow what is made in the block beside the weights of these parts."""
    ledger = make_ledger()
    for part in parts:
        module = getattr(models, part)
        for tensor in (*module.parameters(), *module.buffers()):
            ledger.see(tensor, TRAINED if tensor.requires_grad else FROZEN)
    arithmetic = make_arithmetic(ledger, place.dtype, place.kind)
    with ledger, arithmetic:
        yield ledger, arithmetic


def _trained_on_meta(config: TrainConfig, configs: Configs) -> tuple[Models, list[str], list[torch.nn.Parameter]]:
    """The modules as a training has them: which of them a step reads, and what the optimizer moves."""
    import torch

    models = _on_meta(json.dumps(configs, sort_keys=True), config.clip_skip)
    with quiet(), torch.device("meta"):
        trained = train_parts(config, models, torch.device("meta"))
    parameters = [p for module in trained.values() for p in module.parameters() if p.requires_grad]
    return models, ["unet", "text_encoder"] if config.train_text_encoder else ["unet"], parameters


@_once(*_TRAINED)
def _count_at_rest(config: TrainConfig, configs: Configs, place: Place) -> tuple[dict[str, int], list[torch.Tensor]]:
    """What the weights take between two steps, and what is trained."""
    models, parts, parameters = _trained_on_meta(config, configs)
    with _counting(models, parts, place) as (ledger, _):
        return ledger.next_moment(), parameters


@_once(*_TRAINED, *_STEP)
def _count_step(config: TrainConfig, configs: Configs, place: Place, sums: bool) -> list[dict[str, int]]:
    """What is held at the peaks of the forward and of the backward pass. sums: gradients are there before it."""
    import torch

    models, parts, parameters = _trained_on_meta(config, configs)

    def take(parameter: torch.nn.Parameter) -> None:
        ledger.book(parameter.grad, GRADIENTS)
        if config.memory == "tiny":  # which steps here and frees it
            parameter.grad = None

    with _counting(models, parts, place) as (ledger, arithmetic):
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(take)
            if sums:
                parameter.grad = torch.empty_like(parameter)
                ledger.book(parameter.grad, GRADIENTS)
        ledger.next_moment()
        loss = _forward(config, models, largest_size(config), arithmetic)
        forward = ledger.next_moment()
        run_backward(loss)
        backward = ledger.next_moment()
    return [forward, backward]


def _forward(config: TrainConfig, models: Models, size: Size, arithmetic: Any) -> torch.Tensor:
    """The loss of one pass, as train_step() computes it."""
    import torch

    pictures = config.train_batch_size * (2 if config.with_prior_preservation else 1)
    draw = functools.partial(torch.empty, device="meta")
    tokens = min(models.text_encoder.config.max_position_embeddings, 77)
    latents, noise = draw(2, pictures, *_latent_shape(models, size))
    timesteps, alphas = draw(pictures, dtype=torch.long), draw(1000)
    seen = add_noise(latents, noise, timesteps, alphas)
    if models.inpaints:
        hidden = models.unet.config.in_channels - latents.shape[1]
        seen = torch.cat([seen, draw(pictures, hidden, *latents.shape[2:])], dim=1)
    own = None if config.pad_tokens else draw(pictures, tokens, dtype=torch.long)
    if config.train_text_encoder:
        text = encode_prompts(models.text_encoder, torch.zeros(pictures, tokens, dtype=torch.long, device="meta"))
    else:
        text = draw(pictures, tokens, models.text_encoder.config.hidden_size)
    model_pred = models.unet(seen, timesteps, text, encoder_attention_mask=own).sample
    arithmetic.copies = None  # autocast's block ends here
    weights = draw(pictures, 1, *latents.shape[2:]) if config.masked_loss else None
    return per_sample_loss(model_pred, noise, config.loss_type, config.huber_delta, weights).mean()


def _latent_shape(models: Models, size: Size) -> tuple[int, int, int]:
    factor = models.vae_scale_factor
    return models.vae.config.latent_channels, size[1] // factor, size[0] // factor


@_once()
def _count_encoding(config: TrainConfig, configs: Configs, place: Place, pictures: int, size: Size) -> dict[str, int]:
    """What the VAE holds, itself among it, while it encodes so many pictures at once, in fp32."""
    import torch

    models = _on_meta(json.dumps(configs, sort_keys=True), None)
    with torch.no_grad(), _counting(models, ["vae"], Place(place.kind, torch.float32)) as (ledger, _):
        models.vae.encode(torch.empty(pictures, 3, size[1], size[0], device="meta"))
        return ledger.next_moment()


@_once(*_TRAINED)
def _count_previews(config: TrainConfig, configs: Configs, place: Place, batch: int, guided: bool) -> dict[str, int]:
    """What sampling so many pictures by the live modules holds."""
    return _count_sampling(config, configs, place, batch, guided, live=True)


@_once("clip_skip")
def _count_class_images(
    config: TrainConfig, configs: Configs, place: Place, batch: int, guided: bool
) -> dict[str, int]:
    """What sampling so many pictures by a model that is only sampled holds."""
    return _count_sampling(config, configs, place, batch, guided, live=False)


def _count_sampling(
    config: TrainConfig, configs: Configs, place: Place, batch: int, guided: bool, live: bool
) -> dict[str, int]:
    import torch

    models = _on_meta(json.dumps(configs, sort_keys=True), config.clip_skip)
    parts = ["unet", "vae", "text_encoder"]
    if live:
        with quiet(), torch.device("meta"):
            train_parts(config, models, torch.device("meta"))
    with quiet():
        for part in parts:
            getattr(models, part).eval().to(torch.float32 if live else place.dtype)
    times = 2 if guided else 1
    channels, height, width = _latent_shape(models, largest_size(config))
    tokens = min(models.text_encoder.config.max_position_embeddings, 77)
    with torch.no_grad(), _counting(models, parts, place) as (ledger, _):
        ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
        text = torch.cat([encode_prompts(models.text_encoder, ids)] * times)
        latents = torch.empty(batch, channels, height, width, device="meta", dtype=models.unet.dtype)
        seen = torch.cat([latents] * times)
        if models.inpaints:
            seen = torch.cat([seen, seen, seen[:, :1]], dim=1)
        timesteps = torch.empty(batch * times, dtype=torch.long, device="meta")
        models.unet(seen, timesteps, text, return_dict=False)
        models.vae.decode(latents, return_dict=False)
        return ledger.next_moment()


def _encoding_peak(config: TrainConfig, configs: Configs, place: Place) -> Peak:
    """What encoding the images takes. It comes first: on a GPU the VAE is alone there."""
    pictures, size = max(
        ((at_once(size, place.kind), size) for size in sizes_of(config)),
        key=lambda batch: batch[0] * batch[1][0] * batch[1][1],
    )
    held = _count_encoding(config, configs, place, pictures, size)
    return _peak("encoding the images", held, configs, place, held)


def _sampling_peak(
    phase: str, config: TrainConfig, configs: Configs, place: Place, batch: int, held: dict[str, int] | None
) -> Peak:
    live = held is not None
    count = _count_previews if live else _count_class_images
    counted = count(config, configs, place, batch, config.guidance_scale > 1)
    if live or place.kind == "cuda":
        return _peak(phase, {**counted, **(held or {})}, configs, place, counted)
    # Class images are made before the model is loaded for training.
    return Peak(phase, {**counted, OF_PROCESS: PROCESS_BYTES})
