"""What a run keeps: it trains on whatever its disks do, says what is not saved, and loses nothing that was."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults import OPERATIONS, failing
from several_processes import plain
from test_train import assert_equal, at_unet_pass, log_of, state_of, stop_in_pass

from dbkit import DbkitError, TrainConfig, keeper, train
from dbkit.checkpoint import find_fault, newest_valid
from dbkit.models import read_weights
from dbkit.resume import changes_since
from dbkit.settings import replace

SAVES = {"max_train_steps": 4, "save_model_every_n_steps": 1, "log_interval": 1}


@pytest.fixture
def saving(settings, smaller_model) -> dict:
    """Settings of a short training that saves after each step."""
    return {**settings, "pretrained_model_name_or_path": str(smaller_model), **SAVES}


def under_faults(settings: dict, cases: list[tuple[dict, bool]], folder: Path) -> list[dict]:
    """Train once under each fault, apart: with a local_dir that is well, and once more when the fault has ended."""
    place, result = folder / "failing", folder / "results.json"
    place.mkdir()
    program = Path(__file__).with_name("train_under_faults.py")
    arguments = [place, json.dumps(plain(settings)), json.dumps(cases), result]
    with failing(place) as faults:
        env = {**os.environ, **faults.env, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, program, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(result.read_text())


def assert_whole(run: Path, expected: dict) -> None:
    assert find_fault(run / "model", step=4) is None
    assert_equal(read_weights(run / "model", "unet"), expected)
    assert newest_valid(run / "resume")[0].step == 4


def test_no_fault_of_a_runs_home_ends_a_training_or_costs_what_was_trained(saving, tmp_path):
    expected = read_weights(train(**saving), "unet")
    kinds = ["EIO", "ENOSPC", "ENOTCONN", "short", "corrupt", "ESTALE"]
    cases = [
        ({"operation": operation, "fault": kind if operation in ("write", "read") or kind not in kinds[3:5] else "EIO"})
        for operation, kind in zip(OPERATIONS, kinds * 2)
    ]
    passing = [({**case, "times": 3}, True) for case in cases]
    lasting = [({"operation": "any", "fault": fault, "times": -1}, True) for fault in ("ENOTCONN", "ENOSPC", "stall")]
    results = under_faults(saving, [*passing, *lasting], tmp_path)
    for number, ((fault, _), result) in enumerate(zip([*passing, *lasting], results)):
        home, local = (folder / f"run{number}" for folder in (tmp_path / "failing", tmp_path / "local"))
        assert result["hits"] > 0 or fault["operation"] in ("truncate", "rmdir", "unlink", "list", "close"), fault
        # The model is where train() says, and in the end at home.
        assert result["first"]["made"] == str((local if fault["times"] < 0 else home) / "model"), (fault, result)
        assert result["again"]["made"] == str(home / "model"), (fault, result)
        for run in (home, local):
            assert_whole(run, expected)
        if fault["times"] < 0:
            assert f"model is not at {home}" in result["first"]["said"]
            assert "it is kept in" in result["first"]["said"]


def test_a_disk_that_fails_under_a_run_is_said_and_what_it_costs_is_trained_again(saving, tmp_path):
    expected = read_weights(train(**saving), "unet")
    cases = [
        ({"operation": operation, "fault": fault, "times": times}, False)
        for operation, fault in (("write", "ENOSPC"), ("fsync", "EIO"), ("rename", "EIO"), ("mkdir", "ENOSPC"))
        for times in (6 if operation == "write" else 2, -1)
    ]
    for number, ((fault, _), result) in enumerate(zip(cases, under_faults(saving, cases, tmp_path))):
        run, (first, again) = tmp_path / "failing" / f"run{number}", (result["first"], result["again"])
        assert result["hits"] > 0
        if fault["times"] > 0:
            assert first["made"] == str(run / "model"), (fault, result)
            assert "could not be saved" in first["said"] and "saving works again" in first["said"], (fault, result)
        else:
            said = r"DiskError: the finished model could not be written: .*; the state of step 1 is saved, train"
            assert re.match(said, first["made"]), (fault, result)
            # A problem that lasts is said when it comes, and at the end.
            assert re.findall("the state of step (.) could not be saved", first["said"]) == ["2", "4"], (fault, result)
        assert again["made"] == str(run / "model"), (fault, result)
        assert_whole(run, expected)


@pytest.mark.parametrize(
    ("changes", "step"), [({"save_every_n_minutes": 1e-6}, 2), ({"session_minutes": 1e-6}, 1), ({}, 0)]
)
def test_a_state_is_saved_when_its_time_has_come(saving, changes, step):
    """By minutes after each step here, and once before the session's end, which is over at once."""

    def end():
        raise RuntimeError("the machine is gone")

    saving |= {"save_model_every_n_steps": None, "save_every_n_minutes": None, **changes}
    with at_unet_pass(3, end), pytest.raises(RuntimeError, match="the machine is gone"):
        train(**saving)
    state, _ = newest_valid(saving["output_dir"] / "resume")
    assert (state.step if state else 0) == step


