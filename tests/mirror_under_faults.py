"""Programs for test_mirror.py, run in a process of their own where calls on home fail on cue (faults.py).

Each is a function of the place it works in. The main thread plays the training: nothing fails for it, for it never
touches home but to look at it.
"""

import collections
import contextlib
import io
import itertools
import json
import random
import shutil
import sys
from pathlib import Path

from faults import OPERATIONS, Faults

from dbkit import copies
from dbkit.checkpoint import MANIFEST, commit, newest_valid, rotate, step_folder
from dbkit.mirror import Mirror, bring_back


def write(folder, seed):
    (folder / "unet").mkdir()
    (folder / "unet" / "weights").write_bytes(random.Random(seed).randbytes(40000))
    (folder / "state").write_bytes(random.Random(-seed).randbytes(300))


def commit_step(local, step):
    return commit(step_folder(local / "resume", step), step, lambda folder: write(folder, step), {"step": step}).folder


def commit_model(local, step):
    return commit(local / "model", step, lambda folder: write(folder, step), {"step": step}).folder


def content(folder):
    """Every file below a folder, by name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def leftovers(home):
    """What is half done; mirror.json is written too seldom to be tried again."""
    return [
        p.name for p in home.rglob("*") if p.suffix in (".partial", ".old") and not p.name.startswith("mirror.json")
    ]


class Place:
    """Local states of step 2, 4 and so on with their models, and a home that holds step 2."""

    def __init__(self, folder, steps=(2, 4)):
        self.local, self.home, self.first = folder / "local", folder / "home", folder / "first"
        self.states, self.models = {}, {}
        for step in steps:
            self.states[step] = content(commit_step(self.local, step))
            self.models[step] = content(commit_model(self.local, step))
            if step == steps[0]:
                shutil.copytree(self.local, self.first)
        (self.local / "log.jsonl").write_text('{"step": 4}\n')
        self.begin_again()

    def begin_again(self):
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(self.first, self.home)

    def mirror(self):
        return Mirror(self.local, self.home, pause=0.002, longest_pause=0.02)

    def queue_all(self, mirror, step=4):
        mirror.commit(step_folder(self.local / "resume", step), keep=1)
        mirror.file(self.local / "log.jsonl")
        mirror.commit(self.local / "model")

    def newest(self, home=None):
        """The step of home's newest valid state, which is what was committed."""
        found, _ = newest_valid((home or self.home) / "resume")
        assert found is not None, "home holds no valid state"
        assert content(found.folder) == self.states[found.step], "what is called valid is not what was committed"
        return found.step

    def check_all_is_there(self, step=4, home=None):
        home = home or self.home
        assert self.newest(home) == step
        assert [folder.name for folder in (home / "resume").iterdir()] == [f"step_{step:06d}"]
        assert content(home / "model") == self.models[step]
        assert (home / "log.jsonl").read_bytes() == (self.local / "log.jsonl").read_bytes()
        assert leftovers(home) == []


# The n-th call, whatever it is, for n = 1, 2, 3 and so on, or fewer where another fault takes the same way through.
ONCE = [("any", "EIO", 1), ("any", "unanswered", 1), ("any", "ENOSPC", 4), ("any", "ENOTCONN", 5)]
ONCE += [(operation, fault, 1) for operation in ("read", "write") for fault in ("short", "corrupt")]


def each_call_fails_once(folder):
    """Call after call fails in each way; then everything arrives. Says how many calls of each kind were hit."""
    place, faults = Place(folder), Faults.of_this_process()
    hits = collections.Counter()
    for operation, fault, stride in ONCE:
        for number in itertools.count(1, stride):
            place.begin_again()
            faults.set(operation, fault, at=number)
            mirror = place.mirror()
            place.queue_all(mirror)
            missing = mirror.close(patience=60)
            assert missing == [], (fault, number, missing)
            place.check_all_is_there()
            if not faults.hits:
                break
            hits[f"{faults.last} {fault}"] += 1
            faults.clear()
    return hits


def each_operation_fails_for_long(folder):
    """From its n-th call on an operation fails every time, until the mirror has tried again and again."""
    place, faults = Place(folder), Faults.of_this_process()
    hits = collections.Counter()
    for operation in ["any", *OPERATIONS]:
        for fault in ("EIO", "ENOSPC", "ENOTCONN", "ESTALE", "unanswered", "corrupt"):
            if fault == "corrupt" and operation not in ("read", "write"):
                continue
            for number in (1, 2, 4, 9, 25, 70):
                place.begin_again()
                faults.set(operation, fault, at=number, times=-1)
                mirror = place.mirror()
                place.queue_all(mirror)
                idle = wait_until_failing_or_idle(mirror, faults)
                assert place.newest() in (2, 4)
                if step_folder(place.home / "resume", 4) not in (place.home / "resume").iterdir():
                    assert place.newest() == 2
                hits[f"{operation} {fault}"] += bool(faults.hits)
                faults.clear()
                assert mirror.close(patience=60) == [], (operation, fault, number)
                place.check_all_is_there()
                if idle:
                    break
    return hits


def wait_until_failing_or_idle(mirror, faults):
    """Wait until each thing that is not at home was tried three times; whether there is none."""

    def done():
        with mirror.changed:
            return not mirror.current and all(item.tries >= 3 for item in mirror.queue.values())

    faults.wait_for(done)
    return not mirror.queue


