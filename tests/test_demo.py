"""The demo runs the whole main job and what it made is what it says. tests/test_learning.py asks whether it learnt."""

import json

import torch
from PIL import Image

from dbkit import convert, embedded
from dbkit.demo import demo
from dbkit.embedded import data_templates
from dbkit.models import WEIGHTS, load_models, read_weights


def test_the_demo_makes_a_grid_a_model_and_a_checkpoint_that_converts_back(tmp_path, capsys):
    made = demo(folder=tmp_path / "demo", max_train_steps=2)
    said = str(made).splitlines()
    assert said[-4:-1] == [
        f"before and after: {made.evaluation.grid}",
        f"model folder:     {made.model}",
        f"checkpoint:       {made.checkpoint}",
    ]
    assert list(made.seconds) == [
        "prepare", "class images", "training", "loading, caching and saving",
        "pictures before and after", "export"
    ]  # fmt: skip
    assert all(part in said[-1] for part in made.seconds)
    assert Image.open(made.evaluation.grid).width > 64
    assert json.loads((made.model / "manifest.json").read_text())["step"] == 2
    assert load_models(made.model).facts.resolution == embedded.RESOLUTION
    back = convert(made.checkpoint, tmp_path / "back")
    for part in WEIGHTS:
        exported, model = read_weights(back, part), read_weights(made.model, part)
        assert exported.keys() == model.keys()
        assert all(torch.equal(exported[name], model[name]) for name in model)
    assert capsys.readouterr().out.startswith("The demo teaches dbkit's own small model a subject")

    # Run again, it continues: nothing is trained twice.
    times = (made.model / "manifest.json").stat().st_mtime_ns
    again = demo(folder=tmp_path / "demo", max_train_steps=2)
    assert again.evaluation == made.evaluation
    assert (made.model / "manifest.json").stat().st_mtime_ns == times
    assert "2 steps done already" in capsys.readouterr().out


def test_the_sample_pictures_are_there():
    folder = data_templates()
    assert (folder / "train_object.yaml").is_file()
    assert len(list((folder / embedded.SAMPLE).iterdir())) == 5
    assert len(list((folder / "print").glob("*.png"))) == len(list((folder / "print").glob("*.txt"))) == 24