def test_a_stop_file_stops_a_run_as_the_stop_button_does(settings, tmp_path):
    straight = train(**{**settings, **SAVES, "output_dir": tmp_path / "straight"})
    config = {**settings, **SAVES, "save_model_every_n_steps": None}
    run = config["output_dir"]
    with (
        at_unet_pass(2, (run / "STOP").touch),
        pytest.raises(KeyboardInterrupt, match="stopped after step 2 of 4; the state of step 2 is saved, train"),
    ):
        train(**config)
    # The file has been heard, and does not stop the next session.
    train(**config)
    assert [line["step"] for line in log_of(run)] == [1, 2, 3, 4] and not (run / "STOP").exists()
    assert_equal(state_of(run), state_of(straight.parent))


@pytest.mark.parametrize("place", ["fast", "home"])
def test_a_folder_named_stop_stops_nothing_and_is_said(saving, tmp_path, monkeypatch, capsys, place):
    monkeypatch.setattr(keeper, "LOOK_EVERY", 0.001)
    folder = tmp_path / place / "run" / "STOP"
    folder.mkdir(parents=True)
    train(**{**saving, "output_dir": tmp_path / "home" / "run", "local_dir": tmp_path / "fast"})
    said = capsys.readouterr().out
    assert f"{folder} is a folder, which stops nothing; a file of that name does" in said
    assert "4 of 4 steps are done" in said and folder.is_dir()


@pytest.mark.parametrize("gone", ["renamed", "deleted"])
def test_a_run_whose_folder_goes_while_it_trains_says_so_and_is_a_whole_run_again(saving, tmp_path, capsys, gone):
    straight = train(**{**saving, "output_dir": tmp_path / "straight"})
    run = saving["output_dir"]
    settings = replace(TrainConfig(**saving), start_over=True)
    action = (lambda: shutil.rmtree(run)) if gone == "deleted" else lambda: run.rename(tmp_path / "aside")
    capsys.readouterr()
    with at_unet_pass(3, action):
        made = train(settings)
    said = capsys.readouterr().out
    assert said.count(f"{run} was deleted or renamed while it trains; from step 3 on it is saved in a new folder") == 1
    assert_equal(read_weights(made, "unet"), read_weights(straight, "unet"))
    assert TrainConfig.load(run / "settings.yaml") == settings
    train(settings)
    assert "4 steps done already" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="Windows has no way to send itself Ctrl-C alone")
def test_a_stop_that_comes_too_late_for_the_training_stops_what_would_come_after_it(settings, monkeypatch):
    train_module = importlib.import_module("dbkit.train")  # dbkit.train is the function
    look = train_module._look

    def look_while_someone_asks(*arguments):
        if arguments[-1] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return look(*arguments)

    monkeypatch.setattr(train_module, "_look", look_while_someone_asks)
    with pytest.raises(KeyboardInterrupt, match="all 2 steps were done already; the model is in "):
        train(**settings)
    assert (settings["output_dir"] / "model" / "model_index.json").exists()


def test_a_stop_file_that_comes_while_a_run_starts_stops_it_after_its_first_step(settings, monkeypatch):
    train_module = importlib.import_module("dbkit.train")  # dbkit.train is the function
    run, load = settings["output_dir"], train_module.load_base

    def load_while_someone_asks(config):
        (run / "STOP").touch()
        return load(config)

    monkeypatch.setattr(train_module, "load_base", load_while_someone_asks)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 1 of 2"):
        train(**settings)


def test_a_stop_file_at_home_stops_a_run_that_works_elsewhere(settings, tmp_path, monkeypatch):
    """As one would put it on Google Drive from a telephone."""
    monkeypatch.setattr(keeper, "LOOK_EVERY", 0.01)
    home = settings["output_dir"]
    config = {**settings, "local_dir": tmp_path / "fast", "max_train_steps": 1000}
    with at_unet_pass(2, (home / "STOP").touch), pytest.raises(KeyboardInterrupt, match="stopped after step"):
        train(**config)
    state, _ = newest_valid(home / "resume")
    assert 2 <= state.step < 1000
    train(**{**config, "max_train_steps": state.step + 1})
    assert not (home / "STOP").exists() and read_weights(home / "model", "unet")


