"""plan(): what a training will need, before anything is loaded, and which settings to change where it will not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit import processes, zero
from dbkit.auto import choose_settings, has_8bit_adam, machine_of
from dbkit.checkpoint import by_step
from dbkit.concepts import concepts_of
from dbkit.errors import DbkitError, counted
from dbkit.examples import training_images
from dbkit.files import free_space, size
from dbkit.keeper import all_saves, usable_size
from dbkit.libraries import choose_device, choose_dtype
from dbkit.lora import has_peft, require_peft
from dbkit.memory import (
    OF_CUDA,
    USABLE,
    Configs,
    Peak,
    Place,
    device_peaks,
    fits,
    held,
    largest_size,
    process_peaks,
    read_configs,
    sizes_of_parts,
    step_peak,
    trained_tensors,
)
from dbkit.models import check_resolution, model_facts, size_warnings
from dbkit.preview import read_prompts
from dbkit.resume import settled
from dbkit.settings import configured_by, replace
from dbkit.state import State, state_size
from dbkit.status import duration, status
from dbkit.train_config import TrainConfig
from dbkit.workspace import default_folder, working_folder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Change:
    """Settings that take less memory, what they cost in words, and in bytes what they save and what is needed then."""

    settings: dict[str, Any]
    cost: str
    saves: int
    needs: int

    def __str__(self) -> str:
        words = {"True": "on", "False": "off"}
        listed = ", ".join(f"{name} {words.get(str(value), value)}" for name, value in self.settings.items())
        return f"{listed} (saves {size(self.saves)}, then {size(self.needs)}; {self.cost})"


@dataclass(frozen=True)
class Plan:
    """What a training will need. Shows itself as a table.

    peaks are those of the phases on the device, the step first; ram is the highest of the process, on a GPU machine.
    free and ram_free are in bytes, None where they are not known. disk has (folder, needed, free). seconds is what is
    left by the log of the run's last session, None where there is none. changes are the two cheapest that make the
    training fit; none where it fits, or where nothing helps; None where they were not looked for.
    """

    title: str
    device: str
    free: int | None
    peaks: list[Peak]
    ram: Peak | None
    ram_free: int | None
    disk: list[tuple[Path, int, int]]
    steps: int
    seconds: float | None
    changes: list[Change] | None

    @property
    def peak(self) -> Peak:
        """The phase that takes most on the device."""
        return max(self.peaks, key=lambda peak: peak.total)

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits what is free on the device, with a tenth left over; None where that is not known."""
        return None if self.free is None else self.peak.total <= USABLE * self.free

    def __str__(self) -> str:
        rows = list(self.rows())
        width = max(len(title) for title, _ in rows)
        return "\n".join([self.title, *(f"  {title:<{width}}  {text}" for title, text in rows)])

    def _repr_html_(self) -> str:
        left = "style='text-align:left'"  # JupyterLab sets tables to the right, as numbers are
        rows = "".join(
            f"<tr><td {left}>{html.escape(title)}</td><td {left}>{html.escape(text)}</td></tr>"
            for title, text in self.rows()
        )
        return f"<p><b>{html.escape(self.title)}</b></p><table>{rows}</table>"

    def rows(self) -> Iterator[tuple[str, str]]:
        """What there is to say, each with its title, which is indented where it is a part of what stands above it."""
        yield f"memory, {self.device}", f"{size(self.peak.total)} in {self.peak.phase}{self._verdict()}"
        for kind, count in sorted(self.peak.parts.items(), key=lambda part: -part[1]):
            if count >= 1e6:
                yield f"  {kind}", size(count)
        for peak in self.peaks:
            if peak is not self.peak:
                yield f"memory in {peak.phase}", size(peak.total)
        for title, change in zip(("it fits with", "or with"), self.changes or ()):
            yield title, str(change)
        if self.ram:
            free = f", {size(self.ram_free)} free" if self.ram_free else ""
            yield "RAM", f"{size(self.ram.total)} in {self.ram.phase}{free}"
        for title, (folder, needed, free) in zip(("disk", "disk at home"), self.disk):
            yield title, f"{size(needed)} in {folder}, {size(free)} free{'' if needed <= free else ': too little'}"
        yield "steps", f"{self.steps}; {self.time}"

    def _verdict(self) -> str:
        if self.fits is None:
            return ""
        if self.fits:
            return f", {size(self.free)} free: it fits"
        helps = "" if self.changes else "; no settings make it fit: a smaller model or more memory is needed"
        if self.changes is None:
            helps = "; dbkit plan says what makes it fit"
        return f", {size(self.free)} free: it does not fit (a tenth is left over, since this is an estimate){helps}"

    @property
    def time(self) -> str:
        """How long it takes from here, in words."""
        if self.seconds is None:
            return "how long a step takes is known after the first steps"
        if not self.seconds:
            return "all are done; to train further, raise max_train_steps"
        return f"about {duration(self.seconds)} to the end, by the log of the last session"


