"""Trackers are told what log.jsonl is told, once for each step, also over an interruption."""

import json
import os
import subprocess
import sys

import pytest

from dbkit import DbkitError, train
from dbkit.log import read_log

LOGGED = ("loss", "instance_loss", "class_loss", "learning_rate", "grad_norm")


@pytest.fixture
def logged(settings):
    """Settings of a short training that logs every step."""
    return {**settings, "log_interval": 1, "save_model_every_n_steps": None}


def test_tensorboard_shows_what_the_log_has_and_steps_that_are_taken_again_once(logged, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "logs"
    train(**{**logged, "max_train_steps": 2}, log_with="tensorboard", logging_dir=folder)
    train(**{**logged, "max_train_steps": 4}, log_with="tensorboard", logging_dir=folder)
    events = EventAccumulator(str(folder / "run"), purge_orphaned_data=True)
    events.Reload()
    lines = read_log(logged["output_dir"] / "log.jsonl")
    for name in LOGGED:
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx({line["step"]: line[name] for line in lines}, rel=1e-5)
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


def test_without_a_folder_the_trackers_files_lie_in_the_run(logged):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    train(**logged, log_with="tensorboard")
    assert list((logged["output_dir"] / "logs").glob("events.out.tfevents.*"))


def test_wandb_is_told_the_same_offline_and_one_run_is_one_run_there(logged, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in (2, 4):
        train(**{**logged, "max_train_steps": steps}, log_with="wandb")
    run = logged["output_dir"]
    name = (run / "wandb_id.txt").read_text()
    files = sorted((run / "logs").rglob("*.wandb"))
    assert len(files) == 2 and {path.stem for path in files} == {f"run-{name}"}
    # Its records hold the values as text. The second session logs the steps after the first one's.
    contents = [path.read_bytes() for path in sorted(files, key=lambda path: path.parent.name)]
    for line in read_log(run / "log.jsonl"):
        told = [json.dumps(line["loss"]).encode() in content for content in contents]
        assert told == ([True, False] if line["step"] <= 2 else [False, True])


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_said_before_anything_is_loaded(config, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DbkitError, match=f"log_with is {package}, which is not installed; pip install {package}"):
        train(config, log_with=package)


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_loaded(config, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DbkitError, match=r"logging_dir .*file/run cannot be made, since .*file cannot be written to"):
        train(config, log_with="tensorboard", logging_dir=tmp_path / "file")


def test_wandb_that_cannot_start_is_a_sentence(config):
    pytest.importorskip("wandb", reason="wandb is not installed")
    path = config.save(config.output_dir.with_name("train.yaml"))
    # A process of its own: wandb keeps the mode that it first started in.
    command = [sys.executable, "-m", "dbkit", "train", "--config", path, "--log_with", "wandb"]
    environment = {**os.environ, "WANDB_MODE": "of course"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "dbkit: wandb cannot start (" in done.stderr and "or set WANDB_MODE=offline" in done.stderr


def test_a_folder_without_a_tracker_is_refused(config):
    with pytest.raises(
        DbkitError, match="logging_dir has no effect without log_with; turn that on or leave logging_dir out"
    ):
        train(config, logging_dir="logs")