def test_a_full_disk_before_the_first_step_is_refused_with_what_takes_less(config, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**7))
    with pytest.raises(DbkitError, match=r"this run needs .* 10.0 MB are free; .* space .*; resume_state small or"):
        train(config)


@pytest.mark.parametrize("kind", ["small", "weights"])
def test_a_smaller_state_goes_on_near_the_exact_one_and_says_what_it_lacks(settings, tmp_path, capsys, kind):
    settings |= {"max_train_steps": 6, "train_text_encoder": True, "use_ema": True, "learning_rate": 1e-3}
    runs, sizes = {}, {}
    for name in ("exact", kind):
        own = {**settings, "output_dir": tmp_path / name, "resume_state": name}
        train(**{**own, "max_train_steps": 3})
        (state,) = (tmp_path / name / "resume").iterdir()
        sizes[name] = sum(path.stat().st_size for path in state.iterdir())
        capsys.readouterr()
        runs[name] = read_weights(train(**own), "unet")
        said = capsys.readouterr().out
    assert ("moments were saved in 8 bit" if kind == "small" else "the optimizer begins anew") in said
    # Weights and their averages are 4 + 4 bytes, moments 8; small tensors have longer heads.
    share = {"small": 10.5 / 16, "weights": 8.5 / 16}[kind]
    assert sizes[kind] < share * sizes["exact"]
    start = read_weights(Path(settings["pretrained_model_name_or_path"]), "unet")
    off, moved = (
        sum(float((runs["exact"][n] - other[n]).square().sum()) for n in start) ** 0.5 for other in (runs[kind], start)
    )
    # AdamW that begins anew takes steps of full size at once.
    assert 0 < off < {"small": 0.02, "weights": 0.8}[kind] * moved


def test_what_changed_since_is_said(config, capsys):
    train(config)
    capsys.readouterr()
    train(config, max_train_steps=3, learning_rate=2e-4, save_precision="fp16", session_minutes=60)
    said = capsys.readouterr().out
    assert "changed since, from here on: max_train_steps was 2 and is 3, learning_rate was 0.0001 and is 0.000" in said
    assert "save_precision was fp32 and is fp16" in said and "session_minutes was" not in said
    same = replace(config, max_train_steps=3, learning_rate=2e-4, save_precision="fp16")
    assert changes_since(same, config.output_dir) == []


def test_a_trained_model_as_base_is_a_new_run_and_said_to_be(config, tmp_path, capsys):
    made = train(config)
    train(config, pretrained_model_name_or_path=str(made), output_dir=tmp_path / "next")
    said = capsys.readouterr().out
    assert f"{made} was trained for 2 steps; this is a new run that begins there, with an optimizer of its own" in said
    assert [line["step"] for line in log_of(tmp_path / "next")] == [1, 2]


def test_the_folder_of_another_run_is_not_worked_in(settings, tmp_path):
    train(**{**settings, "output_dir": tmp_path / "one" / "run", "local_dir": tmp_path / "fast"})
    with pytest.raises(DbkitError, match=r"fast/run is where the run .*one/run works; choose another local_dir for"):
        train(**{**settings, "output_dir": tmp_path / "two" / "run", "local_dir": tmp_path / "fast"})


def test_a_run_is_brought_back_from_its_home_to_an_empty_machine(settings, tmp_path):
    settings |= {**SAVES, "output_dir": tmp_path / "home" / "run"}
    straight = train(**{**settings, "output_dir": tmp_path / "straight"})
    stop_in_pass(TrainConfig(**settings), number=2, step=2, local_dir=tmp_path / "first")
    train(**settings, local_dir=tmp_path / "second")
    home = settings["output_dir"]
    assert_equal(state_of(home), state_of(straight.parent))
    assert [line["step"] for line in log_of(home)] == [1, 2, 3, 4]
    kept = sorted(path.name for path in (home / "checkpoints").iterdir())
    assert kept == ["step_000001", "step_000002", "step_000003"]
    assert log_of(tmp_path / "second" / "run") == log_of(home)


def test_an_older_run_of_another_machine_is_moved_aside_and_not_mixed_in(saving, tmp_path, capsys):
    home = tmp_path / "home" / "run"
    train(**{**saving, "output_dir": home, "local_dir": tmp_path / "one"})
    begun = {**saving, "output_dir": home, "learning_rate": 1e-3, "max_train_steps": 2}
    expected = read_weights(train(**begun, local_dir=tmp_path / "two", start_over=True), "unet")
    capsys.readouterr()
    made = train(**begun, local_dir=tmp_path / "one")
    assert (
        f"{tmp_path}/one/run holds an older run than {home}; it is moved to {tmp_path}/one/run-1"
        in capsys.readouterr().out
    )
    assert made == home / "model" and newest_valid(home / "resume")[0].step == 2
    assert_equal(read_weights(made, "unet"), expected)
    assert find_fault(tmp_path / "one" / "run-1" / "model", step=4) is None


