"""What a run will do is found out and said before a model is loaded."""

import json
import shutil

import pytest
import torch
from conftest import draw_photo

from dbkit import DbkitError, TrainConfig
from dbkit.planning import in_a_place, make_plan

CPU = torch.device("cpu")
# The buckets of the two kinds of photographs at 64 pixels.
TALL, NEARLY_SQUARE = (48, 112), (80, 72)


@pytest.fixture
def shapes(photos):
    """The three photographs of 96 x 80 and two tall ones."""
    for number in range(2):
        draw_photo(photos / f"tall {number}.png", (50, 110))
    return photos


def plan(settings, **changes):
    config = TrainConfig(**{**settings, **changes})
    return make_plan(config, config.output_dir, CPU)


def test_sizes_and_what_the_crops_keep_are_said(settings, shapes, capsys):
    plan(settings)
    assert "trained as 5 of 64 x 64; the crops keep 68% of the pictures" in capsys.readouterr().out
    made = plan(settings, use_aspect_ratio_bucket=True)
    assert "trained as 2 of 48 x 112, 3 of 80 x 72; the crops keep 93% of the pictures" in capsys.readouterr().out
    assert {example.size for example in made.instance} == {TALL, NEARLY_SQUARE}


def test_images_that_are_enlarged_are_said(settings, photos, capsys):
    draw_photo(photos / "tiny.png", (30, 30))
    plan(settings)
    assert "1 image enlarged to that, which looks soft: tiny.png" in capsys.readouterr().out


def test_the_prompts_of_the_first_images_are_shown(settings, photos, capsys):
    plan(settings, instance_prompt=None, use_txt_as_label=True)
    said = capsys.readouterr().out
    assert "the first one's prompt: a crimson thing" in said
    assert "  gold.png: a gold thing" in said and "  teal.png: a teal thing" in said


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("photo of zwx dog", "photo of zwx dog in the snow"),
        ("photo of zwx dog, ", "photo of zwx dog in the snow"),
        ("zwx dog in the snow.", "zwx dog in the snow."),
    ],
)
def test_a_place_is_added_to_a_prompt_that_has_none(prompt, shown):
    assert in_a_place(prompt) == shown


def test_a_prompt_and_a_text_are_combined_by_the_template(settings, photos):
    (photos / "teal.txt").write_text("a {PROMPT} in braces")
    made = plan(settings, combine_prompt_from_txt=True)
    assert [example.prompt for example in made.instance] == [
        "photo of zwx thing, a crimson thing",
        "photo of zwx thing, a gold thing",
        "photo of zwx thing, a {PROMPT} in braces",
    ]
    made = plan(settings, combine_prompt_from_txt=True, prompt_combine_template="{TXT_PROMPT} ({PROMPT})")
    assert made.instance[0].prompt == "a crimson thing (photo of zwx thing)"


def test_epochs_count_passes_over_the_images(settings, photos):
    for size, steps in ((1, 30), (2, 15), (4, 8)):
        assert plan(settings, max_train_steps=None, num_train_epochs=10, train_batch_size=size).total == steps


PRIOR = {"with_prior_preservation": True, "class_prompt": "photo of a thing", "num_class_images": 6}


def test_class_images_are_made_in_the_instance_images_sizes_in_proportion(settings, shapes, workspace_folder):
    made = plan(settings, use_aspect_ratio_bucket=True, **PRIOR)
    counts = {}
    for example in made.class_set:
        counts[example.size] = counts.get(example.size, 0) + 1
        assert example.kept == pytest.approx(1)
    assert counts == {TALL: 2, NEARLY_SQUARE: 4}


def test_in_a_folder_of_its_own_class_images_of_each_size_have_a_folder_below(settings, shapes, tmp_path):
    folder = tmp_path / "class"
    plan(settings, use_aspect_ratio_bucket=True, class_data_dir=folder, **PRIOR)
    assert {path.parent.name for path in folder.rglob("*.png")} == {"48x112", "80x72"}


