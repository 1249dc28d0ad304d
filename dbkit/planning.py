"""What a training run will do, found out before any model is loaded: its data, its order, where it goes on from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit import processes
from dbkit.auto import choose_settings
from dbkit.buckets import Size, bucket_limits, share_out, sizes_of
from dbkit.checkpoint import Checkpoint
from dbkit.class_images import make_class_images
from dbkit.concepts import Concept, concepts_of, warnings
from dbkit.config import ClassImagesConfig
from dbkit.errors import CannotGoOn, DbkitError, counted
from dbkit.examples import (
    Example,
    class_examples,
    describe,
    fingerprint,
    first_prompts,
    instance_examples,
    require_apart,
)
from dbkit.files import move_aside
from dbkit.hub import require_hub
from dbkit.images import list_images
from dbkit.lora import require_peft
from dbkit.models import Facts, check_resolution, check_zero_terminal_snr, model_facts, size_warnings, vae_folder
from dbkit.optimizers import choose_library
from dbkit.order import Order
from dbkit.preview import read_prompts
from dbkit.resume import (
    changes_since,
    check_same_run,
    identity_of,
    newest_state,
    of_model,
    of_state,
    open_run,
    run_id,
    settled,
)
from dbkit.state import check_processes
from dbkit.text import check_clip_skip
from dbkit.trackers import require_tracker
from dbkit.train_config import TrainConfig

if TYPE_CHECKING:
    import torch


# Of a preview: one that photographs rarely show.
PLACE = "in the snow"
_REST_AFTER = "last step of the text encoder"


@dataclass(frozen=True)
class RunPlan:
    """What a run will do, found out without loading a model: its data, its steps, and where it goes on from.

    rest_after is the last step in which the text encoder is trained, 0 if it never is.
    """

    concepts: list[Concept]
    instance: list[Example]
    class_set: list[Example]
    order: Order
    previews: list[str]
    total: int
    done: int
    saved: Checkpoint | None
    identity: dict[str, Any]
    optimizer_library: str
    rest_after: int


def begin(
    config: TrainConfig, run: Path, home: Path, device: torch.device, dtype: torch.dtype
) -> tuple[TrainConfig, RunPlan]:
    """Bring to `run` what its home has beyond that, choose what is left to auto, and make the plan.

    Returns the settings as they hold from here on: start_over is on only where nothing is gone on with.
    """
    going_on = settled(config, run, home)
    try:
        begun = _begin(going_on, run, home, device, dtype)
    except CannotGoOn:
        # Other pictures, or no state that is whole: to start over was asked for already.
        if going_on is config:
            raise
        return _begin(config, run, home, device, dtype)
    if going_on is not config:
        folders = " and ".join(map(str, dict.fromkeys((home, run))))
        print(
            "start_over was done already for this run, which goes on; to begin at step 0 again, choose another "
            f"output_dir or delete {folders}"
        )
    return begun


def _begin(
    config: TrainConfig, run: Path, home: Path, device: torch.device, dtype: torch.dtype
) -> tuple[TrainConfig, RunPlan]:
    open_run(config, run, home)
    chosen = choose_settings(config, run, device, dtype)
    return chosen, make_plan(chosen, run, device, home)


def make_plan(config: TrainConfig, run: Path, device: torch.device, home: Path | None = None) -> RunPlan:
    """Check model folder, images and captions, say what was found, and generate class images where they are missing.

    run is where the run works, home where it is kept, if that is another folder.
    """
    check_settings(config, run)
    concepts = concepts_of(config)
    instance = instance_examples(config, concepts)
    previews = preview_prompts(config, instance, concepts)
    order = make_order(config, concepts, instance)
    total = total_steps(config, order)
    # After every other mistake, since this makes a repository.
    require_hub(config, run.name)
    for folder in dict.fromkeys((home or run, run)) if config.start_over else ():
        if holds_run(folder):
            print(f"the earlier run is moved to {move_aside(folder)}")
    saved = newest_state(run)
    library = choose_library(config, device, saved and saved.facts["settings"].get("library of the optimizer"))
    identity = identity_of(config, library, instance)
    # Before class images are made for a run that these settings do not continue.
    check_same_run(saved, identity, run)
    for sentence in (*describe(instance, concepts), *warnings(concepts), *warnings_of(config)):
        print(sentence)
    # Of a run that has as many already, train() says so instead.
    if saved is None or saved.step < total:
        print(arithmetic(config, total, order, len(instance)))
    class_set = _class_examples(config, concepts, instance)
    require_apart(instance, class_set)
    order = make_order(config, concepts, instance, class_set)
    identity |= {"class images": fingerprint(class_set), "weights of the concepts": list(order.weights)}
    done = check_same_run(saved, identity, run)
    if 0 < done < total:
        print(f"continuing after step {done}{of_state(saved)}")
    for sentence in changes_since(config, run) if saved else of_model(config.pretrained_model_name_or_path):
        print(sentence)
    identity["run"] = run_id(saved)
    rest_after = _rest_after(config, max(total, done), saved)
    if rest_after:
        identity[_REST_AFTER] = rest_after
    return RunPlan(concepts, instance, class_set, order, previews, total, done, saved, identity, library, rest_after)


def holds_run(folder: Path) -> bool:
    """Whether a folder has something of a run, which start_over moves aside."""
    return any((folder / name).exists() for name in ("resume", "checkpoints", "model", "settings.yaml"))


def check_settings(config: TrainConfig, run: Path) -> None:
    """Raise DbkitError where the settings do not suit the model's folder, the processes or what is installed."""
    check_processes(config)
    facts = model_facts(config.pretrained_model_name_or_path)
    check_resolution(config.resolution, facts)
    check_zero_terminal_snr(config.rescale_zero_terminal_snr, facts)
    check_clip_skip(config.clip_skip, facts and facts.text_layers)
    if facts and not facts.inpaints and config.inpainting_masks != TrainConfig.inpainting_masks:
        raise DbkitError(
            f"inpainting_masks has no effect on {config.pretrained_model_name_or_path}, which is no inpainting model; "
            "leave it out"
        )
    if config.use_aspect_ratio_bucket:
        _check_buckets(config, facts)
    if run.is_dir() and list_images(run) and not (run / "settings.yaml").exists():
        raise DbkitError(f"output_dir {run} is a folder of pictures and no run; choose another output_dir")
    require_tracker(config, run)
    if config.pretrained_vae_name_or_path:
        vae_folder(config.pretrained_vae_name_or_path)
    if config.adapter == "lora":
        require_peft()


