"""A run's home, Google Drive for instance, gets a copy of what is committed on the fast local disk, in the background.

Home may be full, slow, stalled or gone at any moment. Whoever trains only queues what is to be copied, which never
waits for home; one thread copies, reads back, compares, and tries again. Home's newest state is whole at every moment,
and nothing there is removed before what takes its place has been read back there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbkit.checkpoint import MANIFEST, by_step, newest_valid, read_manifest, remove_committed, rotate
from dbkit.copies import copy_committed, copy_loose, manifest_of, partial_of, reason_of, restore
from dbkit.errors import CannotGoOn, DbkitError
from dbkit.files import FULL, full_disk_is_a_sentence, require_space, size

# In both folders: what is going on, for other processes.
MIRROR = "mirror.json"
# A file of this name in a run's folder stops it as the stop button does, from wherever the folder can be reached.
STOP = "STOP"
# What is committed, whole folders; every other file of a run is a loose one.
_COMMITTED = ("resume", "checkpoints", "model")
_GONE = (errno.ENOTCONN, errno.ESTALE, errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.EHOSTDOWN)


@dataclass
class Item:
    """What waits to be copied, and how its tries went. `keep` is None for a loose file, 0 for a folder that is one."""

    name: str
    path: Path
    keep: int | None
    number: int
    tries: int = 0
    due: float = 0.0
    failed: str | None = None  # the sentence of its last try, and the system's words for the reason
    reason: str = ""
    most: int = 0  # the bytes that its best try handled

    def take_over(self, older: Item) -> None:
        """Be tried when the older one would have been, so that what is new does not hurry a home that fails."""
        self.tries, self.due, self.failed, self.reason = older.tries, older.due, older.failed, older.reason


class Mirror:
    """Copies what is committed below `local` to the same place below `home`. Its methods never wait for home.

    A failed copy is tried again after `pause` seconds, then after twice as long each time up to `longest_pause`. Steps
    whose folder `spare` says yes to are kept beyond the number of those that stay.
    """

    def __init__(
        self,
        local: Path,
        home: Path,
        pause: float = 5.0,
        longest_pause: float = 60.0,
        spare: Callable[[Path], bool] = lambda folder: False,
    ) -> None:
        self.local, self.home, self.pause, self.longest_pause = local, home, pause, longest_pause
        self.spare = spare
        self.changed = threading.Condition()
        self.queue: dict[str, Item] = {}
        self.current: Item | None = None
        self.count = self.done = self.size = self.work = 0
        self.busy = self.ended = self.reached = False
        self.said: set[str] = set()
        self.sentences: list[str] = []
        self.since: float | None = None
        self.moved = self.before = self.shown = self.began = 0.0
        self.longest = 0.0  # the seconds that the slowest copy took
        self.lost: dict[str, str] = {}  # what cannot be copied, as a sentence
        self.queued: dict[Path, int] = {}  # when each loose file was last changed before it was queued
        self.cleaned: set[tuple[Path, str]] = set()
        threading.Thread(target=self._work, name="dbkit mirror", daemon=True).start()

    def commit(self, folder: Path, keep: int = 0) -> None:
        """Queue a committed folder. Of its parent's steps the newest `keep` stay at home; 0 is for a folder like model.

        Steps that still wait beyond that number are dropped. Call it before rotating the local folders.
        """
        self._add(folder, keep)
        self._show()

    def file(self, path: Path) -> None:
        """Queue a loose file. What it holds when its turn comes is copied."""
        self._add(path, None)

    def catch_up(self, keep: int) -> None:
        """Queue all that local holds, as a run does that goes on. What is whole at home is not copied again."""
        for name, most in (("resume", 1), ("checkpoints", keep)):
            for _, folder in sorted(by_step(self.local / name).items())[-most:]:
                self.commit(folder, most)
        if (self.local / "model" / MANIFEST).is_file():
            self.commit(self.local / "model")
        self.loose_files()

    def loose_files(self) -> None:
        """Queue the files that are no commit (settings, log, previews, a tracker's) and changed since then."""
        for path in sorted(self.local.rglob("*")):
            committed = path.relative_to(self.local).parts[0] in _COMMITTED
            if committed or path.suffix == ".partial" or path.name in (MIRROR, STOP):
                continue
            # Other programs' files, a tracker's for instance, come and go.
            with contextlib.suppress(OSError):
                changed = path.stat().st_mtime_ns
                if path.is_file() and self.queued.get(path) != changed:
                    self.queued[path] = changed
                    self.file(path)

    def holds(self, folder: Path) -> bool:
        """Whether a folder is being copied or waits for it, so that rotate() has to spare it until the next time."""
        with self.changed:
            return self._name(folder) in self.queue or (self.current is not None and self.current.path == folder)

    def news(self) -> list[str]:
        """What happened since the last call, a sentence each; a problem is said once, not at each try."""
        with self.changed:
            news, self.sentences = self.sentences, []
            return news

    def close(self, patience: float = 120.0) -> list[str]:
        """Wait until all is copied, at most `patience` seconds in which nothing moves; 0 leaves at once.

        Returns a sentence for each thing that is not at home. A try that fails where the one before did moves nothing.
        """
        with self.changed:
            self.moved = self.before = time.monotonic()
            for item in self.queue.values():
                item.tries, item.due = 0, 0.0
            self.changed.notify_all()
            try:
                while (self.queue or self.busy) and (left := self.moved + patience - time.monotonic()) > 0:
                    self.changed.wait(left)
            finally:
                # Also where somebody does not want to wait: the thread must not go on beside that of the next run.
                self.ended = True
                self.changed.notify_all()
            missing = [item for item in (self.current, *self.queue.values()) if item]
        self._show()
        why = f"nothing moved for {patience:g} seconds" if patience else "there was no time"
        return [
            *self.lost.values(),
            *(
                f"{item.name} is not at {self.home} ({item.reason or why}); it is kept in {self.local}, and to run "
                "the same command again copies it"
                for item in missing
            ),
        ]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.local).as_posix()

    def _add(self, path: Path, keep: int | None) -> None:
        with self.changed:
            self.count += 1
            self._put(Item(self._name(path), path, keep, self.count))
            self.changed.notify_all()

    def _put(self, item: Item) -> None:
        """Queue an item, or what is newer of its name, and drop older steps. The lock is held."""
        if other := self.queue.pop(item.name, None):
            older, item = sorted((item, other), key=lambda item: item.number)
            item.take_over(older)
        self.queue[item.name] = item
        if item.keep:
            beside = [other for other in self.queue.values() if other.keep and other.path.parent == item.path.parent]
            beside.sort(key=lambda item: item.number)
            for older in [other for other in beside[: -item.keep] if not self.spare(other.path)]:
                del self.queue[older.name]
                beside[-1].take_over(older)

    def _work(self) -> None:
        while item := self._next():
            try:
                manifest = None if item.keep is None else manifest_of(item.path)
                self.size = _size_of(item.path, manifest)
                self._show(at_home=True)
                self._send(item, manifest)
                self._settle(item)
            except DbkitError as error:
                # What local holds is damaged or gone: to try again would not help.
                self._settle(item, f"{item.name} is not copied to {self.home}: {error}; the next save takes its place")
            except Exception as error:
                # Whatever it is, it must end neither the training nor the copies. It is said, and tried again.
                if self.ended:
                    return
                self._postpone(item, error)
            self._show(at_home=True)

    def _next(self) -> Item | None:
        """The item whose turn it is, once there is one; None at the end."""
        with self.changed:
            self.busy = False
            self.changed.notify_all()
            while not self.ended:
                now = time.monotonic()
                if item := next((item for item in self.queue.values() if item.due <= now), None):
                    self.current, self.busy = self.queue.pop(item.name), True
                    self.done = self.size = self.work = 0
                    self.before, self.began = self.moved, now
                    return item
                self.changed.wait(min((item.due - now for item in self.queue.values()), default=None))
            return None

    def _send(self, item: Item, manifest: dict[str, Any] | None) -> None:
        target = self.home / item.name
        self._make_parents(target)
        if manifest and not item.keep and ((there := read_manifest(target)) and there["step"] > manifest["step"]):
            return  # another machine has trained the run further
        if manifest is None:
            self._clean(target)
            copy_loose(item.path, target, self._wrote, self._seen)
            return
        # What an older copy left half done goes before, for there may be no space for both.
        for partial in target.parent.glob("step_*.partial") if item.keep else ():
            if partial != partial_of(target):
                remove_committed(partial, for_good=True)
        copy_committed(item.path, target, self._wrote, self._seen, for_good=True)
        if item.keep:
            rotate(target.parent, manifest["step"], item.keep, self.spare, for_good=True)

    def _make_parents(self, target: Path) -> None:
        """Make the folders below home, and home, but never what home lies in.

        Where Drive was mounted, an empty folder remains. Copies put there would be lost with the machine.
        """
        try:
            self.home.stat()
        except FileNotFoundError:
            if self.reached:
                raise
            self.home.mkdir()
        self.reached = True
        for parent in reversed(target.relative_to(self.home).parents[:-1]):
            (self.home / parent).mkdir(exist_ok=True)

    def _clean(self, target: Path) -> None:
        """Remove, once, what a killed process left of files like this one."""
        if (target.parent, target.suffix) not in self.cleaned:
            for partial in target.parent.glob(f"*{target.suffix}.partial"):
                if partial.is_file():
                    partial.unlink()
            self.cleaned.add((target.parent, target.suffix))

    def _seen(self, count: int) -> None:
        """Count bytes that were read or written."""
        if self.ended:
            raise InterruptedError(errno.EINTR, "the run has ended")
        self.work += count
        self.moved = time.monotonic()
        if self.moved - self.shown > 1:
            self._show()

    def _wrote(self, count: int) -> None:
        self.done += count
        self._seen(count)

    def _settle(self, item: Item, sentence: str | None = None) -> None:
        """An item is at home, or for the reason in the sentence never will be."""
        with self.changed:
            self.current = None
            self.longest = max(self.longest, time.monotonic() - self.began)
            self.lost.pop(item.name, None)
            if sentence:
                self.sentences.append(sentence)
                self.lost[item.name] = f"{item.name} is not at {self.home}: what {self.local} holds of it is damaged"
            if self.said and not any(other.failed for other in self.queue.values()):
                self.sentences += (
                    [] if sentence else [f"{self.home} takes copies again: {item.name} is there, verified"]
                )
                self.said, self.since = set(), None

    def _postpone(self, item: Item, error: Exception) -> None:
        kind, sentence = self._describe(item, error)
        with self.changed:
            item.failed, item.reason, item.tries = sentence, reason_of(error), item.tries + 1
            item.due = time.monotonic() + min(self.pause * 2 ** min(item.tries - 1, 20), self.longest_pause)
            if self.work <= item.most:
                self.moved = self.before
            item.most = max(item.most, self.work)
            self.since = self.since or time.time()
            if kind not in self.said:
                self.said.add(kind)
                self.sentences.append(sentence)
            self.current = None
            self._put(item)

    def _describe(self, item: Item, error: Exception) -> tuple[str, str]:
        """What kind of failure this is, and a sentence."""
        number, reason = getattr(error, "errno", None), reason_of(error)
        if number in FULL:
            needed = f" and {item.name} needs {size(self.size)}" if self.size else f", so {item.name} is not copied"
            return "full", (
                f"{self.home} is full{needed}; free some space there (in Drive, empty the trash), it is tried again "
                f"and until then kept in {self.local}"
            )
        if number in _GONE:
            return "gone", (
                f"{self.home} cannot be reached ({reason}); mount it again, until then what is saved is kept in "
                f"{self.local}"
            )
        return "other", (
            f"{item.name} could not be copied to {self.home} ({reason}); it is tried again and until then kept in "
            f"{self.local}"
        )

    def _show(self, at_home: bool = False) -> None:
        """Write to mirror.json what is going on, for other processes. That it cannot be written ends nothing."""
        with self.changed:
            self.shown = time.monotonic()
            status = {"home": str(self.home), "local": str(self.local), "copying": None}
            if self.current:
                status["copying"] = {"name": self.current.name, "done": self.done, "size": self.size}
            status["waiting"] = list(self.queue)
            status["failed"] = next((item.failed for item in self._open() if item.failed), None)
            status |= {"since": self.since if status["failed"] else None, "updated": time.time()}
            _write_status(self.local / MIRROR, status)
        if at_home:
            _write_status(self.home / MIRROR, status)

    def _open(self) -> list[Item]:
        return [item for item in (self.current, *self.queue.values()) if item]


