"""Rounding at random keeps the mean, moves to a neighbour only, and loses no small update."""

import pytest
import torch

from dbkit.rounding import BLOCK, LOWEST, from_blocks, to_bf16, to_blocks

DRAWS = 20_000


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread() -> torch.Tensor:
    """Numbers of either sign over twelve powers of ten."""
    size = 10 ** torch.linspace(-6, 6, 64)
    return torch.randn(64, generator=random(1)) * size


def neighbours(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bf16 numbers at both sides, as fp32."""
    bits = values.view(torch.int32)
    inner = bits & -0x10000
    return inner.view(torch.float32), (inner + 0x10000).view(torch.float32)


def test_the_mean_of_many_draws_is_the_number():
    values = spread()
    drawn = to_bf16(values.expand(DRAWS, -1).contiguous(), random()).double()
    inner, outer = neighbours(values)
    up = (values - inner).double() / (outer - inner).double()
    sigma = (outer - inner).abs().double() * (up * (1 - up) / DRAWS).sqrt()
    assert bool(((drawn.mean(0) - values.double()).abs() <= 5 * sigma).all())
    # The draws differ, or the mean would say nothing.
    assert bool((drawn.std(0)[(up > 0.01) & (up < 0.99)] > 0).all())


def test_a_number_goes_to_one_of_its_neighbours_and_one_that_fits_stays():
    values = spread()
    drawn = to_bf16(values, random()).float()
    inner, outer = neighbours(values)
    assert bool(((drawn == inner) | (drawn == outer)).all())
    fitting = torch.cat([drawn, torch.tensor([0.0, -0.0, 1.0, -(2.0**-130)])])
    assert torch.equal(to_bf16(fitting, random()).float(), fitting)


def test_infinities_and_what_is_no_number_stay():
    bits = torch.tensor([0x7F800000, -0x800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32)
    for seed in range(20):
        inf, minus_inf, *nans = to_bf16(bits.view(torch.float32), random(seed)).tolist()
        assert inf == float("inf") and minus_inf == -float("inf")
        assert all(nan != nan for nan in nans)


def test_updates_of_a_hundredth_of_a_step_add_up_where_rounding_to_the_nearest_loses_all():
    ulp, count, generator = 2.0**-7, 4096, random()  # that of bf16 from 1 to 2
    weights = torch.ones(count, dtype=torch.bfloat16)
    nearest = weights.clone()
    for _ in range(1000):
        weights = to_bf16(weights.float() + ulp / 100, generator)
        nearest = (nearest.float() + ulp / 100).bfloat16()
    assert bool((nearest == 1).all())
    moved = ((weights.double() - 1) / ulp).mean()
    # 1000 draws with a probability of 1 / 100 for each weight.
    assert float(moved) == pytest.approx(10, abs=5 * (1000 * 0.01 * 0.99 / count) ** 0.5)


def test_the_generator_alone_decides():
    values = spread()
    first, again, other = (to_bf16(values, random(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_numbers_in_8_bits_are_near_and_their_mean_is_exact():
    values = torch.randn(4, BLOCK, generator=random(1)) * torch.tensor([[1e-9], [1e-3], [1.0], [1e4]])
    drawn = torch.stack([from_blocks(*to_blocks(values, random(seed))) for seed in range(2000)])
    # Three bits after the leading one: a step is an eighth of that. Below 2 ** -6 of 448 they are fewer.
    top = values.abs().amax(1, keepdim=True)
    assert bool(((drawn - values).abs() <= values.abs() / 8 + top * 2**-9 / 448).all())
    sigma = drawn.double().std(0) / 2000**0.5
    normal = values.abs() > top * LOWEST / 448
    off = (drawn.double().mean(0) - values.double()).abs() / (sigma + values.abs() * 1e-7)
    # A thousand numbers: a few may lie beyond 4 sigma, none beyond 6.
    assert float(off[normal].max()) < 6


def test_a_block_of_zeros_stays_and_what_is_too_small_is_raised():
    codes, scales = to_blocks(torch.zeros(2, BLOCK), random())
    assert codes.dtype == torch.uint8 and codes.shape == (2, BLOCK) and scales.shape == (2, 1)
    assert bool((from_blocks(codes, scales) == 0).all())
    values = torch.zeros(1, BLOCK)
    values[0, 0] = 448
    raised = from_blocks(*to_blocks(values, random(), LOWEST))
    assert raised[0, 0] == 448 and bool((raised[0, 1:] == LOWEST).all())
