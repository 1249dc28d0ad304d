"""What a training holds in memory and a saved state brings back: trained parts, optimizer, loss scaler, averages."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit import processes, zero
from dbkit.attention import widen_heads
from dbkit.cache import Pool
from dbkit.checkpoint import Checkpoint, load_state, save_state
from dbkit.ema import Ema
from dbkit.errors import DbkitError
from dbkit.in_backward import AdamWInBackward, store_in_bf16
from dbkit.lora import add_lora
from dbkit.models import Models
from dbkit.optimizers import from_8_bit, in_8_bit, load_optimizer, make_optimizer, make_scaler, state_bytes
from dbkit.text import encode_prompts, unused_layers
from dbkit.train_config import TrainConfig

if TYPE_CHECKING:
    import torch

_EMA = "ema_"


@dataclass
class State:
    """The parts of the model, which of them are trained, and what belongs to that.

    shown are the parts that are saved and sampled: the same, but where training is sharded whole copies of those that
    are trained, as of the last gather(). engine is DeepSpeed's, if accelerate's file asks for it.
    """

    models: Models
    shown: Models
    trained: dict[str, torch.nn.Module]
    optimizer: torch.optim.Optimizer | AdamWInBackward
    scaler: torch.amp.GradScaler
    ema: Ema | None
    dtype: torch.dtype
    engine: Any = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Everything that the optimizer moves."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def plain(self) -> dict[str, torch.nn.Module]:
        """The trained parts, whole."""
        if self.shown is self.models:
            return self.trained
        return {part: getattr(self.shown, part) for part in self.trained}

    def gather(self) -> dict[str, Any]:
        """Bring what is sharded together in the main process, and return the optimizer's state; all take part."""
        for part, module in self.plain.items():
            if module is not self.trained[part]:
                weights = processes.whole(self.trained[part].state_dict())
                if processes.rank() == 0:
                    module.load_state_dict(weights)
        own = self.optimizer.state_dict()
        return {"processes": processes.gather(own)} if self.engine else processes.whole(own)

    def averaged(self) -> contextlib.AbstractContextManager:
        """Put the averages, if there are any, where the weights are for the time of the block."""
        return self.ema.in_place() if self.ema else contextlib.nullcontext()


def make_state(config: TrainConfig, models: Models, device: torch.device, dtype: torch.dtype, library: str) -> State:
    """Put the trained parts on the device, ready for training; what is trained is fp32, but for memory tiny."""
    shown = models
    if processes.shards():
        shown = dataclasses.replace(models, **{part: copy.deepcopy(getattr(models, part)) for part in _trained(config)})
    trained = train_parts(config, models, device)
    processes.share_weights(parameter for module in trained.values() for parameter in module.parameters())
    if processes.shards():
        for module in trained.values():
            processes.shard(module, device, keep=config.use_aspect_ratio_bucket)
    optimizer = make_optimizer(config, trained, device, library)
    ema = Ema(trained, config.ema_decay) if config.use_ema else None
    engine = zero.make_engine(config, trained, optimizer, dtype) if zero.asked() else None
    return State(models, shown, trained, optimizer, make_scaler(device, dtype), ema, dtype, engine)


def _trained(config: TrainConfig) -> list[str]:
    return ["unet", "text_encoder"] if config.train_text_encoder else ["unet"]


def train_parts(config: TrainConfig, models: Models, device: torch.device) -> dict[str, torch.nn.Module]:
    """Put the parts that are trained on the device and set them up for it; returns what the optimizer moves by part."""
    trained: dict[str, torch.nn.Module] = {part: getattr(models, part) for part in _trained(config)}
    for module in trained.values():
        module.requires_grad_(True).train().to(device)
        if config.recomputes_activations and hasattr(module, "enable_gradient_checkpointing"):
            module.enable_gradient_checkpointing()
        elif config.recomputes_activations:
            module.gradient_checkpointing_enable({"use_reentrant": False})
    if device.type == "cpu":
        widen_heads(models.unet)
    if config.adapter == "lora":
        trained = add_lora(models, config)
    for layer in unused_layers(models.text_encoder):
        layer.requires_grad_(False)
    if config.memory == "tiny":
        store_in_bf16(parameter for module in trained.values() for parameter in module.parameters())
    return trained


