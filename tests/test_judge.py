"""Each saved step is measured by what is there already, the same whenever it is asked, and training is not touched."""

import errno
import os
import shutil
import threading
import types
from pathlib import Path

import pytest
import torch

from dbkit import embedded, train
from dbkit.best_step import recommend
from dbkit.concepts import Concept
from dbkit.evaluate import Dino
from dbkit.images import list_images, read_image, render
from dbkit.judge import Judge
from dbkit.log import read_log
from dbkit.models import read_weights

MEASURED = {"judge_steps": True, "save_model_every_n_steps": 1}


def run_embedded(folder, class_images, **changes):
    """Four steps on the sample poodle with two class images, saved at the second; returns the run's folder."""
    settings = {
        "pretrained_model_name_or_path": embedded.NAME,
        "instance_data_dir": embedded.data_templates() / embedded.SAMPLE,
        "instance_prompt": "photo of zwx dog",
        "with_prior_preservation": True,
        "class_prompt": "photo of a dog",
        "class_data_dir": class_images,
        "output_dir": folder,
        "resolution": embedded.RESOLUTION,
        "save_model_every_n_steps": 2,
        "device": "cpu",
    }
    train(**embedded.TRAINING | settings | {"max_train_steps": 4, "num_class_images": 2} | changes)
    return folder


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    place = tmp_path_factory.mktemp("judged")
    return run_embedded(place / "run", place / "class")


