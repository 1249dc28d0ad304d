"""Several processes, as torchrun and accelerate launch start them: agree, add gradients, put sharded tensors together.

Each process takes its share of every step's samples. Either each holds everything and gradients are averaged, or, if
accelerate's file asks for FSDP, each holds a shard. In one process all of this returns what it was given.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dbkit.errors import DbkitError

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")


def start(device: torch.device, local_rank: int = -1) -> torch.device:
    """Join the other processes, if a launcher started this one, and return the device that is this process's own.

    local_rank is the number of this process on its machine where a launcher says it by a flag; -1: it does not.
    """
    number = os.environ.get("LOCAL_RANK", str(local_rank))
    if number == "-1":
        return device
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise DbkitError(
            f"this is process {number} of several, and {', '.join(missing)} are not set; start it by "
            "torchrun or accelerate launch, or leave local_rank out"
        )
    from accelerate import PartialState

    os.environ["LOCAL_RANK"] = number
    own = PartialState(cpu=device.type == "cpu").device
    _hosts()
    return device if device.type == "cpu" else own


@functools.cache
def _hosts() -> torch.distributed.ProcessGroup:
    """A group that works without GPUs, for what may wait long: class images and previews take one process minutes."""
    import torch

    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))


def world() -> int:
    """How many processes there are."""
    import torch

    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def rank() -> int:
    """The number of this process: 0 is the main one, which alone writes files and speaks."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def is_main() -> bool:
    """Whether rank() is or will be 0, without torch and before start()."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep a process off the screen."""
    with Path(os.devnull).open("w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
        yield


def on_main(work: Callable[..., Result], *values: Any) -> Result:
    """Let the main process alone work, while the others wait; every one gets the result, or ends where that raised."""
    import torch

    if world() == 1:
        return work(*values)
    result: list[Any] = [None, False]
    try:
        if rank() == 0:
            result = [work(*values), True]
    finally:
        torch.distributed.broadcast_object_list(result, group=_hosts())
    if not result[1]:
        raise SystemExit(0)  # the main process has the error, and its exit code is the one that counts
    return result[0]


def share_weights(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every process the main one's weights: another machine may hold another model under the same name."""
    import torch

    for parameter in parameters if world() > 1 else ():
        torch.distributed.broadcast(parameter.data, 0)


def most(number: int) -> int:
    """The highest of all processes' numbers."""
    import torch

    if world() == 1:
        return number
    numbers = torch.tensor(number)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=_hosts())
    return int(numbers)


def any_of(flag: bool) -> bool:
    """Whether the flag is up in any process."""
    return bool(most(int(flag)))


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over the processes."""
    import torch

    if world() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor / world()


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Average gradients over the processes; those of shards are already. Some at a time, for copies cost memory."""
    from torch.nn.utils import parameters_to_vector, vector_to_parameters

    grads = [p.grad for p in parameters if p.grad is not None and not hasattr(p, "full_tensor")] if world() > 1 else []
    for first in range(0, len(grads), 64):
        some = grads[first : first + 64]
        vector_to_parameters(mean(parameters_to_vector(some)), some)


def shards() -> bool:
    """Whether accelerate's configuration file asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and "LOCAL_RANK" in os.environ


def shard(module: torch.nn.Module, device: torch.device, keep: bool) -> None:
    """Leave each process a shard of every tensor (FSDP2), block by block. keep: whole ones stay there within a step."""
    if os.environ.get("FSDP_VERSION") != "2":
        raise DbkitError("dbkit trains with version 2 of FSDP; set fsdp_version: 2 in accelerate's configuration file")
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    offload = os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    reshard = not keep and os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    # Inner blocks first; the libraries say which modules of theirs make good blocks.
    blocks = [block for block in reversed(list(module.modules())) if type(block).__name__ in module._no_split_modules]
    for block in [*blocks, module]:
        fully_shard(block, offload_policy=policy, reshard_after_forward=reshard)


def last_backward(modules: Iterable[torch.nn.Module], last: bool) -> None:
    """Say before a backward pass whether it is the last of a step: only then do shards exchange gradients."""
    for module in modules:
        if hasattr(module, "set_requires_gradient_sync"):
            module.set_requires_gradient_sync(last)
            module.set_reshard_after_backward(last)


def whole(value: Any) -> Any:
    """Tensors of a state put together, on the CPU of the main process; the others must take part and get None."""
    if isinstance(value, dict):
        return {name: whole(part) for name, part in value.items()}
    if not hasattr(value, "full_tensor"):
        return value
    full = value.detach().full_tensor()
    return full.cpu() if rank() == 0 else None


def gather(value: Any) -> list[Any] | None:
    """What each process has, in the main process; None in the others."""
    import torch

    values = [None] * world() if rank() == 0 else None
    torch.distributed.gather_object(value, values, group=_hosts())
    return values


def spread(tensor: Any, like: torch.Tensor) -> Any:
    """A whole tensor, the same in every process, sharded as another one is."""
    if not hasattr(like, "full_tensor") or not hasattr(tensor, "dim") or not tensor.dim():
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements).to(like.device)
