"""What a saved state belongs to, and whether a run may go on from it."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dbkit import models, processes
from dbkit.checkpoint import Checkpoint, by_step, find_fault, newest_valid, read_manifest
from dbkit.errors import CannotGoOn, DbkitError, counted
from dbkit.examples import Example, fingerprint
from dbkit.files import move_aside, one_process
from dbkit.mirror import STOP, bring_back, home_lock
from dbkit.run_folder import read_mirror
from dbkit.settings import left_to_auto, plain, read_yaml, replace
from dbkit.tokenizer import tokenizer_fingerprint
from dbkit.train_config import TrainConfig

# Settings that are of one session and no part of a run.
_OF_A_SESSION = {"start_over", "local_rank", "auto", "output_dir", "local_dir", "session_minutes"}
# What may change in a run that start_over began, and it goes on all the same: how far it goes, and what trades memory,
# for what of that decides a step is part of the run's identity.
_OF_MORE_STEPS_OR_MEMORY = {"max_train_steps", "num_train_epochs", "memory", "gradient_checkpointing"}


def identity_of(
    config: TrainConfig,
    library: str,
    instance: list[Example],
) -> dict[str, Any]:
    """What a run's state belongs to. The model and the data count by what they hold, not by where they lie.

    library is that of the optimizer, whose state no other library can read. Class images are still to come.
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
    }


@contextlib.contextmanager
def locked(run: Path, home: Path) -> Iterator[None]:
    """Keep other processes of this machine out of a run: out of where it works, and of its home."""
    with contextlib.ExitStack() as locks:
        locks.enter_context(one_process(run))
        if run != home:
            try:
                locks.enter_context(one_process(home_lock(home)))
            except DbkitError as error:
                raise DbkitError(
                    f"another process copies to {home}; wait for it, or choose another output_dir"
                ) from error
        yield


def open_run(config: TrainConfig, run: Path, home: Path) -> None:
    """Bring to where a run works what its home has beyond that, unless it starts over."""
    for folder in dict.fromkeys((run, home)):
        with contextlib.suppress(OSError):
            if (folder / STOP).is_dir():
                print(f"{folder / STOP} is a folder, which stops nothing; a file of that name does")
            else:
                (folder / STOP).unlink()  # one of an earlier session; from here on it stops this one
    said = read_mirror(run)
    if run == home:
        local = said and newest_valid(said.local / "resume")[0]
        if local and said.home == home and local.step > max(by_step(run / "resume"), default=0):
            print(
                f"{said.local} holds step {local.step} of this run, which is newer; give local_dir to go on from there"
            )
        return
    if said and said.home != home and (run / "resume").exists():
        raise DbkitError(f"{run} is where the run {said.home} works; choose another local_dir for {home}")
    print(f"the run works in {run}; looking at {home}")
    if config.start_over:
        try:
            # The mirror makes no more than the folder itself.
            home.parent.mkdir(parents=True, exist_ok=True)
            (home / "resume").exists()
        except OSError as error:
            raise DbkitError(
                f"{home} cannot be reached ({error.strerror}), so the run there cannot be moved aside; mount it again, "
                "or choose another output_dir"
            ) from error
        return
    _part_runs(run, home)
    for sentence in bring_back(run, home):
        print(sentence)


def settled(config: TrainConfig, run: Path, home: Path) -> TrainConfig:
    """The settings with start_over as it holds from here on: off where it was done already for these settings."""
    return replace(config, start_over=False) if config.start_over and was_begun_over(config, run, home) else config


def was_begun_over(config: TrainConfig, run: Path, home: Path) -> bool:
    """Whether start_over began the run in these folders with the same settings: done again, it would give the same."""
    try:
        before = read_yaml(_newest(run, home) / "settings.yaml")
    except (DbkitError, OSError):
        return False
    names = {field.name for field in dataclasses.fields(config)} - _OF_A_SESSION - _OF_MORE_STEPS_OR_MEMORY
    # What is left to auto the run keeps.
    return before.get("start_over") is True and not _changes(config, before, names - set(left_to_auto(config)))


def _newest(run: Path, home: Path) -> Path:
    """That of a run's two folders which holds the newer run, or more of it."""

    def reached(folder: Path) -> tuple[str, int]:
        return _newest_id(folder) or "", max(by_step(folder / "resume"), default=0)

    try:
        return max((run, home), key=reached)
    except OSError:  # a home that cannot be reached
        return run


def run_id(saved: Checkpoint | None) -> str:
    """What tells a run from another one in the same folder: when it began, and a random number."""
    known = saved.facts.get("run") if saved else None
    return known or f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%f}-{secrets.token_hex(4)}"


def _part_runs(run: Path, home: Path) -> None:
    """Where a run began anew at home, or here while home was away, move the older one aside: they must not be mixed."""
    try:
        here, there = (_newest_id(folder) for folder in (run, home))
        if here and there and here != there:
            older = run if here < there else home
            print(
                f"{older} holds an older run than {home if older == run else run}; it is moved to {move_aside(older)}"
            )
    except OSError:
        return  # bring_back() says that home cannot be reached


def _newest_id(folder: Path) -> str | None:
    """The run that the newest state of a folder belongs to."""
    for _, state in sorted(by_step(folder / "resume").items(), reverse=True):
        if manifest := read_manifest(state):
            return manifest["facts"].get("run")
    return None


def finished_in(run: Path, place: Path, step: int) -> Path | None:
    """Where a run's finished model of that step is: in `place`, its home if all is there, or where it works."""
    for folder in (place, run):
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
    changed = _changes(config, before, known - _OF_A_SESSION)
    return [f"changed since, from here on: {', '.join(changed)}"] if changed else []


def _changes(config: TrainConfig, before: dict[str, Any], names: set[str]) -> list[str]:
    now = {name: value for name, value in plain(config).items() if name in names}
    return [f"{name} was {before[name]} and is {now[name]}" for name in now if before.get(name, now[name]) != now[name]]


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
        raise CannotGoOn(f"no saved state in {run / 'resume'} is whole; set start_over to begin again at step 0")
    left = "a finished model" if (run / "model").exists() else "checkpoints" if by_step(run / "checkpoints") else None
    if saved is None and left:
        raise CannotGoOn(
            f"{run} holds {left} and no state to go on from; choose another output_dir, or set start_over, which moves "
            "it aside"
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
        raise CannotGoOn(
            f"{run} holds a run of {counted(saved.step, 'step')} that these settings do not continue: "
            f"{', '.join(changed)}; change that back{how}, choose another output_dir, or set start_over"
        )
    return saved.step
