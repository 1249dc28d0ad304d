"""Files whole or not at all, a real full disk, stop signals, and names that every system takes."""

import errno
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dbkit import DbkitError
from dbkit.errors import DiskError
from dbkit.files import (
    full_disk_is_a_sentence,
    move_aside,
    one_process,
    refusals_are_sentences,
    require_place,
    require_space,
    safe_name,
    sha256,
    share,
    size,
    stop_requests,
    whole_file,
    write_text,
)


def test_a_whole_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("old", "new"):
        with whole_file(path) as partial:
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text
    assert [found.name for found in path.parent.iterdir()] == ["a.txt"]


def test_processes_and_threads_may_write_the_same_text_file_at_once(tmp_path):
    code = """
import sys
from pathlib import Path
from dbkit.files import side_by_side, write_text
side_by_side(lambda n: write_text(Path(sys.argv[1]), sys.argv[2] * 50_000), range(100))
"""
    path = tmp_path / "a.txt"
    writers = [subprocess.Popen([sys.executable, "-c", code, path, letter]) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert path.read_text() in ("a" * 50_000, "b" * 50_000)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_old_content(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir() if found.is_file()] == ["a.txt"]


def test_text_is_utf_8_with_the_same_line_ends_on_every_system(tmp_path):
    write_text(tmp_path / "a.txt", "犬\nzwx\n")
    assert (tmp_path / "a.txt").read_bytes() == "犬\nzwx\n".encode()


def test_a_full_disk_is_a_sentence_and_the_old_file_stays(small_disk):
    path = small_disk / "a.txt"
    write_text(path, "old")
    sentence = (
        r"^the disk of .*disk is full \(\d+ bytes free\); free some space there, then run the same command again$"
    )
    with pytest.raises(DbkitError, match=sentence):
        write_text(path, "x" * 100_000)
    assert path.read_text() == "old"
    assert [found.name for found in small_disk.iterdir()] == ["a.txt"]


def test_a_full_disk_under_safetensors_is_the_same_sentence(small_disk):
    path = small_disk / "a.safetensors"
    with pytest.raises(DbkitError, match=r"is full"), whole_file(path) as partial:
        save_file({"a": np.ones(100_000)}, partial)
    assert list(small_disk.iterdir()) == []


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError), full_disk_is_a_sentence(tmp_path):
        (tmp_path / "gone").read_text()


def in_a_file(folder):
    write_text(folder / "file" / "a.txt", "new")


def in_place_of_a_folder(folder):
    write_text(folder / "folder", "new")


def with_a_long_name(folder):
    write_text(folder / ("x" * 255), "new")


def in_a_folder_that_is_a_file(folder):
    with one_process(folder / "file" / "run"):
        pass


def of_a_long_name(folder):
    with one_process(folder / ("x" * 255)):
        pass


def in_a_folder_that_is_gone(folder):
    (folder / "gone").mkdir()
    os.chdir(folder / "gone")
    (folder / "gone").rmdir()
    try:
        Path.cwd()
    finally:
        os.chdir(folder)


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (in_a_file, r"file is no folder, or lies in what is none \(.+\); choose another name"),
        (in_place_of_a_folder, r"folder is a folder where a file belongs \(.+\); choose another name, or"),
        (with_a_long_name, r"[\\/]x{255} has too long a name \(.+\); choose a shorter one$"),
        (in_a_folder_that_is_a_file, r"file is no folder, or lies in what is none \(.+\); choose another name"),
        (of_a_long_name, r"[\\/]x{255} has too long a name \(.+\); choose a shorter one$"),
        (lambda folder: (folder / "gone").read_text(), r"gone is not there \(.+\); check the path$"),
        (in_a_folder_that_is_gone, r"^the current folder is not there \(.+\); change to another one$"),
    ],
)
def test_what_the_system_refuses_is_a_sentence_with_the_name_that_was_given(tmp_path, work, sentence):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(DbkitError, match=sentence) as error, refusals_are_sentences():
        work(tmp_path)
    assert isinstance(error.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.EACCES, r"^a.txt cannot be read or written \(.+\); check that its disk is there, and who may read"),
        (errno.EROFS, r"^a.txt cannot be written \(.+\); choose a folder on another disk$"),
        (errno.EIO, r"^a.txt cannot be read or written \(.+\); check that its disk is there"),
        (errno.ENOSPC, r"^the disk of \. is full \(.+ free\); free some space there"),
    ],
)
def test_what_a_disk_refuses_is_a_sentence(number, sentence):
    with pytest.raises(DbkitError, match=sentence), refusals_are_sentences():
        raise OSError(number, os.strerror(number), "a.txt")


