"""A run is watched from its files, in one place that is written over, until it ends or somebody has seen enough."""

import contextlib
import queue
import shutil
import signal
import sys
import threading

import pytest
from jupyter_client.manager import KernelManager
from test_status import at_work, run, trained  # noqa: F401

from dbkit import DbkitError, watch
from dbkit.cli import main
from dbkit.mirror import Mirror
from dbkit.resume import locked
from dbkit.status import status_at_work


def test_a_run_at_which_nobody_works_is_shown_once(run, capsys):  # noqa: F811
    assert watch(run) is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dog: step 6 of 8 (75%), stopped; train (the same cell or command) goes on from step 4"
    assert sum(line.startswith("dog: ") for line in lines) == 1 and "  steps to be taken again: 2" in lines


@pytest.mark.skipif(sys.platform == "win32", reason="there the lock cannot be looked at")
def test_it_goes_on_as_long_as_somebody_works_at_the_run(run, monkeypatch, capsys):  # noqa: F811
    with contextlib.ExitStack() as stack:
        stack.enter_context(at_work(run))
        # Instead of waiting, the other process ends.
        monkeypatch.setattr("time.sleep", lambda seconds: stack.close())
        watch(run)
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dog: ")]
    assert heads[0].startswith("dog: step 6 of 8 (75%), a process is at work, loss ")
    assert heads[1:] == ["dog: step 6 of 8 (75%), stopped; train (the same cell or command) goes on from step 4"]


@pytest.mark.skipif(sys.platform == "win32", reason="there the lock cannot be looked at")
def test_it_waits_for_a_run_that_a_training_moves_aside_to_start_over(run, monkeypatch, capsys):  # noqa: F811
    aside = run.with_name("dog-1")
    with contextlib.ExitStack() as stack:
        stack.enter_context(at_work(run))
        # Instead of waiting, the other process goes on.
        happens = iter([lambda: run.rename(aside), lambda: aside.rename(run), stack.close])
        monkeypatch.setattr("time.sleep", lambda seconds: next(happens)())
        watch(run)
    assert (
        "dog: step 6 of 8 (75%), stopped; train (the same cell or command) goes on from step 4"
        in capsys.readouterr().out
    )


@pytest.mark.skipif(sys.platform == "win32", reason="there the lock cannot be looked at")
@pytest.mark.parametrize("named", [True, False], ids=["named", "of the workspace"])
def test_it_waits_for_a_run_that_is_locked_and_has_nothing_yet(run, workspace_folder, monkeypatch, capsys, named):  # noqa: F811
    runs = workspace_folder / "runs"
    shutil.copytree(run, runs / "before")
    with contextlib.ExitStack() as stack:
        stack.enter_context(at_work(runs / "dog"))
        # Instead of waiting, the other process goes on.
        happens = iter([lambda: None, lambda: run.rename(runs / "dog"), stack.close])
        monkeypatch.setattr("time.sleep", lambda seconds: next(happens)())
        watch(runs / "dog" if named else None)
    said = capsys.readouterr().out
    assert said.count(f"{runs / 'dog'} is being prepared: a process is at work, and nothing is to be shown yet") == 1
    assert "dog: step 6 of 8 (75%), stopped" in said and "before:" not in said


@pytest.mark.skipif(sys.platform == "win32", reason="there the lock cannot be looked at")
def test_it_waits_at_the_home_of_a_run_that_works_elsewhere_and_has_nothing_yet(run, tmp_path, monkeypatch, capsys):  # noqa: F811
    home = tmp_path / "home" / "dog"
    home.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(tmp_path / "local" / "dog", home))
        monkeypatch.setattr("time.sleep", lambda seconds: stack.close())
        with pytest.raises(DbkitError, match="is no folder of a run"):
            watch(home)
    assert f"{home} is being prepared" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="there the lock cannot be looked at")