def check_processes(config: TrainConfig) -> None:
    """Raise DbkitError for what a sharded training, or one in several processes, cannot do."""
    cannot = {
        f"memory {config.memory}": config.memory in ("balanced", "small", "tiny"),
        f"optimizer {config.chosen_optimizer}": config.chosen_optimizer != "adamw",
        "use_ema": config.use_ema,
        "adapter lora": config.adapter == "lora",
        "stop_text_encoder_training": config.train_text_encoder and bool(config.stop_text_encoder_training),
        f"resume_state {config.resume_state}": config.resume_state != "exact",
    }
    found = [name for name, there in cannot.items() if there]
    if found and (processes.shards() or zero.asked()):
        raise DbkitError(f"{found[0]} does not go with FSDP or DeepSpeed; leave it off, or launch without them")
    if config.memory == "tiny" and processes.world() > 1:
        raise DbkitError("memory tiny trains in one process; choose memory small, or start dbkit without a launcher")


def write_state(state: State, folder: Path, optimizer: dict[str, Any], config: TrainConfig) -> dict[str, str]:
    """Write into a folder what a run needs to go on, as resume_state says; optimizer is what gather() returned.

    Returns what save_state() does.
    """
    others = {"scaler": state.scaler.state_dict()}
    if config.resume_state != "weights":
        others["optimizer"] = in_8_bit(optimizer) if config.resume_state == "small" else optimizer
    precision = config.save_precision if config.resume_state == "weights" else None
    digests = save_state(folder, state.plain, others, precision=precision)
    if state.ema:
        with state.ema.in_place():
            averages = {part: state.trained[part] for part in state.ema.averages}
            digests |= save_state(folder, averages, {}, _EMA, precision)
    return digests


def state_size(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> int:
    """Bytes that write_state() takes on the disk."""
    halved = config.resume_state == "weights" and config.save_precision != "fp32"
    weights = sum(parameter.numel() * (2 if halved else parameter.dtype.itemsize) for parameter in parameters)
    moments = 0 if config.resume_state == "weights" else state_bytes(config.chosen_optimizer, parameters)
    small = config.resume_state == "small" and config.chosen_optimizer in ("adamw", "lion")
    return weights * (2 if config.use_ema else 1) + moments // (4 if small else 1)


def read_state(state: State, saved: Checkpoint) -> None:
    """Put a saved state in."""
    others = load_state(saved, state.trained)
    if state.engine:
        state.engine.optimizer.refresh_fp32_params()
        others["optimizer"] = others["optimizer"]["processes"][processes.rank()]
    if "optimizer" in others:
        load_optimizer(state.optimizer, from_8_bit(others["optimizer"]))
    if others["scaler"]:  # empty when the session before did not run in fp16
        state.scaler.load_state_dict(others["scaler"])
    if state.ema:
        for part in [part for part in state.ema.averages if not (saved.folder / f"{_EMA}{part}.safetensors").is_file()]:
            state.ema.forget(part)  # it was resting already
        with state.ema.in_place():
            load_state(saved, {part: state.trained[part] for part in state.ema.averages}, _EMA)


def rest_text_encoder(state: State, pools: list[Pool]) -> list[Pool]:
    """Train the text encoder no more, or not at all: the pools with its states, and the device free of it.

    What it keeps are its averages, if there are any, so that the U-Net learns to read what is saved.
    """
    import torch

    text_encoder = state.models.text_encoder
    if state.ema:
        state.ema.adopt("text_encoder")
    # Whole numbers, since there is no autocast here: memory tiny mixes bf16 and fp32.
    text_encoder.requires_grad_(False).eval().float().to(pools[0].prompts.device)
    for parameter in text_encoder.parameters():
        parameter.grad = None
        state.optimizer.state.pop(parameter, None)
    with torch.no_grad():
        states = torch.cat([encode_prompts(text_encoder, row[None]) for row in pools[0].prompts])
    text_encoder.to("cpu")
    return [dataclasses.replace(pool, prompts=states) for pool in pools]