def test_a_disk_that_fails_under_an_open_file_is_a_sentence_without_its_name():
    for number, sentence in ((errno.EIO, "^a file cannot be read or written"), (errno.ENOSPC, "^the disk is full")):
        with pytest.raises(DbkitError, match=sentence), refusals_are_sentences():
            raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        OSError("its vae has missing weights"),
        urllib.error.HTTPError("https://example.org", 404, "Not Found", None, None),
        DiskError("the disk is full"),
    ],
)
def test_the_errors_of_networks_libraries_and_dbkit_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, refusals_are_sentences():
        raise error
    assert raised.value is error


def test_a_place_where_no_file_can_be_is_refused_before_it_is_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DbkitError, match=r"file is a file, and .*picture\.png would lie in it; choose another name"):
        require_place(tmp_path / "file" / "more" / "picture.png")
    with pytest.raises(DbkitError, match="x is too long; choose a shorter one"):
        require_place(tmp_path / ("x" * 240))
    require_place(tmp_path / "new" / "picture.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_too_little_space_is_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "not" / "made" / "yet"
    require_space(folder, 1, "the run")
    with pytest.raises(DbkitError, match=r"^the run needs \d+\.\d GB in .* and .* are free; free some space or choose"):
        require_space(folder, 2**60, "the run")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("count", "words"), [(3_400_000_000, "3.4 GB"), (1_500_000, "1.5 MB"), (999_999, "999999 bytes"), (0, "0 bytes")]
)
def test_a_size_is_told_in_words(count, words):
    assert size(count) == words


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 20) + 1])
def test_the_hash_is_that_of_the_whole_file(tmp_path, length):
    content = bytes(range(256)) * (length // 256) + b"x" * (length % 256)
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_moving_aside_numbers_the_folders_and_deletes_nothing(tmp_path):
    run = tmp_path / "run.v1"
    asides = []
    for number in range(3):
        run.mkdir()
        (run / "which").write_text(str(number))
        asides.append(move_aside(run))
    assert [path.name for path in asides] == ["run.v1-1", "run.v1-2", "run.v1-3"]
    assert [(path / "which").read_text() for path in asides] == ["0", "1", "2"]
    assert not run.exists()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("photo of zwx dog", "photo of zwx dog"),
        ("a/b\\c:d*e?f", "a-b-c-d-e-f"),
        ("../../etc/passwd", "etc-passwd"),
        (' <a> "b" | c\n', "a- -b- - c"),
        ("...", "unnamed"),
        ("", "unnamed"),
        ("name. . ", "name"),
        ("con", "con-"),
        ("NUL", "NUL-"),
        ("aux.v2", "aux-.v2"),
        ("Com1.tar.gz", "Com1-.tar.gz"),
        ("lpt9", "lpt9-"),
        ("console", "console"),
        ("com", "com"),
        ("日本語の犬", "日本語の犬"),
        ("Собака ё", "Собака ё"),
        ("Ünïcødé 🐕", "Ünïcødé 🐕"),
    ],
)
def test_a_safe_name_keeps_what_every_system_takes(text, name):
    assert safe_name(text) == name


def test_a_safe_name_is_cut_and_does_not_end_in_a_space_or_dot():
    assert safe_name("a" * 200) == "a" * 80
    assert safe_name("abc. def", 5) == "abc"


def wait_until(condition):
    """Give a signal time to arrive, on however busy a machine."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("the signal did not arrive")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no way to send itself Ctrl-C alone")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_raises_a_flag_and_the_second_one_interrupts(number, capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_requests() as stop:
        assert not stop.made
        os.kill(os.getpid(), number)
        wait_until(lambda: stop.made)
        assert capsys.readouterr().out == "\nstopping as soon as this step or picture is done\n"
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: False)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_signals_are_as_before_when_the_block_ends():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_requests():
        assert signal.getsignal(signal.SIGINT) is not before[0]
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_the_flag_stays_down_and_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with stop_requests() as stop:
            seen.append((stop.made, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    with (
        one_process(tmp_path / "run"),
        pytest.raises(DbkitError, match="another process is at work in"),
        one_process(tmp_path / "run"),
    ):
        pass
    with one_process(tmp_path / "run"):
        pass


def test_a_file_written_whole_has_the_permissions_of_other_new_files(tmp_path):
    (tmp_path / "other").touch()
    with whole_file(tmp_path / "new") as partial:
        partial.touch(mode=0o600)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_safe_name_fits_where_file_systems_count_bytes(tmp_path):
    for text in ("犬" * 300, "🐕" * 300, "ä🐕" * 300, "🐕" * 60 + ".."):
        name = safe_name(text)
        assert name == text[: len(name)] and 150 < len(name.encode()) <= 200
        with whole_file(tmp_path / f"{name}.safetensors", alone=True) as partial:
            partial.touch()


def test_a_file_system_with_permissions_of_its_own_is_used_as_it_is(tmp_path, monkeypatch):
    def refused(path, mode):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    (tmp_path / "file").write_bytes(b"whole")
    monkeypatch.setattr(Path, "chmod", refused)
    share(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"whole"