@configured_by(TrainConfig)
def plan(config: TrainConfig) -> Plan:
    """What a training with these settings needs of the device, RAM, disks and time, before anything is loaded.

    Raises DbkitError where the model's config.json files or the images cannot be read, or a LoRA lacks peft.
    """
    if config.adapter == "lora":
        require_peft()
    where = Where.of(config)
    config = settled(config, where.run, where.home)
    for sentence in size_warnings(config.resolution, model_facts(config.pretrained_model_name_or_path)):
        print(sentence)
    return estimate(choose_settings(config, where.saved, where.device, where.dtype), where)


@dataclass(frozen=True)
class Where:
    """Where a training takes place: the folder in which it works, the one where it is kept, device and arithmetic."""

    run: Path
    home: Path
    device: torch.device
    dtype: torch.dtype

    @property
    def saved(self) -> Path:
        """The folder that has what the run goes on from: on a new machine its home."""
        with contextlib.suppress(OSError):
            if not by_step(self.run / "resume") and by_step(self.home / "resume"):
                return self.home
        return self.run

    @classmethod
    def of(cls, config: TrainConfig) -> Where:
        """As train() chooses it."""
        home = (config.output_dir or default_folder() / "runs" / _method(config)).absolute()
        device = choose_device(config.device)
        dtype = choose_dtype(config.mixed_precision, device, config.memory)
        return cls(working_folder(home, config.local_dir), home, device, dtype)


def estimate(config: TrainConfig, where: Where, search: bool = True) -> Plan:
    """plan() for settings that leave nothing to be chosen, with nothing printed. search: look for what makes it fit."""
    device, dtype, home = where.device, where.dtype, where.home
    configs, place = read_configs(config), Place(device.type, dtype)
    check_resolution(config.resolution, model_facts(config.pretrained_model_name_or_path))
    images = sum(len(training_images(concept.instance_data_dir)) for concept in concepts_of(config))
    machine, free_ram = machine_of(config, device, dtype), _free_ram()
    free = free_ram if machine.memory is None else int(machine.memory * 1e9)
    peaks = device_peaks(config, configs, place, *_amounts(config, configs, images))
    enough = max(peak.total for peak in peaks) <= USABLE * free
    trained = trained_tensors(config, configs, place)
    steps = config.max_train_steps or math.ceil(
        images * config.num_train_epochs / (config.train_batch_size * config.gradient_accumulation_steps)
    )
    changes: list[Change] | None = [] if enough else None
    if search and not enough:
        changes = cheapest_changes(config, configs, place, images, device, USABLE * free)
    return Plan(
        title=_title(config, dtype),
        device=machine.name,
        free=free,
        peaks=peaks,
        ram=None if device.type == "cpu" else max(process_peaks(config, configs, place), key=lambda peak: peak.total),
        ram_free=free_ram,
        disk=_disk(config, configs, trained, images, where.run, home),
        steps=steps,
        seconds=None if config.start_over else _seconds(home, steps),
        changes=changes,
    )


def _method(config: TrainConfig) -> str:
    return "dreambooth" if config.with_prior_preservation else "native"


def _title(config: TrainConfig, dtype: torch.dtype) -> str:
    width, height = largest_size(config)
    pictures = counted(config.train_batch_size * (2 if config.with_prior_preservation else 1), "picture")
    what = "LoRA of U-Net" if config.adapter == "lora" else "U-Net"
    what += " and text encoder" if config.train_text_encoder else ""
    more = ", gradient checkpointing" if config.gradient_checkpointing else ""
    kind = str(dtype).removeprefix("torch.")
    return f"{what}, {config.chosen_optimizer}, {pictures} of {width} x {height} in each pass, {kind}{more}"


def _amounts(config: TrainConfig, configs: Configs, images: int) -> tuple[int, int]:
    """Bytes of what is cached, and how many pictures a preview makes."""
    captioned = config.use_txt_as_label or config.use_filename_as_label or config.combine_prompt_from_txt
    prompts = len(concepts_of(config)) * (1 + (not captioned) + config.with_prior_preservation)
    if config.test_prompts_file:
        prompts = len(read_prompts(config.test_prompts_file))
    elif config.test_prompt:
        prompts = 1
    return _cached(config, configs, images), prompts * config.test_num_per_prompt


