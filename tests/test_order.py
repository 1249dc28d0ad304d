"""The order of a run: every image once an epoch, steps of one size, concepts by weight; a pure function of the seed."""

from collections import Counter

import numpy as np
import pytest

from dbkit import draws
from dbkit.buckets import bucket_sizes, nearest
from dbkit.order import Order

SIZES = bucket_sizes(512, 768 * 512, 64, 256, 1024)
SQUARE, TALL, WIDE = (512, 512), (512, 768), (768, 512)


def random_kinds(random, count, concepts=1):
    shapes = np.exp(random.normal(-0.1, 0.35, count))
    return tuple(
        (int(random.integers(concepts)), nearest(1000, round(1000 / shape), SIZES)) for shape in shapes.tolist()
    )


def shown(order, epochs, start=0):
    length = order.epoch_length
    return [[order.instance(e * length + k) for k in range(length)] for e in range(start, start + epochs)]


def test_with_one_size_and_one_concept_it_is_a_permutation_each_epoch():
    order = Order(3, 2, ((0, SQUARE),) * 7, ((0, SQUARE),) * 4)
    for n in range(30):
        assert order.instance(n) == draws.index(3, "instance order", 7, n)
        assert order.class_image(n) == draws.index(3, "class order", 4, n)


@pytest.mark.parametrize("per_step", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, 3, 12, 30, 500, 2000])
def test_every_image_is_shown_once_an_epoch_whatever_its_size(count, per_step):
    kinds = random_kinds(np.random.default_rng(count), count)
    for images in shown(Order(0, per_step, kinds), 3):
        assert sorted(images) == list(range(count))


@pytest.mark.parametrize(("count", "per_step"), [(12, 2), (30, 2), (50, 4), (100, 8), (500, 8)])
def test_steps_have_one_size_except_for_those_that_are_left_over(count, per_step):
    kinds = random_kinds(np.random.default_rng(count), count)
    order = Order(0, per_step, kinds)
    possible = sum(n // per_step for n in Counter(size for _, size in kinds).values())
    whole = 0
    epochs = 8
    for step in range(epochs * count // per_step):
        sizes = {kinds[order.instance(step * per_step + j)][1] for j in range(per_step)}
        whole += len(sizes) == 1
    # A step that lies across the border of two epochs can cost one of an epoch's whole steps.
    assert whole >= epochs * (possible - 1)
    assert possible > 1


def test_the_epoch_does_not_depend_on_what_was_asked_before():
    kinds = random_kinds(np.random.default_rng(0), 40)
    order, other = Order(0, 4, kinds, kinds[:9]), Order(0, 4, kinds, kinds[:9])
    straight = [(order.instance(n), order.class_image(n)) for n in range(200)]
    backwards = [(other.instance(n), other.class_image(n)) for n in reversed(range(200))][::-1]
    assert straight == backwards


def test_epochs_and_seeds_differ():
    kinds = random_kinds(np.random.default_rng(0), 40)
    epochs = shown(Order(0, 4, kinds), 3) + shown(Order(1, 4, kinds), 1)
    assert len({tuple(images) for images in epochs}) == 4


def test_the_same_samples_are_shown_whether_or_not_they_are_accumulated():
    # per_step is the batch times the accumulated passes, so the order cannot tell them apart; a smaller step may.
    kinds = random_kinds(np.random.default_rng(0), 40)
    assert Order(0, 4, kinds) == Order(0, 2 * 2, kinds)


def test_images_of_small_buckets_are_not_shown_less_often():
    kinds = ((0, SQUARE),) * 10 + ((0, TALL),)
    counts = Counter(image for images in shown(Order(0, 4, kinds), 20) for image in images)
    assert set(counts.values()) == {20}


def test_a_class_image_has_its_instances_size_and_concept_where_there_is_one():
    instance = ((0, SQUARE), (0, TALL), (1, SQUARE), (1, WIDE))
    classes = ((0, SQUARE), (0, SQUARE), (0, TALL), (1, SQUARE), (1, SQUARE))
    order = Order(0, 2, instance, classes, (1.0, 1.0))
    pairs = {(order.instance(n), order.class_image(n)) for n in range(400)}
    # The wide images' concept has no wide class images: any of its own will do.
    assert pairs == {(0, 0), (0, 1), (1, 2), (2, 3), (2, 4), (3, 3), (3, 4)}


def test_class_images_are_shown_equally_often():
    kinds = ((0, SQUARE),) * 6
    order = Order(0, 2, kinds, ((0, SQUARE),) * 4)
    counts = Counter(order.class_image(n) for n in range(6 * 4))
    assert set(counts.values()) == {6}


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (1.0, 4.0)])
def test_concepts_have_their_weights_share_and_every_image_its_turn(weights):
    kinds = ((0, SQUARE),) * 5 + ((1, SQUARE),) * 20
    order = Order(0, 2, kinds, (), weights)
    epochs = shown(order, 4)
    counts = Counter(kinds[image][0] for images in epochs for image in images)
    assert counts[0] / counts[1] == pytest.approx(weights[0] / weights[1], rel=0.1)
    for images in epochs:
        assert set(images) == set(range(25))
    # Within a concept no image is shown twice before the others were.
    first = Counter(image for images in epochs for image in images if kinds[image][0] == 0)
    assert max(first.values()) - min(first.values()) <= 1


def test_concepts_are_mixed_within_an_epoch():
    kinds = ((0, SQUARE),) * 10 + ((1, SQUARE),) * 10
    (images,) = shown(Order(0, 2, kinds, (), (1.0, 1.0)), 1)
    assert 2 <= sum(image < 10 for image in images[:10]) <= 8


def test_no_image_is_missing_from_an_epoch_where_a_small_set_repeats():
    kinds = ((0, SQUARE),) * 20 + ((1, SQUARE),) * 3
    for images in shown(Order(0, 2, kinds, (), (1.0, 0.2)), 30):
        assert set(images) == set(range(23))
