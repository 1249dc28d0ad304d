"""Which image each sample of a run shows: a pure function of the seed and the sample's number, so resuming is exact.

An epoch shows every instance image at least once. With several concepts each gets its weight's share of the epoch, the
smaller sets repeating their images. With buckets the epoch is arranged so that the images of a step have one size, as
far as there are enough of them; those left over fill the steps at its ends, each still in its own size.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass

from dbkit import draws
from dbkit.buckets import Size


@dataclass(frozen=True)
class Order:
    """The order of a run. Kinds are (concept, size) of each instance image and of each class image.

    weights holds each concept's share of the samples, in any unit. per_step is how many instance images make one
    optimizer step.
    """

    seed: int
    per_step: int
    instance_kinds: tuple[tuple[int, Size], ...]
    class_kinds: tuple[tuple[int, Size], ...] = ()
    weights: tuple[float, ...] = (1.0,)

    def instance(self, sample: int) -> int:
        """The instance image that the sample of this number shows, counted over the whole run from 0."""
        epoch, position = divmod(sample, self.epoch_length)
        return self._epoch(epoch)[0][position]

    def class_image(self, sample: int) -> int:
        """The class image beside it: of the same concept, and of the same size if the concept has such class images."""
        epoch, position = divmod(sample, self.epoch_length)
        return self._epoch(epoch)[1][position]

    @property
    def epoch_length(self) -> int:
        """Samples in one epoch."""
        return sum(self._per_concept)

    @functools.cached_property
    def _members(self) -> list[list[int]]:
        concepts = range(len(self.weights))
        return [[i for i, (concept, _) in enumerate(self.instance_kinds) if concept == c] for c in concepts]

    @functools.cached_property
    def _per_concept(self) -> list[int]:
        """How many samples each concept has in an epoch."""
        length = max(len(members) / weight for members, weight in zip(self._members, self.weights))
        # Rounding must not cost the largest set its last image.
        return [
            max(len(members), round(length * weight), 1) if members else 0
            for members, weight in zip(self._members, self.weights)
        ]

    @functools.cached_property
    def _epoch(self):
        # A cache of its own for each order; two epochs are in use when a step lies across their border.
        return functools.lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        images = []
        for concept, (members, count) in enumerate(zip(self._members, self._per_concept)):
            # Each epoch begins a new pass over the concept's images, so that none of them is missing from it.
            first = epoch * math.ceil(count / len(members)) * len(members) if members else 0
            images += [
                members[draws.index(self.seed, "instance order", len(members), first + k, concept)]
                for k in range(count)
            ]
        if len(self.weights) > 1:
            images = [images[k] for k in draws.generator(self.seed, "epoch", epoch).permutation(len(images))]
        if len({size for _, size in self.instance_kinds}) > 1:
            images = self._by_size(images, head=-epoch * self.epoch_length % self.per_step)
        return images, self._partners(images, epoch) if self.class_kinds else []

    def _by_size(self, images: list[int], head: int) -> list[int]:
        """The images in steps of one size each, in the order in which these fill up; the first `head` end a step."""
        waiting: dict[Size, list[int]] = {}
        full = []
        for image in images:
            queue = waiting.setdefault(self.instance_kinds[image][1], [])
            queue.append(image)
            if len(queue) == self.per_step:
                full.append(queue.copy())
                queue.clear()
        left_over = [image for queue in waiting.values() for image in queue]
        while full and len(left_over) < head:
            left_over += full.pop()
        return [*left_over[:head], *(image for step in full for image in step), *left_over[head:]]

    def _partners(self, images: list[int], epoch: int) -> list[int]:
        seen: Counter = Counter()
        partners = []
        for image in images:
            lane, pool, most = self._pool_of[self.instance_kinds[image]]
            number = epoch * most + seen[lane]
            partners.append(pool[draws.index(self.seed, "class order", len(pool), number, lane)])
            seen[lane] += 1
        return partners

    @functools.cached_property
    def _pool_of(self) -> dict[tuple[int, Size], tuple[int, list[int], int]]:
        """For each kind of instance image: a number for its pool of class images, the pool, the most uses an epoch."""
        pools: dict[tuple[int, ...], list] = {}
        pool_of = {}
        for concept, size in sorted(set(self.instance_kinds)):
            same = [i for i, kind in enumerate(self.class_kinds) if kind == (concept, size)]
            pool = tuple(same or [i for i, kind in enumerate(self.class_kinds) if kind[0] == concept])
            entry = pools.setdefault(pool, [len(pools), 0])
            repeats = math.ceil(self._per_concept[concept] / len(self._members[concept]))
            entry[1] += repeats * self.instance_kinds.count((concept, size))
            pool_of[concept, size] = pool
        return {kind: (pools[pool][0], list(pool), pools[pool][1]) for kind, pool in pool_of.items()}
