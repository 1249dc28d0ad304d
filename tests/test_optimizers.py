"""The learning rate equals its formula at every step; each optimizer obeys it, learns, and resumes bit for bit."""

import io
import math
import random
import sys
import types

import numpy as np
import pytest
import torch

from dbkit import DbkitError, TrainConfig
from dbkit.checkpoint import commit, load_state, save_state
from dbkit.optimizers import (
    LIBRARIES,
    choose_library,
    from_8_bit,
    in_8_bit,
    learning_rates,
    load_optimizer,
    make_optimizer,
    make_scaler,
    out_of_memory_is_a_sentence,
    set_learning_rate,
    state_bytes,
    try_optimizer,
)
from dbkit.settings import replace

CPU = torch.device("cpu")

# Every optimizer with every library that has it, and a rate at which it learns the small problem.
KINDS = [(name, library) for name, libraries in LIBRARIES.items() for library in libraries]
RATES = {"adamw": 0.05, "adamw8bit": 0.05, "adafactor": 0.05, "lion": 0.02, "prodigy": 1.0}


def make_config(optimizer="adamw", **changes) -> TrainConfig:
    return TrainConfig(
        pretrained_model_name_or_path="owner/model",
        instance_data_dir="photos",
        instance_prompt="zwx",
        optimizer=optimizer,
        **{"learning_rate": RATES[optimizer], **changes},
    )


@pytest.fixture(params=KINDS, ids="-".join)
def kind(request) -> tuple[str, str]:
    """An optimizer and a library that has it."""
    pytest.importorskip(request.param[1], reason=f"{request.param[1]} is not installed")
    return request.param


def hide(monkeypatch, *libraries: str) -> None:
    """Make these libraries fail to import."""
    for library in libraries:
        for module in (library, "torchao.optim", "torchao.prototype.low_bit_optim"):
            if module.startswith(library):
                monkeypatch.setitem(sys.modules, module, None)


class Problem:
    """Least squares in two parts, each with a matrix large enough for 8 bit and a vector that is not."""

    def __init__(self, kind: tuple[str, str], **changes):
        name, library = kind
        random = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(64, 128, generator=random)
        self.targets = self.inputs @ torch.randn(128, 64, generator=random) + 1
        self.parts = {name: torch.nn.Linear(128, 64) for name in ("unet", "text_encoder")}
        for parameter in self.parameters():
            torch.nn.init.zeros_(parameter)
        self.config = make_config(name, train_text_encoder=True, **changes)
        self.optimizer = make_optimizer(self.config, self.parts, CPU, library)

    def parameters(self):
        return [parameter for part in self.parts.values() for parameter in part.parameters()]

    def weights(self, part: str) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.parts[part].parameters()])

    def loss(self) -> torch.Tensor:
        return (sum(part(self.inputs) for part in self.parts.values()) - self.targets).square().mean()

    def step(self, rate: float) -> None:
        self.loss().backward()
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()


# The learning rate.


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


def test_restarts_and_power_shape_the_schedule():
    restarts = learning_rates(make_config(lr_scheduler="cosine_with_restarts", lr_num_cycles=2), total=20)
    expected = [0.05 * (1 + math.cos(math.pi * (done % 10) / 10)) / 2 for done in range(20)]
    assert [restarts(done) for done in range(20)] == pytest.approx(expected)
    square = learning_rates(make_config(lr_scheduler="polynomial", lr_power=2), total=20)
    expected = [(0.05 - 1e-7) * (1 - done / 20) ** 2 + 1e-7 for done in range(20)]
    assert [square(done) for done in range(20)] == pytest.approx(expected)


def test_learning_rate_does_not_depend_on_which_step_is_asked_first():
    config = make_config(learning_rate=1e-3, lr_scheduler="cosine", lr_warmup_steps=2)
    forward, backward = learning_rates(config, 10), learning_rates(config, 10)
    assert [forward(done) for done in range(10)] == [backward(done) for done in reversed(range(10))][::-1]