def every_moment(folder):
    """Before each single call: home's newest state is whole, and from a copy of home as it is then all goes on."""
    place, faults = Place(folder), Faults.of_this_process()
    faults.set("any", "stall", times=-1)
    mirror = place.mirror()
    place.queue_all(mirror)
    steps, snapshot, before = [], folder / "snapshot", 0
    while True:
        faults.wait_for(lambda before=before: faults.hits > before or not (mirror.queue or mirror.busy))
        if faults.hits == before:
            break
        before = faults.hits
        steps.append(place_after_a_kill(place, snapshot))
        faults.release()
    faults.clear()
    assert mirror.close() == []
    place.check_all_is_there()
    assert steps == sorted(steps) and set(steps) == {2, 4}
    return {"moments": len(steps), "with the old state": steps.count(2)}


def place_after_a_kill(place, snapshot):
    """The newest step of home as it is, found by a process that begins there; then that one's mirror does the rest."""
    shutil.rmtree(snapshot, ignore_errors=True)
    shutil.copytree(place.home, snapshot / "home")
    with contextlib.redirect_stderr(io.StringIO()):
        bring_back(snapshot / "new", snapshot / "home")
    found, _ = newest_valid(snapshot / "new" / "resume")
    assert content(found.folder) == place.states[found.step]
    after = Mirror(place.local, snapshot / "home", pause=0.002)
    after.catch_up(keep=1)
    assert after.close() == []
    place.check_all_is_there(home=snapshot / "home")
    return found.step


def caller_never_waits(folder):
    """While home stalls, wherever that is, a training goes on: all its calls return and nothing piles up."""
    faults = Faults.of_this_process()
    positions = []
    for number in (1, 5, 20, 45, 80):
        place = Place(folder / str(number))
        faults.watch(place.home, spare_main=True)
        faults.set("any", "stall", at=number)
        mirror = place.mirror()
        place.queue_all(mirror)
        faults.wait_for(lambda: faults.stalled)
        positions.append(faults.last)
        for step in range(6, 16, 2):
            place.states[step] = content(commit_step(place.local, step))
            mirror.commit(step_folder(place.local / "resume", step), keep=1)
            rotate(place.local / "resume", step, keep=1, spare=mirror.holds)
            place.models[step] = content(commit_model(place.local, step))
            mirror.commit(place.local / "model")
            (place.local / "log.jsonl").write_text(json.dumps({"step": step}))
            mirror.file(place.local / "log.jsonl")
            mirror.news()
            assert len(mirror.queue) <= 3
            assert len(list((place.local / "resume").iterdir())) <= 3
        # All of that was while one call of the mirror had not returned.
        assert faults.stalled == 1 and faults.hits == 1
        assert place.newest() in (2, 4)
        faults.clear()
        assert mirror.close() == []
        place.check_all_is_there(14)
    return positions


def close_gives_up(folder):
    """A home that stalls is left; one on which all fails, though bytes move, too; and the process can end."""
    place, faults = Place(folder), Faults.of_this_process()
    faults.set("write", "corrupt", times=-1)
    mirror = place.mirror()
    place.queue_all(mirror)
    corrupt = mirror.close(patience=0.5)
    place.begin_again()
    faults.set("write", "ENOSPC", at=12, times=-1)
    mirror = place.mirror()
    place.queue_all(mirror)
    full = mirror.close(patience=0.5)
    faults.set("any", "stall", at=20)
    place.begin_again()
    mirror = place.mirror()
    place.queue_all(mirror)
    faults.wait_for(lambda: faults.stalled)
    stalled = mirror.close(patience=0.2)
    mirror = place.mirror()
    place.queue_all(mirror)
    hurried = mirror.close(patience=0)
    assert faults.stalled
    return [corrupt, full, stalled, hurried, json.loads((place.local / "mirror.json").read_text())]


def close_waits_while_bytes_move(folder):
    """A home that takes longer than the patience, but goes on, gets everything."""
    place, faults = Place(folder), Faults.of_this_process()
    faults.set("write", "stall", times=-1, seconds=0.1)
    mirror = place.mirror()
    place.queue_all(mirror)
    assert mirror.close(patience=0.8) == []
    assert faults.hits * 0.1 > 0.8, "too little to wait for"
    place.check_all_is_there()
    return faults.hits


def full_for_a_while(folder):
    """Home is full: said once; nothing there is given up; what is saved meanwhile takes the place of what waits."""
    place, faults = Place(folder), Faults.of_this_process()
    faults.set("write", "ENOSPC", at=3, times=-1)
    mirror = place.mirror()
    mirror.commit(step_folder(place.local / "resume", 4), keep=1)
    tries = []
    for step in (6, 8):
        faults.wait_for(lambda: any(item.tries >= 3 for item in list(mirror.queue.values())))
        tries.append(faults.hits)
        assert place.newest() == 2
        place.states[step] = content(commit_step(place.local, step))
        mirror.commit(step_folder(place.local / "resume", step), keep=1)
        rotate(place.local / "resume", step, keep=1, spare=mirror.holds)
    faults.wait_for(lambda: faults.hits > tries[-1] + 3)
    said = mirror.news()
    shown = json.loads((place.local / "mirror.json").read_text())
    faults.clear()
    assert mirror.close() == []
    assert place.newest() == 8 and leftovers(place.home) == []
    return [said, mirror.news(), shown, json.loads((place.home / "mirror.json").read_text())]


def copies_until_killed(folder):
    """Copies, and stops for ever where the fault says so."""
    place = Place(folder)
    mirror = place.mirror()
    place.queue_all(mirror)
    mirror.close(patience=600)
    assert (place.home / "resume" / "step_000004" / MANIFEST).exists()


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    copies._BLOCK = 16384  # so that small files have several
    Faults.of_this_process().watch(Path(folder) / "home", spare_main=True)
    print(json.dumps(globals()[name](Path(folder))))
