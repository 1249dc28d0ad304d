"""Trainings that are killed: a program that imports everything once and starts each session in a process of its own.

It reads a line of JSON for each session: the settings of train(), and when to kill it: "event", after so many events
(what the run does to its files, and passes of the U-Net), or "seconds"; without either it is left alone. It answers
with the events and seconds that the session had, and whether it ended well.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


class Killable:
    """The test's side of the program."""

    def __init__(self, said: Path) -> None:
        self.program = subprocess.Popen(
            [sys.executable, __file__, str(said)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def train(self, settings: dict, **kill: float) -> dict:
        """Run one session of a training; kill is event=number or seconds=number."""
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
        self.program.stdin.write(json.dumps([plain, kill]) + "\n")
        self.program.stdin.flush()
        return json.loads(self.program.stdout.readline())

    def close(self) -> None:
        self.program.stdin.close()
        self.program.wait()


def session(settings: dict, kill: dict, report: int) -> None:
    """One training, in this process, which kills itself where it is told to."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    from dbkit import train

    lock, events = threading.Lock(), 0
    places = tuple(settings[name] for name in ("output_dir", "local_dir") if name in settings)

    def count() -> None:
        nonlocal events
        with lock:
            events += 1
            if events == kill.get("event"):
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(places):
            count()

    sys.addaudithook(watch)
    register_module_forward_pre_hook(
        lambda module, _: count() if type(module).__name__ == "UNet2DConditionModel" else None
    )
    train(**settings)
    with os.fdopen(report, "w") as file:
        json.dump({"events": events, "modules": list(sys.modules)}, file)


def run(settings: dict, kill: dict, said: Path) -> dict:
    """One session in a forked process, killed after some seconds if that is asked for."""
    read, write = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        with said.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 1
        try:
            session(settings, kill, write)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(write)
    if "seconds" in kill:
        timer = threading.Timer(kill["seconds"], lambda: os.kill(child, signal.SIGKILL))
        timer.start()
    with os.fdopen(read, "rb") as file:
        text = file.read()  # until the session has ended
    if "seconds" in kill:
        timer.cancel()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - began
    facts = json.loads(text) if text else {"events": None, "modules": []}
    # What a session imported, those that come after it need not import again.
    for name in facts["modules"]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    return {"ended": status, "events": facts["events"], "seconds": seconds}


def main() -> None:
    import torch

    torch.set_num_threads(1)
    # The answers go where the test reads; what is printed goes with the sessions.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        settings, kill = json.loads(line)
        answer = run(settings, kill, Path(sys.argv[1]))
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
