"""watch(): a run as it goes on, in one place of a notebook or a line of a terminal; train() shows itself so too."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from dbkit import processes
from dbkit.config import WatchConfig
from dbkit.errors import DbkitError
from dbkit.files import is_locked
from dbkit.mirror import home_lock
from dbkit.settings import configured_by
from dbkit.status import RunStatus, duration, status, status_at_work
from dbkit.workspace import default_folder, working_folder

# Showing may take this share of the time, and happens once a second at most.
_SHARE, _LEAST = 0.01, 1.0
# Where lines cannot be written over, one a minute is enough.
_EVERY_LINE = 60.0


@configured_by(WatchConfig)
def watch(config: WatchConfig) -> None:
    """Show how far a run is, again and again, until no process of this machine trains it, or the cell is interrupted.

    Without a run it is the one at which a process is at work; for one that is still being prepared it waits.
    Everything is read from the run's files, so it works after a reload, in another notebook and beside the training.
    Raises DbkitError where there is no such run.
    """
    show = _Region() if in_notebook() else _Line()
    run, shown, waits = config.run or _locked_run(), None, False
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                shown = status(run)
            except DbkitError:
                # Nothing is there yet while its class images are made, for which an older run may be moved aside first.
                folder = shown.place.folder if shown else run and run.absolute()
                if not folder or not (is_locked(folder) or is_locked(home_lock(folder))):
                    raise
                if not waits:
                    print(
                        f"{folder} is being prepared: a process is at work, and nothing is to be shown yet", flush=True
                    )
                waits = True
            else:
                ended = not shown.at_work and (shown.finished or shown.at_work is False)
                show(shown, last=ended)
                if ended:
                    return
            time.sleep(config.every_seconds)


def _locked_run() -> Path | None:
    """The run of the workspace at which a process of this machine began to work last; None where none is at work."""
    runs = default_folder() / "runs"
    locks = {lock for folder in (runs, working_folder(runs / "run", None).parent) for lock in folder.glob(".*.lock")}
    newest_first = sorted(locks, key=lambda lock: lock.stat().st_mtime, reverse=True)
    folders = (lock.with_name(lock.name[1:].removesuffix(".lock")) for lock in newest_first)
    return next((folder for folder in folders if is_locked(folder)), None)


def screen_of(run: Path, home: Path, done: int, total: int) -> Screen | None:
    """What a training in a notebook tells its steps. None elsewhere."""
    return Screen(run, home, done, total) if in_notebook() and processes.rank() == 0 else None


class Screen:
    """Shows a training at work in one place, and at the end of its context how the run was left, however that came.

    done and total are the steps that are taken, and all of them.
    """

    def __init__(self, run: Path, home: Path, done: int, total: int) -> None:
        self.run, self.home, self.step, self.total = run, home, done, total
        self.region, self.due = _Region(), 0.0

    def __call__(self, step: int) -> None:
        began = time.monotonic()
        self.step = step
        if began < self.due:
            return
        self._show(at_work=True)
        now = time.monotonic()
        self.due = now + max(_LEAST, (now - began) / _SHARE)

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *error: object) -> None:
        self._show(at_work=False)

    def _show(self, at_work: bool) -> None:
        # What only shows must not end a training.
        with contextlib.suppress(OSError):
            self.region(status_at_work(self.run, self.home, self.step, self.total, at_work))


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook, whose outputs can be shown in place."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config


class _Region:
    """One place in a cell's output: a table, and below it the newest preview, sent only when there is another."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.preview: Path | None = None

    def __call__(self, shown: RunStatus, last: bool = False) -> None:
        from IPython.display import HTML, display

        if not self.handles:
            self.handles = [display(HTML(""), display_id=True) for _ in range(2)]
        table, picture = self.handles
        table.update(HTML(shown.as_table()))
        if shown.newest_preview != self.preview:
            self.preview = shown.newest_preview
            picture.update(HTML(shown.as_picture()))


class _Line:
    """A line of a terminal that is written over; in a file, where that cannot be, one now and then. All at the end."""

    def __init__(self) -> None:
        self.due = 0.0

    def __call__(self, shown: RunStatus, last: bool) -> None:
        line = shown.head()
        line += f", loss {shown.loss:.4f}" if shown.loss is not None else ""
        line += f", about {duration(shown.seconds_left)} left" if shown.seconds_left else ""
        if last:
            print(f"\r\033[K{shown}" if sys.stdout.isatty() else shown, flush=True)
        elif sys.stdout.isatty():
            print(f"\r\033[K{line}", end="", flush=True)
        elif time.monotonic() >= self.due:
            self.due = time.monotonic() + _EVERY_LINE
            print(line, flush=True)
