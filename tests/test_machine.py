"""What a machine is good for, in lines: figures are those by which auto chooses."""

import dataclasses

import pytest
import torch

from dbkit import describe_machine
from dbkit.auto import Machine, choose, memory
from dbkit.machine import describe_gpu
from dbkit.memory import STABLE_DIFFUSION_1
from dbkit.train_config import TrainConfig

T4 = Machine("Tesla T4", 15.6, "fp16", True)


def test_the_machine_is_described_in_lines(monkeypatch):
    lines = describe_machine().splitlines()
    assert torch.__version__ in lines[0]
    assert lines[1].startswith("GPU: ")
    assert lines[1].startswith("GPU: none") == (not torch.cuda.is_available() and not torch.backends.mps.is_available())


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_kaggle_says_how_to_get_one(monkeypatch):
    assert describe_machine().endswith("GPU: none, so training is slow and a small model is suggested")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert describe_machine().endswith("is suggested; on Kaggle choose Settings, Accelerator, GPU T4 x2")


@pytest.mark.parametrize(
    ("machine", "suits", "changes"),
    [
        (T4, "memory balanced, about {:.1f} GB in a step", {"memory": "balanced"}),
        (Machine("NVIDIA L4", 23.6, "bf16", True), "memory fast, about {:.1f} GB in a step", {"memory": "fast"}),
        (Machine("8 GB", 7.9, "bf16", False), "memory tiny, about {:.1f} GB in a step", {"memory": "tiny"}),
        (
            Machine("4 GB", 3.9, "bf16", True),
            "not even memory tiny, about {:.1f} GB in a step; train a LoRA, or with a smaller resolution",
            {"memory": "tiny"},
        ),
        (
            dataclasses.replace(T4, has_8bit_adam=False),
            "not even gradient_checkpointing, about {:.1f} GB in a step; train a LoRA, or with a smaller resolution; "
            "after pip install bitsandbytes it is 6 bytes a parameter less",
            {"gradient_checkpointing": True},
        ),
    ],
)
def test_a_gpu_is_described_by_what_auto_takes_there(machine, suits, changes):
    first, second = describe_gpu(machine, 16_100_000_000).splitlines()
    assert first == f"GPU: {machine.name}, {machine.memory} GB of 16.1 GB free, computes in {machine.dtype}"
    config = TrainConfig("owner/name", "photos", instance_prompt="zwx", **changes)
    need = memory(config, STABLE_DIFFUSION_1, machine)[0]
    assert second == f"Stable Diffusion 1 at 512 px: {suits.format(need)}"
    asked = TrainConfig("owner/name", "photos", instance_prompt="zwx", auto=True)
    assert f"about {need:.1f} GB for Stable Diffusion 1 = " in " ".join(choose(asked, [10], machine)[1])
