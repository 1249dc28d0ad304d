"""The optimizer of memory tiny: AdamW, parameter by parameter inside the backward pass, in few bits."""

import copy

import pytest
import torch

from dbkit.in_backward import AdamWInBackward, is_large, store_in_bf16
from dbkit.models import load_models
from dbkit.optimizers import load_optimizer, set_learning_rate, state_bytes

CPU = torch.device("cpu")
OPTIONS = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
RATE = 1e-2


class Problem:
    """Least squares: a matrix that is kept in few bits, and a bias that is not."""

    def __init__(self, seed: int = 0, max_grad_norm: float = 1e9, few_bits: bool = True):
        random = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(64, 128, generator=random)
        self.targets = self.inputs @ torch.randn(128, 64, generator=random) + 1
        self.layer = torch.nn.Linear(128, 64)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=random))
        self.few_bits = few_bits
        if few_bits:
            store_in_bf16(self.layer.parameters())
        groups = [{"params": list(self.layer.parameters()), "factor": 1.0}]
        self.optimizer = AdamWInBackward(groups, RATE, **OPTIONS, max_grad_norm=max_grad_norm, seed=seed)

    def loss(self, rows: slice = slice(None)) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.few_bits):
            found = self.layer(self.inputs[rows])
        return (found.float() - self.targets[rows]).square().sum() / 64

    def step(self, number: int) -> torch.Tensor:
        set_learning_rate(self.optimizer, RATE)
        self.optimizer.begin(number)
        self.loss().backward()
        return self.optimizer.end()

    @property
    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().float().flatten() for parameter in self.layer.parameters()])


def test_in_fp32_it_is_torchs_adamw_bit_for_bit(smaller_model):
    """On the whole U-Net, with activations that are computed anew, and a gradient that was summed up before."""
    ours, theirs = (load_models(smaller_model).unet.train().requires_grad_(True) for _ in range(2))
    groups = [{"params": list(ours.parameters()), "factor": 1.0}]
    optimizer = AdamWInBackward(groups, RATE, **OPTIONS, max_grad_norm=1e9, seed=0)
    reference = torch.optim.AdamW(theirs.parameters(), lr=RATE, foreach=False, fused=False, **OPTIONS)
    for unet in (ours, theirs):
        unet.enable_gradient_checkpointing()
    for step in range(1, 4):
        loss_of(ours, 2 * step).backward()
        optimizer.begin(step)
        loss_of(ours, 2 * step + 1).backward()
        norm = optimizer.end()
        (loss_of(theirs, 2 * step) + loss_of(theirs, 2 * step + 1)).backward()
        norms = torch.stack([parameter.grad.norm() for parameter in theirs.parameters()])
        assert float(norm) == pytest.approx(float(norms.norm()))
        reference.step()
        reference.zero_grad()
    for own, other in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(own, other)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[own][name], reference.state[other][name])


