"""The optimizer, its loss scaler, and the learning rate as a function of the step."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dbkit import processes
from dbkit.config import TrainConfig
from dbkit.errors import CannotGoOn, DbkitError
from dbkit.in_backward import AdamWInBackward
from dbkit.libraries import quiet

if TYPE_CHECKING:
    import torch


# By name of the optimizer, the libraries that have it; of several the first that works.
LIBRARIES = {
    "adamw": ("torch",),
    "adamw8bit": ("bitsandbytes", "torchao"),
    "adafactor": ("transformers",),
    "lion": ("pytorch_optimizer",),
    "prodigy": ("pytorch_optimizer",),
}
# What stands for a library where memory is tiny.
IN_BACKWARD = "dbkit (memory tiny)"


def choose_library(config: TrainConfig, device: torch.device, before: str | None = None) -> str:
    """The library whose optimizer works here; the one that the run had `before`, since no other can read its state.

    Which library's 8-bit AdamW is used is printed. Raises DbkitError if none works.
    """
    name = config.chosen_optimizer
    if config.memory == "tiny":
        return IN_BACKWARD
    faults: dict[str, str] = {}
    for library in [before] if before in LIBRARIES[name] else LIBRARIES[name]:
        fault = try_optimizer(config, library, device)
        if not fault:
            if name == "adamw8bit":
                fallen = "".join(f"{other} does not work here ({reason}); " for other, reason in faults.items())
                slow = library == "torchao" and device.type == "cuda"
                print(f"{fallen}{library}'s 8-bit AdamW is used{', whose first step compiles for minutes' * slow}")
            return library
        faults[library] = fault
    reasons = " and ".join(f"{library}, which does not work here ({fault})" for library, fault in faults.items())
    if before in faults and len(LIBRARIES[name]) > 1:
        raise CannotGoOn(
            f"this run's saved state is of {reasons}; mend that (pip install {before}), choose another output_dir, or "
            "set start_over"
        )
    off = "leave use_8bit_adam off" if config.use_8bit_adam else "choose another optimizer"
    off = off if config.memory == "auto" else "choose memory fast"
    raise DbkitError(f"optimizer {name} needs {reasons}; pip install {next(iter(faults))}, or {off}")


def try_optimizer(config: TrainConfig, library: str, device: torch.device) -> str:
    """Take two real steps on a small problem, the state saved and read back between; some fail only when they are used.

    Returns why the optimizer does not work on this device, in half a sentence, or "" if it does. Random numbers are
    left alone.
    """
    import torch

    straight, resumed = (torch.nn.Parameter(torch.zeros(64, 128, device=device)) for _ in range(2))
    try:
        with quiet():
            one, two = (
                _make(config, library, [{"params": [weight], "factor": 1.0}], device) for weight in (straight, resumed)
            )
            _small_step(one, straight)
            first = straight.detach().clone()
            file = io.BytesIO()
            torch.save(one.state_dict(), file)
            file.seek(0)
            resumed.data.copy_(first)
            load_optimizer(two, torch.load(file, map_location="cpu", weights_only=True))
            _small_step(one, straight)
            _small_step(two, resumed)
    except Exception as error:  # whatever a library raises here, a NameError for instance, is the reason
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not bool(straight.isfinite().all()):
        return "a test step gave weights that are not numbers"
    if not bool((first != 0).all()):
        return "a test step changed nothing"
    return "" if torch.equal(straight, resumed) else "its saved state does not give the same next step"


def _small_step(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter) -> None:
    import torch

    target = torch.linspace(1, 2, weight.numel(), device=weight.device).view_as(weight)
    (weight - target).square().sum().backward()
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    optimizer.zero_grad()


def make_optimizer(
    config: TrainConfig, trained: dict[str, torch.nn.Module], device: torch.device, library: str
) -> torch.optim.Optimizer | AdamWInBackward:
    """The optimizer of that library over the parameters that are trained.

    Each part has a group of its own, whose `factor` is its learning rate's part of the run's.
    """
    rates = {"text_encoder": config.text_encoder_learning_rate or config.learning_rate}
    groups = [
        {
            "params": [parameter for parameter in module.parameters() if parameter.requires_grad],
            "factor": rates.get(part, config.learning_rate) / config.learning_rate,
        }
        for part, module in trained.items()
    ]
    with quiet():
        return _make(config, library, groups, device)


def _make(
    config: TrainConfig, library: str, groups: list[dict[str, Any]], device: torch.device
) -> torch.optim.Optimizer | AdamWInBackward:
    """An optimizer of parameter groups, with those of the adam settings that mean something to it."""
    import torch

    name = config.chosen_optimizer
    options = {"lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
    if name == "adafactor":
        from transformers.optimization import Adafactor

        # Without these three it would take a rate of its own in place of learning_rate.
        return Adafactor(groups, scale_parameter=False, relative_step=False, warmup_init=False, **options)
    beta2 = config.adam_beta2 if config.adam_beta2 is not None else 0.99 if name == "lion" else 0.999
    options["betas"] = (config.adam_beta1, beta2)
    if name == "lion":
        from pytorch_optimizer import Lion

        return Lion(groups, **options)
    options["eps"] = config.adam_epsilon
    if name == "prodigy":
        from pytorch_optimizer import Prodigy

        return Prodigy(groups, bias_correction=True, safeguard_warmup=True, **options)
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=device.type in ("cuda", "cpu"), **options)
    if library == IN_BACKWARD:
        return AdamWInBackward(groups, max_grad_norm=config.max_grad_norm, seed=config.seed, **options)
    if library == "bitsandbytes":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **options)
    return _torchao_adamw8bit(groups, device, options)


def _torchao_adamw8bit(
    groups: list[dict[str, Any]], device: torch.device, options: dict[str, Any]
) -> torch.optim.Optimizer:
    import torch

    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        from torchao.prototype.low_bit_optim import AdamW8bit  # its place before version 0.10
    optimizer = AdamW8bit(groups, **options)
    # It compiles its step for each shape: worth it on a GPU, but half a minute for each, and a compiler, on a CPU.
    if device.type != "cuda" and hasattr(torch.compiler, "set_stance"):
        optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer | AdamWInBackward, learning_rate: float) -> None:
    """Give each group its part of the learning rate: a number, or a tensor where the library keeps one."""
    import torch

    for group in optimizer.param_groups:
        rate, kept = learning_rate * group["factor"], group["lr"]
        # A new tensor, because early versions of torchao keep one for all groups.
        group["lr"] = torch.full_like(kept, rate) if isinstance(kept, torch.Tensor) else rate


def state_bytes(name: str, parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of an optimizer's state of these fp32 parameters."""
    return sum(_state_bytes(name, parameter.shape) for parameter in parameters)