def test_class_images_that_were_brought_are_used_in_their_nearest_sizes_and_filled_up(settings, shapes, tmp_path):
    folder = tmp_path / "class"
    for number in range(2):
        draw_photo(folder / f"own {number}.png", (60, 120), colour="navy")
    made = plan(settings, use_aspect_ratio_bucket=True, class_data_dir=folder, **PRIOR)
    assert len(made.class_set) == 6
    own = [example for example in made.class_set if example.path.name.startswith("own")]
    assert [example.size for example in own] == [(56, 104)] * 2


def test_enough_class_images_of_ones_own_are_all_that_is_used(settings, shapes, tmp_path):
    folder = tmp_path / "class"
    for number in range(6):
        draw_photo(folder / f"own {number}.png", (60, 120), colour="navy")
    made = plan(settings, use_aspect_ratio_bucket=True, class_data_dir=folder, **PRIOR)
    assert len(made.class_set) == 6 and not list(folder.rglob("class-*.png"))


def test_a_picture_that_is_instance_and_class_image_is_refused(settings, photos, tmp_path):
    (tmp_path / "class").mkdir()
    shutil.copy(photos / "teal.png", tmp_path / "class" / "other name.png")
    with pytest.raises(
        DbkitError, match=r"^1 class image also among the instance images \(.*other name.png is .*teal.png\)"
    ):
        plan(settings, class_data_dir=tmp_path / "class", **{**PRIOR, "num_class_images": 1})


def test_augmentation_and_tags_make_versions_of_instance_images_only(settings, photos):
    tags = {"use_txt_as_label": True, "instance_prompt": None, "shuffle_tags": True}
    (photos / "teal.txt").write_text("zwx, a, b, c, d")
    made = plan(settings, hflip=True, augment_rotation=5, augment_variants=3, **tags, **PRIOR)
    assert [len(example.views) for example in made.instance] == [3, 3, 3]
    assert [len(example.prompts) > 1 for example in made.instance] == [False, False, True]
    assert {len(example.views) for example in made.class_set} == {1}


def test_what_augmentation_and_tags_make_is_said(settings, photos, capsys):
    (photos / "teal.txt").write_text("zwx, looking left, b, c, d")
    plan(settings, hflip=True, use_txt_as_label=True, instance_prompt=None, shuffle_tags=True)
    said = capsys.readouterr().out
    assert "augmentation makes 5 versions of 3 images" in said
    assert "1 image not mirrored, since their prompts say left or right: teal.png" in said
    assert "tags in changing order or number make " in said


def test_a_default_learning_rate_that_does_not_suit_is_said_and_one_that_was_set_is_not(settings, photos, capsys):
    default = {**settings, "learning_rate": TrainConfig.learning_rate}
    pytest.importorskip("pytorch_optimizer", reason="lion needs it")
    for changes, advice in (
        ({"optimizer": "lion"}, "; lion wants a third to a tenth of what AdamW wants\n"),
        ({"adapter": "lora"}, "; 1e-4 is usual for a LoRA\n"),
    ):
        said = f"learning_rate is 5e-06, the default, which suits AdamW and a whole model{advice}"
        plan(default, **changes)
        assert said in capsys.readouterr().out
        plan(settings, **changes)
        assert "learning_rate" not in capsys.readouterr().out
    plan(default)
    assert "learning_rate" not in capsys.readouterr().out


def test_weights_that_would_make_an_epoch_endless_are_refused(settings, photos, tmp_path):
    draw_photo(tmp_path / "one" / "a.png")
    concepts = [
        {"instance_prompt": "photo of zwx thing", "instance_data_dir": str(photos), "weight": 0.01},
        {"instance_prompt": "photo of ukj thing", "instance_data_dir": str(tmp_path / "one"), "weight": 100},
    ]
    (tmp_path / "concepts_list.json").write_text(json.dumps(concepts))
    with pytest.raises(DbkitError, match="with the weights of these concepts an epoch has 30003 samples for 4 images"):
        plan(settings, instance_prompt=None, instance_data_dir=None, concepts_list=tmp_path / "concepts_list.json")
