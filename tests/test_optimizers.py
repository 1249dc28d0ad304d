"""The learning rate equals its formula at every step; the optimizer takes its settings; 8-bit Adam is tried first."""

import math
import sys
import types

import pytest
import torch

from dbkit import DbkitError, TrainConfig
from dbkit.optimizers import (
    learning_rates,
    load_optimizer,
    make_optimizer,
    make_scaler,
    out_of_memory_is_a_sentence,
    probe_8bit_adam,
)
from dbkit.settings import replace

CPU = torch.device("cpu")


def make_config(**changes) -> TrainConfig:
    return TrainConfig(
        pretrained_model_name_or_path="owner/model", instance_data_dir="photos", instance_prompt="zwx", **changes
    )


FACTORS = {
    "constant": lambda step: 1.0,
    "constant_with_warmup": lambda step: min(1.0, step / 4),
    "linear": lambda step: step / 4 if step < 4 else (20 - step) / 16,
    "cosine": lambda step: step / 4 if step < 4 else (1 + math.cos(math.pi * (step - 4) / 16)) / 2,
    "cosine_with_restarts": lambda step: step / 4 if step < 4 else (1 + math.cos(math.pi * (step - 4) / 16)) / 2,
    "polynomial": lambda step: step / 4 if step < 4 else ((1e-3 - 1e-7) * (1 - (step - 4) / 16) + 1e-7) / 1e-3,
}


@pytest.mark.parametrize("lr_scheduler", FACTORS)
def test_learning_rate_of_every_step_equals_its_formula(lr_scheduler):
    warmup = 0 if lr_scheduler == "constant" else 4
    config = make_config(learning_rate=1e-3, lr_scheduler=lr_scheduler, lr_warmup_steps=warmup)
    learning_rate = learning_rates(config, total=20)
    found = [learning_rate(done) for done in range(20)]
    assert found == pytest.approx([1e-3 * FACTORS[lr_scheduler](done) for done in range(20)])


def test_learning_rate_does_not_depend_on_which_step_is_asked_first():
    config = make_config(learning_rate=1e-3, lr_scheduler="cosine", lr_warmup_steps=2)
    forward, backward = learning_rates(config, 10), learning_rates(config, 10)
    assert [forward(done) for done in range(10)] == [backward(done) for done in reversed(range(10))][::-1]


def test_scale_lr_multiplies_by_the_images_of_a_step():
    options = {"learning_rate": 1e-4, "train_batch_size": 3, "gradient_accumulation_steps": 4}
    assert learning_rates(make_config(**options), 10)(0) == pytest.approx(1e-4)
    assert learning_rates(make_config(**options, scale_lr=True), 10)(0) == pytest.approx(12e-4)


def test_optimizer_takes_its_settings():
    parameter = torch.nn.Parameter(torch.ones(3))
    config = make_config(learning_rate=0.5, adam_beta1=0.7, adam_beta2=0.8, adam_weight_decay=0.25, adam_epsilon=1e-3)
    optimizer = make_optimizer(config, {"unet": torch.nn.ParameterList([parameter])}, CPU)
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.5, (0.7, 0.8), 0.25, 1e-3)


def test_optimizer_step_equals_adamw_written_out():
    config = make_config(learning_rate=0.1, adam_beta1=0.7, adam_beta2=0.8, adam_weight_decay=0.25, adam_epsilon=1e-3)
    parameter = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
    optimizer = make_optimizer(config, {"unet": torch.nn.ParameterList([parameter])}, CPU)
    expected, first, second = parameter.tolist(), [0.0] * 3, [0.0] * 3
    for step in range(1, 4):
        parameter.grad = torch.tensor([0.3, -2.0, 0.01]) * step
        for n, gradient in enumerate(parameter.grad.tolist()):
            first[n] = 0.7 * first[n] + 0.3 * gradient
            second[n] = 0.8 * second[n] + 0.2 * gradient**2
            moment = first[n] / (1 - 0.7**step) / (math.sqrt(second[n] / (1 - 0.8**step)) + 1e-3)
            expected[n] = expected[n] * (1 - 0.1 * 0.25) - 0.1 * moment
        optimizer.step()
        assert parameter.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_text_encoder_has_its_own_part_of_the_learning_rate_also_after_a_resume():
    parts = {name: torch.nn.Linear(2, 2) for name in ("unet", "text_encoder")}
    config = make_config(train_text_encoder=True, learning_rate=1e-4, text_encoder_learning_rate=2e-5)
    optimizer = make_optimizer(config, parts, CPU)
    assert [group["factor"] for group in optimizer.param_groups] == pytest.approx([1.0, 0.2])
    lower = make_optimizer(replace(config, text_encoder_learning_rate=1e-5), parts, CPU)
    load_optimizer(lower, optimizer.state_dict())
    assert [group["factor"] for group in lower.param_groups] == pytest.approx([1.0, 0.1])
    both = make_optimizer(replace(config, text_encoder_learning_rate=None), parts, CPU)
    assert [group["factor"] for group in both.param_groups] == [1.0, 1.0]


@pytest.mark.parametrize(("dtype", "enabled"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, False)])
def test_only_fp16_scales_its_loss(dtype, enabled):
    scaler = make_scaler(CPU, dtype)
    assert scaler.is_enabled() == enabled
    scaled = scaler.scale(torch.ones(()))
    assert (scaled.item() > 1) == enabled


def test_8bit_adam_keeps_its_moments_in_8_bit():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    probe_8bit_adam(CPU)
    parameter = torch.nn.Parameter(torch.ones(64, 128))
    optimizer = make_optimizer(make_config(use_8bit_adam=True), {"unet": torch.nn.ParameterList([parameter])}, CPU)
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
    parameter.square().sum().backward()
    optimizer.step()
    assert optimizer.state[parameter]["state1"].dtype == torch.uint8


def test_missing_bitsandbytes_is_said_with_a_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DbkitError, match=r"needs bitsandbytes, which does not work here \(.+\); pip install"):
        probe_8bit_adam(CPU)


def test_bitsandbytes_that_changes_nothing_is_refused(monkeypatch):
    class Idle(torch.optim.SGD):
        def step(self, closure=None):
            return None

    broken = types.ModuleType("bitsandbytes")
    broken.optim = types.SimpleNamespace(AdamW8bit=Idle)
    monkeypatch.setitem(sys.modules, "bitsandbytes", broken)
    with pytest.raises(DbkitError, match="a test step of bitsandbytes changed nothing; leave it off on this machine"):
        probe_8bit_adam(CPU)


def test_a_full_gpu_is_said_with_what_takes_less():
    expected = r"the GPU ran out of memory at .+; turn on gradient_checkpointing and use_8bit_adam, or lower resolution"
    with pytest.raises(DbkitError, match=expected), out_of_memory_is_a_sentence():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="something else"), out_of_memory_is_a_sentence():
        raise RuntimeError("something else")
