"""status(): how far a run is and what of it is safe, from its files alone, whether or not a training is at work."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbkit import run_folder
from dbkit.best_step import Recommendation, recommend
from dbkit.charts import chart, sparkline
from dbkit.config import StatusConfig
from dbkit.files import is_locked, size
from dbkit.images import as_html
from dbkit.run_folder import Mirror, Place, Saved
from dbkit.settings import configured_by


@dataclass(frozen=True)
class RunStatus:
    """How far a run is and what of it is safe. Shows itself as text, and in a notebook as a table with the loss curve.

    home is where the run's commits are kept; local is the folder of this machine where a training works that copies
    them there, None where home is the only place. step and total are optimizer steps; total is None where the files do
    not say it, at_work where this system cannot tell. losses are (step, loss) by the log, log_age is in seconds.
    verified: SHA-256 were compared, not sizes alone. recommended is the step to use among those that are saved, by what
    was measured while it trained, if anything was. images_per_second, learning_rate and gpu_memory (the most bytes that
    tensors took on a GPU) are as of the last line of the log.
    """

    home: Place
    local: Place | None
    step: int
    total: int | None
    finished: bool
    at_work: bool | None
    losses: list[tuple[int, float]]
    seconds_per_step: float | None
    log_age: float | None
    mirror: Mirror | None
    newest_preview: Path | None
    verified: bool
    recommended: Recommendation | None = None
    images_per_second: float | None = None
    learning_rate: float | None = None
    gpu_memory: int | None = None

    @property
    def place(self) -> Place:
        """Where the training works."""
        return self.local or self.home

    @property
    def loss(self) -> float | None:
        """The mean of the last losses in the log."""
        return run_folder.recent_loss([loss for _, loss in self.losses])

    @property
    def best(self) -> Saved | None:
        """What to export: the recommended step, or the last one that is saved; None where nothing is whole."""
        saved = [saved for place in (self.place, self.home) for saved in place.usable]
        wanted = self.recommended.step if self.recommended else max((s.step for s in saved), default=0)
        return next((s for s in reversed(saved) if s.step == wanted), None)

    @property
    def stopped(self) -> bool:
        """Whether nobody works at it: no process here, and none of another machine that copies to the same home."""
        return self.at_work is False and not (self.mirror and self.local is None)

    @property
    def seconds_left(self) -> float | None:
        """How long the steps that are left take at the speed of the log; None where that is not known."""
        if self.finished or not self.total or self.seconds_per_step is None:
            return None
        return max(0, self.total - self.step) * self.seconds_per_step

    @property
    def lost_steps(self) -> int:
        """Steps that would be taken again if the training were killed now."""
        return self._steps_after(self.place)

    @property
    def lost_steps_without_local(self) -> int:
        """Steps that would be taken again if this machine's disk went too, as Colab's does."""
        return self._steps_after(self.home)

    def _steps_after(self, place: Place) -> int:
        safe = [saved.step for saved in (place.last, place.model) if saved and not saved.fault]
        return max(0, self.step - max(safe, default=0))

    def __str__(self) -> str:
        lines = [self.head()]
        for title, text in self._rows():
            lines.append(f"  {title}: {text}")
            if title == "loss":
                lines.append(f"  {sparkline(self.losses)} steps {self.losses[0][0]} to {self.losses[-1][0]}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.as_table() + self.as_picture()

    def as_picture(self) -> str:
        """The newest preview for a notebook."""
        return as_html(self.newest_preview, 384, "newest preview") if self.newest_preview else ""

    def as_table(self) -> str:
        """All but the preview for a notebook, in a few kB."""
        left = "style='text-align:left'"  # JupyterLab sets tables to the right, as numbers are
        rows = "".join(
            f"<tr><td {left}>{html.escape(title)}</td><td {left}>{html.escape(text)}</td></tr>"
            for title, text in self._rows()
        )
        curve = chart(self.losses, "loss", recent=run_folder.RECENT)
        bar = (
            f"<progress value='{self.step}' max='{self.total}'></progress> " if self.total and not self.finished else ""
        )
        return f"<p>{bar}<b>{html.escape(self.head())}</b></p>{curve}<table>{rows}</table>"

    def head(self) -> str:
        """How far it is, as one line."""
        share = f" of {self.total} ({self.step / self.total:.0%})" if self.total else ""
        work = {True: "a process is at work", False: "no process here is at work", None: "at work or not: unknown here"}
        state = work[self.at_work]
        if self.finished and not self.at_work:
            state = "finished"
        elif self.stopped:
            last = max((place.last.step for place in (self.place, self.home) if place.last), default=0)
            goes_on = f"goes on from step {last}" if last else "begins at step 0"
            state = f"stopped; train (the same cell or command) {goes_on}"
        return f"{self.home.folder.name}: step {self.step}{share}, {state}"

    def _rows(self) -> Iterator[tuple[str, str]]:
        """What there is to say, each with its title."""
        yield "folder", str(self.place.folder)
        if self.loss is not None:
            yield "loss", f"{self.loss:.4f}, the mean of the last {min(run_folder.RECENT, len(self.losses))} in the log"
        if self.seconds_per_step is not None:
            runs = self.seconds_left and not self.stopped
            left = f", about {duration(self.seconds_left)} of training left" if runs else ""
            images = f", {self.images_per_second:.3g} images a second" if self.images_per_second else ""
            yield "speed", f"{self.seconds_per_step:.3g} s a step{images}{left}"
        if self.learning_rate is not None:
            yield "learning rate", f"{self.learning_rate:.3g}"
        if self.gpu_memory:
            yield "GPU memory", f"{size(self.gpu_memory)} at most"
        if self.log_age is not None:
            yield "log written", f"{duration(self.log_age)} ago"
        yield from self._saved_rows(self.place)
        at_home = self.lost_steps if self.home.unreadable else self.lost_steps_without_local
        if not self.finished or at_home:
            more = f"; {at_home} if this machine's disk went too" if at_home != self.lost_steps else ""
            title = "steps to be taken again" if self.stopped else "steps lost if it stopped now"
            yield title, f"{self.lost_steps}{more}"
        if self.local:
            yield "home", str(self.home.folder)
            yield from self._saved_rows(self.home, " at home")
        if self.mirror:
            yield from _mirror_rows(self.mirror, elsewhere=self.local is None)
        if self.recommended:
            best = self.best
            folders = [p.folder for p in (self.place, self.home) if best and best.folder.is_relative_to(p.folder)]
            where = f" in {best.folder.relative_to(folders[0]).as_posix()}" if folders else ""
            yield "recommended", f"step {self.recommended.step}{where}: {self.recommended.reason}"
        if self.newest_preview:
            yield "newest preview", str(self.newest_preview)

    def _saved_rows(self, place: Place, where: str = "") -> Iterator[tuple[str, str]]:
        if place.unreadable:
            yield f"last saved state{where}", f"unknown, the folder cannot be read ({place.unreadable})"
            return
        checked = "verified" if self.verified else "sizes are right"
        last = place.last
        told = last and f"step {last.step}, {duration(last.age)} ago, {size(last.size)}, {checked}"
        yield f"last saved state{where}", told or "none"
        usable = [str(saved.step) for saved in place.checkpoints if not saved.fault]
        if usable:
            yield f"checkpoints{where}", f"step{'s' * (len(usable) > 1)} {', '.join(usable)}"
        if place.model and not place.model.fault:
            yield f"finished model{where}", f"step {place.model.step}, {duration(place.model.age)} ago"
        for saved in place.damaged:
            yield f"damaged{where}", f"{saved.folder.relative_to(place.folder).as_posix()}: {saved.fault}"


@configured_by(StatusConfig)
def status(config: StatusConfig) -> RunStatus:
    """How far a run is and what of it is safe, from its files alone; it may be training meanwhile, here or elsewhere.

    Nothing is written. Raises DbkitError where there is no such run.
    """
    home_folder, local_folder = run_folder.find_local(run_folder.find_run(config.run))
    folders = [folder for folder in (local_folder, home_folder) if folder]
    # The log before the states: a commit in between must not make the log seem behind.
    logged = next((lines for folder in folders if (lines := run_folder.read_lines(folder))), [])
    places = [run_folder.read_place(folder, config.verify) for folder in folders]
    total = next((total for folder in folders if (total := run_folder.total_steps(folder))), None)
    whole = [model.step for place in places if (model := place.model) and not model.fault]
    step = max([*(line["step"] for line in logged[-1:]), *(p.last.step for p in places if p.last), *whole], default=0)
    locks = [is_locked(folder) for folder in folders]
    return RunStatus(
        home=places[-1],
        local=places[0] if local_folder else None,
        step=step,
        total=total and max(total, step),
        finished=max(whole, default=-1) >= (total or step),
        at_work=True if True in locks else None if None in locks else False,
        **_logged(logged),
        log_age=next((age for folder in folders if (age := run_folder.log_age(folder)) is not None), None),
        mirror=run_folder.read_mirror(folders[0]),
        newest_preview=next((path for folder in folders if (path := run_folder.newest_preview(folder))), None),
        verified=config.verify,
        recommended=_recommended(folders, places),
    )


def _recommended(folders: list[Path], places: list[Place]) -> Recommendation | None:
    measured = next((lines for folder in folders if (lines := run_folder.read_lines(folder, run_folder.FIGURES))), [])
    return recommend(measured, {saved.step for place in places for saved in place.usable})


def status_at_work(run: Path, home: Path, step: int, total: int, at_work: bool = True) -> RunStatus:
    """The same for who trains, or has just stopped, at a step, from the folder where the run works alone.

    What is at its home is as the mirror says, so that a Drive that hangs holds nobody up.
    """
    place, mirror = run_folder.read_place(run, verify=False), run_folder.read_mirror(run) if run != home else None
    finished = bool(place.model and not place.model.fault and place.model.step >= total)
    return RunStatus(
        home=_arrived(place, home, mirror) if run != home else place,
        local=place if run != home else None,
        step=step,
        total=total,
        finished=finished,
        at_work=at_work and not finished,
        **_logged(run_folder.read_lines(run)),
        log_age=run_folder.log_age(run),
        mirror=mirror,
        newest_preview=run_folder.newest_preview(run),
        verified=False,
        recommended=_recommended([run], [place]),
    )


def _arrived(place: Place, home: Path, mirror: Mirror | None) -> Place:
    """A run's home as the mirror knows it: what its local folder holds, without what is being copied or waits."""
    if mirror is None:
        return Place(home, [], [], None, "nothing was copied yet")
    missing = {*mirror.waiting, *(mirror.copying or ())[:1]}
    there = [
        [s for s in saved if f"{s.folder.parent.name}/{s.folder.name}" not in missing]
        for saved in (place.states, place.checkpoints)
    ]
    return Place(home, *there, None if "model" in missing else place.model)


