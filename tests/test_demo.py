"""The demo runs the whole main job and what it made is what it says."""

import json

import torch
from PIL import Image

from dbkit import convert
from dbkit.demo import data_templates, demo, make_random_model
from dbkit.models import WEIGHTS, load_models, read_weights


def test_the_demo_makes_a_grid_a_model_and_a_checkpoint_that_converts_back(tmp_path, capsys):
    made = demo(folder=tmp_path / "demo", max_train_steps=2)
    assert str(made).splitlines() == [
        f"preview grid: {made.grid}",
        f"model folder: {made.model}",
        f"checkpoint:   {made.checkpoint}",
    ]
    assert Image.open(made.grid).width > 64
    assert json.loads((made.model / "manifest.json").read_text())["step"] == 2
    assert load_models(made.model).facts.resolution == 64
    back = convert(made.checkpoint, tmp_path / "back")
    for part in WEIGHTS:
        exported, model = read_weights(back, part), read_weights(made.model, part)
        assert exported.keys() == model.keys()
        assert all(torch.equal(exported[name], model[name]) for name in model)
    assert "its weights are random" in capsys.readouterr().out

    # Run again, it continues: nothing is trained twice.
    times = (made.model / "manifest.json").stat().st_mtime_ns
    again = demo(folder=tmp_path / "demo", max_train_steps=2)
    assert again == made
    assert (made.model / "manifest.json").stat().st_mtime_ns == times
    assert "2 steps are done already" in capsys.readouterr().out


def test_the_random_model_is_the_same_at_every_call_and_leaves_the_random_state_alone(model, tmp_path):
    before = torch.get_rng_state()
    again = make_random_model(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    other = make_random_model(tmp_path / "other", seed=1)
    for part in WEIGHTS:
        first, second, third = (read_weights(folder, part) for folder in (model, again, other))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(not torch.equal(first[name], third[name]) for name in first)


def test_the_sample_pictures_are_there():
    folder = data_templates()
    assert (folder / "train_object.yaml").is_file()
    assert list((folder / "robot").iterdir())
