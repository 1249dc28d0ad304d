"""log.jsonl has one line for each logged step, the mean of the steps since the last one, and survives a kill."""

import json

import pytest
import torch

from dbkit import DbkitError
from dbkit.log import Log, read_log


def add(log: Log, step: int, loss: float, grad_norm: float = 1.0) -> None:
    log.add(step, torch.tensor([loss, loss / 2, loss / 4]), torch.tensor(grad_norm), 1e-4)


def test_lines_come_at_step_1_at_every_interval_and_at_the_end(tmp_path):
    log = Log(tmp_path, done=0, total=8, interval=3)
    for step in range(1, 9):
        add(log, step, 1.0)
    assert [line["step"] for line in read_log(log.path)] == [1, 3, 6, 8]


def test_a_line_holds_the_means_since_the_last_line(tmp_path):
    log = Log(tmp_path, done=0, total=4, interval=4)
    for step, loss in enumerate((8.0, 1.0, 2.0, 6.0), 1):
        add(log, step, loss, grad_norm=float(step))
    first, last = read_log(log.path)
    assert (first["loss"], first["instance_loss"], first["class_loss"]) == (8, 4, 2)
    assert (last["loss"], last["instance_loss"], last["class_loss"]) == (3, 1.5, 0.75)
    assert (last["learning_rate"], last["grad_norm"]) == (1e-4, 4)
    assert last["seconds_per_step"] > 0


def test_a_tracker_that_cannot_write_is_said_once_and_ends_nothing(tmp_path, capsys):
    told = []

    def track(step, values):
        told.append(step)
        raise OSError(28, "No space left on device")

    log = Log(tmp_path, 0, 4, 1, track)
    for step in range(1, 5):
        add(log, step, 1.0)
    log.close()
    assert told == [1] and capsys.readouterr().out.count("the tracker cannot write") == 1
    assert [line["step"] for line in read_log(log.path)] == [1, 2, 3, 4]


def test_steps_that_are_taken_again_are_logged_once(tmp_path):
    log = Log(tmp_path, done=0, total=6, interval=1)
    for step in range(1, 7):
        add(log, step, 1.0)
    log = Log(tmp_path, done=4, total=8, interval=1)
    for step in range(5, 9):
        add(log, step, 2.0)
    assert [(line["step"], line["loss"]) for line in read_log(log.path)] == [
        *((step, 1) for step in range(1, 5)),
        *((step, 2) for step in range(5, 9)),
    ]


def test_a_last_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_log(path) == [{"step": 1}]
    add(Log(tmp_path, done=1, total=2, interval=1), 2, 1.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_line_that_is_nested_without_end_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n' + "[" * 100_000)
    assert read_log(path) == [{"step": 1}]


def test_a_log_that_is_not_there_is_empty(tmp_path):
    assert read_log(tmp_path / "log.jsonl") == []


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_and_is_not_logged(tmp_path, loss):
    log = Log(tmp_path, done=0, total=8, interval=2)
    add(log, 1, 1.0)
    with pytest.raises(DbkitError, match=rf"the loss is {loss} at step 2; lower learning_rate and train again"):
        add(log, 2, loss)
    assert [line["step"] for line in read_log(log.path)] == [1]


def test_a_first_step_without_gradient_stops_the_run(tmp_path):
    log = Log(tmp_path, done=0, total=8, interval=2)
    with pytest.raises(DbkitError, match="the first step gave no gradient, so nothing would be learnt"):
        add(log, 1, 1.0, grad_norm=0.0)


def test_an_infinite_gradient_norm_is_still_json(tmp_path):
    log = Log(tmp_path, 0, 10, 1)
    log.add(1, torch.ones(3), torch.tensor(float("inf")), 1e-6)
    log.close()
    assert read_log(tmp_path / "log.jsonl")[0]["grad_norm"] is None
    assert "Infinity" not in (tmp_path / "log.jsonl").read_text(encoding="utf-8")
