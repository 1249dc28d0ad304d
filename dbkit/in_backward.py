"""AdamW inside the backward pass: memory tiny.

Each gradient is applied and freed as soon as it is there, so there is never more than one of them; weights are bf16
and moments take 8 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dbkit import draws
from dbkit.rounding import BLOCK, LOWEST, from_blocks, to_bf16, to_blocks

if TYPE_CHECKING:
    import torch

# Blocks that are stepped at once, 4 million numbers: of the largest layer the intermediate results would take 1 GB.
_AT_ONCE = 2**14


def store_in_bf16(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Turn the large ones among the parameters that are trained into bf16, in place."""
    import torch

    for parameter in parameters:
        if parameter.requires_grad and is_large(parameter):
            # Row by row, whatever the memory format was: a step reads the numbers in blocks.
            parameter.data = parameter.data.to(torch.bfloat16, memory_format=torch.contiguous_format)


def is_large(parameter: torch.Tensor) -> bool:
    """Whether memory tiny keeps it in few bits: matrices and kernels. Biases and norms are a thousandth of a model."""
    return parameter.ndim > 1 and parameter.numel() % BLOCK == 0


class AdamWInBackward:
    """AdamW with decoupled weight decay (arXiv:1711.05101) that steps each parameter when its gradient is there.

    A step is begin(), a backward pass, and end(). Gradients of a backward pass without begin() are summed up as ever.
    fp32 parameters and their moments are those of torch's AdamW, bit for bit. bf16 ones have moments in 8 bits, and all
    three are rounded at random, by numbers that depend on the seed, the step and the parameter alone; of the second
    moment the root is kept, whose range is half as wide. Groups and state are laid out as in torch.optim.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
        seed: int,
    ) -> None:
        import torch

        self.param_groups = [{**group, "lr": lr} for group in groups]
        self.state: dict[torch.nn.Parameter, dict[str, Any]] = {}
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.step, self.norms = 0, []
        self.random = torch.Generator(groups[0]["params"][0].device)
        for number, (group, parameter) in enumerate(self._parameters()):
            parameter.register_post_accumulate_grad_hook(functools.partial(self._take, number, group))

    def begin(self, step: int) -> None:
        """Let the next backward pass take optimizer step `step`, counted from 1, at each group's `lr`."""
        self.step, self.norms = step, []

    def end(self) -> torch.Tensor:
        """End the step. Returns the norm of the whole gradient, before it was clipped."""
        import torch

        self.step = 0
        return torch.linalg.vector_norm(torch.stack(self.norms))

    def state_dict(self) -> dict[str, Any]:
        """The state, by the numbers of the parameters, and the groups without them."""
        states = {n: self.state[p] for n, (_, p) in enumerate(self._parameters()) if p in self.state}
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put a saved state in. Settings stay those that this one was made with."""
        for number, (_, parameter) in enumerate(self._parameters()):
            if number in state["state"]:
                values = state["state"][number].items()
                self.state[parameter] = {
                    name: value if name == "step" else value.to(parameter.device) for name, value in values
                }

    def _parameters(self) -> list[tuple[dict[str, Any], torch.nn.Parameter]]:
        return [(group, parameter) for group in self.param_groups for parameter in group["params"]]

    def _take(self, number: int, group: dict[str, Any], parameter: torch.nn.Parameter) -> None:
        """Step a parameter and free its gradient."""
        import torch

        if not self.step:
            return
        with torch.no_grad():
            grad, parameter.grad = parameter.grad, None
            norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
            self.norms.append(norm)
            # Of the whole gradient's norm nothing is known yet, so each is clipped by itself, as torch clips the whole.
            clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1)
            state = self.state.get(parameter) or self._begin(parameter)
            state["step"] += 1
            if parameter.dtype != torch.bfloat16:
                self._adamw(parameter, grad * clip, state["exp_avg"], state["exp_avg_sq"], group["lr"], state["step"])
                return
            random = self._random(number)
            weights, grads = parameter.view(-1, BLOCK), grad.reshape(-1, BLOCK)
            codes = [state[name] for name in ("exp_avg", "exp_avg_scales", "exp_rms", "exp_rms_scales")]
            for first in range(0, len(weights), _AT_ONCE):
                some = slice(first, first + _AT_ONCE)
                self._step_in_few_bits(
                    weights[some], grads[some], clip, [c[some] for c in codes], random, group["lr"], state["step"]
                )

    def _begin(self, parameter: torch.nn.Parameter) -> dict[str, Any]:
        """The state of a parameter that has taken no step."""
        import torch

        state = self.state[parameter] = {"step": 0}
        if parameter.dtype != torch.bfloat16:
            state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            return state
        rows, device = parameter.numel() // BLOCK, parameter.device
        for name in ("exp_avg", "exp_rms"):
            state[name] = torch.zeros(rows, BLOCK, dtype=torch.uint8, device=device)
            state[f"{name}_scales"] = torch.zeros(rows, 1, device=device)
        return state

    def _random(self, number: int) -> torch.Generator:
        """The device's generator, at the beginning of the numbers of one parameter in this step."""
        key = draws.generator(self.seed, "rounding", self.step, number).integers(2**63)
        return self.random.manual_seed(int(key))

    def _step_in_few_bits(
        self,
        weights: torch.Tensor,
        grads: torch.Tensor,
        clip: torch.Tensor,
        codes: list[torch.Tensor],
        random: torch.Generator,
        rate: float,
        step: int,
    ) -> None:
        """Step some blocks of a parameter in fp32, and round weights and moments again; all of shape (N, BLOCK)."""
        weight, exp_avg, exp_avg_sq = weights.float(), from_blocks(*codes[:2]), from_blocks(*codes[2:]).square_()
        self._adamw(weight, grads.float().mul_(clip), exp_avg, exp_avg_sq, rate, step)
        weights.copy_(to_bf16(weight, random))
        # A second moment of zero would make a step endless.
        for kept, new in zip(codes, (*to_blocks(exp_avg, random), *to_blocks(exp_avg_sq.sqrt_(), random, LOWEST))):
            kept.copy_(new)

    def _adamw(
        self,
        weight: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        rate: float,
        step: int,
    ) -> None:
        """One step in fp32, in place: the operations of torch's AdamW in their order."""
        beta1, beta2 = self.betas
        weight.mul_(1 - rate * self.weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        divisor = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(self.eps)
        weight.addcdiv_(exp_avg, divisor, value=-rate / (1 - beta1**step))
