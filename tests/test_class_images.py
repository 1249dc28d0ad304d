"""Class images are made once, continue where they stopped, and are never mixed with those of another kind."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import draw_photo
from PIL import Image
from safetensors.torch import load_file, save_file

from dbkit import ClassImagesConfig, DbkitError, generate_class_images


@pytest.fixture
def class_config(model) -> ClassImagesConfig:
    return ClassImagesConfig(
        pretrained_model_name_or_path=str(model),
        class_prompt="photo of a thing",
        num_class_images=3,
        resolution=64,
        num_inference_steps=2,
        sample_batch_size=1,
        device="cpu",
    )


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_there_are_as_many_images_as_asked_for_at_the_asked_size(class_config):
    made = generate_class_images(class_config)
    assert (made.generated, made.found, made.brought) == (3, 0, 0)
    assert sorted(contents(made.folder)) == ["class-00000.png", "class-00001.png", "class-00002.png"]
    assert {Image.open(path).size for path in made.folder.glob("*.png")} == {(64, 64)}
    assert len(set(contents(made.folder).values())) == 3
    assert str(made) == f"class images: 3 generated, 0 found: {made.folder}"
    shown = made._repr_html_()
    assert "3 generated" in shown and shown.count("data:image/jpeg;base64,") == 3


def test_called_again_it_makes_nothing(class_config):
    first = generate_class_images(class_config)
    times = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    again = generate_class_images(class_config)
    assert (again.generated, again.found, again.folder) == (0, 3, first.folder)
    assert {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times


def test_a_missing_image_is_made_again_to_the_byte(class_config):
    folder = generate_class_images(class_config).folder
    before = contents(folder)
    (folder / "class-00001.png").unlink()
    made = generate_class_images(class_config)
    assert (made.generated, made.found) == (1, 2)
    assert contents(folder) == before


def test_more_images_join_those_that_are_there(class_config):
    folder = generate_class_images(class_config, num_class_images=2).folder
    before = contents(folder)
    made = generate_class_images(class_config, num_class_images=4)
    assert (made.folder, made.generated, made.found) == (folder, 2, 2)
    assert len(contents(folder)) == 4
    assert before.items() <= contents(folder).items()


def test_what_a_kill_left_half_written_is_no_image(class_config):
    folder = generate_class_images(class_config).folder
    before = contents(folder)
    (folder / "class-00002.png").rename(folder / "class-00002.png.partial")
    assert generate_class_images(class_config).generated == 1
    assert contents(folder) == before
    assert not list(folder.glob("*.partial"))


def test_batch_size_does_not_change_the_pictures(class_config, tmp_path):
    folders = [
        generate_class_images(
            class_config, num_class_images=5, sample_batch_size=size, class_data_dir=tmp_path / f"{size}"
        ).folder
        for size in (1, 2, 5)
    ]
    one, *others = (
        np.stack([np.asarray(Image.open(path), int) for path in sorted(folder.glob("*.png"))]) for folder in folders
    )
    assert all(np.abs(one - other).max() <= 2 for other in others)


def test_images_do_not_depend_on_the_global_random_state(class_config, tmp_path):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(contents(generate_class_images(class_config, class_data_dir=tmp_path / str(seed)).folder))
    assert found[0] == found[1]


def test_each_model_and_prompt_has_a_folder_of_its_own_in_the_workspace(
    class_config, model, workspace_folder, tmp_path
):
    other = shutil.copytree(model, tmp_path / "other")
    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 0.9 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    configs = [
        class_config,
        dataclasses.replace(class_config, class_prompt="photo of a dog"),
        dataclasses.replace(class_config, pretrained_model_name_or_path=str(other)),
        dataclasses.replace(class_config, seed=1),
    ]
    made = [generate_class_images(config, num_class_images=1) for config in configs]
    assert len({images.folder for images in made}) == len(configs)
    assert {images.folder.parent for images in made} == {workspace_folder / "class_images"}
    assert len({next(iter(contents(images.folder).values())) for images in made}) == len(configs)
    assert made[1].folder.name.startswith("photo of a dog-")


def test_a_copy_of_the_model_elsewhere_uses_the_same_images(class_config, model, tmp_path):
    first = generate_class_images(class_config)
    copied = shutil.copytree(model, tmp_path / "copied")
    again = generate_class_images(class_config, pretrained_model_name_or_path=str(copied))
    assert (again.folder, again.generated) == (first.folder, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("class_prompt", "photo of a dog"),
        ("negative_prompt", "blurry"),
        ("resolution", 32),
        ("num_inference_steps", 3),
        ("guidance_scale", 3.0),
        ("seed", 1),
        ("clip_skip", 2),
    ],
)
def test_images_of_another_kind_are_refused_by_what_differs(class_config, tmp_path, name, value):
    config = dataclasses.replace(class_config, class_data_dir=tmp_path / "class", num_class_images=1)
    generate_class_images(config)
    before = contents(tmp_path / "class")
    expected = f"holds class images made with {name} {getattr(config, name)!r} instead of {value!r}; choose another"
    with pytest.raises(DbkitError, match=expected):
        generate_class_images(config, **{name: value})
    assert contents(tmp_path / "class") == before


def test_images_of_another_model_are_refused(class_config, tmp_path):
    config = dataclasses.replace(class_config, class_data_dir=tmp_path / "class", num_class_images=1)
    generate_class_images(config)
    manifest = tmp_path / "class" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "model": "owner/name@main"}))
    with pytest.raises(
        DbkitError, match=r"made with model 'owner/name@main' instead of '[0-9a-f]{64}'; choose another"
    ):
        generate_class_images(config)


def test_a_damaged_manifest_is_refused(class_config, tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "manifest.json").write_text('{"model": ')
    with pytest.raises(DbkitError, match=r"manifest\.json is damaged \(.+\); choose another class_data_dir"):
        generate_class_images(class_config, class_data_dir=tmp_path / "class")


def test_a_manifest_of_something_else_is_refused(class_config, tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "manifest.json").write_text("[]")
    with pytest.raises(
        DbkitError, match=r"manifest\.json is not a manifest of class images; choose another class_data"
    ):
        generate_class_images(class_config, class_data_dir=tmp_path / "class")


def test_the_users_own_images_are_used_as_they_are(class_config, tmp_path):
    own = [draw_photo(tmp_path / "class" / f"IMG_{number}.png") for number in range(3)]
    before = contents(tmp_path / "class")
    made = generate_class_images(class_config, class_data_dir=tmp_path / "class")
    assert (made.generated, made.found, made.brought) == (0, 0, len(own))
    assert contents(tmp_path / "class") == before
    assert "3 brought by you, of unknown origin, used as they are" in str(made)


def test_generated_images_join_the_users_own_up_to_the_count(class_config, tmp_path):
    draw_photo(tmp_path / "class" / "IMG_1.png")
    for generated, found in ((2, 0), (0, 2)):
        made = generate_class_images(class_config, class_data_dir=tmp_path / "class")
        assert (made.generated, made.found, made.brought) == (generated, found, 1)
        assert len(contents(tmp_path / "class")) == 3


def test_more_own_images_than_asked_for_are_all_kept(class_config, tmp_path):
    for number in range(4):
        draw_photo(tmp_path / "class" / f"{number}.png")
    made = generate_class_images(class_config, class_data_dir=tmp_path / "class", num_class_images=2)
    assert (made.generated, made.brought) == (0, 4)


def test_a_resolution_that_the_model_cannot_make_is_refused_before_anything_is_written(class_config, workspace_folder):
    with pytest.raises(DbkitError, match="resolution is 60; this model's pictures need a multiple of 8"):
        generate_class_images(class_config, resolution=60)
    assert not (workspace_folder / "class_images").exists()