def _size_of(path: Path, manifest: dict[str, Any] | None) -> int:
    if manifest is None:
        return path.stat().st_size if path.exists() else 0
    return sum(file["size"] for file in manifest["files"].values())


def _write_status(path: Path, status: dict[str, Any]) -> None:
    # Not synced: after a crash nobody needs it.
    with contextlib.suppress(OSError):
        partial_of(path).write_text(json.dumps(status, indent=1), encoding="utf-8")
        partial_of(path).replace(path)


def home_lock(home: Path) -> Path:
    """What who copies to a home locks. On the local disk: a home that hangs must not hold up the end of a run."""
    name = hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"dbkit-{name}"


def bring_back(local: Path, home: Path) -> list[str]:
    """Before a run: if home's newest valid state is newer than local's, copy it here with the log and the settings.

    Returns sentences to print. Raises DbkitError where to go on would lose what home holds.
    """
    here, _ = newest_valid(local / "resume")
    try:
        # A home that was there before is not made anew: where Drive was mounted, that would be a folder of this disk.
        if here is None:
            home.mkdir(parents=True, exist_ok=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                home.stat()
            home.parent.stat()
        for old in (home / "resume").glob("step_*.old"):
            restore(old)
        if here and max(by_step(home / "resume"), default=0) <= here.step:
            return []
        there, skipped = newest_valid(home / "resume")
        finished = (home / "model").is_dir()
    except OSError as error:
        if here is None:
            raise DbkitError(
                f"{home} cannot be reached ({reason_of(error)}), and a saved state could only be there; mount it again "
                "or choose another output_dir"
            ) from error
        return [
            f"{home} cannot be reached ({reason_of(error)}): the run goes on from step {here.step}, which {local} "
            "holds; mount it again"
        ]
    if there and (here is None or here.step < there.step):
        _fetch(local, there.folder, home)
        return [*skipped, f"step {there.step} was brought from {home} to {local}"]
    if here is None and skipped:
        raise CannotGoOn(
            f"no saved state in {home / 'resume'} is whole ({'; '.join(skipped)}); set start_over to begin again at "
            "step 0"
        )
    if here is None and finished:
        raise CannotGoOn(
            f"{home} holds a finished model and no state to go on from; choose another output_dir, or set start_over, "
            "which moves it aside"
        )
    return skipped


def _fetch(local: Path, state: Path, home: Path) -> None:
    """Copy home's state, last: a kill before it leaves a local folder that is brought up to date again."""
    from tqdm import tqdm

    target = local / "resume" / state.name
    total = _size_of(state, manifest_of(state))
    target.parent.mkdir(parents=True, exist_ok=True)
    require_space(local, total, "the saved state")
    with full_disk_is_a_sentence(local), tqdm(desc=f"bringing {state.name}", total=total, unit="B") as bar:
        try:
            for name in ("settings.yaml", "log.jsonl", "figures.jsonl", "wandb_id.txt"):
                if (home / name).is_file():
                    copy_loose(home / name, local / name, _ignore, _ignore)
            copy_committed(state, target, bar.update, _ignore)
        except DbkitError as error:
            raise DbkitError(f"{error}; run the same command again once {home} can be reached") from error


def _ignore(count: int) -> None:
    pass