def test_scale_lr_multiplies_by_the_images_of_a_step():
    options = {"learning_rate": 1e-4, "train_batch_size": 3, "gradient_accumulation_steps": 4}
    assert learning_rates(make_config(**options), 10)(0) == pytest.approx(1e-4)
    assert learning_rates(make_config(**options, scale_lr=True), 10)(0) == pytest.approx(12e-4)


# The optimizers.


def test_optimizer_takes_its_settings():
    parameter = torch.nn.Parameter(torch.ones(3))
    config = make_config(learning_rate=0.5, adam_beta1=0.7, adam_beta2=0.8, adam_weight_decay=0.25, adam_epsilon=1e-3)
    optimizer = make_optimizer(config, {"unet": torch.nn.ParameterList([parameter])}, CPU, "torch")
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.5, (0.7, 0.8), 0.25, 1e-3)


def test_optimizer_step_equals_adamw_written_out():
    config = make_config(learning_rate=0.1, adam_beta1=0.7, adam_beta2=0.8, adam_weight_decay=0.25, adam_epsilon=1e-3)
    parameter = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
    optimizer = make_optimizer(config, {"unet": torch.nn.ParameterList([parameter])}, CPU, "torch")
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


def test_moments_in_8_bit_are_near_their_own_and_a_quarter_of_the_size(tmp_path):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(300, 200))
    optimizer = torch.optim.AdamW([weight])
    for size in (1e-3, 1.0, 1e-6):
        weight.grad = size * torch.randn_like(weight)
        weight.grad[0] = 0
        optimizer.step()
    state = optimizer.state_dict()
    sizes = []
    for name, saved in (("whole", state), ("small", in_8_bit(state))):
        torch.save(saved, tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[1] < 0.26 * sizes[0]
    back = from_8_bit(torch.load(tmp_path / "small", weights_only=True))
    assert back["param_groups"] == state["param_groups"] and back["state"][0]["step"] == state["state"][0]["step"]
    for name in ("exp_avg", "exp_avg_sq"):
        one, two = state["state"][0][name], back["state"][0][name]
        assert ((one - two).abs() <= 0.07 * one.abs() + 1e-7 * one.abs().max()).all()
        # No second moment becomes zero that was none.
        assert ((one == 0) == (two == 0)).all() and (one[0] == 0).all()
    assert from_8_bit(state)["state"][0]["exp_avg"] is state["state"][0]["exp_avg"]


def test_the_text_encoder_has_its_own_part_of_the_learning_rate_also_after_a_resume():
    parts = {name: torch.nn.Linear(2, 2) for name in ("unet", "text_encoder")}
    config = make_config(train_text_encoder=True, learning_rate=1e-4, text_encoder_learning_rate=2e-5)
    optimizer = make_optimizer(config, parts, CPU, "torch")
    assert [group["factor"] for group in optimizer.param_groups] == pytest.approx([1.0, 0.2])
    lower = make_optimizer(replace(config, text_encoder_learning_rate=1e-5), parts, CPU, "torch")
    load_optimizer(lower, optimizer.state_dict())
    assert [group["factor"] for group in lower.param_groups] == pytest.approx([1.0, 0.1])
    both = make_optimizer(replace(config, text_encoder_learning_rate=None), parts, CPU, "torch")
    assert [group["factor"] for group in both.param_groups] == [1.0, 1.0]


def test_each_optimizer_resumes_bit_for_bit(kind, tmp_path):
    straight, resumed = Problem(kind), Problem(kind)
    rates = [RATES[kind[0]] * factor for factor in (1, 0.9, 0.8, 0.7, 0.6, 0.5)]
    for rate in rates:
        straight.step(rate)
    stopped = Problem(kind)
    for rate in rates[:3]:
        stopped.step(rate)
    others = {"optimizer": stopped.optimizer.state_dict()}
    saved = commit(tmp_path / "step_000003", 3, lambda folder: save_state(folder, {}, others), {})
    for part, module in resumed.parts.items():
        module.load_state_dict(stopped.parts[part].state_dict())
    load_optimizer(resumed.optimizer, load_state(saved, {})["optimizer"])
    for rate in rates[3:]:
        resumed.step(rate)
    for part in straight.parts:
        assert torch.equal(straight.weights(part), resumed.weights(part))
        assert not torch.equal(straight.weights(part), stopped.weights(part))


def test_twice_the_rate_is_twice_the_step(kind):
    once, twice = Problem(kind), Problem(kind)
    once.step(RATES[kind[0]])
    twice.step(2 * RATES[kind[0]])
    for part in once.parts:
        assert bool((once.weights(part) != 0).all())
        assert torch.allclose(2 * once.weights(part), twice.weights(part), rtol=1e-4, atol=0)


def test_each_optimizer_but_prodigy_gives_the_text_encoder_its_own_rate(kind):
    name, _ = kind
    if name == "prodigy":
        with pytest.raises(DbkitError, match="prodigy finds one rate for all parts; leave text_encoder_learning_rate"):
            Problem(kind, text_encoder_learning_rate=0.5)
        return
    problem = Problem(kind, text_encoder_learning_rate=RATES[name] / 4)
    problem.step(RATES[name])
    assert torch.allclose(problem.weights("unet") / 4, problem.weights("text_encoder"), rtol=1e-4, atol=0)


def test_each_optimizer_solves_least_squares(kind):
    problem = Problem(kind, adam_weight_decay=0)
    before = problem.loss().item()
    for step in range(300):
        problem.step(RATES[kind[0]] * (1 - step / 300))
    assert problem.loss().item() < 1e-3 * before


def test_weight_decay_pulls_towards_zero_in_proportion_to_the_rate(kind):
    name, library = kind
    # Prodigy's rate before it has found one is a millionth, and its bias correction belongs to the rate.
    given, rate = (1e5, 0.1 * math.sqrt(0.001) / 0.1) if name == "prodigy" else (0.1, 0.1)
    moved = []
    for decay in (0.0, 0.5):
        weight = torch.nn.Parameter(torch.full((64, 128), 2.0**-12))
        config = make_config(name, adam_weight_decay=decay)
        optimizer = make_optimizer(config, {"unet": torch.nn.ParameterList([weight])}, CPU, library)
        weight.grad = torch.ones_like(weight)
        set_learning_rate(optimizer, given)
        optimizer.step()
        moved.append(weight.detach().double())
    assert (moved[0] - moved[1]).mean().item() == pytest.approx(rate * 0.5 * 2.0**-12, rel=0.02)


def test_loss_scaling_skips_a_step_that_overflowed_and_takes_the_next(kind):
    problem = Problem(kind)
    scaler = make_scaler(CPU, torch.float16)
    for overflows in (True, False):
        scaler.scale(problem.loss()).backward()
        if overflows:
            problem.parameters()[0].grad[0, 0] = torch.inf
        scaler.unscale_(problem.optimizer)
        set_learning_rate(problem.optimizer, RATES[kind[0]])
        scaler.step(problem.optimizer)
        scaler.update()
        problem.optimizer.zero_grad()
        for part in problem.parts:
            assert bool((problem.weights(part) == 0).all()) == overflows


def test_the_size_of_the_state_is_known_beforehand(kind):
    name, library = kind
    module = torch.nn.Sequential(torch.nn.Linear(512, 256), torch.nn.Conv2d(64, 64, 3))
    optimizer = make_optimizer(make_config(name), {"unet": module}, CPU, library)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert len(file.getvalue()) == pytest.approx(state_bytes(name, module.parameters()), rel=0.05, abs=12_000)


def test_adafactor_takes_the_rate_it_is_given():
    weight = torch.nn.Parameter(torch.full((64, 128), 8.0))
    config = make_config("adafactor", adam_weight_decay=0)
    optimizer = make_optimizer(config, {"unet": torch.nn.ParameterList([weight])}, CPU, "transformers")
    for rate, total in ((0.25, 0.25), (0.125, 0.375)):
        weight.grad = torch.full_like(weight, 3.0)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        assert torch.allclose(weight, torch.full_like(weight, 8 - total))


@pytest.mark.parametrize(
    ("given", "beta1", "beta2"), [({}, 0.9, 0.99), ({"adam_beta1": 0.5, "adam_beta2": 0.7}, 0.5, 0.7)]
)
def test_lion_step_equals_lion_written_out(given, beta1, beta2):
    pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    parameter = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
    config = make_config("lion", learning_rate=0.1, adam_weight_decay=0.25, **given)
    optimizer = make_optimizer(config, {"unet": torch.nn.ParameterList([parameter])}, CPU, "pytorch_optimizer")
    expected, moment = parameter.tolist(), [0.0] * 3
    for step in range(1, 6):
        # The sign changes, so that what the moments remember decides.
        parameter.grad = torch.tensor([0.3, -2.0, 0.01]) * (-1) ** (step // 2) * step
        for n, gradient in enumerate(parameter.grad.tolist()):
            direction = math.copysign(1, beta1 * moment[n] + (1 - beta1) * gradient)
            expected[n] = expected[n] * (1 - 0.1 * 0.25) - 0.1 * direction
            moment[n] = beta2 * moment[n] + (1 - beta2) * gradient
        optimizer.step()
        assert parameter.tolist() == pytest.approx(expected, rel=1e-5)


def test_prodigy_finds_a_rate_to_the_size_of_the_problem():
    pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    for size in (0.01, 100.0):
        weight = torch.nn.Parameter(torch.zeros(64))
        config = make_config("prodigy", adam_weight_decay=0)
        optimizer = make_optimizer(config, {"unet": torch.nn.ParameterList([weight])}, CPU, "pytorch_optimizer")
        for step in range(300):
            optimizer.zero_grad()
            (weight - size).square().sum().backward()
            set_learning_rate(optimizer, 1 - step / 300)
            optimizer.step()
        assert weight.mean().item() == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize(("dtype", "enabled"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, False)])
def test_only_fp16_scales_its_loss(dtype, enabled):
    scaler = make_scaler(CPU, dtype)
    assert scaler.is_enabled() == enabled
    scaled = scaler.scale(torch.ones(()))
    assert (scaled.item() > 1) == enabled


def test_8bit_adam_keeps_its_moments_in_8_bit():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    parameter = torch.nn.Parameter(torch.ones(64, 128))
    parts = {"unet": torch.nn.ParameterList([parameter])}
    optimizer = make_optimizer(make_config(use_8bit_adam=True), parts, CPU, "bitsandbytes")
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
    parameter.square().sum().backward()
    optimizer.step()
    assert optimizer.state[parameter]["state1"].dtype == torch.uint8


# Which library has it, and whether it works.


def test_each_optimizer_works_on_the_cpu_and_trying_it_leaves_random_numbers_alone(kind):
    name, library = kind
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert try_optimizer(make_config(name), library, CPU) == ""
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_8bit_adam_of_bitsandbytes_is_taken_where_it_works_and_said(capsys):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assert choose_library(make_config("adamw8bit"), CPU) == "bitsandbytes"
    assert capsys.readouterr().out == "bitsandbytes's 8-bit AdamW is used\n"


def test_8bit_adam_of_torchao_is_taken_and_said_where_bitsandbytes_fails(monkeypatch, capsys):
    pytest.importorskip("torchao", reason="torchao is not installed")
    hide(monkeypatch, "bitsandbytes")
    assert choose_library(make_config(use_8bit_adam=True), CPU) == "torchao"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("bitsandbytes does not work here (import of bitsandbytes halted")
    assert line.endswith("); torchao's 8-bit AdamW is used")


def test_a_run_keeps_the_library_that_it_began_with(monkeypatch, capsys):
    for library in LIBRARIES["adamw8bit"]:
        pytest.importorskip(library, reason=f"{library} is not installed")
        assert choose_library(make_config("adamw8bit"), CPU, before=library) == library
        assert capsys.readouterr().out == f"{library}'s 8-bit AdamW is used\n"
        expected = (
            rf"^this run's saved state is of {library}, which does not work here \(.+\); mend that \(pip install "
            rf"{library}\), choose another output_dir, or set start_over$"
        )
        with monkeypatch.context() as patch, pytest.raises(DbkitError, match=expected):
            hide(patch, library)
            choose_library(make_config("adamw8bit"), CPU, before=library)


@pytest.mark.parametrize(
    ("given", "way_out"),
    [({"use_8bit_adam": True}, "leave use_8bit_adam off"), ({"optimizer": "adamw8bit"}, "choose another optimizer")],
)
def test_where_no_8bit_adam_works_both_reasons_are_said(monkeypatch, given, way_out):
    hide(monkeypatch, "bitsandbytes", "torchao")
    expected = (
        r"^optimizer adamw8bit needs bitsandbytes, which does not work here \(.*bitsandbytes.*\) and torchao, which "
        rf"does not work here \(.*torchao.*\); pip install bitsandbytes, or {way_out}$"
    )
    with pytest.raises(DbkitError, match=expected):
        choose_library(make_config(**given), CPU)


@pytest.mark.parametrize("name", ["lion", "prodigy"])
def test_a_missing_library_is_said_with_its_command(monkeypatch, name):
    hide(monkeypatch, "pytorch_optimizer")
    expected = (
        rf"^optimizer {name} needs pytorch_optimizer, which does not work here \(.+\); pip install "
        r"pytorch_optimizer, or choose another optimizer$"
    )
    with pytest.raises(DbkitError, match=expected):
        choose_library(make_config(name), CPU)


class Idle(torch.optim.SGD):
    """Changes nothing."""

    def __init__(self, groups, lr, **options):
        super().__init__(groups, lr=lr)

    def step(self, closure=None):
        return None


class Bursting(Idle):
    """Makes weights that are no numbers."""

    @torch.no_grad()
    def step(self, closure=None):
        self.param_groups[0]["params"][0].fill_(torch.nan)


class Forgetful(Idle):
    """Takes longer steps each time and saves nothing of that."""

    taken = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.taken += 1
        self.param_groups[0]["params"][0].add_(self.taken)


class NotData(Idle):
    """Its saved state would run code when it is read."""

    def state_dict(self):
        return {**super().state_dict(), "more": types.SimpleNamespace()}


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (Idle, "a test step changed nothing"),
        (Bursting, "a test step gave weights that are not numbers"),
        (Forgetful, "its saved state does not give the same next step"),
        (NotData, "Weights only load failed"),
    ],
)
def test_an_optimizer_that_works_only_in_part_is_refused(monkeypatch, broken, fault):
    module = types.ModuleType("pytorch_optimizer")
    module.Lion = broken
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", module)
    expected = rf"^optimizer lion needs pytorch_optimizer, which does not work here \({fault}.*\); pip install"
    with pytest.raises(DbkitError, match=expected):
        choose_library(make_config("lion"), CPU)


def test_a_full_gpu_is_said_with_what_takes_less():
    expected = r"the GPU ran out of memory at .+; turn on gradient_checkpointing and use_8bit_adam, or lower resolution"
    with pytest.raises(DbkitError, match=expected), out_of_memory_is_a_sentence():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="something else"), out_of_memory_is_a_sentence():
        raise RuntimeError("something else")