def test_a_run_that_began_anew_while_its_home_was_away_is_not_undone(saving, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(keeper, "PATIENCE", 1.0)
    home = tmp_path / "drive" / "run"
    saving |= {"output_dir": home, "local_dir": tmp_path / "fast"}
    train(**saving)
    away = home.parent.rename(tmp_path / "away")
    home.parent.touch()  # where it was mounted there is something else
    with pytest.raises(
        DbkitError, match=r"drive/run cannot be reached \(.+\), so the run there cannot be moved aside; mount"
    ):
        train(**saving, start_over=True)
    # The machine is a new one, and begins anew although nobody knows what home holds.
    (tmp_path / "fast" / "run").rename(tmp_path / "fast" / "old")
    home.parent.unlink()
    begun = {**saving, "learning_rate": 1e-3, "max_train_steps": 2}
    expected = read_weights(train(**begun), "unet")
    shutil.rmtree(home.parent)
    away.rename(home.parent)
    assert_equal(read_weights(train(**begun), "unet"), expected)
    assert "holds an older run than" in capsys.readouterr().out
    assert find_fault(home.parent / "run-1" / "model", step=4) is None


def test_a_home_that_is_not_mounted_is_said_and_not_made_anew(saving, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(keeper, "PATIENCE", 1.0)
    home = tmp_path / "mounted" / "drive" / "run"
    saving |= {"output_dir": home, "local_dir": tmp_path / "fast"}
    train(**saving)
    home.parent.rename(tmp_path / "away")
    made = train(**{**saving, "max_train_steps": 5})
    said = capsys.readouterr().out
    assert f"{home} cannot be reached" in said and "the run goes on from step 4" in said
    assert made == tmp_path / "fast" / "run" / "model" and not home.parent.exists()


def test_a_model_that_another_machine_trained_further_stays(saving, tmp_path):
    home = tmp_path / "home" / "run"
    saving |= {"output_dir": home}
    train(**{**saving, "max_train_steps": 2}, local_dir=tmp_path / "one")
    train(**saving, local_dir=tmp_path / "two")
    config = TrainConfig(**{**saving, "max_train_steps": 6})
    stop_in_pass(config, number=1, step=5, local_dir=tmp_path / "one")
    assert find_fault(home / "model", step=4) is None and find_fault(home / "resume" / "step_000005") is None


def test_checkpoints_without_a_state_are_not_mixed_with_a_new_run(saving, tmp_path):
    run = train(**saving).parent
    for name in ("resume", "model"):
        shutil.rmtree(run / name)
    with pytest.raises(DbkitError, match="holds checkpoints and no state to go on from; choose another output_dir"):
        train(**{**saving, "learning_rate": 1e-3})
    train(**{**saving, "learning_rate": 1e-3}, start_over=True)
    assert find_fault(run.with_name("run-1") / "checkpoints" / "step_000003") is None


def test_files_of_other_programs_that_go_end_nothing(saving, tmp_path):
    logs = tmp_path / "fast" / "run" / "logs"
    logs.mkdir(parents=True)
    (logs / "gone").symlink_to(tmp_path / "nowhere")
    (logs / "kept.txt").write_text("kept")
    home = tmp_path / "home" / "run"
    train(**{**saving, "output_dir": home, "local_dir": tmp_path / "fast"})
    assert (home / "logs" / "kept.txt").read_text() == "kept" and not (home / "logs" / "gone").exists()


def test_a_run_that_works_at_home_again_is_not_looked_for_elsewhere(saving, tmp_path, capsys):
    home = tmp_path / "home" / "run"
    saving |= {"output_dir": home}
    stop_in_pass(TrainConfig(**saving), number=2, step=2, local_dir=tmp_path / "fast")
    shutil.rmtree(home / "resume")
    shutil.rmtree(home / "checkpoints")
    capsys.readouterr()
    train(**{**saving, "max_train_steps": 1})
    assert f"{tmp_path}/fast/run holds step 2 of this run, which is newer; give local_dir" in capsys.readouterr().out
    assert not (home / "mirror.json").exists()


def test_starting_over_moves_both_folders_aside(settings, tmp_path):
    settings |= {"output_dir": tmp_path / "home" / "run", "local_dir": tmp_path / "fast"}
    train(**settings)
    train(**settings, start_over=True)
    for folder in ("home", "fast"):
        for run in ("run", "run-1"):
            assert find_fault(tmp_path / folder / run / "model", step=2) is None
