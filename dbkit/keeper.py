"""What a run keeps while it trains: the state to resume from, usable weights, log and previews, here and at its home.

A run works in a folder of the local disk. Where its home is another one, on Google Drive for instance, a mirror copies
there what was saved, in the background. A disk that is full, slow or gone ends no training: it is said and tried again.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dbkit import processes
from dbkit.best_step import recommend
from dbkit.checkpoint import by_step, commit, find_fault, read_manifest, rotate, step_folder
from dbkit.errors import DbkitError, DiskError
from dbkit.files import free_space, require_space, size, write_text
from dbkit.lora import save_lora
from dbkit.mirror import MIRROR, STOP, Mirror
from dbkit.models import save_models
from dbkit.processes import on_main
from dbkit.run_folder import FIGURES, read_lines
from dbkit.saves import Due, Saves
from dbkit.state import State, state_size, write_state
from dbkit.tensor_files import is_finite
from dbkit.train_config import TrainConfig

# Seconds that the end of a run waits for copies of which nothing moves; after a stop or a mistake, when somebody waits,
# what is not copied by then is copied by the next session.
PATIENCE, PATIENCE_AFTER_STOP = 120.0, 20.0
# How often, in seconds, home is asked for a file that stops the run.
LOOK_EVERY = 5.0


class Keeper:
    """Saves a run in its folder `run` and copies that to `home`; the two are one where no copy is needed.

    identity is what the state belongs to. Everything but the choice of what is due happens in the main process.
    """

    def __init__(
        self, config: TrainConfig, run: Path, home: Path, identity: dict[str, Any], state: State, saves: Saves
    ) -> None:
        self.config, self.run, self.home, self.state = config, run, home, state
        self.identity = {**identity, "resume_state": config.resume_state}
        self.saves, self.mirror, self.closed, self.stop_at_home = saves, None, threading.Event(), False
        self.saved = saves.done  # the step of the newest state
        self.place = home  # where all of the run is, once it has ended
        self.failing: set[str] = set()
        self.then = ""  # what follows a save that failed
        self.settings = ""  # the text of settings.yaml
        parts = (state.models.unet, state.models.text_encoder, state.models.vae)
        whole = sum(parameter.numel() for module in parts for parameter in module.parameters())
        self.model_size = usable_size(config, whole, sum(parameter.numel() for parameter in state.parameters))

    def _open(self) -> None:
        self.settings = (self.run / "settings.yaml").read_text(encoding="utf-8")
        self._require_space()
        if self.home == self.run:
            (self.run / MIRROR).unlink(missing_ok=True)  # of a time when it worked elsewhere
        else:
            self.mirror = Mirror(self.run, self.home, spare=functools.partial(_is_best, self.run))
            self.mirror.catch_up(self.config.checkpoints_total_limit)
            threading.Thread(target=self._watch_home, name="dbkit stop file", daemon=True).start()

    def _watch_home(self) -> None:
        # In a thread of its own, since a Drive that hangs must hold up neither training nor copies.
        while not self.closed.wait(LOOK_EVERY):
            with contextlib.suppress(OSError):
                self.stop_at_home = self.stop_at_home or (self.home / STOP).is_file()

    def _require_space(self) -> None:
        """Say what a save takes and what is free. Raises DiskError unless the states and the weights fit."""
        needed = state_size(self.config, self.state.parameters)
        words = f"a state to resume from takes {size(needed)}, usable weights {size(self.model_size)}"
        for folder in dict.fromkeys((self.run, self.home)):
            try:
                there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                total = all_saves(self.config, needed, self.model_size, is_home=folder == self.home)
                require_space(folder, max(needed, total - there), "this run")
                words += f"; {size(free_space(folder))} are free in {folder}"
            except DiskError as error:
                way = "; resume_state small or weights, or a lower checkpoints_total_limit, takes less"
                raise DiskError(f"{error}{way}") from error
            except OSError as error:
                words += f"; {folder} cannot be reached ({error.strerror})"
        _say(words)

    def __enter__(self) -> Keeper:
        on_main(self._open)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.closed.set()
        mirror, self.mirror = self.mirror, None
        if mirror:
            mirror.loose_files()
            if mirror.queue or mirror.busy:
                _say(f"copying to {self.home}; all is safe in {self.run}, and what is left the next session copies")
            if not _close(mirror, PATIENCE if kind is None else PATIENCE_AFTER_STOP):
                # A home that hangs must not hold up who looks for the model.
                self.place = self.run

    def due(self, step: int, stopping: bool) -> Due:
        """What is due after a step, the same in all processes. stopping: this one was asked to stop."""
        if self.mirror:
            self.saves.took(self.mirror.longest)
            for sentence in self.mirror.news():
                _say(sentence)
        if sentence := self.saves.outlook(step):
            _say(sentence)
        with contextlib.suppress(OSError):
            stopping = stopping or (self.run / STOP).is_file()
        stop = stopping or self.stop_at_home
        return Due(processes.most(Due.STOP if stop else self.saves.due(step)))

    def save(self, step: int, weights: bool = False, last: bool = False) -> None:
        """Commit the state of a step, and usable weights if asked for.

        Where the disk is full or fails, that is printed. last: no other save follows. Raises DbkitError where the
        weights are not numbers.
        """
        self.then = "" if last else "; training goes on, and the next save tries again"
        optimizer = self.state.gather()
        with self.saves.saving():
            self.saved = on_main(self._save, optimizer, step, weights)

    def finish(self, step: int) -> None:
        """Commit the finished model. Raises DiskError where it cannot be written."""
        on_main(self._finish, step)

    def _save(self, optimizer: dict[str, Any], step: int, weights: bool) -> int:
        self._require_numbers(step)
        self._require_folder(step)
        saved = self._try("state", step, functools.partial(self._commit_state, optimizer, step))
        if weights and step >= self.config.save_min_steps:
            folder, keep = step_folder(self.run / "checkpoints", step), self.config.checkpoints_total_limit
            self._try("weights", step, functools.partial(self._commit_weights, folder, step, keep))
        if self.mirror:
            self.mirror.loose_files()
        return step if saved else self.saved

    def _finish(self, step: int) -> None:
        try:
            self._commit_weights(self.run / "model", step, 0)
        except (DiskError, OSError) as error:
            raise DiskError(f"the finished model could not be written: {error}; {self.what_is_saved()}") from error
        if (self.run / "checkpoints").exists():
            rotate(self.run / "checkpoints", step, self.config.checkpoints_total_limit, self._stays)

    def what_is_saved(self) -> str:
        """What to do next, as the end of a sentence."""
        if not self.saved:
            return "nothing is saved, so what was trained is lost; free some space, then train again"
        return f"the state of step {self.saved} is saved, train again to go on from there"

    def _require_numbers(self, step: int) -> None:
        for part, module in self.state.plain.items():
            if not all(is_finite(parameter.detach()) for parameter in module.parameters()):
                raise DbkitError(
                    f"the {part} has weights that are not numbers at step {step}, and nothing was saved; lower "
                    "learning_rate and train again, which continues from the last good state"
                )

    def _require_folder(self, step: int) -> None:
        """Begin the run's folder again where somebody deleted or renamed it: all that counts is in memory."""
        path = self.run / "settings.yaml"
        # A disk that fails is said by the save that follows.
        with contextlib.suppress(DiskError, OSError):
            if not path.exists():
                write_text(path, self.settings)
                _say(
                    f"{self.run} was deleted or renamed while it trains; from step {step} on it is saved in a new "
                    "folder of that name, and what was there before is not in it"
                )

    def _try(self, what: str, step: int, work: Callable[[], None]) -> bool:
        """Do what writes to the disk. That it fails is said once, until it works again; training goes on."""
        try:
            work()
        except (DiskError, OSError) as error:
            if what not in self.failing or not self.then:
                _say(f"the {what} of step {step} could not be saved: {error}{self.then}")
            self.failing.add(what)
            return False
        if what in self.failing:
            _say(f"saving works again: the {what} of step {step} is on the disk")
            self.failing.discard(what)
        return True

    def _commit_state(self, optimizer: dict[str, Any], step: int) -> None:
        folder = step_folder(self.run / "resume", step)
        # The state that was continued from stays, for there is no other one.
        if step != self.saved or find_fault(folder, step=step):
            require_space(self.run, state_size(self.config, self.state.parameters), "a saved state")
            write = functools.partial(write_state, self.state, optimizer=optimizer, config=self.config)
            commit(folder, step, write, self.identity)
        if self.mirror:
            self.mirror.commit(folder, keep=1)
        rotate(self.run / "resume", step, 1, self._holds)

    def _commit_weights(self, folder: Path, step: int, keep: int) -> None:
        """Usable weights: a checkpoint of which the last `keep` stay, or with 0 the finished model."""
        # The checkpoint of the state that was continued from would be the same again, if it is of this run.
        if not keep or step != self.saves.done or self._is_other(folder, step):
            require_space(self.run, self.model_size, "usable weights")
            with self.state.averaged():
                commit(folder, step, self._writer(step, finished=not keep), self.identity)
        if self.mirror:
            self.mirror.commit(folder, keep)
        if keep:
            rotate(folder.parent, step, keep, self._stays)

    def _is_other(self, folder: Path, step: int) -> bool:
        manifest = read_manifest(folder)
        return (
            manifest is None or manifest["facts"].get("run") != self.identity["run"] or bool(find_fault(folder, step))
        )

    def _writer(self, step: int, finished: bool) -> Callable[[Path], None]:
        if self.config.adapter == "none":
            return functools.partial(save_models, self.state.shown, precision=self.config.save_precision)
        # User interfaces list a LoRA by the name of its file.
        name = self.run.name if finished else f"{self.run.name}-{step:06d}"
        return functools.partial(save_lora, self.state.models, config=self.config, name=name)

    def _stays(self, checkpoint: Path) -> bool:
        return self._holds(checkpoint) or _is_best(self.run, checkpoint)

    def _holds(self, folder: Path) -> bool:
        return self.mirror is not None and self.mirror.holds(folder)


