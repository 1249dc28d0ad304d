"""DeepSpeed's ZeRO: the optimizer's moments are divided among the processes, or kept in the computer's memory.

The modules stay whole and are called as always; only backward and step are DeepSpeed's. Weights are fp32, so what it
holds beyond them is the optimizer's state of each process.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dbkit.config import TrainConfig
from dbkit.errors import DbkitError

if TYPE_CHECKING:
    import torch


def asked() -> bool:
    """Whether accelerate's configuration file asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true" and "LOCAL_RANK" in os.environ


def make_engine(
    config: TrainConfig, trained: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer, dtype: torch.dtype
) -> Any:
    """DeepSpeed's engine over the trained parts, as accelerate's file describes it; it takes the optimizer over."""
    import torch
    from accelerate.utils import DeepSpeedPlugin

    try:
        import deepspeed
    except ImportError as error:
        raise DbkitError("accelerate's configuration file asks for DeepSpeed; pip install deepspeed") from error
    settings = DeepSpeedPlugin().deepspeed_config
    stage = settings["zero_optimization"]["stage"]
    if stage not in (1, 2):
        raise DbkitError(f"zero_stage is {stage}, and dbkit trains with 1 or 2; for more, choose FSDP")
    if stage == 2 and config.use_aspect_ratio_bucket:
        raise DbkitError("use_aspect_ratio_bucket does not go with zero_stage 2; set zero_stage: 1, or choose FSDP")
    if dtype == torch.float16:
        raise DbkitError("mixed_precision fp16 does not go with DeepSpeed here; choose bf16 or no")
    for name in ("train_batch_size", "fp16", "bf16", "scheduler", "optimizer"):
        settings.pop(name, None)
    settings |= {
        "train_micro_batch_size_per_gpu": config.train_batch_size,
        # The loop divides the loss by the number of passes and says which backward pass is the last of a step.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        # torch's fused AdamW is as fast on a CPU as DeepSpeed's own, which has to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=torch.nn.ModuleDict(trained), optimizer=optimizer, config=settings)
    return engine


def backward(engine: Any, loss: torch.Tensor, last: bool) -> None:
    """One backward pass, the last of a step or not."""
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss, scale_wrt_gas=False)


def step(engine: Any) -> torch.Tensor:
    """Clip and update. Returns the gradient norm."""
    import torch

    engine.step()
    return torch.as_tensor(engine.get_global_grad_norm())
