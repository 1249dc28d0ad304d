"""A folder that fails on cue, for programs in a process of their own: the Python side of faults.c.

    with failing(home, operation="write", fault="ENOSPC", at=3, times=5) as faults:
        subprocess.run(command, env={**os.environ, **faults.env})
        assert faults.hits

lets the third to seventh write below `home` fail with ENOSPC. While the program runs, faults.set() chooses another
fault, faults.clear() ends it, and faults.calls, hits and stalled tell what has happened. The program itself reaches the
same faults by Faults.of_this_process().
"""

import contextlib
import errno
import mmap
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

OPERATIONS = ["open", "write", "fsync", "rename", "unlink", "mkdir", "read", "stat", "close", "truncate", "list"]
OPERATIONS += ["rmdir"]
# What an operation may do: fail before it does anything; be done although it says EIO, as a network's file system may;
# hand over or take only half of the bytes; change a bit of them and say nothing; wait.
FAULTS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "ENOTCONN": errno.ENOTCONN, "ESTALE": errno.ESTALE}
FAULTS |= {"short": -1, "corrupt": -2, "stall": -3, "unanswered": -4}
FIELDS = ["operation", "fault", "at", "times", "milliseconds", "spare_main"]
FIELDS += ["calls", "hits", "stalled", "released", "generation", "last"]


def _field(name):
    place = 4 * FIELDS.index(name)
    return property(
        lambda self: struct.unpack_from("i", self.shared, place)[0],
        lambda self, value: struct.pack_into("i", self.shared, place, value),
    )


class Faults:
    """The memory that faults.c reads and counts in.

    calls: the calls of the chosen operation since set(); hits: those that failed; stalled: the threads that wait now;
    last: the operation that was hit last.
    """

    operation, fault, at, times, milliseconds, spare_main = map(_field, FIELDS[:6])
    calls, hits, stalled, released, generation, last_number = map(_field, FIELDS[6:])

    def __init__(self, control):
        with Path(control).open("r+b") as file:
            self.shared = mmap.mmap(file.fileno(), 4096)

    @classmethod
    def of_this_process(cls):
        return cls(os.environ["FAULTS_CONTROL"])

    @property
    def last(self):
        return OPERATIONS[self.last_number - 2]

    def watch(self, folder, spare_main=False):
        """Choose the folder; with spare_main nothing happens to calls of the program's main thread."""
        name = os.fsencode(Path(folder).absolute())
        self.shared[64 : 64 + len(name) + 1] = name + b"\0"
        self.spare_main = int(spare_main)

    def set(self, operation="any", fault="EIO", at=1, times=1, seconds=0.0):
        """From the at-th call from now on, `times` calls of the operation fail; -1 is all. Stalls without seconds wait
        for release() or clear()."""
        self.fault = 0
        self.operation = 1 if operation == "any" else OPERATIONS.index(operation) + 2
        self.at, self.times, self.milliseconds = at, times, int(seconds * 1000)
        self.calls = self.hits = self.released = 0
        self.generation += 1
        self.fault = FAULTS[fault]

    def release(self):
        """Let what stalls now go on; the next call may stall again."""
        self.released = self.hits

    def clear(self):
        self.fault = 0
        self.generation += 1

    def wait_for(self, condition, seconds=60):
        """Wait until condition() holds; that it never does is a failure."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never came"
            time.sleep(0.0005)


def library(folder):
    """faults.c, compiled; the test is skipped where that cannot be."""
    compiler = shutil.which("cc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("the file system that fails on cue needs Linux and a C compiler named cc")
    made = Path(folder) / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-w", "-o", made, source, "-ldl"], check=True)
    return made


@contextlib.contextmanager
def failing(folder, operation=None, fault="EIO", at=1, times=1, seconds=0.0, spare_main=False):
    """Yield Faults whose `env` makes a program see `folder` fail; without an operation nothing fails until set()."""
    with tempfile.TemporaryDirectory() as place:
        control = Path(place) / "control"
        control.write_bytes(bytes(4096))
        faults = Faults(control)
        faults.env = {"LD_PRELOAD": str(library(place)), "FAULTS_CONTROL": str(control)}
        faults.watch(folder, spare_main)
        if operation:
            faults.set(operation, fault, at, times, seconds)
        yield faults
        faults.clear()
