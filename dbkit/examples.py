"""What training reads: the images of a folder, checked, each with its prompts, its size and its views."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from dbkit.augment import tag_variants, views_of
from dbkit.buckets import Size, kept_share, nearest, sizes_of
from dbkit.captions import read_caption
from dbkit.concepts import Concept
from dbkit.errors import DbkitError, counted, some
from dbkit.files import sha256
from dbkit.images import (
    OTHER_SUFFIXES,
    SUFFIXES,
    UNREAD,
    View,
    crop_place,
    is_text,
    list_images,
    printable,
    read_usable,
    render_mask,
    usable_mask,
)
from dbkit.report import backgrounds
from dbkit.train_config import TrainConfig


@dataclass(frozen=True)
class Example:
    """One training image: checked, not held in memory. sha256 is that of the file.

    size is (width, height) in pixels as it is trained, kept the share of the picture that its crop leaves, scale how
    much larger it is made for that. mask is the picture that says what counts, itself if it is transparent in places.
    """

    path: Path
    prompts: tuple[str, ...]
    views: tuple[View, ...]
    size: Size
    sha256: str
    concept: int = 0
    kept: float = 1.0
    scale: float = 1.0
    mask: Path | None = None
    mask_sha256: str = ""

    @property
    def prompt(self) -> str:
        """The prompt as it is written, before tags are shuffled or left out."""
        return self.prompts[0]


def instance_examples(config: TrainConfig, concepts: list[Concept]) -> list[Example]:
    """The instance images with their resolved prompts. Every image is decoded once here, before any model is loaded.

    Raises DbkitError naming all unreadable images, or all images without a caption, at once.
    """
    examples = []
    for number, concept in enumerate(concepts):
        paths = training_images(concept.instance_data_dir)
        examples += _checked_examples(paths, _prompts(config, concept, paths), config, number)
    return _masked(examples) if config.masked_loss else examples


def unread_examples(config: TrainConfig, concepts: list[Concept]) -> list[Example]:
    """The same images with the same prompts, before any is decoded: all in the size of the settings, unchecked."""
    return [
        Example(path, prompts, (), config.size, "", number)
        for number, concept in enumerate(concepts)
        for path, prompts in _prompts(config, concept, training_images(concept.instance_data_dir)).items()
    ]


def _masked(examples: list[Example]) -> list[Example]:
    """The examples with their masks. Raises DbkitError if there is none at all, or naming all that cannot be used."""
    found, faults = [], []
    for example in examples:
        try:
            found.append(_with_mask(example))
        except DbkitError as error:
            faults.append(str(error))
    if faults:
        raise DbkitError(f"{len(faults)} of {len(examples)} masks are not usable: {some(faults)}")
    if not any(example.mask for example in found):
        name = examples[0].path
        raise DbkitError(
            f"masked_loss needs masks, and no image has one; put masks/{name.stem}.png beside {name.name}, white where "
            "the subject is, or take pictures with transparent backgrounds"
        )
    return found


def _with_mask(example: Example) -> Example:
    """An example with its mask, if it has one, and without the views that show nothing of what the mask shows."""
    mask = usable_mask(example.path)
    if mask is None:
        return example
    path, grey = mask
    # A weighted mean of such a view would be of the background alone, at full strength.
    views = tuple(view for view in example.views if render_mask(grey, example.size, view).getextrema()[1])
    if not views:
        raise DbkitError(
            f"the crop of {example.path.name} shows nothing of what its mask does; set use_aspect_ratio_bucket, or "
            "crop the picture by hand"
        )
    return dataclasses.replace(example, views=views, mask=path, mask_sha256=sha256(path))


def class_examples(config: TrainConfig, concept: Concept, paths: list[Path], number: int = 0) -> list[Example]:
    """The class images of a concept, each with the class prompt, checked like the instance images."""
    # What is learnt about the class is how the base model draws it: its pictures are not varied.
    names = [field.name for field in dataclasses.fields(config) if field.name.startswith("augment_")]
    plain = dataclasses.replace(config, hflip=False, **{name: getattr(TrainConfig, name) for name in names})
    return _checked_examples(paths, dict.fromkeys(paths, (concept.class_prompt,)), plain, number)


def _prompts(config: TrainConfig, concept: Concept, paths: list[Path]) -> dict[Path, tuple[str, ...]]:
    """Each image's prompts by the one setting that says where they come from."""
    alone = sorted(backgrounds(concept.instance_data_dir) & {path.name for path in paths})
    if alone and not config.use_txt_as_label:
        raise DbkitError(
            f"{len(alone)} images in {concept.instance_data_dir} show a background without the subject "
            f"({some(alone)}); set use_txt_as_label, so that they are learnt with their own captions, or take them out"
        )
    if config.use_filename_as_label:
        return {path: (path.stem,) for path in paths}
    if not (config.use_txt_as_label or config.combine_prompt_from_txt):
        return dict.fromkeys(paths, (concept.instance_prompt,))
    texts = {path: read_caption(path) for path in paths}
    if missing := [path.name for path, text in texts.items() if not text]:
        raise DbkitError(
            f"{len(missing)} of {len(paths)} images in {concept.instance_data_dir} have no caption "
            f"({some(missing)}); write a .txt file of the same name beside each (dbkit caption and notebook 3 help)"
        )
    template = config.prompt_combine_template if config.combine_prompt_from_txt else "{TXT_PROMPT}"
    # The text goes in last, so that braces in it are only text.
    template = template.replace("{PROMPT}", concept.instance_prompt or "")
    return {
        path: tuple(template.replace("{TXT_PROMPT}", version) for version in tag_variants(config, path.name, text))
        for path, text in texts.items()
    }