def _rest_after(config: TrainConfig, total: int, saved: Checkpoint | None) -> int:
    """The last step in which the text encoder is trained: the last of all, a part of the total, or as it is given."""
    if not config.train_text_encoder:
        return 0
    stop = config.stop_text_encoder_training or total
    if stop >= 1:
        return int(stop)
    # Of a run that is trained further it is a part of the first total: what rests already must not begin anew.
    return saved.facts.get(_REST_AFTER, 0) if saved else max(1, round(stop * total))


def warnings_of(config: TrainConfig) -> list[str]:
    """What the settings let expect and nobody wants: pictures of another size than the model's, a rate that is off."""
    return size_warnings(config.resolution, model_facts(config.pretrained_model_name_or_path)) + rate_warnings(config)


def rate_warnings(config: TrainConfig) -> list[str]:
    """What the default learning rate does not suit; a rate of one's own is left alone."""
    wanted = ["1e-4 is usual for a LoRA"] if config.adapter == "lora" else []
    wanted += ["lion wants a third to a tenth of what AdamW wants"] if config.optimizer == "lion" else []
    if not wanted or config.learning_rate != TrainConfig.learning_rate:
        return []
    default = f"learning_rate is {config.learning_rate:g}, the default, which suits AdamW and a whole model"
    return [f"{default}; {'; '.join(wanted)}"]


def _check_buckets(config: TrainConfig, facts: Facts | None) -> None:
    """Raise DbkitError unless the model can take every bucket."""
    _, _, shortest, longest = bucket_limits(config)
    if shortest > longest:
        raise DbkitError(f"bucket_min_side {shortest} is above bucket_max_side {longest}; lower it")
    for width, height in sizes_of(config):
        for side in (width, height):
            if facts and side % facts.size_factor:
                raise DbkitError(
                    f"a bucket would be {width} x {height}, and this model's pictures need multiples of "
                    f"{facts.size_factor}; set bucket_step and bucket_min_side to such"
                )


