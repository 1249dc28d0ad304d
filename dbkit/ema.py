"""The moving average of the weights (EMA): what is sampled and saved, while training goes on with the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Ema:
    """Averages of the trained parameters of some modules, by the names of their parts.

    Everything else about it follows from the number of the step, so there is no other state to save.
    """

    def __init__(self, trained: dict[str, torch.nn.Module], decay: float) -> None:
        self.decay = decay
        self.parameters = {
            part: [parameter for parameter in module.parameters() if parameter.requires_grad]
            for part, module in trained.items()
        }
        self.averages = {part: [p.detach().clone() for p in own] for part, own in self.parameters.items()}

    def update(self, step: int) -> None:
        """Move the averages towards the weights after optimizer step `step`, counted from 1.

        The decay warms up as min(ema_decay, (1 + step) / (10 + step)): an average that began at full length would be
        the base model's weights for thousands of steps.
        """
        import torch

        decay = min(self.decay, (1 + step) / (10 + step))
        for part, averages in self.averages.items():
            torch._foreach_lerp_(averages, [p.detach() for p in self.parameters[part]], 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages where the weights are for the time of the block. Nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for part, averages in self.averages.items():
            for number, parameter in enumerate(self.parameters[part]):
                parameter.data, averages[number] = averages[number], parameter.data

    def adopt(self, part: str) -> None:
        """Let a part that is trained no more keep its averages, if there are any, as its weights."""
        for parameter, average in zip(self.parameters.get(part, ()), self.averages.get(part, ())):
            parameter.data.copy_(average)
        self.forget(part)

    def forget(self, part: str) -> None:
        """Keep no averages of a part any longer."""
        self.parameters.pop(part, None)
        self.averages.pop(part, None)