def training_images(folder: Path) -> list[Path]:
    """The images of a data folder. Raises DbkitError unless it is a folder with images that can all be read."""
    if not folder.is_dir():
        raise DbkitError(f"instance_data_dir {folder} is not a folder; check the path, or make it with dbkit prepare")
    paths = list_images(folder)
    odd = [path for path in paths if not is_text(path.name)]
    if odd:
        shown = some([printable(path.name) for path in odd])
        raise DbkitError(f"{len(odd)} images in {folder} have names that are no text ({shown}); rename them")
    others = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in OTHER_SUFFIXES)
    if others:
        raise DbkitError(f"{len(others)} images in {folder} are not usable: {UNREAD.format(some(others))}")
    if not paths:
        below = sorted({path.parent for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES})
        hint = f"there are some in {below[0]}: name that folder" if below else "put 5 to 20 photographs there"
        raise DbkitError(f"there are no images in instance_data_dir {folder}; {hint}")
    return paths


def _checked_examples(
    paths: list[Path], prompts: dict[Path, tuple[str, ...]], config: TrainConfig, concept: int
) -> list[Example]:
    examples, unreadable, sizes = [], [], sizes_of(config)
    for path in paths:
        try:
            width, height = read_usable(path).size
        except DbkitError as error:
            unreadable.append(str(error))
        else:
            place = crop_place(config.center_crop, config.seed, path.name)
            views = views_of(config, path.name, place, prompts[path][0])
            size = nearest(width, height, sizes)
            kept, scale = kept_share(width, height, size), max(size[0] / width, size[1] / height)
            examples.append(Example(path, prompts[path], views, size, sha256(path), concept, kept, scale))
    if unreadable:
        raise DbkitError(f"{len(unreadable)} of {len(paths)} images are not usable: {some(unreadable)}")
    return examples


def first_prompts(examples: list[Example], concepts: list[Concept]) -> list[str]:
    """The prompt of each concept's first image."""
    return [next(example.prompt for example in examples if example.concept == n) for n in range(len(concepts))]


def require_apart(instance: list[Example], class_set: list[Example]) -> None:
    """Raise DbkitError if a picture is both an instance and a class image: it would be learnt under both prompts."""
    known = {example.sha256: example.path for example in instance}
    both = [f"{example.path} is {known[example.sha256]}" for example in class_set if example.sha256 in known]
    if both:
        raise DbkitError(
            f"{counted(len(both), 'class image')} also among the instance images ({some(both, 3)}); take out of the "
            "class images what shows the subject"
        )


def fingerprint(examples: list[Example]) -> str:
    """A hash of what training sees of the data: image bytes, prompts, crops and their order, but not where they lie."""
    facts = [
        (example.sha256, example.prompts, [dataclasses.astuple(view) for view in example.views], example.size)
        + ((example.concept,) if example.concept else ())
        + ((example.mask_sha256,) if example.mask_sha256 else ())
        for example in examples
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def describe(examples: list[Example], concepts: list[Concept]) -> list[str]:
    """What was found, for people: images and first prompts of each concept, sizes, and what the crops cut off."""
    return describe_prompts(examples, concepts) + describe_pictures(examples)


def describe_prompts(examples: list[Example], concepts: list[Concept]) -> list[str]:
    """How many images each concept has, and their first prompts."""
    lines = []
    for number, concept in enumerate(concepts):
        own = [example for example in examples if example.concept == number]
        name = counted(len(own), "instance image") + (f" of {concept}" if len(concepts) > 1 else "")
        lines.append(f"{name}; the first one's prompt: {own[0].prompt}")
        # Further prompts only say something where they differ.
        lines += [f"  {example.path.name}: {example.prompt}" for example in own[1:3] if example.prompt != own[0].prompt]
    return lines


def describe_pictures(examples: list[Example]) -> list[str]:
    """In which sizes images are trained, what their crops cut off, their versions and masks, and which are enlarged."""
    counts: dict[Size, int] = {}
    for example in examples:
        counts[example.size] = counts.get(example.size, 0) + 1
    sizes = ", ".join(f"{count} of {width} x {height}" for (width, height), count in sorted(counts.items()))
    kept = sum(example.kept for example in examples) / len(examples)
    lines = [f"trained as {sizes}; the crops keep {kept:.0%} of the pictures", *_versions(examples)]
    whole = [example.path.name for example in examples if not example.mask]
    if len(whole) < len(examples):
        rest = f"; these count whole: {some(whole)}" if whole else ""
        lines.append(f"{counted(len(examples) - len(whole), 'image')} with a mask{rest}")
    # A tenth more is not seen.
    if small := [example.path.name for example in examples if example.scale > 1.1]:
        lines.append(f"{counted(len(small), 'image')} enlarged to that, which looks soft: {some(small)}")
    return lines


def _versions(examples: list[Example]) -> list[str]:
    """What augmentation and tags make of the examples, in sentences."""
    lines = []
    views, prompts = (sum(len(getattr(example, name)) for example in examples) for name in ("views", "prompts"))
    if views > len(examples):
        lines.append(f"augmentation makes {views} versions of {counted(len(examples), 'image')}")
        still = [e.path.name for e in examples if not any(view.flip for view in e.views)]
        if still and len(still) < len(examples):
            which = f"{counted(len(still), 'image')} not mirrored"
            lines.append(f"{which}, since their prompts say left or right: {some(still)}")
    if prompts > len(examples):
        lines.append(f"tags in changing order or number make {prompts} versions of {counted(len(examples), 'caption')}")
    return lines
