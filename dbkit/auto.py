"""Good settings from the facts: the images, the method and the GPU. docs/auto.md has the rules and their sources."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit import embedded, processes
from dbkit.concepts import concepts_of
from dbkit.errors import DbkitError, counted
from dbkit.examples import training_images
from dbkit.memory import STABLE_DIFFUSION_1, USABLE, Configs, Place, read_configs, step_peak
from dbkit.optimizers import LIBRARIES, try_optimizer
from dbkit.settings import AUTO, is_on, left_to_auto, read_yaml, replace
from dbkit.state import check_processes
from dbkit.train_config import TIERS, TrainConfig

if TYPE_CHECKING:
    import torch

# What is seen of the images over a run: 100 times each, within these bounds.
LEAST_SUBJECT, LEAST_WITH_CLASS, MOST_SUBJECT, MOST_CAPTIONED = 400, 800, 4_000, 60_000
CAPTIONED_BATCH = 4
PEOPLE = {"person", "people", "man", "woman", "boy", "girl", "child", "face"}
# benchmarks/learning.md, and of a LoRA what its --lora takes.
_MEASURED = f"what suits {embedded.NAME}, by measurement at {embedded.RESOLUTION} px"
# Ways to save memory, as (gradient_checkpointing, use_8bit_adam): none of them.
_WHOLE = ((False, False),)
_WITHOUT_8BIT = "; after pip install bitsandbytes it is 6 bytes a parameter less"


@dataclass(frozen=True)
class Machine:
    """What the choices depend on. memory is what is free on the GPU in GB (10^9 bytes), None where it is no GPU's."""

    name: str
    memory: float | None
    dtype: str
    has_8bit_adam: bool


# Values for some settings, and the sentence that says why.
Chosen = tuple[dict[str, Any], str]


def choose_settings(config: TrainConfig, run: Path, device: torch.device, dtype: torch.dtype) -> TrainConfig:
    """The settings with a value for each that is left to be chosen, and the reasons on the screen.

    A run that goes on keeps what it ran with, but for gradient_checkpointing, which changes memory and not the result.
    """
    config, reasons = settings_and_reasons(config, run, device, dtype)
    for reason in reasons:
        print(reason)
    return config


def settings_and_reasons(
    config: TrainConfig, run: Path, device: torch.device, dtype: torch.dtype
) -> tuple[TrainConfig, list[str]]:
    """What choose_settings() returns, and the sentences that it prints."""
    import torch

    reasons = []
    if config.memory == "tiny" and (dtype != torch.bfloat16 or device.type == "mps"):
        config = replace(config, memory="small")
        where = "Apple's GPUs" if device.type == "mps" else "this GPU"
        reasons.append(f"memory tiny computes in bf16, which {where} cannot do well; memory small takes its place")
    left = _left(config)
    if not left:
        reasons += ["auto has nothing to choose: all that it chooses is given"] * config.auto
        return replace(config, auto=False), reasons
    kept = {} if config.start_over else _kept(config, run, left)
    if kept:
        reasons.append(f"auto: {run} goes on with {_listed(kept)}")
    images = [len(training_images(concept.instance_data_dir)) for concept in concepts_of(config)]
    chosen, why = choose(replace(config, **kept), images, machine_of(config, device, dtype))
    reasons += [f"auto: {reason}" for reason in why]
    return replace(config, **kept, **chosen, auto=False), reasons


def choose(config: TrainConfig, images: Sequence[int], machine: Machine) -> tuple[dict[str, Any], list[str]]:
    """A value for each setting that is left to be chosen, and the reasons. images has the number of each concept's."""
    chosen, reasons = {}, []
    for rule in (_batch_and_memory, _steps, _learning_rate, _class_images, _saves):
        values, why = rule(dataclasses.replace(config, **chosen), images, machine)
        new = {name: value for name, value in values.items() if name in _left(config)}
        chosen |= new
        if new:
            reasons.append(f"{_listed(new)}: {why}")
    return {name: getattr(TrainConfig, name) for name in left_to_auto(config)} | chosen, reasons


