"""Forms without a browser: values are set as typing would, and read back from the form and from the workspace."""

import dataclasses

import ipywidgets
import pytest
import torch
import yaml

from dbkit import ConvertConfig, DbkitError, PrepareConfig, PreviewConfig, TrainConfig, open_workspace
from dbkit.config import COMMANDS
from dbkit.forms import form
from dbkit.settings import AUTO


@pytest.fixture
def workspace(model, photos):
    """A workspace with one set of photographs, so that nothing has to be made for a form to open."""
    opened = open_workspace()
    (opened.path / "models" / "mine").symlink_to(model)
    photos.rename(opened.path / "photos" / "things")
    return opened


def kept(workspace, name):
    return yaml.safe_load(workspace.settings_file(name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("cls", [cls for name, cls in COMMANDS.items() if name != "demo"])
def test_every_setting_has_a_field_and_no_secret_one_has(cls, workspace):
    shown = set(form(cls, workspace)._inputs)
    assert shown == {f.name for f in dataclasses.fields(cls) if not f.metadata.get("secret")}
    assert "hub_token" not in shown


def test_opening_a_form_writes_nothing(workspace):
    form(PrepareConfig, workspace)
    assert not workspace.settings_file("prepare").exists()


def test_a_change_is_kept_and_refilled(workspace):
    form(PrepareConfig, workspace).set(resolution=96, framing="random")
    assert kept(workspace, "prepare") == {"resolution": "96", "framing": "random"}
    again = form(PrepareConfig, workspace).read()
    assert (again.resolution, again.framing) == (96, "random")


def test_an_address_with_a_query_is_used_and_not_kept(workspace):
    settings = form(ConvertConfig, workspace)
    url = "https://example.com/small.safetensors?token=hush"
    settings.set(source=url, destination="made", license="mit")
    assert settings.read().source == url
    assert "hush" not in workspace.settings_file("convert").read_text()
    assert kept(workspace, "convert")["license"] == "mit"
    settings.set(source="https://example.com/small.safetensors")
    assert kept(workspace, "convert")["source"] == "https://example.com/small.safetensors"


def test_a_learning_rate_looks_like_one(workspace):
    settings = form(TrainConfig, workspace)
    settings.set(learning_rate=2e-6)
    assert settings._inputs["learning_rate"].value == "2e-06"
    settings.set(instance_prompt="photo of zwx thing", use_txt_as_label=False)
    assert settings.read().learning_rate == 2e-6


def test_paths_in_the_workspace_are_shown_relative_and_read_absolute(workspace):
    settings = form(PrepareConfig, workspace)
    assert settings._inputs["source"].value == "photos/things"
    assert settings.read().source == workspace.path / "photos" / "things"


def test_a_mistake_is_shown_at_once_and_raised_on_read(workspace):
    settings = form(PrepareConfig, workspace)
    settings.set(resolution="wide")
    assert "resolution is &#x27;wide&#x27;; write a whole number" in settings._message.value
    with pytest.raises(DbkitError, match="resolution is 'wide'; write a whole number"):
        settings.read()
    settings.set(resolution="64")
    assert settings._message.value == ""


def test_an_emptied_field_is_none_where_that_is_a_value_and_else_the_default(workspace):
    settings = form(TrainConfig, workspace)
    settings.set(
        auto=False, save_model_every_n_steps="", num_train_epochs="", use_txt_as_label=True, instance_prompt=""
    )
    read = settings.read()
    assert read.save_model_every_n_steps is None
    assert read.num_train_epochs == 100


def test_on_a_first_visit_what_can_be_chosen_is_empty_and_left_to_auto(workspace):
    settings = form(TrainConfig, workspace)
    settings.set(use_txt_as_label=True, instance_prompt="", learning_rate=2e-6, use_8bit_adam=False)
    assert settings._inputs["max_train_steps"].value == settings._inputs["gradient_checkpointing"].value == ""
    assert settings._inputs["max_train_steps"].placeholder == "auto"
    read = settings.read()
    assert read.auto and {read.max_train_steps, read.gradient_checkpointing, read.num_class_images} == {AUTO}
    assert (read.learning_rate, read.use_8bit_adam) == (2e-6, False)
    # What was filled in is kept and stands the next time.
    again = form(TrainConfig, workspace)
    assert again.read() == read and again._inputs["use_8bit_adam"].value == "off"


def test_without_auto_an_empty_field_is_none_or_the_default_and_suggestions_are_shown(workspace):
    settings = form(TrainConfig, workspace)
    settings.set(use_txt_as_label=True, instance_prompt="", auto=False, use_8bit_adam=True)
    assert settings._inputs["max_train_steps"].placeholder == "empty"
    read = settings.read()
    assert (read.max_train_steps, read.learning_rate, read.gradient_checkpointing) == (None, 5e-6, False)
    assert read.use_8bit_adam is True
    assert form(TrainConfig, workspace)._inputs["learning_rate"].value == "5e-06"


def test_several_prompts_are_lines(workspace):
    settings = form(PreviewConfig, workspace)
    settings.set(prompt=["a thing", "two things"], guidance_scale=["3", "7.5"])
    assert settings.read().prompt == ("a thing", "two things")
    assert settings.read().guidance_scale == (3.0, 7.5)


def test_advanced_settings_are_folded_away_until_asked_for(workspace):
    settings = form(ConvertConfig, workspace)
    more, folded = settings.children[-3:-1]
    assert isinstance(more, ipywidgets.Checkbox) and folded.layout.display == "none"
    more.value = True
    assert folded.layout.display is None


def test_a_field_that_is_not_there_is_named(workspace):
    with pytest.raises(DbkitError, match="there is no field 'colour' in this form"):
        form(PrepareConfig, workspace).set(colour="red")


def test_a_kept_choice_that_no_longer_exists_is_named(workspace):
    workspace.settings_file("train").write_text("lr_scheduler: cosine_with_hard_restarts\n", encoding="utf-8")
    with pytest.raises(DbkitError, match="lr_scheduler: 'cosine_with_hard_restarts', which cannot be shown"):
        form(TrainConfig, workspace)


def test_kept_names_that_are_no_settings_do_not_hide_the_form(workspace):
    workspace.settings_file("prepare").write_text("gone: 1\nresolution: 64\n", encoding="utf-8")
    assert form(PrepareConfig, workspace).read().resolution == 64


def test_without_a_gpu_and_a_model_the_form_says_that_it_suggests_the_embedded_one(workspace, monkeypatch):
    monkeypatch.setattr("dbkit.suggestions.choose_device", lambda name: torch.device("cpu"))

    def first_line():
        return getattr(form(TrainConfig, workspace).children[0], "value", "")

    assert first_line() == ""
    (workspace.path / "models" / "mine").unlink()
    assert first_line().startswith("The model suggested here is dbkit's own small one, which needs no GPU")
    assert form(TrainConfig, workspace)._inputs["pretrained_model_name_or_path"].value == "tiny-sd"
