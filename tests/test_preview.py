"""preview() gives the same pictures for the same settings, in a grid of prompts by seeds or guidance scales."""

import dataclasses
import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from dbkit import DbkitError, PreviewConfig, preview
from dbkit.models import load_models
from dbkit.preview import Preview, labelled_grid, make_preview, read_prompts


@pytest.fixture
def preview_config(model, tmp_path) -> PreviewConfig:
    return PreviewConfig(
        model=model,
        prompt=("photo of a dog", "photo of a cat"),
        output=tmp_path / "out" / "grid.png",
        num_per_prompt=2,
        num_inference_steps=2,
        sample_batch_size=1,
        device="cpu",
    )


def contents(made) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [made.grid, *made.pictures]}


def test_same_settings_give_the_same_bytes(preview_config):
    first = contents(preview(preview_config))
    torch.manual_seed(123)
    assert contents(preview(preview_config)) == first
    assert len(set(first.values())) == 5


def test_the_global_random_state_is_not_touched(preview_config):
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes()
    preview(preview_config)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tobytes() == before[1]


def test_there_is_a_picture_for_each_prompt_and_seed_and_a_grid(preview_config):
    made = preview(preview_config)
    assert made.grid == preview_config.output
    assert {path.name for path in made.pictures} == {
        f"{row:02d}-photo of a {animal}-seed{seed}-guidance7.5.png"
        for row, animal in ((1, "dog"), (2, "cat"))
        for seed in (42, 43)
    }
    assert {path.parent for path in made.pictures} == {preview_config.output.with_suffix("")}
    assert {Image.open(path).size for path in made.pictures} == {(64, 64)}
    assert str(made) == f"preview: {made.grid}"


def test_the_grid_shows_every_picture_where_its_prompt_and_seed_say(preview_config):
    made = preview(preview_config)
    grid = np.asarray(Image.open(made.grid))
    # Pictures of 64 px are enlarged three times; the gap is 8, a line of text 19 and the column heads take 31.
    cell, gap, line, top = 192, 8, 19, 31
    assert grid.shape == (top + 2 * (line + gap + cell + gap), gap + 2 * (cell + gap), 3)
    by_name = {path.name: np.asarray(Image.open(path)) for path in made.pictures}
    for row, animal in enumerate(("dog", "cat")):
        for column, seed in enumerate((42, 43)):
            x, y = gap + column * (cell + gap), top + row * (line + gap + cell + gap) + line + gap
            picture = by_name[f"{row + 1:02d}-photo of a {animal}-seed{seed}-guidance7.5.png"]
            assert np.array_equal(grid[y : y + cell : 3, x : x + cell : 3], picture)


def test_several_guidance_scales_make_the_columns_with_one_seed(preview_config):
    made = preview(preview_config, prompt="photo of a dog", guidance_scale=(1.0, 3.0, 9.0), num_per_prompt=4)
    assert [path.name for path in made.pictures] == [
        f"01-photo of a dog-seed42-guidance{scale}.png" for scale in (1, 3, 9)
    ]
    assert len(set(contents(made).values())) == 4
    alone = preview(preview_config, prompt="photo of a dog", guidance_scale=3.0, num_per_prompt=1)
    assert alone.pictures[0].read_bytes() == made.pictures[1].read_bytes()


def test_without_an_output_each_preview_is_a_new_one_beside_the_model(preview_config, copied, monkeypatch):
    short = dataclasses.replace(preview_config, model=copied, output=None, prompt=("a dog",), num_per_prompt=1)
    first, second = preview(short), preview(short, model="copied")
    assert (first.grid, second.grid) == (
        copied.with_name("copied-preview.png"),
        copied.with_name("copied-preview-1.png"),
    )
    assert first.grid.read_bytes() == second.grid.read_bytes()
    monkeypatch.chdir(copied)
    assert preview(short, model=".").grid == copied.with_name("copied-preview-2.png")


def test_the_embedded_model_is_previewed_into_the_current_folder(preview_config, tmp_path):
    short = dataclasses.replace(preview_config, model="tiny-sd", output=None, prompt=("a dog",), num_per_prompt=1)
    assert preview(short).grid.absolute() == tmp_path / "tiny-sd-preview.png"