def test_an_interruption_ends_it_quietly(run, capsys):  # noqa: F811
    # What a shell starts in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with at_work(run):
            main_thread = threading.main_thread().ident
            threading.Timer(0.5, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
            assert watch(run, every_seconds=60) is None
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Traceback" not in capsys.readouterr().err


def test_the_command_shows_the_same_and_a_run_that_is_not_there_is_a_sentence(run, capsys):  # noqa: F811
    assert main(["watch", str(run)]) == 0
    assert "None" not in capsys.readouterr().out
    with pytest.raises(DbkitError, match="there is no run"):
        watch(run.with_name("cat"))


def test_who_trains_asks_no_home_and_knows_from_the_mirror_what_is_there(run, tmp_path):  # noqa: F811
    home = tmp_path / "home" / "dog"
    home.parent.mkdir()
    mirror = Mirror(run, home)
    mirror.commit(run / "resume" / "step_000004", keep=1)
    assert mirror.close() == []
    shown = status_at_work(run, home, step=7, total=8)
    assert (shown.step, shown.lost_steps, shown.lost_steps_without_local) == (7, 3, 3)
    assert "last saved state at home: step 4" in str(shown)
    # What is lost at home now is not noticed, since only the mirror's word is read.
    (home.parent / "dog").rename(home.with_name("gone"))
    assert status_at_work(run, home, step=7, total=8).lost_steps_without_local == 3
    (run / "mirror.json").write_text(
        (run / "mirror.json").read_text().replace('"waiting": []', '"waiting": ["resume/step_000004", "model"]')
    )
    assert status_at_work(run, home, step=7, total=8).lost_steps_without_local == 7


def test_in_a_notebook_a_training_and_a_watch_have_one_place_each_and_print_no_bar(tmp_path, settings):
    said = [
        "import dbkit",
        f"dbkit.train(**{ {name: str(v) if name.endswith('_dir') else v for name, v in settings.items()} })",
        f"dbkit.watch({str(settings['output_dir'])!r})",
    ]
    _, training, watching = outputs_of(said)
    for messages in (training, watching):
        assert [kind for kind, _ in messages].count("display_data") == 2
    last = [content for kind, content in training if kind == "update_display_data"][-1]["data"]["text/html"]
    # At the end it has the finished model.
    assert "step 2 of 2 (100%), finished" in last and "finished model</td>" in last and "<progress" not in last
    # At most the first step and the last one within a second.
    assert len([kind for kind, _ in training if kind == "update_display_data"]) <= 10
    assert not any("training:" in content["text"] for kind, content in training if kind == "stream")
    (table,) = [content["data"]["text/html"] for kind, content in watching if kind == "update_display_data"]
    assert "step 2 of 2 (100%), finished" in table and "<progress" not in table


def test_a_training_that_was_stopped_in_a_notebook_does_not_say_that_it_is_at_work(settings):
    folder = settings["output_dir"]
    values = {name: str(v) if name.endswith("_dir") else v for name, v in settings.items()} | {"max_train_steps": 9999}
    said = f"""
import dbkit, pathlib, threading, time
def stop():
    # As soon as the log is there, which is in the first step.
    while not pathlib.Path({str(folder / "log.jsonl")!r}).exists():
        time.sleep(0.01)
    pathlib.Path({str(folder / "STOP")!r}).touch()
threading.Thread(target=stop).start()
try:
    dbkit.train(**{values})
except KeyboardInterrupt as stopped:
    print(stopped)
"""
    (outputs,) = outputs_of([said])
    last = [content for kind, content in outputs if kind == "update_display_data"][-1]["data"]["text/html"]
    assert "stopped; train (the same cell or command) goes on from step " in last
    assert "steps to be taken again</td><td style='text-align:left'>0<" in last


def outputs_of(cells):
    """The outputs of each cell in a fresh kernel, as (kind of message, content)."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        found = []
        for cell in cells:
            messages = []
            reply = client.execute_interactive(
                cell,
                timeout=240,
                output_hook=lambda message, to=messages: to.append((message["msg_type"], message["content"])),
            )
            assert reply["content"]["status"] == "ok", reply["content"]
            found.append(messages)
        return found
    except queue.Empty as error:
        raise AssertionError("the kernel does not answer") from error
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
