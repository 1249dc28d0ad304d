"""What a table of this folder says of where it was made, and the file that its figures go to."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


def made_on() -> dict[str, Any]:
    """The machine, its GPU too where there is one, and the versions of Python and the libraries."""
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return {
        "machine": ", ".join([*gpu, platform.machine(), f"{os.cpu_count()} CPU cores"]),
        "versions": {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def in_words(found: dict[str, Any]) -> str:
    """What made_on() found, for the line above a table."""
    return "; ".join([found["machine"], *(f"{name} {number}" for name, number in found["versions"].items())])


def write(path: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures with the machine and the versions as JSON, where a path is given."""
    if path:
        path.write_text(json.dumps({**made_on(), **figures}, indent=1, ensure_ascii=False), encoding="utf-8")