def make_order(
    config: TrainConfig, concepts: list[Concept], instance: list[Example], class_set: Sequence[Example] = ()
) -> Order:
    """The order of the images. Raises DbkitError if the concepts' weights are too far apart."""
    order = Order(
        config.seed,
        config.train_batch_size * config.gradient_accumulation_steps * processes.world(),
        tuple((example.concept, example.size) for example in instance),
        tuple((example.concept, example.size) for example in class_set),
        tuple(concept.weight for concept in concepts),
    )
    # An epoch has each image once at least; beyond this the rarest concept would wait for it too long.
    if order.epoch_length > 100 * len(instance):
        raise DbkitError(
            f"with the weights of these concepts an epoch has {order.epoch_length} samples for {len(instance)} images; "
            "bring the weights closer together"
        )
    return order


def total_steps(config: TrainConfig, order: Order) -> int:
    """max_train_steps, or enough optimizer steps for num_train_epochs epochs. Raises DbkitError if all are warm-up."""
    total = config.max_train_steps or math.ceil(order.epoch_length * config.num_train_epochs / order.per_step)
    if config.lr_warmup_steps >= total:
        steps = counted(total, "step")
        raise DbkitError(
            f"lr_warmup_steps is {config.lr_warmup_steps} and the run has {steps}; make the warm-up shorter"
        )
    return total


def arithmetic(config: TrainConfig, total: int, order: Order, images: int) -> str:
    """What so many steps come to, as a sentence with its sum."""
    *others, last = [f for f in (config.gradient_accumulation_steps, processes.world()) if f > 1] + [
        config.train_batch_size
    ]
    factors = " x ".join([counted(total, "step"), *map(str, others), counted(last, "image")])
    samples = total * order.per_step
    times = samples / images
    times = f"{times:.0f}" if times >= 100 else f"{times:.3g}"
    seen = f"each of {counted(images, 'instance image')} is seen {times} times on average"
    return f"{factors} = {counted(samples, 'sample')}: {seen}"


def _class_examples(config: TrainConfig, concepts: list[Concept], instance: list[Example]) -> list[Example]:
    """The class images of every concept, generated where they are missing; none without prior preservation."""
    if not config.with_prior_preservation:
        return []
    asked = [
        (number, settings)
        for number, concept in enumerate(concepts)
        for settings in _class_settings(config, concept, [e.size for e in instance if e.concept == number])
    ]
    examples: list[Example] = []
    for (number, _), made in zip(asked, make_class_images([settings for _, settings in asked])):
        print(made)
        examples += class_examples(config, concepts[number], made.paths, number)
    return examples


def _class_settings(config: TrainConfig, concept: Concept, sizes: list[Size]) -> list[ClassImagesConfig]:
    """What to generate for a concept: class images in the sizes of its instance images, as many of each in proportion.

    A folder that holds enough images already is used as it is.
    """
    shared = {field.name for field in dataclasses.fields(ClassImagesConfig)} & {
        field.name for field in dataclasses.fields(config)
    }
    given = {name: getattr(config, name) for name in shared}
    given |= {"class_prompt": concept.class_prompt, "class_data_dir": concept.class_data_dir}
    folder = concept.class_data_dir
    brought = len(list_images(folder)) if folder and folder.is_dir() else 0
    if set(sizes) == {config.size} or brought >= config.num_class_images:
        return [ClassImagesConfig(**given)]
    shares = share_out(config.num_class_images - brought, {size: sizes.count(size) for size in sizes})
    own = [ClassImagesConfig(**{**given, "num_class_images": brought})] if brought else []
    return own + [
        ClassImagesConfig(
            **{
                **given,
                "num_class_images": count,
                "width": size[0],
                "height": size[1],
                "class_data_dir": folder / f"{size[0]}x{size[1]}" if folder else None,
            }
        )
        for size, count in shares.items()
    ]


def in_a_place(prompt: str) -> str:
    """The same thing where photographs are rarely taken."""
    return prompt if PLACE in prompt else f"{prompt.rstrip(' ,.;')} {PLACE}"


def preview_prompts(config: TrainConfig, instance: list[Example], concepts: list[Concept]) -> list[str]:
    """What the previews show: the prompts that are asked for; or each subject, alone and in a place, and each class."""
    if config.test_prompts_file:
        return read_prompts(config.test_prompts_file)
    if config.test_prompt:
        return [config.test_prompt]
    shown = []
    for concept, prompt in zip(concepts, first_prompts(instance, concepts)):
        # Where the photographs were not taken it shows whether the subject is learnt, and whether words still count.
        shown += [prompt, in_a_place(prompt)] if prompt == concept.instance_prompt else [prompt]
    # The class prompt without the identifier is where an overdone training shows first.
    shown += [concept.class_prompt for concept in concepts if config.with_prior_preservation]
    return list(dict.fromkeys(shown))