def test_each_step_has_its_figures_and_step_0_those_of_the_base(judged):
    lines = read_log(judged / "figures.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4]
    names = {"step", "validation_loss", "class_loss", "subject_fidelity", "prompt_fidelity", "class_leak", "previews"}
    assert all(line.keys() == names for line in lines)
    assert lines[2]["validation_loss"] < lines[0]["validation_loss"]


def test_previews_of_another_session_are_compared_where_they_were_made_with_the_same_settings(judged, tmp_path):
    run = shutil.copytree(judged, tmp_path / "run")
    for changes in ({}, {"test_seed": 5}, {"test_negative_prompt": "a cat"}):
        steps = read_log(run / "figures.jsonl")[-1]["step"] + 2
        run_embedded(run, judged.parent / "class", max_train_steps=steps, **changes)
    lines = read_log(run / "figures.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8, 10]
    assert [line["previews"] == lines[0]["previews"] for line in lines] == [True] * 4 + [False] * 2
    assert "by the loss, since previews of step 8 were made with other settings" in recommend(lines, [8, 10]).reason


def test_likeness_is_that_of_the_preview_pictures_to_the_photographs(judged):
    dino = Dino(embedded.DINO, torch.device("cpu"))
    folder = embedded.data_templates() / embedded.SAMPLE
    photographs = dino([render(read_image(path), (32, 32)) for path in list_images(folder)])
    alone, elsewhere, of_class = (
        read_image(path) for path in sorted((judged / "previews" / "step_000004").glob("*.png"))
    )
    line = read_log(judged / "figures.jsonl")[-1]
    assert line["subject_fidelity"] == pytest.approx((dino([alone, elsewhere]) @ photographs.T).mean().item(), abs=1e-5)
    assert line["class_leak"] == pytest.approx((dino([of_class]) @ photographs.T).mean().item(), abs=1e-5)


def test_a_training_that_is_not_measured_is_the_same(judged, tmp_path):
    plain = run_embedded(tmp_path / "plain", judged.parent / "class", judge_steps=False, auto_test_model=False)
    one, two = (read_weights(folder / "model", "unet") for folder in (judged, plain))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not (plain / "figures.jsonl").exists()


def test_without_previews_or_judges_the_loss_is_measured_and_that_is_said_once(settings, tmp_path, capsys):
    train(**settings | MEASURED)
    names = [line.keys() for line in read_log(tmp_path / "run" / "figures.jsonl")]
    assert names == [{"step", "validation_loss"}] * 3
    assert "not judged" not in capsys.readouterr().out
    train(**settings | MEASURED | {"auto_test_model": True, "output_dir": tmp_path / "other"})
    assert capsys.readouterr().out.count("previews are not judged, since openai/clip-vit-base-patch32 or ") == 1
    assert read_log(tmp_path / "other" / "figures.jsonl") == read_log(tmp_path / "run" / "figures.jsonl")


def test_a_run_that_goes_on_keeps_the_figures_of_the_steps_it_has_and_measures_the_others_again(settings, tmp_path):
    train(**settings | MEASURED)
    path = tmp_path / "run" / "figures.jsonl"
    whole = path.read_text().splitlines()
    path.write_text("\n".join([*whole, '{"step": 9, "validation_loss": 1.0}', '{"step": 3, "vali']))
    train(**settings | MEASURED | {"max_train_steps": 3})
    lines = path.read_text().splitlines()
    assert lines[:3] == whole and [line["step"] for line in read_log(path)] == [0, 1, 2, 3]


def judge_of(run, done=0):
    """One that measures nothing but that a step was there."""
    plan = types.SimpleNamespace(previews=[], done=done)
    return Judge(types.SimpleNamespace(auto_test_model=False, judge_steps=True), run, plan, dict)


def blocker(run):
    """Where a folder keeps this thread from writing a run's figures."""
    return run / f"figures.jsonl.{threading.get_native_id()}.partial"


def test_figures_that_cannot_be_written_end_no_training_and_that_is_said_once(settings, tmp_path, capsys):
    blocker(tmp_path / "run").mkdir(parents=True)
    train(**settings | MEASURED)
    assert capsys.readouterr().out.count("the figures of saved steps cannot be kept: ") == 1


def test_what_a_disk_did_not_take_is_written_with_the_next_step(tmp_path):
    judge = judge_of(tmp_path / "run")
    blocked = blocker(tmp_path / "run")
    blocked.mkdir()
    judge(1)
    assert not read_log(tmp_path / "run" / "figures.jsonl")
    blocked.rmdir()
    judge(2)
    assert [line["step"] for line in read_log(tmp_path / "run" / "figures.jsonl")] == [1, 2]


def test_figures_that_cannot_be_read_are_not_replaced(settings, tmp_path, monkeypatch, capsys):
    train(**settings | MEASURED)
    path = tmp_path / "run" / "figures.jsonl"
    whole = path.read_text()
    read = Path.read_text

    def fail(self, *args, **kwargs):
        if self == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return read(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        capsys.readouterr()
        train(**settings | MEASURED | {"max_train_steps": 4})
    assert path.read_text() == whole
    assert capsys.readouterr().out.count("the figures of saved steps cannot be kept: ") == 1


def test_figures_that_can_be_read_again_are_kept_beside_those_of_the_session(tmp_path):
    path = tmp_path / "run" / "figures.jsonl"
    path.mkdir(parents=True)
    judge = judge_of(tmp_path / "run", done=2)
    judge(2)
    judge(3)
    path.rmdir()
    path.write_text('{"step": 0}\n{"step": 2, "validation_loss": 0.1}\n{"step": 3, "validation_loss": 0.2}\n')
    judge(4)
    assert read_log(path) == [{"step": 0}, {"step": 2, "validation_loss": 0.1}, {"step": 3}, {"step": 4}]


def test_figures_of_steps_that_are_taken_again_go_where_they_are_not_measured_again(settings, tmp_path):
    train(**settings | MEASURED)
    path = tmp_path / "run" / "figures.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 3, "validation_loss": 0.001}\n')
    train(**settings | MEASURED | {"judge_steps": False, "max_train_steps": 3})
    assert path.read_text() == whole


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("photo of zwx dog", [0]),
        ("a painting of zwx", [0]),
        ("ukj cat and zwx dog", [0, 1]),
        ("photo of a dog", []),
    ],
)
def test_a_preview_is_of_the_concepts_whose_own_words_it_has(tmp_path, prompt, named):
    concepts = [
        Concept(tmp_path, "photo of zwx dog", "photo of a dog"),
        Concept(tmp_path, "photo of ukj cat", "photo of a cat"),
    ]
    judge = Judge.__new__(Judge)
    judge.plan = types.SimpleNamespace(concepts=concepts)
    assert judge._named(prompt) == named


def test_every_preview_of_a_native_training_is_of_its_images(tmp_path):
    judge = Judge.__new__(Judge)
    judge.plan = types.SimpleNamespace(concepts=[Concept(tmp_path)])
    assert judge._named("a house in zwx style") == [0]
