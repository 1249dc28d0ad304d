"""A home that is full, slow, stalled, gone or wrong loses nothing, tears nothing and keeps nobody waiting.

The proof under faults is mirror_under_faults.py, run here; the rest needs no faults.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from faults import OPERATIONS, failing
from mirror_under_faults import Place, commit_model, commit_step, content, leftovers

from dbkit import DbkitError
from dbkit.checkpoint import MANIFEST, commit, find_fault, newest_valid, rotate, step_folder
from dbkit.mirror import Mirror, bring_back

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fast():
    """A folder in memory where there is such a place: thousands of copies are made."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def command(name, folder):
    return [sys.executable, Path(__file__).with_name("mirror_under_faults.py"), name, folder]


def environment(faults):
    return {**os.environ, **faults.env, "PYTHONPATH": str(ROOT)}


def run(name, folder):
    """What a program of mirror_under_faults.py found; that it ends badly, or never, is a failure."""
    with failing(folder / "home") as faults:
        done = subprocess.run(
            command(name, folder), env=environment(faults), capture_output=True, text=True, timeout=300, check=False
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_after_any_one_call_has_failed_in_any_way_everything_arrives(fast):
    hits = run("each_call_fails_once", fast)
    for operation in OPERATIONS:
        assert hits[f"{operation} EIO"] and hits[f"{operation} unanswered"], hits
    for operation in ("read", "write"):
        assert hits[f"{operation} corrupt"] > 10 and hits[f"{operation} short"] > 10
    assert sum(hits.values()) > 700


def test_while_an_operation_fails_home_keeps_what_it_has_and_afterwards_everything_arrives(fast):
    hits = run("each_operation_fails_for_long", fast)
    assert all(
        hits[f"{operation} {fault}"]
        for operation in OPERATIONS
        for fault in ("EIO", "ENOSPC", "ENOTCONN", "ESTALE", "unanswered")
    )
    assert hits["write corrupt"] and hits["read corrupt"]


def test_at_every_moment_homes_newest_state_is_whole_and_a_kill_loses_nothing(fast):
    found = run("every_moment", fast)
    assert found["moments"] > 200
    assert 20 < found["with the old state"] < found["moments"]


def test_a_stalled_home_keeps_no_call_waiting_and_nothing_piles_up(fast):
    assert len(run("caller_never_waits", fast)) == 5


def test_the_end_does_not_wait_for_a_home_that_moves_nothing(fast):
    corrupt, full, stalled, hurried, shown = run("close_gives_up", fast)
    home, local = fast / "home", fast / "local"
    kept = f"; it is kept in {local}, and to run the same command again copies it"
    assert f"resume/step_000004 is not at {home} (state reads back differently){kept}" in corrupt
    assert f"model is not at {home} (No space left on device){kept}" in full
    assert stalled[0] == f"resume/step_000004 is not at {home} (nothing moved for 0.2 seconds){kept}"
    assert f"resume/step_000004 is not at {home} (there was no time){kept}" in hurried
    assert [len(sentences) for sentences in (corrupt, stalled, hurried)] == [3, 3, 3]
    assert "resume/step_000004" in [*shown["waiting"], (shown["copying"] or {}).get("name")]


def test_the_end_waits_for_a_slow_home_as_long_as_bytes_move(fast):
    assert run("close_waits_while_bytes_move", fast) > 8


def test_a_full_home_is_said_once_and_takes_copies_again_when_it_has_space(fast):
    said, later, shown, at_home = run("full_for_a_while", fast)
    home, local = fast / "home", fast / "local"
    assert said == [
        f"{home} is full and resume/step_000004 needs 40300 bytes; free some space there (in Drive, empty the trash), "
        f"it is tried again and until then kept in {local}"
    ]
    assert later == [f"{home} takes copies again: resume/step_000008 is there, verified"]
    assert shown["failed"].startswith(f"{home} is full and resume/step_00000") and shown["since"] <= shown["updated"]
    assert at_home == {
        "home": str(home),
        "local": str(local),
        "copying": None,
        "waiting": [],
        "failed": None,
        "since": None,
        "updated": at_home["updated"],
    }


@pytest.mark.parametrize("operation", ["write", "fsync", "rename", "truncate", "unlink"])
def test_a_process_killed_in_the_middle_of_a_copy_leaves_home_whole(fast, operation):
    with failing(fast / "home", spare_main=True) as faults:
        faults.set(operation, "stall", at=4 if operation in ("write", "rename") else 2)
        process = subprocess.Popen(command("copies_until_killed", fast), env=environment(faults))
        faults.wait_for(lambda: faults.stalled or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert faults.hits == 1
    local, home = fast / "local", fast / "home"
    before = newest_valid(home / "resume")[0]
    assert content(before.folder) == content(step_folder(local / "resume", before.step))
    mirror = Mirror(local, home)
    mirror.catch_up(keep=1)
    assert mirror.close() == []
    assert [path.name for path in (home / "resume").iterdir()] == ["step_000004"]
    assert find_fault(home / "resume" / "step_000004", 4) is None and find_fault(home / "model", 4) is None
    assert leftovers(home) == []


@pytest.fixture
def place(fast):
    return Place(fast)


def copied(local, home, *calls):
    """What a mirror says that does these calls and has all the time it needs."""
    mirror = Mirror(local, home, pause=0.01)
    for call in calls:
        call(mirror)
    # What is damaged here cannot be copied; that is news too.
    assert [sentence for sentence in mirror.close() if not sentence.endswith("holds of it is damaged")] == []
    return mirror.news()


def test_the_last_checkpoints_stay_at_home_and_the_older_ones_are_emptied_and_removed(tmp_path):
    local, home = tmp_path / "local", tmp_path / "home"
    home.mkdir()

    def save(step):
        def write(folder):
            (folder / "weights").write_text(str(step) * 100)

        return commit(step_folder(local / "checkpoints", step), step, write, {}).folder

    for step in (2, 4, 6):
        folder = save(step)
        copied(local, home, lambda mirror, folder=folder: mirror.commit(folder, keep=2))
        if step == 2:
            os.link(home / "checkpoints" / "step_000002" / "weights", tmp_path / "the same bytes")
            (home / "checkpoints" / "step_000002" / "notes.txt").write_text("mine")
    assert (tmp_path / "the same bytes").stat().st_size == 0
    names = sorted(path.name for path in (home / "checkpoints").iterdir())
    assert names == ["step_000002-1", "step_000004", "step_000006"]
    assert [path.name for path in (home / "checkpoints" / "step_000002-1").iterdir()] == ["notes.txt"]


def test_what_is_whole_at_home_is_not_copied_again(place):
    copied(place.local, place.home, lambda mirror: mirror.catch_up(keep=1))
    times = {path: path.stat().st_mtime_ns for path in place.home.rglob("*") if path.suffix != ".json"}
    assert len(times) > 5
    copied(place.local, place.home, lambda mirror: mirror.catch_up(keep=1))
    again = {path: path.stat().st_mtime_ns for path in times}
    loose = place.home / "log.jsonl"
    assert {path: time for path, time in again.items() if path.is_file() and path != loose} == {
        path: time for path, time in times.items() if path.is_file() and path != loose
    }


def test_a_damaged_state_at_home_is_replaced(place):
    copied(place.local, place.home, place.queue_all)
    (place.home / "resume" / "step_000004" / "state").write_bytes(b"x" * 300)
    copied(place.local, place.home, place.queue_all)
    place.check_all_is_there()


def test_a_file_that_an_earlier_try_left_whole_is_not_copied_again(place):
    source, partial = place.local / "resume" / "step_000004", place.home / "resume" / "step_000004.partial"
    shutil.copytree(source, partial)
    (partial / MANIFEST).rename(partial / "manifest.json.partial")
    (partial / "state").write_bytes(b"half")
    number = (partial / "unet" / "weights").stat().st_ino
    copied(place.local, place.home, place.queue_all)
    place.check_all_is_there()
    assert (place.home / "resume" / "step_000004" / "unet" / "weights").stat().st_ino == number


def test_what_is_damaged_in_local_is_never_called_good_at_home(place):
    path = place.local / "resume" / "step_000004" / "unet" / "weights"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    news = copied(place.local, place.home, place.queue_all)
    assert news == [
        f"resume/step_000004 is not copied to {place.home}: {path} has changed or is damaged; the next save takes its "
        "place"
    ]
    mirror = Mirror(place.local, place.home)
    place.queue_all(mirror)
    assert mirror.close() == [f"resume/step_000004 is not at {place.home}: what {place.local} holds of it is damaged"]
    assert place.newest() == 2
    assert content(place.home / "model") == place.models[4]


def test_a_model_that_a_kill_left_without_its_name_gets_it_back_though_nothing_can_replace_it(place):
    before = content(place.home / "model")
    (place.home / "model").rename(place.home / "model.old")
    (place.local / "model" / "state").write_bytes(b"x" * 300)
    (news,) = copied(place.local, place.home, lambda mirror: mirror.commit(place.local / "model"))
    assert "has changed or is damaged" in news
    assert content(place.home / "model") == before


def test_rotation_spares_what_is_being_copied_or_waits(place):
    mirror = Mirror(place.local, place.home)
    with mirror.changed:  # so that the thread takes nothing yet
        mirror.commit(step_folder(place.local / "resume", 4), keep=1)
        commit_step(place.local, 6)
        rotate(place.local / "resume", 6, keep=1, spare=mirror.holds)
        assert sorted(path.name for path in (place.local / "resume").iterdir()) == ["step_000004", "step_000006"]
        mirror.commit(step_folder(place.local / "resume", 6), keep=1)
        assert list(mirror.queue) == ["resume/step_000006"]
        rotate(place.local / "resume", 6, keep=1, spare=mirror.holds)
    assert [path.name for path in (place.local / "resume").iterdir()] == ["step_000006"]
    assert mirror.close() == []


def test_a_loose_file_waits_once_and_is_copied_as_it_is_then(place):
    mirror = Mirror(place.local, place.home)
    picture = place.local / "previews" / "step_000004.png"
    picture.parent.mkdir()
    picture.write_bytes(b"png")
    with mirror.changed:
        for number in range(5):
            (place.local / "log.jsonl").write_text(str(number))
            mirror.file(place.local / "log.jsonl")
        mirror.file(picture)
        assert list(mirror.queue) == ["log.jsonl", "previews/step_000004.png"]
    assert mirror.close() == []
    assert (place.home / "log.jsonl").read_text() == "4"
    assert (place.home / "previews" / "step_000004.png").read_bytes() == b"png"


def test_half_a_picture_of_a_killed_process_goes_and_other_files_stay(place):
    picture = place.local / "previews" / "b.png"
    picture.parent.mkdir()
    picture.write_bytes(b"png")
    (place.home / "previews").mkdir()
    for name in ("a.png.partial", "a.psd.partial", "a.png"):
        (place.home / "previews" / name).touch()
    copied(place.local, place.home, lambda mirror: mirror.file(picture))
    assert sorted(path.name for path in (place.home / "previews").iterdir()) == ["a.png", "a.psd.partial", "b.png"]


@pytest.mark.parametrize("lost", ["the folder that home lies in", "home itself"])
def test_where_a_drive_was_mounted_nothing_is_written_until_it_is_back(tmp_path, lost):
    place = Place(tmp_path)
    drive = tmp_path / "drive"
    drive.mkdir()
    place.home = place.home.rename(drive / "home")
    mirror = place.mirror()
    mirror.file(place.local / "log.jsonl")
    wait_until(lambda: not mirror.queue and not mirror.busy)
    away = drive if lost != "home itself" else place.home
    away.rename(tmp_path / "away")
    place.queue_all(mirror)
    wait_until(lambda: mirror.queue and all(item.tries >= 2 for item in list(mirror.queue.values())))
    assert not away.exists()
    assert mirror.news() == [
        f"{place.home} cannot be reached (No such file or directory); mount it again, until then what is saved is kept "
        f"in {place.local}"
    ]
    (tmp_path / "away").rename(away)
    assert mirror.close() == []
    place.check_all_is_there()
    assert len(mirror.news()) == 1


def wait_until(condition):
    waiting = threading.Event()
    for _ in range(60000):
        if condition():
            return
        waiting.wait(0.001)
    raise AssertionError("it never came")


def test_a_new_machine_gets_the_newest_state_the_log_and_the_settings(place, tmp_path):
    copied(place.local, place.home, place.queue_all)
    (place.home / "settings.yaml").write_text("seed: 1\n")
    new = tmp_path / "new"
    assert bring_back(new, place.home) == [f"step 4 was brought from {place.home} to {new}"]
    assert content(new / "resume" / "step_000004") == place.states[4]
    assert (new / "settings.yaml").read_text() == "seed: 1\n"
    assert (new / "log.jsonl").read_bytes() == (place.local / "log.jsonl").read_bytes()
    assert bring_back(new, place.home) == []
    assert leftovers(new) == []


def test_what_is_newer_here_or_as_new_is_left_alone(place):
    (place.local / "log.jsonl").write_text("mine")
    (place.home / "log.jsonl").write_text("older")
    assert bring_back(place.local, place.home) == []
    assert (place.local / "log.jsonl").read_text() == "mine"
    shutil.rmtree(place.local / "resume" / "step_000004")
    assert bring_back(place.local, place.home) == []


def test_a_damaged_state_at_home_is_named_and_the_one_before_comes(place, tmp_path):
    shutil.copytree(place.local / "resume", place.home / "resume", dirs_exist_ok=True)
    (place.home / "resume" / "step_000004" / "state").unlink()
    said = bring_back(tmp_path / "new", place.home)
    assert said[0] == f"skipping {place.home / 'resume' / 'step_000004'}: state is missing"
    assert newest_valid(tmp_path / "new" / "resume")[0].step == 2


def test_a_state_that_a_kill_left_without_its_name_gets_it_back(place, tmp_path):
    folder = place.home / "resume" / "step_000002"
    folder.rename(folder.with_name("step_000002.old"))
    bring_back(tmp_path / "new", place.home)
    assert place.newest() == 2
    assert newest_valid(tmp_path / "new" / "resume")[0].step == 2


def test_a_run_is_not_begun_again_where_home_may_hold_its_state(place, tmp_path):
    new, blocked = tmp_path / "new", tmp_path / "file"
    blocked.touch()
    with pytest.raises(
        DbkitError, match=r"cannot be reached \(Not a directory\), and a saved state could only be ther"
    ):
        bring_back(new, blocked / "home")
    assert bring_back(place.local, blocked / "home") == [
        f"{blocked / 'home'} cannot be reached (Not a directory): the run goes on from step 4, which {place.local} "
        "holds; mount it again"
    ]
    (place.home / "resume" / "step_000002" / "state").unlink()
    with pytest.raises(DbkitError, match=r"no saved state in .* is whole \(skipping .*: state is missing\); set start"):
        bring_back(new, place.home)
    shutil.rmtree(place.home / "resume")
    with pytest.raises(DbkitError, match="holds a finished model and no state to go on from; choose another output_di"):
        bring_back(new, place.home)
    shutil.rmtree(place.home / "model")
    assert bring_back(new, place.home) == []


def test_a_newer_model_takes_the_place_of_the_one_at_home(place):
    copied(place.local, place.home, place.queue_all)
    place.models[6] = content(commit_model(place.local, 6))
    copied(place.local, place.home, lambda mirror: mirror.commit(place.local / "model"))
    assert content(place.home / "model") == place.models[6]
    assert leftovers(place.home) == []
