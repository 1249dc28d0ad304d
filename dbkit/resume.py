"""What a saved state belongs to, and whether a run may go on from it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbkit import models, processes
from dbkit.checkpoint import Checkpoint, find_fault, newest_valid, read_manifest
from dbkit.errors import DbkitError, counted
from dbkit.examples import Example, fingerprint
from dbkit.mirror import bring_back
from dbkit.run_folder import read_mirror
from dbkit.settings import plain, read_yaml
from dbkit.tokenizer import tokenizer_fingerprint
from dbkit.train_config import TrainConfig

# Settings that are of one session and no part of a run.
_OF_A_SESSION = {"start_over", "local_rank", "auto", "output_dir", "local_dir", "session_minutes"}


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


def open_run(config: TrainConfig, run: Path, home: Path) -> None:
    """Bring to where a run works what its home has beyond that, unless it starts over."""
    if run == home:
        return
    said = read_mirror(run)
    if said and said.home != home and (run / "resume").exists():
        raise DbkitError(f"{run} is where the run {said.home} works; choose another local_dir for {home}")
    if config.start_over:
        # The mirror makes no more than the folder itself.
        with contextlib.suppress(OSError):
            home.parent.mkdir(parents=True, exist_ok=True)
        return
    for sentence in bring_back(run, home):
        print(sentence)


def finished_in(folders: Sequence[Path], step: int) -> Path | None:
    """The first of a run's folders that has its finished model, of that step and whole."""
    for folder in folders:
        with contextlib.suppress(OSError):
            if find_fault(folder / "model", step) is None:
                return folder
    return None


def changes_since(config: TrainConfig, run: Path) -> list[str]:
    """What a run that goes on was given otherwise before, of the settings that may change; a sentence."""
    try:
        before = read_yaml(run / "settings.yaml")
    except DbkitError:
        return []
    known = {field.name for field in dataclasses.fields(config) if not field.metadata.get("fixed")}
    now = {name: value for name, value in plain(config).items() if name in known - _OF_A_SESSION}
    changed = [
        f"{name} was {before[name]} and is {now[name]}" for name in now if before.get(name, now[name]) != now[name]
    ]
    return [f"changed since, from here on: {', '.join(changed)}"] if changed else []


def of_model(name_or_path: str) -> list[str]:
    """Says so where a new run begins from a model that dbkit trained, which is not to go on with that one's run."""
    folder = Path(name_or_path)
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None or "settings" not in manifest["facts"]:
        return []
    steps = counted(manifest["step"], "step")
    return [
        f"{folder} was trained for {steps}; this is a new run that begins there, with an optimizer of its own; to go "
        "on with that one instead, give its output_dir"
    ]


def of_state(saved: Checkpoint) -> str:
    """What a state that is not exact lacks, as the end of a sentence."""
    if not any(saved.folder.glob("optimizer.pt")):
        return "; its state holds weights alone, so the optimizer begins anew and the result will be another one"
    return "; its moments were saved in 8 bit" if saved.facts.get("resume_state") == "small" else ""


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
