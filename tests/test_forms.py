"""Forms without a browser: values are set as typing would, and read back from the form and from the workspace."""

import dataclasses
import io
import os
import shutil
import sys
import threading

import ipywidgets
import pytest
import torch
import yaml

from dbkit import CaptionConfig, ConvertConfig, DbkitError, PrepareConfig, PreviewConfig, TrainConfig, open_workspace
from dbkit.config import COMMANDS
from dbkit.forms import form
from dbkit.settings import AUTO, groups
from dbkit.train_summary import BACKGROUND


@pytest.fixture
def workspace(model, photos):
    """A workspace with one set of photographs, so that nothing has to be made for a form to open."""
    opened = open_workspace()
    (opened.path / "models" / "mine").symlink_to(model)
    photos.rename(opened.path / "photos" / "things")
    return opened


@pytest.fixture(autouse=True)
def no_thread_is_left():
    """What a form finds out in the background must not run into another test."""
    yield
    for thread in threading.enumerate():
        if thread.name == BACKGROUND:
            thread.join()


def every(widget):
    """A widget and all below it."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from every(child)


def is_shown(settings, name):
    return settings._rows[name].layout.display != "none"


def kept(workspace, name):
    return yaml.safe_load(workspace.settings_file(name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "reason"), [("train.yaml", "is a folder and no settings file"), ("x", "too long")])
def test_settings_that_cannot_be_read_are_a_sentence(workspace, name, reason):
    workspace.settings_file("train").mkdir()
    with pytest.raises(DbkitError, match=reason):
        form(TrainConfig, workspace, "train" if name == "train.yaml" else "x" * 255)


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


@pytest.mark.parametrize("fault", ["no folder", "full disk"])
def test_a_form_whose_settings_cannot_be_kept_says_so_and_reads_what_it_shows(workspace, fault, request):
    settings, folder = form(TrainConfig, workspace), workspace.settings_file("train").parent
    settings.set(instance_prompt="photo of zwx thing", use_txt_as_label=False)
    if fault == "no folder":
        shutil.rmtree(folder)
        folder.touch()
    else:
        disk = request.getfixturevalue("small_disk")
        shutil.rmtree(folder)
        folder.symlink_to(disk)
        (disk / "file").write_bytes(bytes(2**16))
    settings.set(adapter="lora", lora_rank=32)
    assert is_shown(settings, "lora_rank") and settings.read().lora_rank == 32
    reason = "is no folder" if fault == "no folder" else "is full"
    assert "crimson" in settings._message.value and reason in settings._message.value
    assert settings._message.value.count("what was changed holds in this form, but is not kept: ") == 1
    settings.set(lora_rank="many")
    assert reason in settings._message.value and "lora_rank is &#x27;many&#x27;" in settings._message.value
    (folder.unlink if fault == "no folder" else (disk / "file").unlink)()
    settings.set(lora_rank=8)
    assert settings._message.value == "" and kept(workspace, "train")["lora_rank"] == "8"


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


@pytest.mark.skipif("IPYWIDGETS" not in os.environ, reason="any version will do")
def test_the_version_is_the_one_that_was_asked_for():
    assert ipywidgets.__version__ == os.environ["IPYWIDGETS"]


def test_advanced_settings_are_folded_away_until_asked_for(workspace):
    settings = form(ConvertConfig, workspace)
    ((more, folded),) = [
        pair for pair in zip(settings.children, settings.children[1:]) if pair[0] is settings._folds[0][0]
    ]
    assert more.description == "more settings" and folded.layout.display == "none"
    assert settings._rows["sha256"] in folded.children and settings._rows["source"] in settings.children
    more.value = True
    assert folded.layout.display is None


def test_the_form_of_training_has_its_groups_in_order_each_with_what_to_set_before_the_advanced(workspace):
    settings = form(TrainConfig, workspace)
    parts = list(every(settings))
    place = {name: parts.index(row) for name, row in settings._rows.items()}
    headings = [part for part in parts if isinstance(part, ipywidgets.HTML) and "<h3" in part.value]
    assert len(headings) == len(groups(TrainConfig)) == 8
    for heading, (title, fields) in zip(headings, groups(TrainConfig)):
        assert f">{title.capitalize()}</h3>" in heading.value
        names = [field.name for field in fields if field.name in place]
        names.sort(key=lambda name: bool(TrainConfig.__dataclass_fields__[name].metadata.get("advanced")))
        in_order = [parts.index(heading), *(place[name] for name in names)]
        assert in_order == sorted(in_order)
    assert [more.description for more, _ in settings._folds][:2] == ["more of method and prompts", "more of pictures"]


def test_a_value_out_of_its_range_is_said_beside_its_field_and_its_help_stays(workspace):
    settings = form(TrainConfig, workspace)
    help_alone = settings._notes["learning_rate"].value
    assert "peak learning rate" in help_alone and "span" not in help_alone
    settings.set(learning_rate="5", train_batch_size="two")
    beside = settings._notes["learning_rate"].value
    assert (
        beside.startswith(help_alone.removesuffix("</div>")) and "learning_rate is 5.0; it must be at most 1" in beside
    )
    assert "train_batch_size is &#x27;two&#x27;; write a whole number" in settings._notes["train_batch_size"].value
    assert "span" not in settings._notes["resolution"].value
    settings.set(learning_rate="5e-6")
    assert settings._notes["learning_rate"].value == help_alone


def test_settings_that_do_not_go_together_are_said_below_the_form(workspace):
    settings = form(TrainConfig, workspace)
    settings.set(instance_prompt="photo of zwx thing", use_txt_as_label=True)
    assert "instance_prompt and use_txt_as_label exclude each other" in settings._message.value


def test_a_setting_without_effect_is_hidden_and_left_out_and_keeps_its_value(workspace):
    settings = form(TrainConfig, workspace)
    settings.set(instance_prompt="photo of zwx thing", use_txt_as_label=False, with_prior_preservation=True)
    settings.set(class_prompt="photo of a thing", adapter="lora", lora_rank=8, loss_type="huber", huber_delta="0.2")
    dependent = ("class_prompt", "num_class_images", "lora_rank", "huber_delta")
    assert all(is_shown(settings, name) for name in dependent)
    settings.set(with_prior_preservation=False, adapter="none", loss_type="mse")
    assert not any(is_shown(settings, name) for name in dependent)
    read = settings.read()
    assert (read.class_prompt, read.lora_rank, read.huber_delta) == (None, 16, 0.1)
    again = form(TrainConfig, workspace)
    assert not any(is_shown(again, name) for name in dependent)
    again.set(with_prior_preservation=True, adapter="lora", loss_type="huber")
    assert all(is_shown(again, name) for name in dependent)
    read = again.read()
    assert (read.class_prompt, read.lora_rank, read.huber_delta) == ("photo of a thing", 8, 0.2)


def test_what_hangs_on_a_hidden_setting_is_hidden_too(workspace):
    settings = form(TrainConfig, workspace)
    settings.set(instance_prompt="", use_txt_as_label=True, tag_dropout="0.1", keep_tags=2)
    assert is_shown(settings, "keep_tags") and settings.read().keep_tags == 2
    settings.set(instance_prompt="photo of zwx thing", use_txt_as_label=False)
    assert not is_shown(settings, "tag_dropout") and not is_shown(settings, "keep_tags")
    assert settings.read().keep_tags == 1


def test_a_number_that_is_zero_is_off_however_it_is_written(workspace):
    settings = form(TrainConfig, workspace)
    settings.set(augment_rotation="0.00")
    assert not is_shown(settings, "augment_variants")
    settings.set(augment_rotation="2")
    assert is_shown(settings, "augment_variants")


def test_where_all_of_the_advanced_settings_are_hidden_there_is_nothing_to_unfold(workspace):
    settings = form(TrainConfig, workspace)
    (more,) = [more for more, names in settings._folds if "lora_alpha" in names]
    assert more.layout.display == "none"
    settings.set(adapter="lora")
    assert more.layout.display is None


def test_a_captioner_shows_its_own_settings_only(workspace):
    settings = form(CaptionConfig, workspace)
    own = {"tagger": "threshold", "blip": "num_beams"}
    for captioner in ("none", "tagger", "blip"):
        settings.set(captioner=captioner)
        assert [name for name in own if is_shown(settings, own[name])] == [captioner] * (captioner != "none")
        assert is_shown(settings, "existing") is (captioner != "none")


def test_under_the_form_of_training_stands_what_its_settings_come_to(workspace, capsys):
    settings = form(TrainConfig, workspace)
    settings.set(use_txt_as_label=False, instance_prompt="photo of zwx thing", max_train_steps=30, train_batch_size=2)
    settings.read()
    said = settings._summary.value
    assert "3 instance images; the first one&#x27;s prompt: photo of zwx thing" in said
    assert "30 steps x 2 images = 60 samples: each of 3 instance images is seen 20 times on average" in said
    assert "learning_rate 5e-06: that of diffusers for a subject" in said
    assert "it fits" in said and not said.endswith("…</p>")
    settings.set(max_train_steps=60)
    settings.read()
    assert "60 steps x 2 images = 120 samples" in settings._summary.value
    settings.set(max_train_steps="many")
    with pytest.raises(DbkitError):
        settings.read()
    assert settings._summary.value == ""
    assert capsys.readouterr() == ("", "")


def test_a_form_that_is_opened_again_has_the_summary_and_the_former_one_stays_usable(workspace):
    former, later = form(TrainConfig, workspace), form(TrainConfig, workspace)
    given = {"use_txt_as_label": False, "instance_prompt": "photo of zwx thing"}
    former.set(**given)
    later.set(**given, max_train_steps=20)
    later.read()
    assert "20 steps x " in later._summary.value and not later._summary.value.endswith("…</p>")
    assert "20 steps x " not in former._summary.value
    former.set(max_train_steps=30)
    former.read()
    assert "30 steps x " in former._summary.value and "30 steps x " not in later._summary.value


class Counted(io.StringIO):
    """An output that notes at each flush how many widgets were made since the last, and whether a summary is begun."""

    def __init__(self):
        super().__init__()
        self.made, self.notes = 0, []

    def flush(self):
        self.notes.append((self.made, any(thread.name == BACKGROUND for thread in threading.enumerate())))
        self.made = 0

    def count(self, widget):
        self.made += 1


def test_a_form_waits_until_its_widgets_are_sent_before_more_are_made_and_before_its_summary_begins(
    workspace, monkeypatch
):
    output = Counted()
    monkeypatch.setattr(sys, "stdout", output)
    ipywidgets.Widget.on_widget_constructed(output.count)
    settings = form(TrainConfig, workspace)
    ipywidgets.Widget.on_widget_constructed(None)
    monkeypatch.undo()
    made, begun = zip(*output.notes)
    # Each widget is a message; a kernel keeps 1000 and loses what is above.
    assert len(settings._inputs) < sum(made) < 650
    assert max(made) < 100 and output.made == 0
    assert not any(begun)


def test_other_forms_have_no_summary(workspace):
    settings = form(PrepareConfig, workspace)
    settings.read()
    assert settings._summary.value == ""


def test_a_field_that_is_not_there_is_named(workspace):
    with pytest.raises(DbkitError, match="there is no field 'colour' in this form"):
        form(PrepareConfig, workspace).set(colour="red")


def test_a_choice_that_a_field_does_not_have_is_said_and_one_under_another_name_is_taken(workspace):
    settings = form(TrainConfig, workspace)
    with pytest.raises(DbkitError, match=r"^mixed_precision is 'foo'; choose one of auto, no, fp16, bf16"):
        settings.set(mixed_precision="foo")
    with pytest.raises(DbkitError, match=r"^with_prior_preservation is 'perhaps'; write true or false"):
        settings.set(with_prior_preservation="perhaps")
    settings.set(mixed_precision=False, gradient_checkpointing="no", with_prior_preservation="off")
    boxes = [
        settings._inputs[name] for name in ("mixed_precision", "gradient_checkpointing", "with_prior_preservation")
    ]
    assert [box.value for box in boxes] == ["no", "off", False]


def test_what_was_written_by_hand_is_shown_as_the_settings_class_reads_it(workspace):
    workspace.settings_file("train").write_text("with_prior_preservation: 'no'\ntrain_text_encoder: 'true'\n")
    workspace.settings_file("preview").write_text("guidance_scale: 3\nprompt: a dog\n")
    inputs = form(TrainConfig, workspace)._inputs
    assert [inputs[name].value for name in ("with_prior_preservation", "train_text_encoder")] == [False, True]
    shown = form(PreviewConfig, workspace)
    assert shown._inputs["guidance_scale"].value == "3" and shown._inputs["prompt"].value == "a dog"


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
    assert first_line().startswith("The model here is dbkit's own small one, which needs no GPU")
    assert form(TrainConfig, workspace)._inputs["pretrained_model_name_or_path"].value == "tiny-sd"


def test_what_a_form_of_training_showed_when_it_was_changed_is_what_it_shows_again(workspace, monkeypatch):
    monkeypatch.setattr("dbkit.suggestions.choose_device", lambda name: torch.device("cpu"))
    things = workspace.path / "photos" / "things"
    away = things.rename(workspace.path / "away")
    first = form(TrainConfig, workspace)
    # The sample subject, which is suggested with all of its settings.
    assert first._inputs["with_prior_preservation"].value is True
    first.set(instance_prompt="photo of ohwx thing", class_prompt="photo of a thing")
    shown = {name: box.value for name, box in first._inputs.items()}
    away.rename(things)
    again = form(TrainConfig, workspace)
    assert {name: box.value for name, box in again._inputs.items()} == shown
    assert again.read() == first.read()
    # What came since is offered, once, and then is what stands there.
    assert "has something newer: instance_data_dir photos/things. Fill" in again.children[0].value
    again.set(instance_data_dir="photos/things")
    assert "newer" not in form(TrainConfig, workspace).children[0].value


def test_before_anything_is_changed_a_form_follows_the_workspace(workspace):
    assert form(TrainConfig, workspace)._inputs["instance_data_dir"].value == "photos/things"
    (workspace.path / "photos" / "things").rename(workspace.path / "photos" / "more")
    assert form(TrainConfig, workspace)._inputs["instance_data_dir"].value == "photos/more"
    form(PreviewConfig, workspace).set(num_inference_steps=3)
    assert kept(workspace, "preview") == {"num_inference_steps": "3"}


def test_an_empty_field_says_what_it_means(workspace):
    boxes = form(PreviewConfig, workspace)._inputs
    assert boxes["num_inference_steps"].placeholder == str(PreviewConfig.num_inference_steps)
    assert boxes["model"].placeholder == "required" and boxes["resolution"].placeholder == "empty"


def test_a_path_may_begin_with_the_name_of_the_workspace(workspace):
    settings = form(PrepareConfig, workspace)
    settings.set(source=f"{workspace.path.name}/photos/things", destination=f"{workspace.path.name}/datasets/new")
    read = settings.read()
    assert read.source == workspace.path / "photos" / "things"
    assert read.destination == workspace.path / "datasets" / "new"


def test_a_setting_that_a_message_names_is_found_though_it_is_folded_away(workspace):
    settings = form(TrainConfig, workspace)
    settings.set(instance_prompt="photo of zwx thing", use_8bit_adam=True, optimizer="lion")
    assert "optimizer is lion" in settings._message.value
    more = next(more for more, names in settings._folds if "optimizer" in names)
    assert f"Under <i>{more.description}</i>: optimizer" in settings._message.value
    more.value = True
    settings._check()
    assert "optimizer is lion" in settings._message.value and "Under" not in settings._message.value


def test_two_forms_of_one_file_keep_what_was_changed_in_either(workspace):
    one, other = form(PrepareConfig, workspace), form(PrepareConfig, workspace)
    one.set(resolution=96)
    other.set(framing="random")
    one.set(method="native")
    assert kept(workspace, "prepare") == {"resolution": "96", "framing": "random", "method": "native"}
    workspace.settings_file("prepare").write_text("of_a_later_version: 1\n", encoding="utf-8")
    form(PrepareConfig, workspace).set(resolution=128)
    assert kept(workspace, "prepare") == {"of_a_later_version": 1, "resolution": "128"}


def test_a_setting_that_the_summary_wants_changed_is_found_too(workspace):
    settings = form(TrainConfig, workspace)
    settings.set(instance_prompt="photo of zwx thing", use_txt_as_label=False)
    settings.read()
    assert "gradient_accumulation_steps" in settings._summary.value and "Under" not in settings._summary.value
    settings.set(use_aspect_ratio_bucket=True, bucket_min_side=128, bucket_max_side=64)
    settings.read()
    assert "to be changed" in settings._summary.value
    assert "Under <i>more of pictures</i>: bucket_max_side, bucket_min_side" in settings._summary.value


def test_a_choice_that_may_be_left_empty_offers_what_it_can_be(workspace):
    assert form(ConvertConfig, workspace, "export")._inputs["save_precision"].options == ("fp16", "bf16", "fp32")
