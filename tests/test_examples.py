"""What training reads: every image checked before a model is loaded, each with its prompt."""

import hashlib
import shutil

import numpy as np
import pytest
from conftest import draw_photo
from PIL import Image

from dbkit import DbkitError, TrainConfig, prepare_dataset
from dbkit.concepts import concepts_of
from dbkit.examples import class_examples, describe, fingerprint, instance_examples
from dbkit.images import list_images, render_mask
from dbkit.report import DatasetReport, Kept, write_report
from dbkit.settings import replace


def picture(path, colour="teal", size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def test_clutter_is_ignored(photos, tmp_path):
    for name in (".DS_Store", "Thumbs.db", ".ipynb_checkpoints/x.png", "._teal.png", "__MACOSX/y.png", "notes.md"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"clutter")
    report = prepare_dataset(photos, tmp_path / "out", resolution=32)
    prepared = {image.source for image in report.kept}
    assert prepared == {"teal.png", "crimson.png", "gold.png"}
    assert report.refused == {}
    assert {example.path.name for example in examples_of(training(photos))} == prepared


def training(folder, **changes):
    values = {"pretrained_model_name_or_path": "owner/name", "instance_data_dir": folder, "resolution": 32}
    labels = {"use_txt_as_label", "use_filename_as_label", "instance_prompt"}
    return TrainConfig(**values, **({} if labels & set(changes) else {"instance_prompt": "photo of zwx"}), **changes)


def examples_of(config):
    return instance_examples(config, concepts_of(config))


def test_one_prompt_for_every_image(photos):
    examples = examples_of(training(photos))
    assert [(example.path.name, example.prompt) for example in examples] == [
        ("crimson.png", "photo of zwx"),
        ("gold.png", "photo of zwx"),
        ("teal.png", "photo of zwx"),
    ]
    assert {example.path.name: example.sha256 for example in examples} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in photos.glob("*.png")
    }


def test_each_images_text_file_is_its_prompt(photos):
    prompts = [example.prompt for example in examples_of(training(photos, use_txt_as_label=True))]
    assert prompts == ["a crimson thing", "a gold thing", "a teal thing"]


def test_each_images_file_name_is_its_prompt(photos):
    picture(photos / "a red dog, v1.5.jpg")
    prompts = [example.prompt for example in examples_of(training(photos, use_filename_as_label=True))]
    assert prompts == ["a red dog, v1.5", "crimson", "gold", "teal"]


def test_a_background_is_never_learnt_as_the_subject(photos):
    facts = ("photo.jpg", 40, 30, 1.0, False, None, "")
    kept = [Kept("gold.png", *facts, part="background"), Kept("teal.png", *facts)]
    write_report(DatasetReport(photos, kept, {}), 32)
    with pytest.raises(
        DbkitError, match=r"^1 images in .* show a background without the subject \(gold.png\); set use"
    ):
        examples_of(training(photos))
    assert len(examples_of(training(photos, use_txt_as_label=True))) == 3


def test_a_report_of_another_program_does_not_matter(photos):
    for text in ("{", "[]", '{"images": [1]}', '{"images": 3}'):
        (photos / "report.json").write_text(text)
        assert len(examples_of(training(photos))) == 3


def test_missing_captions_are_named_all_at_once(photos):
    (photos / "teal.txt").unlink()
    (photos / "gold.txt").write_text(" ")
    sentence = r"^2 of 3 images in .*photos have no caption \(gold.png, teal.png\); write a .txt file of the same name"
    with pytest.raises(DbkitError, match=sentence):
        examples_of(training(photos, use_txt_as_label=True))


def test_of_many_missing_captions_five_are_named_and_the_rest_counted(tmp_path):
    for number in range(7):
        picture(tmp_path / "in" / f"{number}.png")
    with pytest.raises(DbkitError, match=r"^7 of 7 .* \(0.png, 1.png, 2.png, 3.png, 4.png and 2 more\);"):
        examples_of(training(tmp_path / "in", use_txt_as_label=True))


def test_unreadable_images_are_named_all_at_once(photos):
    (photos / "a.png").write_bytes(b"")
    (photos / "b.jpg").write_text("no image")
    with pytest.raises(
        DbkitError, match=r"^2 of 5 images are not usable: a.png cannot be read .*, b.jpg cannot be read "
    ):
        examples_of(training(photos))


def test_a_folder_of_images_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DbkitError, match=r"^instance_data_dir .*gone is not a folder; check the path, or make it with"):
        examples_of(training(tmp_path / "gone"))


def test_a_folder_of_images_that_is_empty_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(
        DbkitError, match=r"^there are no images in instance_data_dir .*in; put 5 to 20 photographs there$"
    ):
        examples_of(training(tmp_path / "in"))


def test_images_in_a_folder_below_are_pointed_out(tmp_path):
    picture(tmp_path / "in" / "dog" / "a.png")
    with pytest.raises(DbkitError, match=r"there are some in .*dog: name that folder$"):
        examples_of(training(tmp_path / "in"))