def _is_best(run: Path, checkpoint: Path) -> bool:
    """Whether a folder is the checkpoint that would be recommended among those beside it, by the run's figures.

    Of a training that goes on too long the last few are not worth keeping alone.
    """
    if checkpoint.parent.name != "checkpoints":
        return False
    found = recommend(read_lines(run, FIGURES), by_step(checkpoint.parent))
    return found is not None and checkpoint.name == step_folder(run, found.step).name


def copy_home(config: TrainConfig, run: Path, home: Path) -> Path:
    """Copy to a run's home what an earlier session could not, without training; returns where all of the run is."""
    if run == home or not run.exists():
        return home
    mirror = Mirror(run, home, spare=functools.partial(_is_best, run))
    mirror.catch_up(config.checkpoints_total_limit)
    return home if _close(mirror, PATIENCE) else run


def _close(mirror: Mirror, patience: float) -> bool:
    """End a mirror and say what is not at home; returns whether all is."""
    missing = mirror.close(patience)
    for sentence in (*mirror.news(), *missing):
        _say(sentence)
    return not missing


def all_saves(config: TrainConfig, state: int, weights: int, is_home: bool) -> int:
    """Bytes of all that a run keeps at once, of what one state and usable weights take.

    There are two states while one replaces the other, and a third where one is being copied home. Beside the last
    checkpoints the recommended one is kept.
    """
    kept = config.checkpoints_total_limit + 1 + config.judge_steps if config.save_model_every_n_steps else 0
    return (2 if is_home else 3) * state + (kept + 1) * weights


def usable_size(config: TrainConfig, model: int, trained: int) -> int:
    """Bytes of the usable weights: of the whole model, or of the LoRA, by their numbers of parameters."""
    return (trained if config.adapter == "lora" else model) * (4 if config.save_precision == "fp32" else 2)


def _say(sentence: str) -> None:
    """Print a sentence above the progress line."""
    from tqdm import tqdm

    if processes.rank() == 0:
        tqdm.write(sentence, file=sys.stdout)
