"""Random numbers as a function of what they are for, and of nothing else."""

import random

import numpy as np
import pytest
import torch

from dbkit.draws import generator, index

KEY = {"seed": 3, "purpose": "instance", "step": 5, "sample": 7}


def test_the_same_key_gives_the_same_numbers():
    assert (generator(**KEY).standard_normal(100) == generator(**KEY).standard_normal(100)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"purpose": "class"},
        {"step": 6},
        {"sample": 8},
        {"step": 7, "sample": 5},
        {"seed": 2**63 - 1},
        {"sample": 2**64 - 1},
    ],
)
def test_another_key_gives_other_numbers(change):
    ours = generator(**KEY).standard_normal(1000)
    theirs = generator(**{**KEY, **change}).standard_normal(1000)
    assert not set(ours) & set(theirs)


def test_the_numbers_of_a_key_never_change_since_saved_runs_depend_on_them():
    purposes = ("instance", "class", "instance order", "class order", "crop", "class image", "preview")
    drawn = [int(generator(1, purpose, step=2, sample=3).integers(10**6)) for purpose in purposes]
    assert drawn == [942161, 937440, 488263, 234742, 599260, 448829, 829796]
    assert [index(1, "instance order", 7, n) for n in range(7)] == [6, 0, 4, 5, 2, 3, 1]


def test_an_unknown_purpose_is_a_programmers_mistake():
    with pytest.raises(ValueError, match=r"not in tuple"):
        generator(0, "weather")


@pytest.mark.parametrize("count", [1, 2, 7])
def test_each_epoch_shows_every_item_once(count):
    for epoch in range(5):
        shown = [index(0, "instance order", count, epoch * count + position) for position in range(count)]
        assert sorted(shown) == list(range(count))


def test_the_order_is_another_one_in_each_epoch_for_each_seed_and_for_each_purpose():
    def order(seed, purpose, epoch):
        return tuple(index(seed, purpose, 20, epoch * 20 + position) for position in range(20))

    keys = [(0, "instance order", 0), (0, "instance order", 1), (1, "instance order", 0), (0, "class order", 0)]
    assert len({order(*key) for key in keys}) == len(keys)


def test_an_item_does_not_depend_on_what_was_asked_before():
    forwards = [index(9, "class order", 5, n) for n in range(60)]
    backwards = [index(9, "class order", 5, n) for n in reversed(range(60))]
    assert forwards == backwards[::-1]


def test_the_global_random_states_are_untouched():
    def states():
        return (
            random.getstate(),
            np.random.get_state(legacy=False)["state"]["key"].tolist(),
            torch.get_rng_state().tolist(),
        )

    # Away from where a fresh seed would put them.
    random.random(), np.random.random(), torch.rand(1)
    before = states()
    generator(0, "preview").standard_normal(10)
    index(123, "instance order", 11, 40)
    assert states() == before
