"""The optimizer, its loss scaler, and the learning rate as a function of the step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dbkit.config import TrainConfig
from dbkit.errors import DbkitError
from dbkit.files import size

if TYPE_CHECKING:
    import torch


def probe_8bit_adam(device: torch.device) -> None:
    """Take one real 8-bit step on a small problem: a bitsandbytes without its native library only fails when used."""
    import torch

    try:
        import bitsandbytes

        weight = torch.nn.Parameter(torch.ones(64, 128, device=device))
        weight.square().sum().backward()
        bitsandbytes.optim.AdamW8bit([weight], lr=0.1).step()
        moved = bool((weight < 1).all())
    except (ImportError, RuntimeError, OSError, AttributeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DbkitError(
            f"use_8bit_adam needs bitsandbytes, which does not work here ({reason}); pip install "
            "bitsandbytes, or leave it off"
        ) from error
    if not moved:
        raise DbkitError("use_8bit_adam: a test step of bitsandbytes changed nothing; leave it off on this machine")


def make_optimizer(
    config: TrainConfig, trained: dict[str, torch.nn.Module], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over fp32 parameters; fused where torch has it, with its moments in 8 bit if asked for.

    Each part has a group of its own, whose `factor` is its learning rate's part of the run's.
    """
    import torch

    rates = {"text_encoder": config.text_encoder_learning_rate or config.learning_rate}
    parameters = [
        {
            "params": [p for p in module.parameters() if p.requires_grad],
            "factor": rates.get(part, config.learning_rate) / config.learning_rate,
        }
        for part, module in trained.items()
    ]

    options = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=device.type in ("cuda", "cpu"), **options)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a saved state in; the factors stay those of the settings, which may have changed since."""
    factors = [group["factor"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, factor in zip(optimizer.param_groups, factors):
        group["factor"] = factor


def make_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Loss scaling for fp16; in other types it is switched off and passes everything through."""
    import torch

    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def learning_rates(config: TrainConfig, total: int) -> Callable[[int], float]:
    """The learning rate as a function of the steps done, from diffusers' schedules: there is no state to save."""
    import torch
    from diffusers.optimization import get_scheduler

    peak = config.learning_rate
    if config.scale_lr:
        peak *= config.train_batch_size * config.gradient_accumulation_steps
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=peak)
    schedule = get_scheduler(
        config.lr_scheduler, stand_in, num_warmup_steps=config.lr_warmup_steps, num_training_steps=total
    )
    return lambda done: peak * schedule.lr_lambdas[0](done)


@contextlib.contextmanager
def out_of_memory_is_a_sentence() -> Iterator[None]:
    """Say how much memory was used and what takes less. Nothing is tried again by itself."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        peak = size(torch.cuda.max_memory_allocated())
        raise DbkitError(
            f"the GPU ran out of memory at {peak}; turn on gradient_checkpointing and use_8bit_adam, or lower "
            "resolution or train_batch_size, and train again"
        ) from error
