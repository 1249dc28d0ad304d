"""Concepts: the subjects of one training, from the settings or from a concepts_list."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbkit.errors import DbkitError
from dbkit.settings import closest
from dbkit.train_config import TrainConfig

_PATHS = ("instance_data_dir", "class_data_dir")
_PROMPTS = ("instance_prompt", "class_prompt")


@dataclass(frozen=True)
class Concept:
    """One subject: its images and prompts, those of its class, and its share of the training in any unit."""

    instance_data_dir: Path
    instance_prompt: str | None = None
    class_prompt: str | None = None
    class_data_dir: Path | None = None
    weight: float = 1.0

    def __str__(self) -> str:
        return self.instance_prompt or self.instance_data_dir.name


def concepts_of(config: TrainConfig) -> list[Concept]:
    """The concepts of a training: those of concepts_list, or the one that the settings describe."""
    if config.concepts_list:
        concepts = read_concepts(config.concepts_list, config)
        if mistakes := _folder_mistakes(concepts, config):
            raise DbkitError(f"{config.concepts_list} needs a change:" + "".join(f"\n  - {m}" for m in mistakes))
        return concepts
    return [Concept(config.instance_data_dir, config.instance_prompt, config.class_prompt, config.class_data_dir)]


def read_concepts(path: Path, config: TrainConfig) -> list[Concept]:
    """The concepts of a JSON list. Relative folders are taken from the list's own folder.

    Raises DbkitError with every mistake in the list at once.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DbkitError(f"concepts_list {path} cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise DbkitError(f"concepts_list {path} is not JSON ({error}); mend it there") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise DbkitError(f'concepts_list {path} is not a list of concepts; write [{{"instance_prompt": …}}, …]')
    mistakes = [
        f"concept {number}: {mistake}"
        for number, entry in enumerate(entries, 1)
        for mistake in _mistakes(entry, config)
    ]
    if mistakes:
        raise DbkitError(f"{path} needs a change:" + "".join(f"\n  - {mistake}" for mistake in mistakes))
    return [_concept(entry, path.parent) for entry in entries]


def _mistakes(entry: dict[str, Any], config: TrainConfig) -> list[str]:
    known = [*_PATHS, *_PROMPTS, "weight"]
    mistakes = [f"there is no setting {name!r}{closest(name, known)}" for name in entry if name not in known]
    for name in (*_PATHS, *_PROMPTS):
        if not isinstance(entry.get(name), (str, type(None))):
            mistakes.append(f"{name} is {entry[name]!r}; write text")
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0.01 <= weight <= 100:
        mistakes.append(f"weight is {weight!r}; write a number from 0.01 to 100")
    needed = ["instance_data_dir"]
    if not (config.use_txt_as_label or config.use_filename_as_label):
        needed.append("instance_prompt")
    if config.with_prior_preservation:
        needed.append("class_prompt")
    mistakes += [f"{name} is missing" for name in needed if not entry.get(name)]
    if "instance_prompt" not in needed and entry.get("instance_prompt"):
        mistakes.append("instance_prompt would not be used, since each image's label is its prompt; leave it out")
    if not config.with_prior_preservation:
        given = [name for name in ("class_prompt", "class_data_dir") if entry.get(name)]
        mistakes += [
            f"{name} has no effect without with_prior_preservation; turn that on or leave it out" for name in given
        ]
    if entry.get("class_prompt") and entry.get("class_prompt") == entry.get("instance_prompt"):
        mistakes.append("class_prompt and instance_prompt are the same; put an identifier in instance_prompt only")
    return mistakes


def _folder_mistakes(concepts: list[Concept], config: TrainConfig) -> list[str]:
    """Folders that must not be the same or lie in one another: found before anything is generated into them."""
    mistakes, prompts = [], {}
    instance = {concept.instance_data_dir.resolve() for concept in concepts}
    for number, concept in enumerate(concepts, 1):
        for name in _PATHS:
            folder = getattr(concept, name)
            if folder and config.output_dir and folder.resolve().is_relative_to(config.output_dir.resolve()):
                mistakes.append(f"concept {number}: {name} {folder} lies in output_dir; choose another output_dir")
        folder = concept.class_data_dir and concept.class_data_dir.resolve()
        if folder in instance:
            mistakes.append(f"concept {number}: class_data_dir {folder} holds instance images; choose another folder")
        if folder and prompts.setdefault(folder, concept.class_prompt) != concept.class_prompt:
            mistakes.append(f"concept {number}: class_data_dir {folder} is another class's too; choose another folder")
    return mistakes


def _concept(entry: dict[str, Any], folder: Path) -> Concept:
    try:
        paths = {name: folder / Path(entry[name]).expanduser() for name in _PATHS if entry.get(name)}
    except RuntimeError as error:
        raise DbkitError(f"a folder in concepts_list has no such user: {str(error).lower()}; write the path") from error
    prompts = {name: entry.get(name) or None for name in _PROMPTS}
    return Concept(**paths, **prompts, weight=float(entry.get("weight", 1)))


def warnings(concepts: list[Concept]) -> list[str]:
    """Sentences about concepts that get in each other's way."""
    found = []
    folders = [concept.instance_data_dir.resolve() for concept in concepts]
    if len(set(folders)) < len(folders):
        found.append("two concepts share one instance_data_dir, so one picture would get two names; give each its own")
    of_class: dict[str, list[str]] = {}
    for concept in concepts:
        if concept.class_prompt:
            of_class.setdefault(" ".join(concept.class_prompt.casefold().split()), []).append(str(concept))
    for class_prompt, names in of_class.items():
        if len(names) > 1:
            found.append(
                f"{' and '.join(names)} are of one class ({class_prompt}): such subjects mix, and a picture of both "
                "together rarely works; look at the previews of each, and train them one after the other if they do"
            )
    return found
