"""Random numbers as a pure function of what they are for.

Sample j of step k draws from a generator keyed by (seed, purpose, k, j), so a resumed run equals an uninterrupted
one, n accumulated batches equal one batch of n, and previews cannot disturb training. The generator is Philox, which
is made for this (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

from __future__ import annotations

import functools
import typing
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

Purpose = Literal[
    "instance",
    "class",
    "instance order",
    "class order",
    "crop",
    "class image",
    "preview",
    "epoch",
    "augment",
    "tags",
    "variant",
    "holes",
    "lora",
    "proof",
    "rounding",
]
# A purpose's number is part of every seed: new purposes go at the end.
_PURPOSES: tuple[Purpose, ...] = typing.get_args(Purpose)


def generator(seed: int, purpose: Purpose, step: int = 0, sample: int = 0) -> np.random.Generator:
    """The generator of one sample of one step for one purpose. Every argument is at least 0 and below 2**64."""
    import numpy as np

    key = np.array([seed, _PURPOSES.index(purpose)], dtype=np.uint64)
    # The lowest word counts the numbers drawn, so streams of different (step, sample) never meet.
    counter = np.array([0, 0, sample, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def index(seed: int, purpose: Purpose, count: int, n: int, lane: int = 0) -> int:
    """Which of `count` items the n-th sample of a run shows: each pass over them is a permutation of its own.

    lane tells several sets of items of one purpose apart.
    """
    if count == 1:
        return 0
    epoch, position = divmod(n, count)
    return int(_permutation(seed, purpose, count, epoch, lane)[position])


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, purpose: Purpose, count: int, epoch: int, lane: int) -> np.ndarray:
    return generator(seed, purpose, step=epoch, sample=lane).permutation(count)
