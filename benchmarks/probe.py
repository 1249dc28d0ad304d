"""Runs a training script as it is, of dbkit or of another project, and notes when each of its steps began.

    python benchmarks/probe.py RESULT.json SCRIPT [ARGUMENTS ...]

SCRIPT is a file, or -m and a module. A step begins with the U-Net's pass for which gradients are kept. RESULT gets a
list of [wall seconds since the process began, CPU seconds of it], the peak of its memory and the libraries' versions.
Any interpreter with torch and diffusers will do; this file needs nothing of dbkit.
"""

import json
import os
import resource
import runpy
import sys
import time


def started() -> float:
    """When this process began, on the clock of time.time(). Where that is not known, now."""
    try:
        with open("/proc/self/stat") as file:  # noqa: PTH123
            ticks = int(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime") as file:  # noqa: PTH123
            up = float(file.read().split()[0])
        return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.time()


BEGAN = started()


def let_torchvision_load(torch) -> None:
    """The wheel for CUDA does not load beside a torch for the CPU, for want of two operators that nobody calls."""
    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def main() -> None:
    result, *command = sys.argv[1:]
    import torch

    if os.environ.get("PROBE_TORCHVISION"):
        let_torchvision_load(torch)
    import diffusers

    unet, steps = diffusers.UNet2DConditionModel, []
    forward = unet.forward

    def noted(self, *arguments, **keywords):
        if torch.is_grad_enabled():
            steps.append([time.time() - BEGAN, time.process_time()])
        return forward(self, *arguments, **keywords)

    unet.forward = noted
    sys.argv = command[1:] if command[0] == "-m" else command
    try:
        if command[0] == "-m":
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(command[0]))  # noqa: PTH120
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    found = {
        "steps": steps,
        "wall": time.time() - BEGAN,
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    if torch.cuda.is_available():
        found |= {"cuda": torch.cuda.max_memory_allocated(), "device": torch.cuda.get_device_name()}
    with open(result, "w") as file:  # noqa: PTH123
        json.dump(found, file)


main()
