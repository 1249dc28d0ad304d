"""What this machine has for training, and what that is good for."""

from __future__ import annotations

import os
import platform

from dbkit.auto import Machine, machine_of, what_suits
from dbkit.files import size
from dbkit.libraries import choose_device, choose_dtype
from dbkit.train_config import TrainConfig
from dbkit.workspace import gpu_hint


def describe_machine() -> str:
    """What this machine has for training, a line each: Python and torch, the GPU, and what that GPU can do.

    Without a GPU it says how to get one, where that is a choice.
    """
    import torch

    first = f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} CPU cores"
    device = choose_device("auto")
    if device.type == "cpu":
        return f"{first}\nGPU: none, so training is slow and a small model is suggested{gpu_hint()}"
    if device.type == "mps":
        return f"{first}\nGPU: Apple (mps), which computes in fp32"
    total = torch.cuda.mem_get_info()[1]
    config = TrainConfig("model", "pictures", instance_prompt="zwx")
    return f"{first}\n{describe_gpu(machine_of(config, device, choose_dtype('auto', device)), total)}"


def describe_gpu(machine: Machine, total: int) -> str:
    """Two lines: a GPU's name, its memory, free and in bytes in all, and its arithmetic; and what auto takes there."""
    free = f"{size(int(machine.memory * 1e9))} of {size(total)} free"
    return (
        f"GPU: {machine.name}, {free}, computes in {machine.dtype}\nStable Diffusion 1 at 512 px: {what_suits(machine)}"
    )