def _logged(lines: list[dict]) -> dict[str, Any]:
    """What the lines of a log say, as fields of RunStatus."""
    last, seconds = lines[-1] if lines else {}, _speed(lines)
    rate, *counts = (last.get(name) for name in ("learning_rate", "images", "gpu_memory"))
    images, memory = (count if isinstance(count, int) and abs(count) < 2**63 else None for count in counts)
    return {
        "losses": [(line["step"], line["loss"]) for line in lines if run_folder.finite(line.get("loss"))],
        "seconds_per_step": seconds,
        "images_per_second": images / seconds if images is not None and seconds else None,
        "learning_rate": rate if run_folder.finite(rate) else None,
        "gpu_memory": memory,
    }


def _speed(logged: list[dict]) -> float | None:
    """Seconds a step, the median of the last lines: the first steps of a session are slower, as are pauses."""
    recent = [line.get("seconds_per_step") for line in logged[-run_folder.RECENT :]]
    known = sorted(seconds for seconds in recent if run_folder.finite(seconds))
    return known[(len(known) - 1) // 2] if known else None


def _mirror_rows(mirror: Mirror, elsewhere: bool) -> Iterator[tuple[str, str]]:
    """What is being copied. Of another machine, or one that is gone, only what it last wrote is known."""
    yield "copying to home", f"as of {duration(mirror.age)} ago{', on another machine' if elsewhere else ''}"
    if mirror.copying:
        name, done, whole = mirror.copying
        yield "being copied", f"{name}, {done / whole if whole else 1:.0%} of {size(whole)}"
    if mirror.waiting:
        yield "waiting to be copied", ", ".join(mirror.waiting)
    if mirror.failed:
        yield "copying failed", mirror.failed


def duration(seconds: float) -> str:
    """A time in plain words: 12 s, 3 min, 2 h 5 min, 3 days."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // (24 * 60)} days"
