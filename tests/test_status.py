"""status() tells how far a run is from its files alone, whatever happens to them meanwhile, and changes none."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from xml.etree import ElementTree

import pytest
from conftest import draw_photo

import dbkit
from dbkit import DbkitError, TrainConfig, status
from dbkit.checkpoint import commit, rotate, step_folder
from dbkit.cli import main
from dbkit.files import one_process, write_text
from dbkit.status import duration

HOLD = """
import sys
from pathlib import Path
from dbkit.files import one_process
with one_process(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """A real run of four steps that committed at step 2 and 4, of a LoRA, whose files are small. Do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    draw_photo(folder / "photos" / "one.png")
    dbkit.train(
        pretrained_model_name_or_path=str(model),
        instance_data_dir=folder / "photos",
        instance_prompt="photo of zwx thing",
        output_dir=folder / "dog",
        resolution=64,
        adapter="lora",
        max_train_steps=4,
        save_model_every_n_steps=2,
        log_interval=1,
        auto_test_model=False,
        judge_steps=False,
        learning_rate=1e-4,
        save_precision="fp32",
        device="cpu",
    )
    for name in ("step_000002.png", "step_000004.png", "step_000004/0.png"):  # as previews are named
        draw_photo(folder / "dog" / "previews" / name)
    return folder / "dog"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run, of which eight steps are now wanted, and six are in its log."""
    folder = shutil.copytree(trained, tmp_path / "runs" / "dog")
    write_text(folder / "settings.yaml", "max_train_steps: 8\n")
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        for step in (5, 6):
            log.write(json.dumps({"step": step, "loss": 0.5, "seconds_per_step": 30.0}) + "\n")
    return folder


@contextlib.contextmanager
def at_work(folder):
    """Another process that holds the folder's lock for the time of the block."""
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield
        process.stdin.close()


def write_five(folder):
    (folder / "a").write_bytes(b"12345")


def save(folder, step):
    """Commit a small state of a step."""
    commit(step_folder(folder / "resume", step), step, write_five, {})


def lines_of(shown):
    """The text of a status, its ages and figures that differ from run to run made equal."""
    text = re.sub(r"\d+ (s|min) ago", "AGE ago", str(shown))
    text = re.sub(r"\d+\.\d+ MB", "SIZE", text)
    return re.sub(r"\d\.\d{4},", "LOSS,", text).splitlines()


def snapshot(folder):
    """Everything in a folder, and when it was changed."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_finished_run_in_words(trained):
    shown = status(trained)
    assert (shown.step, shown.total, shown.finished, shown.at_work, shown.lost_steps) == (4, 4, True, False, 0)
    assert [step for step, _ in shown.losses] == [1, 2, 3, 4]
    logged = [json.loads(line)["loss"] for line in (trained / "log.jsonl").read_text().splitlines()]
    assert shown.loss == pytest.approx(sum(logged) / 4)
    lines = lines_of(shown)
    assert re.fullmatch(r"  [▁▂▃▄▅▆▇█]{4} steps 1 to 4", lines.pop(3))
    assert re.fullmatch(r"  speed: \S+ s a step, \S+ images a second", lines.pop(3))
    assert lines.pop(3) == "  learning rate: 0.0001"
    assert lines == [
        "dog: step 4 of 4 (100%), finished",
        f"  folder: {trained}",
        "  loss: LOSS, the mean of the last 4 in the log",
        "  log written: AGE ago",
        "  last saved state: step 4, AGE ago, SIZE, sizes are right",
        "  checkpoints: step 2",
        "  finished model: step 4, AGE ago",
        f"  newest preview: {trained / 'previews' / 'step_000004.png'}",
    ]


def test_an_unfinished_run_tells_what_is_left_and_what_would_be_lost(run):
    shown = status(run)
    assert (shown.step, shown.total, shown.finished, shown.at_work, shown.lost_steps) == (6, 8, False, False, 2)
    write_text(run / "log.jsonl", "".join(f'{{"step": {n}, "seconds_per_step": {n}.0}}\n' for n in (4, 5, 90, 6)))
    shown = status(run)
    # The median, so that one pause does not count.
    assert (shown.seconds_per_step, shown.seconds_left) == (5, 10)
    lines = lines_of(shown)
    assert lines[0] == "dog: step 6 of 8 (75%), stopped; train (the same cell or command) goes on from step 4"
    assert "  speed: 5 s a step" in lines
    assert "  steps to be taken again: 2" in lines


def test_epochs_leave_the_total_open(run):
    write_text(run / "settings.yaml", "num_train_epochs: 3\n")
    shown = status(run)
    assert (shown.total, shown.seconds_left, shown.finished) == (None, None, False)
    assert lines_of(shown)[0] == "dog: step 6, stopped; train (the same cell or command) goes on from step 4"
    shutil.rmtree(run / "model")
    (run / "log.jsonl").unlink()
    assert not status(run).finished


def test_the_step_to_use_is_told_of_those_that_are_whole(run):
    lines = [{"step": step, "validation_loss": loss} for step, loss in ((0, 0.3), (2, 0.15), (3, 0.1), (4, 0.2))]
    write_text(run / "figures.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    said = str(status(run))
    assert "  recommended: step 2 in checkpoints/step_000002: of the saved steps it gained the most" in said
    assert status(run).best.folder == run / "checkpoints" / "step_000002"
    next((run / "checkpoints" / "step_000002").glob("*.safetensors")).write_bytes(b"")
    assert status(run).recommended.step == 4


def test_a_run_that_has_only_begun_has_nothing_yet(tmp_path):
    write_text(tmp_path / "new" / "settings.yaml", "max_train_steps: 8\n")
    shown = status(tmp_path / "new")
    assert str(shown).splitlines() == [
        "new: step 0 of 8 (0%), stopped; train (the same cell or command) begins at step 0",
        f"  folder: {tmp_path / 'new'}",
        "  last saved state: none",
        "  steps to be taken again: 0",
    ]
    assert "<svg" not in shown._repr_html_()


@pytest.mark.skipif(os.name == "nt", reason="there the lock cannot be looked at")
def test_another_process_at_work_is_seen_and_keeps_its_lock(run):
    with at_work(run):
        shown = status(run)
        assert shown.at_work is True
        assert lines_of(shown)[0] == "dog: step 6 of 8 (75%), a process is at work"
        assert "  steps lost if it stopped now: 2" in lines_of(shown)
        assert any(line.endswith(" of training left") for line in lines_of(shown))
        with pytest.raises(DbkitError, match="another process is at work in"), one_process(run):
            pass
    assert status(run).at_work is False
    with one_process(run):  # looking left no lock behind
        assert status(run).at_work is True


def test_a_lock_that_cannot_be_looked_at_is_unknown(run):
    (run.parent / ".dog.lock").mkdir()
    shown = status(run)
    assert shown.at_work is None
    assert lines_of(shown)[0] == "dog: step 6 of 8 (75%), at work or not: unknown here"


def test_a_run_of_too_long_a_name_is_a_sentence():
    with pytest.raises(DbkitError, match=r"x[\\/]settings.yaml has too long a name \(.+\); choose a shorter one"):
        status("x" * 300)


def test_looking_changes_nothing(run):
    before = snapshot(run.parent)
    status(run, verify=True)._repr_html_()
    assert snapshot(run.parent) == before
    (run.parent / ".dog.lock").touch()
    before = snapshot(run.parent)
    str(status(run))
    assert snapshot(run.parent) == before


def test_a_missing_file_is_named_and_the_state_before_it_is_the_last(run):
    save(run, 3)
    gone = next(path for path in (run / "resume" / "step_000004").iterdir() if path.suffix == ".safetensors")
    gone.unlink()
    shown = status(run)
    assert (shown.home.last.step, shown.lost_steps) == (3, 2)
    assert f"  damaged: resume/step_000004: {gone.name} is missing" in lines_of(shown)


def test_a_changed_size_is_seen_at_once_and_a_changed_byte_when_asked_for(run):
    path = run / "checkpoints" / "step_000002" / "dog-000002.safetensors"
    damaged = f"  damaged: checkpoints/step_000002: {path.name} has changed or is damaged"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    assert "  checkpoints: step 2" in lines_of(status(run))
    lines = lines_of(status(run, verify=True))
    assert damaged in lines and "  checkpoints: step 2" not in lines
    assert "  last saved state: step 4, AGE ago, SIZE, verified" in lines
    path.write_bytes(whole[:-1])
    assert damaged in lines_of(status(run))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"step": 9, "files": {"a": 1}}', '{"step": 9, "files": {"a": {}}}'])
def test_a_state_without_a_readable_manifest_is_not_one(run, text):
    write_text(run / "resume" / "step_000009" / "manifest.json", text)
    shown = status(run)
    assert shown.home.last.step == 4
    sentence = "  damaged: resume/step_000009: it has no readable manifest"
    assert any(line.startswith(sentence) for line in lines_of(shown))


def test_a_state_under_the_name_of_another_step_is_not_one(run):
    shutil.copytree(run / "resume" / "step_000004", run / "resume" / "step_000009")
    assert "  damaged: resume/step_000009: it is of step 4" in lines_of(status(run))


def test_what_is_being_written_or_removed_is_no_damage(run):
    shutil.copytree(run / "resume" / "step_000004", run / "resume" / "step_000006.partial")
    # Rotation takes the manifest of an old one first.
    shutil.copytree(run / "resume" / "step_000004", run / "resume" / "step_000002")
    (run / "resume" / "step_000002" / "manifest.json").unlink()
    shown = status(run)
    assert [state.step for state in shown.home.states] == [4]
    assert shown.home.damaged == []


def test_a_checkpoint_that_is_being_removed_beside_an_older_one_that_stays_is_no_damage(run):
    for step in (1, 3):
        commit(step_folder(run / "checkpoints", step), step, write_five, {})
    (run / "checkpoints" / "step_000002" / "manifest.json").unlink()
    assert [saved.step for saved in status(run).home.checkpoints] == [1, 3]
    (run / "checkpoints" / "step_000003" / "manifest.json").unlink()
    assert [saved.folder.name for saved in status(run).home.damaged] == ["step_000002", "step_000003"]


def test_files_may_come_and_go_while_it_looks(tmp_path):
    run = tmp_path / "run"
    write_text(run / "settings.yaml", "max_train_steps: 100000\n")
    save(run, 1)
    ended = threading.Event()

    def train():
        for step in range(2, 60):
            write_text(run / "log.jsonl", json.dumps({"step": step, "loss": 0.5}) + "\n")
            save(run, step)
            rotate(run / "resume", step, keep=1)
            (run / "log.jsonl").unlink()
        ended.set()

    writer = threading.Thread(target=train)
    writer.start()
    seen = []
    while not ended.is_set():
        shown = status(run)
        assert shown.home.damaged == [] and shown.home.last
        seen.append(shown.home.last.step)
    writer.join()
    assert seen == sorted(seen) and len(set(seen)) > 3


def test_a_preview_that_is_gone_by_now_is_not_shown(run):
    shown = status(run)
    assert shown._repr_html_().count("data:image/jpeg;base64,") == 1
    shutil.rmtree(run / "previews")
    assert "<img" not in shown._repr_html_()
    assert status(run).newest_preview is None


def test_in_a_notebook_it_is_a_table_with_the_curve_and_names_are_text(run):
    run = run.rename(run.with_name("<b>dog & cat"))
    shown = status(run)._repr_html_()
    assert "<b>dog" not in shown
    page = ElementTree.fromstring(f"<div>{shown}</div>".replace(' alt="newest preview">', "/>"))
    rows = {row[0].text: row[1].text for row in page.iter("tr")}
    assert rows["folder"] == str(run)
    assert rows["steps to be taken again"] == "2"
    assert [len(line.get("points").split()) for line in page.iter("polyline")] == [6, 6]


def test_a_loss_that_is_no_number_is_left_out(run):
    write_text(run / "log.jsonl", '{"step": 1, "loss": null}\n{"step": 2, "loss": "x"}\n{"step": 3, "loss": 0.25}\n')
    shown = status(run)
    assert (shown.losses, shown.loss, shown.seconds_per_step) == ([(3, 0.25)], 0.25, None)


@pytest.mark.parametrize(
    "damage",
    [
        '"images": 1' + "0" * 400,
        '"gpu_memory": 1' + "0" * 400,
        '"loss": 1e308}\n{"step": 2, "loss": -1e308}\n{"step": 3, "seconds_per_step": 1e308',
        '"loss": 1.0}\n{"step": 1' + "0" * 400,
        '"loss": 1.0}\n{"step": -1',
    ],
)
def test_numbers_that_nothing_can_be_reckoned_with_are_left_out(run, damage):
    write_text(run / "log.jsonl", '{"step": 1, "loss": 0.5, "seconds_per_step": 0.5}\n{"step": 3, ' + damage + "}\n")
    shown = status(run)
    assert shown.losses[0] == (1, 0.5) and shown.step == 4 and shown.images_per_second is shown.gpu_memory is None
    assert "speed: 0.5 s a step" in str(shown) and shown._repr_html_()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (90, "2 min"),
        (3599, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (47 * 3600, "47 h 0 min"),
        (72 * 3600, "3 days"),
    ],
)
def test_times_are_plain_words(seconds, words):
    assert duration(seconds) == words


@pytest.fixture
def mirrored(run, tmp_path):
    """(home, local): a run that works in a local folder, two commits ahead of its home on Drive."""
    local = shutil.copytree(run, tmp_path / "local" / "dog")
    save(local, 5)
    save(local, 6)
    facts = {
        "home": str(run),
        "local": str(local),
        "copying": {"name": "resume/step_000006", "done": 30, "size": 120},
        "waiting": ["checkpoints/step_000006", "model"],
        "failed": "the Drive is full; free some space",
        "since": time.time() - 60,
        "updated": time.time() - 180,
    }
    for folder in (run, local):
        write_text(folder / "mirror.json", json.dumps(facts))
    return run, local


def change(folder, **changes):
    path = folder / "mirror.json"
    write_text(path, json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}))


@pytest.mark.parametrize("asked", [0, 1], ids=["home", "local"])
def test_a_run_that_is_copied_home_shows_both_places_whichever_is_asked_for(mirrored, asked):
    home, local = mirrored
    shown = status(mirrored[asked])
    assert (shown.home.folder, shown.local.folder) == (home, local)
    assert (shown.home.last.step, shown.local.last.step) == (4, 6)
    assert (shown.lost_steps, shown.lost_steps_without_local) == (0, 2)
    lines = lines_of(shown)
    assert lines[:2] == [
        "dog: step 6 of 8 (75%), stopped; train (the same cell or command) goes on from step 6",
        f"  folder: {local}",
    ]
    assert lines[5:] == [
        "  log written: AGE ago",
        "  last saved state: step 6, AGE ago, 5 bytes, sizes are right",
        "  checkpoints: step 2",
        "  finished model: step 4, AGE ago",
        "  steps to be taken again: 0; 2 if this machine's disk went too",
        f"  home: {home}",
        "  last saved state at home: step 4, AGE ago, SIZE, sizes are right",
        "  checkpoints at home: step 2",
        "  finished model at home: step 4, AGE ago",
        "  copying to home: as of AGE ago",
        "  being copied: resume/step_000006, 25% of 120 bytes",
        "  waiting to be copied: checkpoints/step_000006, model",
        "  copying failed: the Drive is full; free some space",
        f"  newest preview: {local / 'previews' / 'step_000004.png'}",
    ]


def test_a_finished_run_that_is_not_home_yet_says_what_this_disk_alone_holds(mirrored):
    home, local = mirrored
    commit(local / "model", 8, write_five, {})
    lines = lines_of(status(home))
    assert lines[0] == "dog: step 8 of 8 (100%), finished"
    assert "  steps to be taken again: 0; 4 if this machine's disk went too" in lines
    shutil.rmtree(home / "model")
    shutil.copytree(local / "model", home / "model")
    assert not any("steps to be" in line for line in lines_of(status(home)))


@pytest.mark.skipif(os.name == "nt", reason="there the lock cannot be looked at")
def test_a_process_at_work_in_either_place_is_seen(mirrored):
    for folder in mirrored:
        with one_process(folder):
            assert status(mirrored[0]).at_work is True


def test_the_local_folders_word_on_copying_is_the_newer_one(mirrored):
    home, local = mirrored
    change(local, copying=None, waiting=[], failed=None)
    assert not any("copied" in line or "failed" in line for line in lines_of(status(home)))


def test_of_another_machine_the_home_tells_what_it_last_knew(mirrored):
    home, local = mirrored
    shutil.rmtree(local)
    shown = status(home)
    assert shown.local is None
    # It may train there.
    assert lines_of(shown)[0] == "dog: step 6 of 8 (75%), no process here is at work"
    assert lines_of(shown)[-5:-1] == [
        "  copying to home: as of AGE ago, on another machine",
        "  being copied: resume/step_000006, 25% of 120 bytes",
        "  waiting to be copied: checkpoints/step_000006, model",
        "  copying failed: the Drive is full; free some space",
    ]


def test_a_local_folder_of_another_run_is_not_taken_for_this_ones(mirrored, tmp_path):
    home, local = mirrored
    change(local, home=str(tmp_path / "other"))
    assert status(home).local is None
    (local / "mirror.json").unlink()
    assert status(home).local is None


def test_a_home_that_cannot_be_read_is_said_and_the_local_folder_shown(mirrored):
    _, local = mirrored
    change(local, home="/" + "x" * 300)  # the system's refusal stands for that of a Drive that is gone
    shown = status(local)
    assert shown.place.last.step == 6
    lines = lines_of(shown)
    assert "  last saved state at home: unknown, the folder cannot be read (File name too long)" in lines
    assert "  steps lost if it stopped now: 0" in lines


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "{}"),
        *('{"local": 5}', '{"local": "\\u0000"}', '{"copying": 3}', '{"copying": {"name": "a"}}', '{"copying": {}}'),
        *('{"waiting": null}', '{"updated": "now"}', '{"updated": Infinity}', '{"updated": -1e308}'),
    ],
)
def test_a_damaged_mirror_file_is_no_error(run, text):
    whole = {"home": "a", "local": "b", "copying": None, "waiting": [], "failed": None, "updated": 1}
    with contextlib.suppress(ValueError, TypeError):
        text = json.dumps(whole | json.loads(text)) if text != "{}" else text
    write_text(run / "mirror.json", text)
    shown = status(run)
    assert shown.local is None and shown.home.last.step == 4
    assert str(shown) and shown._repr_html_()


def test_without_a_name_it_is_the_run_of_the_workspace_that_was_worked_on_last(run, workspace_folder):
    for number, name in enumerate(("old", "new", "older")):
        path = workspace_folder / "runs" / name / "settings.yaml"
        write_text(path, f"max_train_steps: {number + 1}\n")
        os.utime(path, (1000 - number, 1000 - number))
    os.utime(workspace_folder / "runs" / "new" / "settings.yaml", (2000, 2000))
    (workspace_folder / "runs" / "notes").mkdir()
    assert status().home.folder == workspace_folder / "runs" / "new"


def test_without_any_run_that_is_said_and_no_workspace_made(workspace_folder):
    with pytest.raises(DbkitError) as error:
        status()
    runs = workspace_folder / "runs"
    assert str(error.value) == f"there is no run in {runs} yet; train one, or give the folder of a run"
    assert not workspace_folder.exists()


def test_a_run_that_is_not_there_is_refused_with_the_nearest_name(run):
    for name, hint in (("dgo", "did you mean 'dog'?"), ("zebra", "check the path")):
        with pytest.raises(DbkitError) as error:
            status(run.with_name(name))
        assert str(error.value) == f"there is no run {run.with_name(name)}; {hint}"


def test_a_folder_that_is_no_run_is_refused(run, photos):
    with pytest.raises(DbkitError) as error:
        status(photos)
    assert str(error.value) == f"{photos} is no folder of a run; give the output_dir of a training"
    with pytest.raises(DbkitError) as error:
        status(run.parent)
    assert str(error.value) == f"{run.parent} is no folder of a run; give one of the runs in it: dog"


def test_the_command_prints_it(run, capsys):
    assert main(["status", str(run)]) == 0
    assert capsys.readouterr().out.startswith(
        "dog: step 6 of 8 (75%), stopped; train (the same cell or command) goes on from step 4\n"
    )
    assert main(["status", str(run.with_name("dgo"))]) == 2
    assert capsys.readouterr().err == f"dbkit: there is no run {run.with_name('dgo')}; did you mean 'dog'?\n"


def test_a_training_that_goes_on_afterwards_is_not_disturbed(trained, model, tmp_path):
    run = shutil.copytree(trained, tmp_path / "dog")
    settings = TrainConfig.load(run / "settings.yaml")
    status(run, verify=True)
    assert dbkit.train(settings, output_dir=run, max_train_steps=5) == run / "model"
    assert (status(run).step, status(run).finished) == (5, True)