def test_prompts_of_a_file_follow_those_given(preview_config, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa red car\n\n  ein Bär \n", encoding="utf-8")
    made = preview(preview_config, prompt="a dog", prompts_file=tmp_path / "prompts.txt", num_per_prompt=1)
    assert [path.name.partition("-seed")[0] for path in made.pictures] == ["01-a dog", "02-a red car", "03-ein Bär"]


@pytest.mark.parametrize("output", ["grid.jpg", "grid"])
def test_a_grid_that_is_no_png_is_refused_before_the_model_is_read(preview_config, tmp_path, output):
    with pytest.raises(DbkitError, match=rf"output is .*{output}; give the grid a name that ends in \.png"):
        preview(preview_config, output=tmp_path / output, model=tmp_path / "no-model")


def test_a_missing_prompts_file_is_refused(tmp_path):
    with pytest.raises(DbkitError, match=r"there is no prompts file .*prompts\.txt; check the path"):
        read_prompts(tmp_path / "prompts.txt")


def test_a_prompts_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("ein Bär".encode("latin-1"))
    with pytest.raises(DbkitError, match=r"prompts\.txt is not UTF-8 text; save it again as UTF-8"):
        read_prompts(tmp_path / "prompts.txt")


def test_an_empty_prompts_file_is_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n  \n")
    with pytest.raises(DbkitError, match=r"prompts\.txt holds no prompt; write one on each line"):
        read_prompts(tmp_path / "prompts.txt")


def test_a_resolution_that_the_model_cannot_make_is_refused(preview_config):
    with pytest.raises(DbkitError, match="resolution is 65; this model's pictures need a multiple of 8, for"):
        preview(preview_config, resolution=65)


@pytest.mark.parametrize(
    "prompt",
    [
        "a very long prompt, highly detailed, " * 20,
        'a <b> "c": d/e\\f|g?h*',
        "犬" * 100,
        "🐕" * 100,
        "con",
        "../../etc/passwd",
        "...",
        "tab\there\x00",
    ],
    ids=["long", "forbidden", "three bytes", "four bytes", "reserved", "climbing", "dots", "control"],
)
def test_every_prompt_gives_a_file_name_that_every_system_takes(preview_config, prompt):
    made = preview(preview_config, prompt=prompt, num_per_prompt=1, num_inference_steps=1)
    (path,) = made.pictures
    assert path.is_file()
    assert path.parent == preview_config.output.with_suffix("")
    assert not set(path.name) & set('<>:"/\\|?*\t\0')
    assert len(os.fsencode(path.name)) + len(".partial") <= 255


def test_pictures_of_another_size_can_be_asked_for(preview_config):
    made = preview(preview_config, prompt="a dog", num_per_prompt=1, resolution=32)
    assert Image.open(made.pictures[0]).size == (32, 32)


def test_a_notebook_shows_the_grid_as_a_jpeg(preview_config):
    made = preview(preview_config, prompt="a dog", num_per_prompt=1)
    shown = Image.open(io.BytesIO(made._repr_jpeg_()))
    assert shown.format == "JPEG"
    difference = np.asarray(shown, int) - np.asarray(Image.open(made.grid), int)
    assert shown.size == Image.open(made.grid).size
    assert np.abs(difference).mean() < 10


def test_a_live_model_is_previewed_as_it_is_now_and_given_back(preview_config):
    models = load_models(preview_config.model)
    models.unet.train()
    options = {"seeds": (42,), "side": 64, "steps": 2, "batch_size": 1, "dtype": torch.float32}

    def show(name):
        made = make_preview(
            models, ["a dog"], output=preview_config.output.with_name(name), device=torch.device("cpu"), **options
        )
        return made.pictures[0].read_bytes()

    before = show("before.png")
    assert before == preview(preview_config, prompt="a dog", num_per_prompt=1).pictures[0].read_bytes()
    with torch.no_grad():
        models.unet.conv_out.weight *= 2
    assert show("after.png") != before
    assert models.unet.training


def test_large_pictures_are_not_enlarged_and_long_labels_are_wrapped():
    pictures = [[Image.new("RGB", (200, 200), "red")] * 2]
    one, wrapped = (labelled_grid(pictures, [label], ["seed 1", "seed 2"]) for label in ("short", "long words " * 30))
    assert one.width == wrapped.width == 8 + 2 * 208
    assert wrapped.height > one.height
    assert (np.asarray(wrapped) == (255, 0, 0)).all(axis=-1).sum() == 2 * 200 * 200


def test_no_prompt_and_no_guidance_scale_are_refused(preview_config):
    with pytest.raises(DbkitError, match="prompt is missing: say what the pictures should show"):
        dataclasses.replace(preview_config, prompt=())
    with pytest.raises(DbkitError, match="guidance_scale is empty; give at least one value"):
        dataclasses.replace(preview_config, guidance_scale=())


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("folder.png", "folder.png is a folder; give the grid another name"),
        ("file/grid.png", "file is a file, and .*grid.png would lie in it"),
        ("file.png", "file is a file, and .* would lie in it"),
        ("x" * 250 + ".png", "x.png is too long; choose a shorter one"),
    ],
)
def test_a_grid_that_cannot_be_written_is_refused_before_the_model_is_looked_for(tmp_path, output, sentence):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(DbkitError, match=sentence):
        preview(tmp_path / "no model", prompt="a dog", output=tmp_path / output)


def test_a_folder_that_cannot_be_made_is_said_before_the_model_is_loaded(copied, tmp_path):
    (copied / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no model")
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DbkitError, match=r"out is no folder, or lies in what is none \(.+\); choose another name"):
        preview(copied, prompt="a dog", output=tmp_path / "out" / "grid.png")


def test_a_grid_is_shown_at_any_height_and_not_at_all_once_it_is_gone(tmp_path):
    made = Preview(tmp_path / "grid.png", [])
    Image.new("RGB", (20, 66_000)).save(made.grid)
    assert Image.open(io.BytesIO(made._repr_jpeg_())).height == 65_500
    made.grid.unlink()
    assert made._repr_jpeg_() is None