def loss_of(unet, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    latents, text = (torch.randn(1, *shape, generator=random) for shape in ((4, 8, 8), (77, 64)))
    return unet(latents, torch.tensor([10]), text).sample.square().mean()


def test_in_few_bits_it_stays_near_adamw():
    ours, theirs = Problem(), Problem(few_bits=False)
    assert [p.dtype for p in ours.layer.parameters()] == [torch.bfloat16, torch.float32]
    began = theirs.weights.clone()
    for number in range(1, 51):
        ours.step(number)
        theirs.step(number)
    # Steps of 0.01 of numbers around 1, whose bf16 neighbours are 0.008 away.
    moved, should = ours.weights - began, theirs.weights - began
    assert float((moved - should).norm() / should.norm()) < 0.15
    # The mean, which rounding at random keeps, is much nearer.
    assert float(((moved - should) * should.sign()).mean() / should.abs().mean()) == pytest.approx(0, abs=0.03)
    assert float(ours.loss().detach()) < 0.6 * float(Problem().loss().detach())


def test_each_gradient_is_clipped_by_itself_and_the_norm_is_that_of_all():
    loud, quiet = Problem(max_grad_norm=1e-4), Problem(few_bits=False)
    quiet.loss().backward()
    grads = [parameter.grad for parameter in quiet.layer.parameters()]
    norm = loud.step(1)
    assert float(norm) == pytest.approx(float(torch.stack([g.norm() for g in grads]).norm()), rel=0.02)
    weight, bias = (loud.optimizer.state[parameter] for parameter in loud.layer.parameters())
    # After one step the first moment is a tenth of the gradient.
    assert float(bias["exp_avg"].norm()) == pytest.approx(1e-5, rel=1e-3)
    assert weight["exp_avg"].dtype == torch.uint8


def test_a_backward_pass_outside_a_step_is_summed_up():
    one, two = Problem(few_bits=False), Problem(few_bits=False)
    one.step(1)
    before = two.weights.clone()
    two.loss(slice(0, 40)).backward()
    assert torch.equal(two.weights, before) and two.layer.weight.grad is not None
    two.optimizer.begin(1)
    two.loss(slice(40, 64)).backward()
    two.optimizer.end()
    assert two.layer.weight.grad is None
    for parameters in zip(one.layer.parameters(), two.layer.parameters()):
        moments = [problem.optimizer.state[p]["exp_avg"] for problem, p in zip((one, two), parameters)]
        torch.testing.assert_close(*moments, rtol=1e-4, atol=1e-4)


def test_rounding_depends_on_seed_step_and_parameter():
    def after(seed: int, step: int) -> torch.Tensor:
        problem = Problem(seed)
        problem.step(step)
        problem.optimizer.state.clear()
        return problem.layer.weight.detach()

    assert torch.equal(after(0, 1), after(0, 1))
    assert not torch.equal(after(0, 1), after(1, 1))
    twins = [torch.nn.Parameter(torch.ones(16, 16, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = AdamWInBackward([{"params": twins, "factor": 1.0}], 1e-4, **OPTIONS, max_grad_norm=1.0, seed=0)
    optimizer.begin(1)
    sum(twin.float().sum() for twin in twins).backward()
    assert not torch.equal(*(twin.detach() for twin in twins))


def test_a_saved_state_gives_the_same_next_steps():
    straight, resumed = Problem(), Problem()
    for number in range(1, 4):
        straight.step(number)
    resumed.layer.load_state_dict(straight.layer.state_dict())
    load_optimizer(resumed.optimizer, copy.deepcopy(straight.optimizer.state_dict()))
    for number in range(4, 7):
        straight.step(number)
        resumed.step(number)
    assert torch.equal(straight.weights, resumed.weights)


def test_no_more_than_one_gradient_is_alive_in_the_backward_pass(model):
    """Counted when each gradient comes and after it was taken; checkpointing computes parts of the model anew."""
    unet = load_models(model).unet.train().requires_grad_(True)
    unet.enable_gradient_checkpointing()
    store_in_bf16(unet.parameters())
    parameters = list(unet.parameters())
    optimizer = AdamWInBackward([{"params": parameters, "factor": 1.0}], 1e-4, **OPTIONS, max_grad_norm=1.0, seed=0)
    before = [parameter.detach().clone() for parameter in parameters]
    alive, taken = {}, []

    def size(grad: torch.Tensor) -> int:
        return grad.numel() * grad.element_size()

    def come(number: int, grad: torch.Tensor) -> None:
        alive[number] = size(grad)
        taken.append(sum(alive.values()))

    def gone(number: int, parameter: torch.nn.Parameter) -> None:
        if parameter.grad is None:
            del alive[number]

    for number, parameter in enumerate(parameters):
        parameter.register_hook(lambda grad, number=number: come(number, grad))
        parameter.register_post_accumulate_grad_hook(lambda p, number=number: gone(number, p))
    with torch.autocast("cpu", torch.bfloat16):
        found = unet(torch.randn(1, 4, 16, 16), torch.tensor([10]), torch.randn(1, 77, 64)).sample
    optimizer.begin(1)
    found.float().square().mean().backward()
    assert float(optimizer.end()) > 0
    assert len(taken) == len(parameters) and not alive
    assert max(taken) < 2 * max(map(size, parameters))
    assert max(taken) < sum(map(size, parameters)) / 10
    assert not any(torch.equal(old, new.detach()) for old, new in zip(before, parameters))


def test_the_state_of_large_weights_takes_two_bytes_each():
    problem = Problem()
    problem.step(1)
    for parameter in problem.layer.parameters():
        values = [value for value in problem.optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
        size = sum(value.numel() * value.element_size() for value in values)
        assert size == pytest.approx((2 + 8 / 256 if is_large(parameter) else 8) * parameter.numel())
        assert size <= state_bytes("adamw8bit", [parameter])


def test_weights_in_another_memory_format_take_the_same_step():
    """channels_last, which a kernel may come in: blocks of numbers follow the order of its dimensions all the same."""
    made = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(32, 32, 3).to(memory_format=memory_format)
        store_in_bf16(layer.parameters())
        groups = [{"params": list(layer.parameters()), "factor": 1.0}]
        optimizer = AdamWInBackward(groups, RATE, **OPTIONS, max_grad_norm=1e9, seed=0)
        optimizer.begin(1)
        with torch.autocast("cpu", torch.bfloat16):
            layer(torch.linspace(-1, 1, 32 * 64).view(1, 32, 8, 8)).float().square().sum().backward()
        optimizer.end()
        made.append(layer.weight.detach())
    assert torch.allclose(made[0].float(), made[1].float(), rtol=0.02)
