"""Trainings for test_keeper.py, run in a process of their own in which a folder fails on cue (faults.py).

Each begins well; with the second pass of its U-Net the fault begins. When it has ended, with or without an error, the
fault ends too, and the same training is started again.
"""

import contextlib
import functools
import io
import json
import sys
from pathlib import Path

import torch
from faults import Faults
from torch.nn.modules.module import register_module_forward_pre_hook

from dbkit import DbkitError, keeper, train

# What a user waits for is short here.
keeper.PATIENCE = 2.0
keeper.Mirror = functools.partial(keeper.Mirror, pause=0.01, longest_pause=0.1)


def attempt(settings: dict) -> dict:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            made = str(train(**settings))
        except (DbkitError, OSError) as error:
            made = f"{type(error).__name__}: {error}"
    return {"made": made, "said": said.getvalue()}


def main() -> None:
    torch.set_num_threads(1)
    place, settings, cases = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    faults, results, passes, due = Faults.of_this_process(), [], 0, {}

    def begin(module: torch.nn.Module, _: object) -> None:
        nonlocal passes
        if type(module).__name__ == "UNet2DConditionModel":
            passes += 1
            if passes == 2:
                faults.set(**due)

    register_module_forward_pre_hook(begin)
    for number, (fault, apart) in enumerate(cases):
        due = fault
        own = {**settings, "output_dir": str(place / f"run{number}")}
        own |= {"local_dir": str(place.parent / "local")} if apart else {}
        passes = 0
        first = attempt(own)
        hits = faults.hits
        faults.clear()
        results.append({"hits": hits, "first": first, "again": attempt(own)})
    Path(sys.argv[4]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
