"""What there is to export is read from the files of runs, and only what is whole is offered."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file

from dbkit import ConvertConfig, PreviewConfig, convert, open_workspace, saved_models, train
from dbkit.forms import form
from dbkit.lora_files import read_lora


@pytest.fixture
def workspace(settings):
    """A workspace with a run that saved steps 1 and 2, with previews, and ended."""
    opened = open_workspace()
    run = {
        "output_dir": opened.path / "runs" / "thing",
        "auto_test_model": True,
        "judge_steps": True,
        "save_model_every_n_steps": 1,
    }
    train(**{**settings, **run})
    return opened


def test_each_whole_step_is_listed_with_its_preview_and_its_loss(workspace):
    run = workspace.path / "runs" / "thing"

    found = saved_models(workspace).models

    assert [(m.folder, m.step) for m in found] == [
        (run / "checkpoints" / "step_000001", 1),
        (run / "model", 2),
    ]
    assert [m.preview for m in found] == [run / "previews" / f"step_{m.step:06d}.png" for m in found]
    assert found[0].loss != found[1].loss > 0 and not any(m.is_lora for m in found)
    assert all(m.size > 1e6 for m in found)


def test_what_is_damaged_is_not_offered(workspace):
    weights = workspace.path / "runs" / "thing" / "checkpoints" / "step_000001" / "unet"
    with next(weights.glob("*.safetensors")).open("ab") as file:
        file.write(b"more")

    assert [model.step for model in saved_models(workspace).models] == [2]


def test_it_shows_itself_as_lines_and_as_pictures(workspace):
    previews = workspace.path / "runs" / "thing" / "previews"
    next((previews / "step_000001").glob("*.png")).write_bytes(b"no picture")
    models = saved_models(workspace)

    assert str(models).splitlines()[0] == f"2 models in {workspace.path / 'runs'}"
    assert "runs/thing/checkpoints/step_000001: step 1, " in str(models)
    shown = models._repr_html_()
    assert shown.count("<code>runs/thing/") == 2 and shown.count("data:image/jpeg;base64,") == 3
    # Without the single pictures the grid is shown.
    shutil.rmtree(previews / "step_000001")
    assert saved_models(workspace)._repr_html_().count("data:image/jpeg;base64,") == 3


def test_the_recommended_step_is_said_marked_and_what_an_export_and_a_preview_begin_with(workspace):
    run = workspace.path / "runs" / "thing"
    figures = [{"step": step, "subject_fidelity": value} for step, value in ((0, 0.1), (1, 0.69), (2, 0.7))]
    (run / "figures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in figures))

    models = saved_models(workspace)
    assert models.best("thing").folder == run / "checkpoints" / "step_000001"
    assert "of thing step 1 is recommended: its previews are nearly as like the subject" in str(models)
    assert ", subject fidelity 0.69" in str(models)
    shown = models._repr_html_()
    first, last = shown.split("<code>")[1:]
    assert "★ recommended" in first and "★" not in last
    assert shown.count("stroke-dasharray") == 1 and "subject fidelity</b>: likeness of the previews" in shown
    assert "type='range' min='0' max='2'" in shown
    export = form(ConvertConfig, workspace, "export")
    assert export._inputs["source"].options[0] == "runs/thing/checkpoints/step_000001"
    chosen = export.read()
    assert Path(chosen.source) == run / "checkpoints" / "step_000001"
    assert chosen.destination.name == "thing-1.safetensors"
    assert Path(form(PreviewConfig, workspace, "preview").read().model) == run / "checkpoints" / "step_000001"


def test_a_page_runs_the_slider_without_closing_its_attribute(workspace):
    page = ElementTree.fromstring(
        "<div>" + re.sub("(<img[^>]*|<br|<input[^>]*)>", r"\1/>", saved_models(workspace)._repr_html_()) + "</div>"
    )
    (slider,) = page.iter("input")
    assert slider.get("oninput").startswith("const n=+this.value;") and "&&" in slider.get("oninput")


def test_the_newest_run_comes_first_and_an_empty_workspace_says_so(workspace, settings, tmp_path):
    older = workspace.path / "runs" / "a"
    train(**{**settings, "output_dir": older})
    os.utime(older / "log.jsonl", (1, 1))

    newest = workspace.path / "runs" / "thing" / "log.jsonl"
    for when in (newest.stat().st_mtime, time.time() + 3600):  # the clock of another machine may be ahead
        os.utime(newest, (when, when))
        assert list(dict.fromkeys(model.run for model in saved_models(workspace).models)) == ["thing", "a"]
    assert "There is no finished model" in saved_models(open_workspace(tmp_path / "empty"))._repr_html_()


def test_a_lora_is_offered_like_any_model_and_exported_under_the_names_that_user_interfaces_read(
    workspace, settings, capsys
):
    train(**{**settings, "output_dir": workspace.path / "runs" / "small", "adapter": "lora"})

    assert [m.run for m in saved_models(workspace).models if m.is_lora] == ["small"]
    models = ["runs/small/model", "runs/thing/checkpoints/step_000001", "runs/thing/model"]
    assert set(form(PreviewConfig, workspace)._inputs["model"].options) == set(models)
    export = form(ConvertConfig, workspace, "export")
    assert set(export._inputs["source"].options) == set(models) and export._inputs["source"].value == models[0]
    assert not form(ConvertConfig, workspace, "convert")._inputs["source"].options

    capsys.readouterr()
    made = convert(export.read())
    assert made == workspace.path / "exports" / "small-2.safetensors"
    assert "layers under kohya's names, read back and equal\n" in capsys.readouterr().out
    (file,) = (workspace.path / "runs" / "small" / "model").glob("*.safetensors")
    one, other = read_lora(made), read_lora(file)
    assert one.keys() == other.keys() and all(name.startswith("lora_") for name in load_file(made))
    assert all(torch.equal(one[name].up, other[name].up.half()) for name in one)
