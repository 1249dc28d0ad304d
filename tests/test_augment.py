"""Augmentation: what the versions of an image show, that they are decided once, and that captions stay true."""

import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dbkit import TrainConfig
from dbkit.augment import holes_of, tag_variants, views_of
from dbkit.images import View, crop_of, render


def config(**changes):
    values = {"pretrained_model_name_or_path": "owner/name", "instance_data_dir": "images", "use_txt_as_label": True}
    return TrainConfig(**values, **changes)


def views(caption="a dog", name="dog.png", **changes):
    return views_of(config(**changes), name, (0.5, 0.5), caption)


def test_without_augmentation_there_is_the_plain_view_alone():
    assert views() == (View(),)


def test_flipping_adds_the_mirrored_view():
    assert views(hflip=True) == (View(), View(flip=True))


@pytest.mark.parametrize("caption", ["a dog on the left", "Right hand raised", "a left-handed man"])
def test_a_caption_that_tells_left_from_right_forbids_mirroring(caption):
    assert views(caption, hflip=True) == (View(),)
    assert not any(view.flip for view in views(caption, hflip=True, augment_rotation=5))


@pytest.mark.parametrize("caption", ["bright sunlight", "a cleft rock"])
def test_words_that_only_contain_left_or_right_do_not(caption):
    assert len(views(caption, hflip=True)) == 2


ALL = {
    "augment_rotation": 10,
    "augment_brightness": 0.2,
    "augment_contrast": 0.3,
    "augment_crop": 0.4,
    "augment_variants": 64,
    "hflip": True,
}


def test_variants_keep_to_their_limits_and_use_them():
    found = views(**ALL)
    assert found[0] == View()
    assert len(set(found)) == 64
    assert Counter(view.flip for view in found) == {True: 32, False: 32}
    for name, centre, most in (("degrees", 0, 10), ("brightness", 1, 0.2), ("contrast", 1, 0.3), ("share", 1, 0.4)):
        changes = [abs(getattr(view, name) - centre) for view in found]
        assert 0.7 * most < max(changes) <= most


def test_variants_depend_on_the_seed_and_the_name_alone():
    assert views(**ALL) == views(**ALL)
    assert views(**ALL)[1:] != views(name="other.png", **ALL)[1:]
    assert views(**ALL)[1:] != views(seed=1, **ALL)[1:]


@pytest.mark.parametrize("setting", ["augment_rotation", "augment_brightness", "augment_contrast", "augment_crop"])
def test_each_setting_alone_changes_what_is_seen(setting):
    image = Image.effect_noise((90, 60), 60).convert("RGB")
    plain, *others = [np.asarray(render(image, (40, 40), view)) for view in views(**{setting: 0.3})]
    assert len(others) == 3
    assert all((other != plain).any() for other in others)


def test_a_mirrored_view_is_the_mirror_of_the_plain_one():
    image = Image.effect_noise((90, 60), 60).convert("RGB")
    assert (np.asarray(render(image, (40, 40), View(flip=True))) == np.asarray(render(image, (40, 40)))[:, ::-1]).all()


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (48, 96)])
@pytest.mark.parametrize("degrees", [-45, -7, 3, 30])
def test_a_rotated_view_shows_no_corner_from_outside_the_image(degrees, size):
    image = Image.new("RGB", (300, 200), "white")
    for place in ((0, 0), (1, 1), (0.5, 0.2)):
        assert np.asarray(render(image, size, View(place, degrees=degrees))).min() > 245


@pytest.mark.parametrize("degrees", [-30, 20])
def test_a_rotated_view_is_not_stretched(degrees):
    image = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(image).ellipse((120, 70, 180, 130), fill="black")
    dark = np.asarray(render(image, (96, 64), View(degrees=degrees)).convert("L")) < 128
    assert abs(int(dark.any(0).sum()) - int(dark.any(1).sum())) <= 2


