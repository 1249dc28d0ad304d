"""Averages follow the weights by their formula, take their place for a time, and give it back."""

import pytest
import torch

from dbkit.ema import Ema


def make_module(value: float = 0.0) -> torch.nn.Module:
    module = torch.nn.Linear(2, 2)
    set_weights(module, value)
    return module


def set_weights(module: torch.nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def test_the_decay_warms_up_to_its_limit():
    module = make_module()
    ema = Ema({"unet": module}, decay=0.25)
    set_weights(module, 1.0)
    expected = 0.0
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (3, 0.25), (4000, 0.25)):
        ema.update(step)
        expected = decay * expected + (1 - decay)
        for average in ema.averages["unet"]:
            torch.testing.assert_close(average, torch.full_like(average, expected))


def test_averages_lie_where_the_weights_are_for_a_time_only():
    module = make_module(3.0)
    ema = Ema({"unet": module}, decay=0.9)
    set_weights(module, 5.0)
    before = module.weight.data_ptr()
    with pytest.raises(RuntimeError, match="in between"), ema.in_place():
        assert float(module.weight[0, 0].detach()) == 3 and float(ema.averages["unet"][0][0, 0]) == 5
        raise RuntimeError("in between")
    assert float(module.weight[0, 0].detach()) == 5 and float(ema.averages["unet"][0][0, 0]) == 3
    assert module.weight.data_ptr() == before


def test_a_part_that_rests_keeps_its_averages_and_is_followed_no_more():
    modules = {"unet": make_module(1.0), "text_encoder": make_module(1.0)}
    ema = Ema(modules, decay=0.9)
    for module in modules.values():
        set_weights(module, 2.0)
    ema.adopt("text_encoder")
    ema.adopt("text_encoder")  # of a part without averages there is nothing to keep
    assert float(modules["text_encoder"].weight[0, 0].detach()) == 1
    assert float(modules["unet"].weight[0, 0].detach()) == 2
    assert list(ema.averages) == ["unet"]


def test_parameters_that_are_not_trained_are_not_averaged():
    module = make_module()
    module.bias.requires_grad_(False)
    assert [average.shape for average in Ema({"unet": module}, 0.9).averages["unet"]] == [(2, 2)]
