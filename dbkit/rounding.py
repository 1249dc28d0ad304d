"""Numbers in fewer bits without a bias: fp32 to bf16 by stochastic rounding, moments in 8 bits by the block.

To the nearest, every update below half a step of the coarser numbers is lost; up or down at random, with the
probabilities that keep the mean, none is lost in expectation (arXiv:1502.02551).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Numbers that share a scale (arXiv:2110.02861).
BLOCK = 256
# Bits of an fp32 number after its leading one, and of those of 16 and 8 bits.
_FP32, _BF16, _FP8 = 23, 7, 3
# What torch.float8_e4m3fn holds with all of its bits: from the smallest to the largest.
LOWEST, _HIGHEST = 2.0**-6, 448.0


def to_bf16(values: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """fp32 numbers as bf16, each rounded up or down so that its mean over many draws is the number itself."""
    import torch

    return _rounded(values, _BF16, random).to(torch.bfloat16)


def to_blocks(
    values: torch.Tensor, random: torch.Generator, lowest: float = -_HIGHEST
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 numbers of shape (N, BLOCK) in 8 bits: bytes (N, BLOCK) and fp32 scales (N, 1), rounded as in to_bf16().

    What is below `lowest`, of which the largest of each block is 448, is raised to that.
    """
    import torch

    # The bound keeps a block of zeros from dividing by zero.
    scales = (values.abs().amax(1, keepdim=True) / _HIGHEST).clamp_(min=torch.finfo(torch.float32).tiny)
    levels = _rounded(values / scales, _FP8, random).clamp_(lowest, _HIGHEST)
    # As bytes, which every version of torch saves.
    return levels.to(torch.float8_e4m3fn).view(torch.uint8), scales


def from_blocks(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The fp32 numbers of to_blocks()."""
    import torch

    return codes.view(torch.float8_e4m3fn).float().mul_(scales)


def _rounded(values: torch.Tensor, kept: int, random: torch.Generator) -> torch.Tensor:
    """fp32 numbers of which only `kept` bits after the leading one are not zero; NaN and infinities as they are."""
    import torch

    step = 1 << (_FP32 - kept)
    # As an integer a number's magnitude grows with its bits, so what a random number carries over rounds away from zero
    # with the probability that the bits below say.
    bits = values.view(torch.int32)
    bits = torch.empty_like(bits).random_(0, step, generator=random).add_(bits).bitwise_and_(-step)
    return torch.where(values.isnan(), values, bits.view(torch.float32))