def _state_bytes(name: str, shape: Sequence[int]) -> int:
    count = math.prod(shape)
    if name == "adafactor" and len(shape) > 1:
        # One mean of squares for each row and each column (arXiv:1804.04235); a convolution's are those of its kernel.
        return 4 * (count // shape[-1] + count // shape[-2])
    if name == "adamw8bit" and count >= 4096 and count % 256 == 0:
        # Two moments of a byte, each with a scale for every 256 and a table of 256; smaller tensors stay fp32.
        return 2 * (count + 4 * count // 256 + 4 * 256)
    return {"adamw": 8, "adamw8bit": 8, "adafactor": 4, "lion": 4, "prodigy": 16}[name] * count


def in_8_bit(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with its fp32 moments in 8 bit: a fourth of the size, each number within 7 % of its own.

    That is down to 2 ** -24 of a tensor's largest; what is smaller is raised to that.

    A moment spans many powers of two, so the levels are powers too: a sign and 127 levels over 24 of them. What a
    library keeps in 8 bit already stays as it is.
    """
    return _with_moments(state, lambda value: _levels(value) if _is_plain_fp32(value) else value)


def from_8_bit(state: dict[str, Any]) -> dict[str, Any]:
    """What in_8_bit() made, with moments in fp32 again; other states as they are."""
    return _with_moments(state, lambda value: _numbers(**value) if isinstance(value, dict) else value)


def _with_moments(state: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    changed = {
        number: {name: change(value) if name in ("exp_avg", "exp_avg_sq") else value for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": changed}


def _is_plain_fp32(value: Any) -> bool:
    """Whether a value is a tensor of fp32 numbers, and no kind of its own that a library made."""
    import torch

    return type(value) is torch.Tensor and value.dtype == torch.float32


def _levels(moment: torch.Tensor) -> dict[str, torch.Tensor]:
    """A moment as levels from -127 to 127: the top one is its largest number, each below that 2 ** (24 / 127) less."""
    import torch

    moment = moment.cpu().float()
    top = moment.abs().max()
    # What is too small for the lowest level is raised to it: a second moment of zero would make a step endless.
    level = (127 + (moment.abs() / top).log2() * 127 / 24).round().clamp(min=1)
    return {"levels": torch.where(moment == 0, 0, level * moment.sign()).to(torch.int8), "top": top}


def _numbers(levels: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    import torch

    numbers = top * torch.exp2((levels.float().abs() - 127) * 24 / 127) * levels.sign()
    return torch.where(levels == 0, 0.0, numbers)


def load_optimizer(optimizer: torch.optim.Optimizer | AdamWInBackward, state: dict[str, Any]) -> None:
    """Put a saved state in; the factors stay those of the settings, which may have changed since."""
    factors = [group["factor"] for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    spread = {
        number: {name: processes.spread(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": spread})
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

    peak = config.peak_learning_rate * (processes.world() if config.scale_lr else 1)
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=peak)
    schedule = get_scheduler(
        config.lr_scheduler,
        stand_in,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=total,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    return lambda done: peak * schedule.lr_lambdas[0](done)