def _left(config: TrainConfig) -> list[str]:
    """The settings that are to be chosen: memory too, where what its tiers turn on is, since there auto is a value."""
    left = left_to_auto(config)
    tier = config.auto and config.memory == AUTO and {"gradient_checkpointing", "use_8bit_adam"} <= set(left)
    return left + ["memory"] * tier


def machine_of(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> Machine:
    """The facts of a device."""
    import torch

    kind = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    if device.type != "cuda":
        return Machine("CPU" if device.type == "cpu" else "Apple GPU", None, kind, False)
    free, _ = torch.cuda.mem_get_info(device)
    # What torch holds and does not use is free for the run.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Machine(torch.cuda.get_device_name(device), free / 1e9, kind, has_8bit_adam(config, device))


def has_8bit_adam(config: TrainConfig, device: torch.device) -> bool:
    """Whether one of the libraries that have AdamW in 8 bit works on the device."""
    if config.optimizer != "adamw":
        return False
    tried = {name: getattr(TrainConfig, name) for name in left_to_auto(config)}
    tried |= {"use_8bit_adam": True, "memory": AUTO}
    config = dataclasses.replace(config, **tried)
    return any(not try_optimizer(config, library, device) for library in LIBRARIES["adamw8bit"])


def _kept(config: TrainConfig, run: Path, left: list[str]) -> dict[str, Any]:
    """What a run that has a state ran with, of the settings that are left to be chosen."""
    if not any((run / "resume").glob("step_*[0-9]")) or not (run / "settings.yaml").is_file():
        return {}
    ran = read_yaml(run / "settings.yaml")
    needed = {field.name: field.metadata.get("needs") for field in dataclasses.fields(config)}
    names = [name for name in left if name in ran and (not needed[name] or is_on(config, needed[name]))]
    return {name: ran[name] for name in names if name != "gradient_checkpointing"}


def _listed(values: dict[str, Any]) -> str:
    words = {True: "on", False: "off", None: "empty"}
    shown = {n: words[v] if v is None or isinstance(v, bool) else v for n, v in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _captioned(config: TrainConfig) -> bool:
    """Whether a style is learnt, each image with its own caption, rather than a subject."""
    return not config.with_prior_preservation and (config.use_txt_as_label or config.use_filename_as_label)


def _lora(config: TrainConfig) -> bool:
    return config.adapter == "lora"


def _has_moments(config: TrainConfig) -> bool:
    """Whether there are Adam's moments to save, which a LoRA and other optimizers do not have."""
    return not _lora(config) and config.optimizer == "adamw"


def _or(value: Any, choice: Any) -> Any:
    return choice if value == AUTO else value


# The rules. Each takes what is given or was chosen before as it is, and a sentence says no more than was computed.


def _batch_and_memory(config: TrainConfig, images: Sequence[int], machine: Machine) -> Chosen:
    """The fastest of the ways that fit into the memory: whole, with 8-bit Adam, with checkpointing as well, tiny."""
    if embedded.is_embedded(config.pretrained_model_name_or_path):
        return _ways(config, _WHOLE, (embedded.TRAINING["train_batch_size"],))[0], _MEASURED
    wanted = CAPTIONED_BATCH if _captioned(config) else 1
    why = f"{wanted} in each step is usual for {'captioned images' if _captioned(config) else 'a subject'}; "
    why += f"{machine.name}, {machine.dtype}"
    if machine.memory is None:
        slow = "; 800 steps of Stable Diffusion take about 9 hours on a fast CPU" if machine.name == "CPU" else ""
        traded = "nothing is traded for memory" if config.memory == AUTO else f"memory {config.memory} is given"
        return _ways(config, _WHOLE, (1,), wanted)[0], f"{why}: {traded}{slow}"
    configs, known = _configs(config)
    way, number, (need, parts), fits = _fastest_way(config, wanted, machine, configs)
    why += f", {machine.memory:.1f} GB free: about {need:.1f} GB{known} = {parts}"
    if not fits:
        less = "a smaller resolution" if _lora(config) else "a LoRA"
        why += f"; that leaves too little room: {less} or a larger GPU is needed"
    helps = number and _has_moments(config) and not machine.has_8bit_adam
    if helps and config.use_8bit_adam == AUTO and "memory" not in way:
        why += _WITHOUT_8BIT
    return way, why


def what_suits(machine: Machine) -> str:
    """What auto takes on a GPU for Stable Diffusion 1 at 512 px, one picture in a step, and what that needs."""
    config = TrainConfig("model", "pictures", instance_prompt="zwx", auto=True)
    way, number, (need, _), fits = _fastest_way(config, 1, machine, STABLE_DIFFUSION_1)
    tiers = {TIERS[name]: name for name in ("fast", "balanced", "small")}
    pair = (way["gradient_checkpointing"], way["use_8bit_adam"])
    takes = f"memory {way['memory']}" if "memory" in way else f"memory {tiers[pair]}" if pair in tiers else ""
    what = f"{takes or 'gradient_checkpointing'}, about {need:.1f} GB in a step"
    if not fits:
        what = f"not even {what}; train a LoRA, or with a smaller resolution"
    return what + (_WITHOUT_8BIT if number and not machine.has_8bit_adam and "memory" not in way else "")


def _fastest_way(
    config: TrainConfig, wanted: int, machine: Machine, configs: Configs
) -> tuple[dict[str, Any], int, tuple[float, str], bool]:
    """The fastest way that fits, its number among all, what it needs in GB and in words, and whether it fits."""
    eight = machine.has_8bit_adam and _has_moments(config)
    pairs = (*_WHOLE, (False, True), (True, True)) if eight else (*_WHOLE, (True, False))
    sizes = [size for size in (4, 2, 1) if size <= wanted]
    ways = _ways(config, pairs, sizes, wanted) + _tiny_ways(config, sizes, machine)
    need = functools.cache(lambda number: memory(config, configs, machine, **ways[number]))
    fitting = (number for number in range(len(ways)) if need(number)[0] <= USABLE * machine.memory)
    best = next(fitting, None)
    fits = best is not None
    if not fits:  # of ways that need the same the one that saves most, since the figures are approximate
        best = min(reversed(range(len(ways))), key=lambda number: need(number)[0])
    return ways[best], best, need(best), fits


def _ways(
    config: TrainConfig, pairs: Sequence[tuple[bool, bool]], sizes: Sequence[int], wanted: int = 1
) -> list[dict[str, Any]]:
    """Ways to train, the fastest first, with what is given in place of what is tried."""
    ways, tier = [], TIERS[config.memory]
    for checkpointing, eight in pairs if config.memory == AUTO else (tier,):
        for size in sizes:
            size = _or(config.train_batch_size, size)
            way = {
                "train_batch_size": size,
                "gradient_accumulation_steps": _or(config.gradient_accumulation_steps, max(1, wanted // size)),
                "gradient_checkpointing": tier[0] or _or(config.gradient_checkpointing, checkpointing),
                "use_8bit_adam": tier[1] or _or(config.use_8bit_adam, eight),
            }
            if config.memory == "tiny":
                way["gradient_accumulation_steps"] = 1
            ways += [way] if way not in ways else []
    return ways


def _tiny_ways(config: TrainConfig, sizes: Sequence[int], machine: Machine) -> list[dict[str, Any]]:
    """memory tiny, unless something that is given speaks against it."""
    if "memory" not in _left(config) or machine.dtype != "bf16":
        return []
    try:
        tiny = dataclasses.replace(config, memory="tiny")
        check_processes(tiny)
    except DbkitError:
        return []
    return [{**way, "memory": "tiny"} for way in _ways(tiny, (), sizes)]


def _configs(config: TrainConfig) -> tuple[Configs, str]:
    """The model's settings, or those of Stable Diffusion 1 where they cannot be had yet, and what to say of that."""
    try:
        return read_configs(config), ""
    except DbkitError:  # said when the model is loaded
        return STABLE_DIFFUSION_1, " for Stable Diffusion 1"


def memory(config: TrainConfig, configs: Configs, machine: Machine, **way: Any) -> tuple[float, str]:
    """How many GB a step takes at its peak, and the sum in words."""
    import torch

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[machine.dtype]
    peak = step_peak(dataclasses.replace(config, **way), configs, Place("cuda", dtype))
    parts = sorted(peak.parts.items(), key=lambda part: -part[1])
    words = " + ".join(f"{count / 1e9:.1f} GB of {kind}" for kind, count in parts if count >= 0.05e9)
    return peak.total / 1e9, words


def _steps(config: TrainConfig, images: Sequence[int], machine: Machine) -> Chosen:
    if config.num_train_epochs != TrainConfig.num_train_epochs:
        return {"max_train_steps": None}, f"num_train_epochs {config.num_train_epochs} decides"
    if embedded.is_embedded(config.pretrained_model_name_or_path):
        steps, why = embedded.TRAINING["max_train_steps"], _MEASURED
        if _lora(config):
            steps, why = 2 * steps, f"twice what suits {embedded.NAME} without a LoRA"
        return {"max_train_steps": steps}, why
    count, prior = sum(images), config.with_prior_preservation
    least, most = LEAST_WITH_CLASS if prior else LEAST_SUBJECT, MOST_SUBJECT
    if _captioned(config):
        least, most = 0, MOST_CAPTIONED
    seen = min(max(100 * count, least), most)
    why = f"{counted(count, 'image')} x 100 times = {100 * count}, the rule of thumb"
    if seen > 100 * count:
        why += f", but at least {least}" + (" with class images" if prior else "")
    elif seen < 100 * count:
        why += f", but at most {most}"
    together = config.train_batch_size * config.gradient_accumulation_steps * processes.world()
    steps = math.ceil(seen / together)
    return {"max_train_steps": steps}, why + (f"; {together} in each step: {steps} steps" if together > 1 else "")


def _learning_rate(config: TrainConfig, images: Sequence[int], machine: Machine) -> Chosen:
    prompts = f"{config.instance_prompt or ''} {config.class_prompt or ''}".lower().replace(",", " ").split()
    if config.optimizer == "prodigy":
        rate, why = 1.0, "prodigy finds the rate, and multiplies it by this"
    elif embedded.is_embedded(config.pretrained_model_name_or_path):
        rate, why = embedded.TRAINING["learning_rate"], _MEASURED
        if _lora(config):
            rate, why = 10 * rate, f"ten times what suits {embedded.NAME} without a LoRA"
    elif _lora(config):
        rate, why = 1e-4, "that of diffusers for a LoRA"
    elif config.train_text_encoder and PEOPLE & set(prompts):
        rate, why = 1e-6, "that of Hugging Face's experiments for faces, since the text encoder is trained too"
    elif config.train_text_encoder:
        rate, why = 2e-6, "that of diffusers where the text encoder is trained too"
    elif _captioned(config):
        rate, why = 1e-5, "that of diffusers for captioned images"
    else:
        rate, why = 5e-6, "that of diffusers for a subject"
    if config.optimizer == "lion":
        rate, why = round(rate / 5, 9), f"{why}, a fifth of it with lion"
    return {"learning_rate": rate}, why


def _class_images(config: TrainConfig, images: Sequence[int], machine: Machine) -> Chosen:
    if not config.with_prior_preservation:
        return {}, ""
    if embedded.is_embedded(config.pretrained_model_name_or_path):
        return {"num_class_images": embedded.TRAINING["num_class_images"]}, _MEASURED
    most = max(images)
    return {
        "num_class_images": min(max(10 * most, 50), 200)
    }, f"10 for each of {counted(most, 'image')}, from 50 to 200"


def _saves(config: TrainConfig, images: Sequence[int], machine: Machine) -> Chosen:
    together = config.train_batch_size * config.gradient_accumulation_steps * processes.world()
    total = config.max_train_steps or math.ceil(sum(images) * config.num_train_epochs / together)
    every = min(max(total // 4 // 50 * 50, 100), 500)
    return {"save_model_every_n_steps": every}, f"a quarter of {total} steps in fifties, from 100 to 500"