def _cached(config: TrainConfig, configs: Configs, images: int) -> int:
    """Bytes of the latents and text states of so many images and their class images."""
    channels, area, inpaints = _latents(config, configs)
    concepts = len(concepts_of(config))
    each = 4 * area * (2 * channels + config.masked_loss + inpaints * (1 + channels))
    rows = _views(config, images) * (config.inpainting_masks if inpaints else 1)
    captioned = config.use_txt_as_label or config.use_filename_as_label or config.combine_prompt_from_txt
    versions = config.caption_variants if config.shuffle_tags or config.tag_dropout else 1
    prompts = (images * versions if captioned else concepts) + concepts * config.with_prior_preservation + 1
    return rows * each + prompts * 4 * 77 * configs["text_encoder"]["hidden_size"]


def _kept_latents(config: TrainConfig, configs: Configs, images: int) -> int:
    """Bytes of the file that keeps the latents: mean and std of each view, and of what each hole leaves of it."""
    channels, area, inpaints = _latents(config, configs)
    return 4 * area * 2 * channels * _views(config, images) * (1 + config.inpainting_masks if inpaints else 1)


def _latents(config: TrainConfig, configs: Configs) -> tuple[int, int, bool]:
    """Channels and area of a picture's latents, and whether the model is for inpainting."""
    vae = configs["vae"]
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    width, height = largest_size(config)
    channels = vae.get("latent_channels", 4)
    return channels, (width // factor) * (height // factor), configs["unet"].get("in_channels", 4) != channels


def _views(config: TrainConfig, images: int) -> int:
    """How many views so many images and their class images have."""
    varied = any((config.augment_rotation, config.augment_brightness, config.augment_contrast, config.augment_crop))
    views = config.augment_variants if varied else 1 + config.hflip
    classes = config.num_class_images * len(concepts_of(config)) if config.with_prior_preservation else 0
    return images * views + classes


def _free_ram() -> int:
    """Bytes that are free for this process, what it has among them."""
    import psutil  # accelerate needs it

    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def _disk(
    config: TrainConfig, configs: Configs, trained: list[torch.Tensor], images: int, run: Path, home: Path
) -> list[tuple[Path, int, int]]:
    """What a run keeps, here and at its home, and what is free there."""
    count = sum(parameter.numel() for parameter in trained)
    weights = usable_size(config, sum(sizes_of_parts(configs).values()), count)
    state, latents = state_size(config, trained), _kept_latents(config, configs, images)
    return [
        (folder, all_saves(config, state, weights, is_home=folder == home) + latents, free_space(folder))
        for folder in dict.fromkeys((run, home))
    ]


def _seconds(home: Path, steps: int) -> float | None:
    """What is left of a run after its saved state, at the speed of its last steps."""
    try:
        seen = status(run=home)
    except DbkitError:
        return None
    left = max(0, steps - seen.step + seen.lost_steps)
    return left and seen.seconds_per_step and left * seen.seconds_per_step


# What takes less memory.


def _possible(config: TrainConfig, configs: Configs, device: torch.device) -> list[tuple[int, dict[str, Any], str]]:
    """Changes that can be made, the cheapest first: rank, settings, and what they cost in speed or quality."""
    factor = math.lcm(8, 2 ** (len(configs["vae"]["block_out_channels"]) - 1))
    step = 64 if config.resolution > 256 else factor
    lower = max(factor, config.resolution * 3 // 4 // step * step)
    together = config.train_batch_size * config.gradient_accumulation_steps
    can_be_lora = config.adapter == "none" and has_peft()
    batch = {"train_batch_size": 1, "gradient_accumulation_steps": together}
    changes = [
        (1, {"sample_batch_size": 1}, "slower previews and class images", config.sample_batch_size > 1),
        (2, {"use_8bit_adam": True}, "no slower", config.chosen_optimizer == "adamw"),
        (4, {"gradient_checkpointing": True}, "about a quarter slower", not config.gradient_checkpointing),
        (6, batch, "somewhat slower, the same result", config.train_batch_size > 1),
        (12, {"use_ema": False}, "less steady weights", config.use_ema),
        (20, {"train_text_encoder": False}, "less likeness", config.train_text_encoder),
        (40, {"resolution": lower}, "less detail", lower < config.resolution),
        (60, {"adapter": "lora"}, "a small file that goes with the base model", can_be_lora),
    ]
    found = [change[:3] for change in changes if change[3]]
    if any("use_8bit_adam" in settings for _, settings, _ in found) and not has_8bit_adam(config, device):
        found = [change for change in found if "use_8bit_adam" not in change[1]]
    return found


def cheapest_changes(
    config: TrainConfig, configs: Configs, place: Place, images: int, device: torch.device, limit: float
) -> list[Change]:
    """The two cheapest sets of changes with which the peak is at most `limit` bytes; none where there is none.

    Each was estimated, and has no change that could be left out of it.
    """
    possible = _possible(config, configs, device)
    sets = [some for n in range(1, len(possible) + 1) for some in itertools.combinations(possible, n)]
    sets.sort(key=lambda some: sum(rank for rank, _, _ in some))

    def made(some: tuple) -> tuple:
        changed = _changed(config, some)
        return changed, configs, place, *_amounts(changed, configs, images)

    if not sets or not fits(limit, *made(sets[-1])):
        return []
    found: list[Change] = []
    taken: list[set[int]] = []
    for some in sets:
        ranks = {rank for rank, _, _ in some}
        if any(ranks >= before_it for before_it in taken):
            continue
        if fits(limit, *made(some)):
            taken.append(ranks)
            settings = {name: value for _, change, _ in some for name, value in change.items()}
            before, need = (max(peak.total for peak in device_peaks(*made(each))) for each in ((), some))
            found.append(Change(settings, "; ".join(cost for _, _, cost in some), before - need, need))
        if len(found) == 2:
            break
    return found


def _changed(config: TrainConfig, changes: tuple[tuple[int, dict[str, Any], str], ...]) -> TrainConfig:
    """The settings with some changed; what has no effect without those that are turned off takes its default."""
    settings = {name: value for _, change, _ in changes for name, value in change.items()}
    off = [name for name, value in settings.items() if value is False]
    unused = {field.name: field.default for field in dataclasses.fields(config) if field.metadata.get("needs") in off}
    return replace(config, **unused, **settings)


def say_estimate(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Print what a step is estimated to take of the GPU; watch() compares it with what it took."""
    if device.type != "cuda" or processes.shards() or zero.asked():
        return
    with contextlib.suppress(DbkitError):  # what is wrong with the model is said when it is loaded
        needed = step_peak(config, read_configs(config), Place(device.type, dtype)).total
        machine = machine_of(config, device, dtype)
        print(in_short(needed, int(machine.memory * 1e9), machine.name))


def in_short(needed: int, free: int, device: str) -> str:
    """What a step takes beside what is free, both in bytes, in a line."""
    fits = "it fits" if needed <= USABLE * free else "it does not fit; dbkit plan says what makes it fit"
    return f"memory of a step: about {size(needed)}, and {size(free)} are free on {device}: {fits}"


def watch(taken: int, config: TrainConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Print what a step was estimated to take and what it took, after the second one: the first makes the state."""
    import torch

    if device.type != "cuda" or taken > 2 or processes.shards() or zero.asked():
        return
    if taken == 1:
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(DbkitError):  # a Hub that does not answer now must not end a training
        estimated = _tensors(step_peak(config, read_configs(config), Place(device.type, dtype)))
        measured = torch.cuda.max_memory_allocated(device)
        print(f"\nmemory of a step: {size(estimated)} estimated, {size(measured)} measured, beside what CUDA takes")


@contextlib.contextmanager
def out_of_memory_is_told(config: TrainConfig, state: State, device: torch.device) -> Iterator[None]:
    """Print what was estimated and what is there, and say what takes less. Nothing is tried again by itself."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        measured = torch.cuda.max_memory_allocated()
        configs, place = read_configs(config), Place(device.type, state.dtype)
        print(f"\n{compare(step_peak(config, configs, place), held(state), measured)}")
        takes_less = advice(config, configs, place, device)
        raise DbkitError(
            f"the GPU ran out of memory at {size(measured)}; take {takes_less}, and train again"
        ) from error


def compare(estimated: Peak, there: dict[str, int], measured: int) -> str:
    """A step's memory as a table: each part as it was estimated and, where it can be told, as it is."""
    rows = [("memory of a step", "estimated", "measured")]
    for kind, count in sorted(estimated.parts.items(), key=lambda part: -part[1]):
        if kind != OF_CUDA:
            rows.append((f"  {kind}", size(count), size(there[kind]) if kind in there else ""))
    rows.append(("all tensors", size(_tensors(estimated)), size(measured)))
    return "\n".join(f"{title:<32} {one:>12} {two:>12}".rstrip() for title, one, two in rows)


def _tensors(peak: Peak) -> int:
    return peak.total - peak.parts.get(OF_CUDA, 0)


def advice(config: TrainConfig, configs: Configs, place: Place, device: torch.device) -> str:
    """The two cheapest changes that lower the peak of a step, each with what it saves."""
    before, helps = step_peak(config, configs, place).total, []
    for change in _possible(config, configs, device):
        saves = before - step_peak(_changed(config, (change,)), configs, place).total
        if saves > 0.02 * before:
            helps.append(Change(change[1], change[2], saves, before - saves))
    return " or ".join(map(str, helps[:2])) or "a larger GPU"