def test_a_positive_angle_turns_the_image_against_the_clock():
    image = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(image).rectangle((100, 90, 160, 110), fill="black")
    rows = np.nonzero(np.asarray(render(image, (200, 200), View(degrees=30)).convert("L")) < 128)[0]
    assert rows.mean() < 95


def test_a_smaller_share_keeps_that_part_of_the_side():
    _, whole = crop_of((300, 200), (64, 64), View())
    _, part = crop_of((300, 200), (64, 64), View(share=0.6))
    assert whole == (200, 200)
    assert part == pytest.approx((120, 120))


def test_a_brighter_view_is_brighter_by_that_factor():
    image = Image.new("RGB", (64, 64), (100, 100, 100))
    assert np.asarray(render(image, (8, 8), View(brightness=1.2))).mean() == pytest.approx(120, abs=1)


TAGS = "zwx dog, sitting, grass, blue sky, collar, tongue out"


def test_tags_are_shuffled_behind_those_that_are_kept():
    versions = tag_variants(config(shuffle_tags=True, keep_tags=2), "a.png", TAGS)
    assert versions[0] == TAGS
    assert 4 < len(versions) == len(set(versions)) <= 8
    for version in versions:
        assert version.split(", ")[:2] == ["zwx dog", "sitting"]
        assert sorted(version.split(", ")) == sorted(TAGS.split(", "))


def test_tags_are_left_out_with_their_probability_and_never_all():
    versions = tag_variants(config(tag_dropout=0.5, caption_variants=64), "a.png", ", ".join(map(str, range(21))))
    kept = [len(version.split(", ")) - 1 for version in versions[1:]]
    assert np.mean(kept) / 20 == pytest.approx(0.5, abs=3 * math.sqrt(0.25 / (20 * len(kept))) + 0.03)
    assert all(version.startswith("0") for version in versions)
    assert all(", " in v for v in tag_variants(config(tag_dropout=0.9, caption_variants=64), "a.png", "a, b, c"))


def test_without_shuffling_the_order_of_what_is_left_stays():
    for version in tag_variants(config(tag_dropout=0.5, caption_variants=16), "a.png", "0, 1, 2, 3, 4, 5"):
        numbers = [int(tag) for tag in version.split(", ")]
        assert numbers == sorted(numbers)


def test_a_sentence_without_commas_is_left_alone():
    assert tag_variants(config(shuffle_tags=True, tag_dropout=0.5), "a.png", "a dog on the grass") == [
        "a dog on the grass"
    ]


def test_plain_captions_have_one_version():
    assert tag_variants(config(), "a.png", TAGS) == [TAGS]


def test_holes_hide_all_in_a_quarter_and_else_a_part_of_many_kinds():
    holes = holes_of(config(inpainting_masks=64), "a.png", (12, 8))
    assert all(hole.shape == (8, 12) and hole.dtype == np.float32 for hole in holes)
    assert all(set(np.unique(hole)) <= {0, 1} for hole in holes)
    assert [n for n, hole in enumerate(holes) if hole.all()] == list(range(0, 64, 4))
    parts = [hole for hole in holes if not hole.all()]
    assert len({hole.tobytes() for hole in parts}) > 40
    shares = [hole.mean() for hole in parts]
    assert 0 < min(shares) < 0.1 and 0.4 < max(shares) < 0.8
    # Some are rectangles: as large as the box around them.
    boxes = [np.ptp(np.nonzero(hole), axis=1) + 1 for hole in parts]
    full = [hole.sum() == height * width for hole, (height, width) in zip(parts, boxes)]
    assert 10 < sum(full) < 45


def test_holes_depend_on_the_image_and_the_seed_alone():
    first = holes_of(config(), "a.png", (8, 8))
    assert all((one == two).all() for one, two in zip(first, holes_of(config(), "a.png", (8, 8))))
    for other in (holes_of(config(), "b.png", (8, 8)), holes_of(config(seed=1), "a.png", (8, 8))):
        assert any((one != two).any() for one, two in zip(first, other))
