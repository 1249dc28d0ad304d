"""Buckets: the list that the seed document gives, the nearest shape by the logarithm, and nothing stretched."""

import math

import numpy as np
import pytest
from conftest import draw_photo
from PIL import Image, ImageDraw

from dbkit import DbkitError, TrainConfig, train
from dbkit.buckets import bucket_sizes, kept_share, nearest, share_out, sizes_of
from dbkit.images import View, crop_of, render

SEED = """
    256 1024, 320 1024, 384 1024, 384 960, 384 896, 448 832, 512 768, 512 704, 512 512, 576 640, 640 576, 704 512,
    768 512, 832 448, 896 384, 960 384, 1024 384, 1024 320, 1024 256
"""
SEEDS_BUCKETS = [tuple(map(int, pair.split())) for pair in SEED.split(",")]


def config(**changes):
    return TrainConfig(
        pretrained_model_name_or_path="owner/name",
        instance_data_dir="images",
        instance_prompt="photo of zwx",
        use_aspect_ratio_bucket=True,
        **changes,
    )


def test_the_seeds_nineteen_buckets_come_out_of_its_parameters():
    assert bucket_sizes(512, max_area=768 * 512, step=64, min_side=256, max_side=1024) == SEEDS_BUCKETS


def test_at_512_the_settings_left_empty_give_the_same_buckets():
    assert sizes_of(config()) == SEEDS_BUCKETS


def test_at_other_resolutions_the_buckets_grow_with_it():
    assert sizes_of(config(resolution=768)) == [(w * 3 // 2, h * 3 // 2) for w, h in SEEDS_BUCKETS]


def test_without_buckets_there_is_the_square_alone():
    assert sizes_of(TrainConfig(**{**vars(config()), "use_aspect_ratio_bucket": False})) == [(512, 512)]


@pytest.mark.parametrize("changes", [{}, {"bucket_step": 8}, {"bucket_max_area": 512 * 512}, {"bucket_min_side": 384}])
def test_every_bucket_keeps_to_its_limits(changes):
    wanted = config(**changes)
    area = wanted.bucket_max_area or 768 * 512
    sizes = sizes_of(wanted)
    for width, height in sizes:
        assert width * height <= max(area, 512 * 512)
        assert (wanted.bucket_min_side or 256) <= min(width, height) <= max(width, height) <= 1024
    assert {(height, width) for width, height in sizes} == set(sizes)


def test_an_image_goes_to_the_bucket_whose_shape_is_nearest_by_the_logarithm():
    random = np.random.default_rng(0)
    for _ in range(2000):
        width, height = random.integers(50, 5000, 2).tolist()
        size = nearest(width, height, SEEDS_BUCKETS)
        distances = [abs(math.log(width / height) - math.log(w / h)) for w, h in SEEDS_BUCKETS]
        assert abs(math.log(width / height) - math.log(size[0] / size[1])) == pytest.approx(min(distances))
        # An image and the same image turned are treated alike; a linear distance does not.
        assert nearest(height, width, SEEDS_BUCKETS) == size[::-1]


@pytest.mark.parametrize("seed", range(3))
def test_over_random_sets_no_crop_is_stretched_and_it_covers_its_bucket(seed):
    random = np.random.default_rng(seed)
    for _ in range(int(random.integers(1, 2001))):
        width, height = random.integers(64, 4000, 2).tolist()
        size = nearest(width, height, SEEDS_BUCKETS)
        (x, y), (crop_width, crop_height) = crop_of((width, height), size, View())
        assert crop_width / crop_height == pytest.approx(size[0] / size[1])
        assert x - crop_width / 2 >= -1e-6 and x + crop_width / 2 <= width + 1e-6
        assert y - crop_height / 2 >= -1e-6 and y + crop_height / 2 <= height + 1e-6
        kept = crop_width * crop_height / (width * height)
        assert kept == pytest.approx(kept_share(width, height, size))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (150, 149), (500, 130), (1000, 100)])
def test_a_circle_stays_a_circle_in_its_bucket(size):
    image = Image.new("L", size, "white")
    (x, y), radius = (size[0] / 2, size[1] / 2), min(size) * 0.4
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill="black")
    shown = np.asarray(render(image.convert("RGB"), nearest(*size, SEEDS_BUCKETS)).convert("L")) < 128
    wide, high = shown.any(0).sum(), shown.any(1).sum()
    assert abs(int(wide) - int(high)) <= 0.02 * high + 1


def test_within_the_buckets_shapes_a_crop_cuts_little():
    random = np.random.default_rng(0)
    kept = []
    for shape in np.exp(random.uniform(-math.log(4), math.log(4), 5000)):
        width, height = round(1000 * math.sqrt(shape)), round(1000 / math.sqrt(shape))
        kept.append(kept_share(width, height, nearest(width, height, SEEDS_BUCKETS)))
    assert np.mean(kept) > 0.95
    assert min(kept) > 0.87


def test_a_number_is_shared_out_in_proportion():
    assert share_out(10, {(1, 1): 3, (2, 1): 1, (1, 2): 1}) == {(1, 1): 6, (2, 1): 2, (1, 2): 2}
    assert sum(share_out(100, {(1, 1): 1, (2, 1): 1, (1, 2): 1}).values()) == 100
    assert share_out(1, {(1, 1): 5, (2, 1): 1}) == {(1, 1): 1, (2, 1): 1}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bucket_step": 4}, "a bucket would be .*, and this model's pictures need multiples of 8; set bucket_step"),
        ({"bucket_min_side": 72, "bucket_max_side": 64}, "bucket_min_side 72 is above bucket_max_side 64; lower it"),
    ],
)
def test_buckets_that_the_model_cannot_take_are_refused_before_it_is_loaded(settings, changes, sentence):
    with pytest.raises(DbkitError, match=sentence):
        train(**{**settings, "use_aspect_ratio_bucket": True, **changes})


def test_class_images_are_made_in_the_sizes_of_the_instance_images(settings, photos, tmp_path, workspace_folder):
    draw_photo(photos / "tall.png", (50, 120))
    train(
        **settings,
        use_aspect_ratio_bucket=True,
        with_prior_preservation=True,
        class_prompt="photo of a thing",
        num_class_images=4,
        train_batch_size=4,
    )
    made = {Image.open(path).size for path in workspace_folder.glob("class_images/*/*.png")}
    sizes = bucket_sizes(64, 64 * 96, 8, 32, 128)
    assert made == {nearest(50, 120, sizes), nearest(96, 80, sizes)} and len(made) == 2