def with_class(photos):
    return training(photos, with_prior_preservation=True, class_prompt="photo of a thing")


def test_class_images_all_have_the_class_prompt(photos, tmp_path):
    picture(tmp_path / "class" / "a.png")
    examples = class_examples(with_class(photos), *concepts_of(with_class(photos)), list_images(tmp_path / "class"))
    assert [example.prompt for example in examples] == ["photo of a thing"]


def marked(folder, **changes):
    return fingerprint(examples_of(training(folder, **{"use_txt_as_label": True, **changes})))


def test_the_fingerprint_does_not_depend_on_where_the_images_lie(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "elsewhere" / "copy")
    for crop in (True, False):
        assert marked(photos, center_crop=crop) == marked(tmp_path / "elsewhere" / "copy", center_crop=crop)


def test_the_fingerprint_changes_with_a_caption(photos):
    before = marked(photos)
    (photos / "teal.txt").write_text("another thing")
    assert marked(photos) != before


def test_the_fingerprint_changes_with_an_images_bytes(photos):
    before = marked(photos)
    image = np.asarray(Image.open(photos / "teal.png")).copy()
    image[0, 0, 0] ^= 1
    Image.fromarray(image).save(photos / "teal.png")
    assert marked(photos) != before


def test_the_fingerprint_changes_with_the_order(photos):
    examples = examples_of(training(photos))
    assert fingerprint(examples) != fingerprint(examples[::-1])


def test_the_fingerprint_changes_with_the_crops(photos):
    marks = [
        marked(photos, center_crop=crop, seed=seed) for crop, seed in [(True, 0), (False, 0), (False, 1), (True, 1)]
    ]
    assert len(set(marks)) == 3
    assert marks[0] == marks[3]


def test_a_mask_counts_for_what_a_run_is(config, photos):
    draw_photo(photos / "masks" / "teal.png", colour="white")
    masked = replace(config, masked_loss=True)
    examples = instance_examples(masked, concepts_of(masked))
    assert [example.mask for example in examples] == [None, None, photos / "masks" / "teal.png"]
    said = describe(examples, concepts_of(masked))
    assert "1 image with a mask; these count whole: crimson.png, gold.png" in said
    before = fingerprint(examples)
    draw_photo(photos / "masks" / "teal.png", colour="black")
    assert fingerprint(instance_examples(masked, concepts_of(masked))) != before
    # Without the setting a mask is nothing.
    assert not any(example.mask for example in instance_examples(config, concepts_of(config)))


def test_masks_that_are_missing_or_do_not_fit_are_refused(config, photos):
    masked = replace(config, masked_loss=True)
    expected = r"masked_loss needs masks, and no image has one; put masks/crimson\.png beside crimson\.png, white where"
    with pytest.raises(DbkitError, match=expected):
        instance_examples(masked, concepts_of(masked))
    draw_photo(photos / "masks" / "gold.png", size=(80, 96))
    Image.new("L", (96, 80)).save(photos / "masks" / "teal.png")
    (photos / "masks" / "crimson.png").write_bytes(b"no picture")
    with pytest.raises(DbkitError, match=r"^3 of 3 masks are not usable: masks/crimson.png cannot be read") as caught:
        instance_examples(masked, concepts_of(masked))
    assert "masks/gold.png is 80 x 96 and gold.png 96 x 80, which is another shape; make the mask" in str(caught.value)
    assert "masks/teal.png is black all over, so nothing of the picture would count; take it out" in str(caught.value)


def test_a_picture_that_is_transparent_all_over_is_no_mask(config, photos):
    Image.new("RGBA", (96, 80)).save(photos / "gold.png")
    masked = replace(config, masked_loss=True)
    with pytest.raises(DbkitError, match=r"gold.png is transparent all over, so nothing of the picture would count"):
        instance_examples(masked, concepts_of(masked))


def test_views_that_show_nothing_of_the_mask_are_left_out(config, photos):
    mask = Image.new("L", (96, 80))
    mask.paste(255, (0, 0, 12, 80))
    (photos / "masks").mkdir()
    mask.save(photos / "masks" / "gold.png")
    # The middle square of a wide picture begins at 8; crops of 0.4 of it mostly lie further right.
    masked = replace(config, masked_loss=True, augment_crop=0.6, augment_variants=16)
    by_name = {example.path.name: example for example in instance_examples(masked, concepts_of(masked))}
    gold, teal = by_name["gold.png"], by_name["teal.png"]
    assert len(teal.views) == 16 and 1 <= len(gold.views) < 16
    seen = [render_mask(mask, gold.size, view).getextrema()[1] for view in gold.views]
    assert min(seen) > 0
    mask.paste(0, (0, 0, 12, 80))
    mask.paste(255, (0, 0, 4, 80))
    mask.save(photos / "masks" / "gold.png")
    with pytest.raises(DbkitError, match=r"the crop of gold.png shows nothing of what its mask does; set use_aspect"):
        plain = replace(config, masked_loss=True)
        instance_examples(plain, concepts_of(plain))
