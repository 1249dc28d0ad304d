"""The libraries and the device underneath: errors as sentences, advice off the screen."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import textwrap
import threading
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from dbkit.errors import DbkitError, reason_of

if TYPE_CHECKING:
    import torch


# On in the thread of a form: there the Hub is asked for nothing, since its client may ask the user for a token.
only_cached: ContextVar[bool] = ContextVar("only_cached", default=False)


# transformers and accelerate change torch itself while they load, for all threads.
_one_loads = threading.RLock()


@contextlib.contextmanager
def loading(name: str | Path) -> Iterator[None]:
    """Say in one sentence why a model cannot be loaded. One thread at a time loads."""
    try:
        with _one_loads, quiet():
            yield
    except library_errors() as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "copy or convert it again" if Path(name).is_dir() else "check the id, the connection and the token"
        raise DbkitError(f"the model {name} cannot be loaded ({reason}); {where}") from error
    except ImportError as error:
        # Of transformers' versions some read pictures by torchvision alone.
        raise DbkitError(
            f"the model {name} cannot be loaded without a library that is not here ({reason_of(error)}); install it"
        ) from error


def hub_options(name: str, file: str = "model_index.json", revision: str | None = None) -> dict[str, bool]:
    """How to load a Hugging Face model now: from the cache alone where the Hub cannot be reached.

    file is one that the model has for certain. Raises DbkitError at once if it is not there either; the libraries would
    try for minutes.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if only_cached.get():
        if not isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            raise DbkitError(f"{file} of {name} is not on this machine yet; dbkit.plan() downloads it, which is quick")
        return {"local_files_only": True}
    if constants.HF_HUB_OFFLINE:
        reason, way = "HF_HUB_OFFLINE is set", "unset that"
    elif urllib.request.getproxies():
        return {}
    else:
        try:
            socket.getaddrinfo(urllib.parse.urlparse(constants.ENDPOINT).hostname, 443)
            return {}
        except OSError as error:
            reason, way = str(error), "check the connection"
    if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
        return {"local_files_only": True}
    raise DbkitError(
        f"the model {name} is not on this machine and Hugging Face cannot be reached ({reason}); {way}, or give the "
        "folder of a model"
    )


def library_errors() -> tuple[type[Exception], ...]:
    """What the libraries raise about files that are missing, damaged or contradict each other."""
    import huggingface_hub.errors
    from safetensors import SafetensorError

    # transformers 5 reports settings that cannot be by an error of its own; the Hub's are OSErrors and ValueErrors.
    strict = getattr(huggingface_hub.errors, "StrictDataclassError", ValueError)
    return OSError, ValueError, RuntimeError, KeyError, SafetensorError, strict


def hub_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises where the Hub refuses, or cannot be reached."""
    from huggingface_hub.utils import HfHubHTTPError

    # Before version 1 the client's connection errors are OSErrors; since then they share a base with its own.
    return *library_errors(), *HfHubHTTPError.__bases__


def status_and_reason(error: BaseException) -> tuple[int | None, str]:
    """The HTTP status behind an error, if there is one, and what it says in one line."""
    while isinstance(error, RuntimeError) and error.__cause__:
        error = error.__cause__  # the client's own says only at which file it was
    status = getattr(getattr(error, "response", None), "status_code", None)
    # Addresses lose their queries, which may be signed.
    reason = textwrap.shorten(re.sub(r"\?\S+", "", str(error)), 300, placeholder=" …")
    return status, reason.rstrip(". ") or type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and advice off the screen; what matters is said by dbkit itself."""
    # bitsandbytes and torchao, which the libraries import when they are there, warn of kernels that nobody asked for.
    kernels = [(log, log.level) for log in map(logging.getLogger, ("bitsandbytes", "torchao", "torch.utils._pytree"))]
    for log, _ in kernels:
        log.setLevel(logging.ERROR)
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    levels = [(log, log.get_verbosity()) for log in (diffusers_logging, transformers_logging)]
    bars = [(log, log.is_progress_bar_enabled()) for log in (diffusers_logging, transformers_logging)]
    try:
        for log, _ in levels:
            log.set_verbosity_error()
            log.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for log, level in kernels:
            log.setLevel(level)
        for log, level in levels:
            log.set_verbosity(level)
        for log, enabled in bars:
            if enabled:
                log.enable_progress_bar()


def choose_device(name: str) -> torch.device:
    """The device of that name, or for "auto" the best one there is. Raises DbkitError if it is not there."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    if not there[name]:
        hint = "on Colab choose Runtime, Change runtime type, GPU" if name == "cuda" else "choose auto or cpu"
        raise DbkitError(f"device is {name}, and this machine has none; {hint}")
    return torch.device(name)


def choose_dtype(precision: str, device: torch.device, memory: str = "auto") -> torch.dtype:
    """The type that matrix products run in: what was asked for, or what the device is good at.

    bf16 from the Ampere generation on, fp16 on older GPUs, fp32 on Apple's GPUs and on the CPU, where memory tiny has
    bf16.
    """
    import torch

    if precision == "auto":
        if device.type != "cuda":
            return torch.bfloat16 if device.type == "cpu" and memory == "tiny" else torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if precision == "fp16" and device.type == "cpu":
        raise DbkitError("mixed_precision is fp16, which needs a GPU; choose auto, no or bf16 on the CPU")
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
