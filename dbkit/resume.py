"""What a saved state belongs to, and whether a run may go on from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbkit import models, processes
from dbkit.checkpoint import Checkpoint, newest_valid
from dbkit.errors import DbkitError, counted
from dbkit.examples import Example, fingerprint
from dbkit.settings import plain
from dbkit.tokenizer import tokenizer_fingerprint
from dbkit.train_config import TrainConfig


def identity_of(
    config: TrainConfig,
    library: str,
    instance: list[Example],
    class_set: list[Example],
    weights: Sequence[float] = (1.0,),
) -> dict[str, Any]:
    """What a run's state belongs to. The model and the data count by what they hold, not by where they lie.

    library is that of the optimizer, whose state no other library can read.
    """
    fixed = {field.name for field in dataclasses.fields(config) if field.metadata.get("fixed")}
    settings = {name: value for name, value in plain(config).items() if name in fixed}
    shared = {"processes": processes.world()}  # how many images make a step depends on it
    return {
        "settings": {**settings, "optimizer": config.chosen_optimizer, "library of the optimizer": library, **shared},
        "pretrained_model_name_or_path": models.fingerprint(config.pretrained_model_name_or_path, config.revision),
        "pretrained_vae_name_or_path": models.vae_fingerprint(config.pretrained_vae_name_or_path),
        "tokenizer_name": tokenizer_fingerprint(config.tokenizer_name),
        "instance images or captions": fingerprint(instance),
        "class images": fingerprint(class_set),
        "weights of the concepts": list(weights),
    }


def newest_state(run: Path) -> Checkpoint | None:
    """The newest valid state of a run, or None; those that are skipped are said."""
    saved, skipped = newest_valid(run / "resume")
    for sentence in skipped:
        print(sentence)
    if skipped and not saved:
        raise DbkitError(f"no saved state in {run / 'resume'} is whole; set start_over to begin again at step 0")
    if saved is None and (run / "model").exists():
        raise DbkitError(
            f"{run} holds a finished model and no state to go on from; choose another output_dir, or set start_over, "
            "which moves it aside"
        )
    return saved


def check_same_run(saved: Checkpoint | None, identity: dict[str, Any], run: Path) -> int:
    """The steps that are done. Raises DbkitError if the state is of other settings, another model or other data."""
    if saved is None:
        return 0
    then, now = saved.facts, identity
    # A setting that the state does not know came with a later version, which leaves it as it was.
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)} | {"processes": 1}
    before = {**defaults, **then["settings"]}
    changed = [
        f"{name} was {before[name]!r} and is {value!r}"
        for name, value in now["settings"].items()
        if before.get(name, value) != value
    ]
    changed += [f"{name} differ" for name in now if name != "settings" and then.get(name) != now[name]]
    if changed:
        number = before["processes"]
        how = f" (torchrun --nproc_per_node {number} starts {number})" if number != processes.world() else ""
        raise DbkitError(
            f"{run} holds a run of {counted(saved.step, 'step')} that these settings do not continue: "
            f"{', '.join(changed)}; change that back{how}, choose another output_dir, or set start_over"
        )
    return saved.step
