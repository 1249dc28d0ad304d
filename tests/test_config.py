"""The settings themselves: types, helps, the field's vocabulary, contradictions, sample files and the page of docs."""

import dataclasses
import importlib.util
import typing
from pathlib import Path

import pytest

from dbkit import ConvertConfig, DbkitError, PrepareConfig, PreviewConfig, TrainConfig
from dbkit.cli import main
from dbkit.config import COMMANDS
from dbkit.settings import coerce, field_type, groups, plain, to_yaml
from dbkit.workspace import open_workspace

ROOT = Path(__file__).parents[1]

# The parameters that people who come from the older scripts know.
TABLE = """
    pretrained_model_name_or_path revision tokenizer_name instance_data_dir class_data_dir instance_prompt class_prompt
    with_prior_preservation prior_loss_weight num_class_images output_dir seed resolution center_crop
    use_filename_as_label use_txt_as_label train_text_encoder train_batch_size sample_batch_size num_train_epochs
    max_train_steps gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler
    lr_warmup_steps use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub
    hub_token hub_model_id logging_dir log_with mixed_precision local_rank save_model_every_n_steps auto_test_model
    test_prompt test_prompts_file test_negative_prompt test_seed test_num_per_prompt
"""

# What a flag's value is where 1 would not do, and what it needs beside it.
FLAG_VALUES = {
    "pretrained_model_name_or_path": ["nowhere"],
    "class_data_dir": ["c", "--with_prior_preservation", "--class_prompt=dog"],
    "class_prompt": ["dog", "--with_prior_preservation"],
    "with_prior_preservation": ["--class_prompt=dog"],
    "num_class_images": ["2", "--with_prior_preservation", "--class_prompt=dog"],
    "use_filename_as_label": ["--instance_prompt="],
    "use_txt_as_label": ["--instance_prompt="],
    "resolution": ["512"],
    "lr_scheduler": ["cosine"],
    "lr_warmup_steps": ["1", "--lr_scheduler=linear"],
    "adam_beta1": ["0.5"],
    "adam_beta2": ["0.5"],
    "hub_token": ["hf_hush", "--push_to_hub"],
    "hub_model_id": ["owner/name", "--push_to_hub"],
    "log_with": ["wandb"],
    "logging_dir": ["logs", "--log_with", "tensorboard"],
    "mixed_precision": ["bf16"],
    "local_rank": ["-1"],
}


def made(**changes):
    values = {"pretrained_model_name_or_path": "owner/name", "instance_data_dir": "photos", "instance_prompt": "zwx"}
    return TrainConfig(**{**values, **changes})


def fields_where(holds):
    """The settings of every command for which holds(field, type) is true."""
    return [
        pytest.param(cls, field, id=f"{cls.__name__}.{field.name}")
        for cls in COMMANDS.values()
        for field in dataclasses.fields(cls)
        if holds(field, field_type(cls, field.name))
    ]


def is_number(field, kind):
    return {int, float} & {kind, *typing.get_args(kind)}


@pytest.mark.parametrize(("cls", "field"), fields_where(lambda field, _: field.default is not dataclasses.MISSING))
def test_each_default_has_its_declared_type(cls, field):
    value = coerce(field.default, field_type(cls, field.name))
    assert value == field.default
    assert type(value) is type(field.default)


@pytest.mark.parametrize(("cls", "field"), fields_where(lambda *_: True))
def test_each_setting_has_a_help_on_one_line(cls, field):
    assert len(field.metadata["help"].split()) >= 3
    assert "\n" not in field.metadata["help"]
    # An empty field of a form is auto's choice where auto is on.
    if field.metadata.get("auto"):
        assert "empty:" not in field.metadata["help"].replace("empty: auto's choice, without auto ", "")


@pytest.mark.parametrize(("cls", "field"), fields_where(is_number))
def test_each_number_has_a_lower_bound(cls, field):
    assert {"min", "above"} & set(field.metadata)


def test_scaled_up_a_low_rate_may_fall_by_a_polynomial():
    made(lr_scheduler="polynomial", learning_rate=1e-7, train_batch_size=2, scale_lr=True)


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, "adamw"),
        ({"use_8bit_adam": True}, "adamw8bit"),
        ({"use_8bit_adam": True, "optimizer": "adamw8bit"}, "adamw8bit"),
        ({"optimizer": "adafactor"}, "adafactor"),
    ],
)
def test_use_8bit_adam_means_adamw8bit(given, chosen):
    assert made(**given).chosen_optimizer == chosen


def test_the_defaults_are_accepted():
    assert made().max_train_steps is None


@pytest.mark.parametrize("name", TABLE.split())
def test_each_known_parameter_is_a_setting_of_training(name):
    assert name in {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("spelling", [lambda name: name, lambda name: name.replace("_", "-")], ids=["_", "-"])
@pytest.mark.parametrize("name", TABLE.split())
def test_each_known_parameter_is_a_flag(name, spelling, capsys):
    switch = field_type(TrainConfig, name) is bool
    rest = FLAG_VALUES.get(name, [] if switch else ["1"])
    arguments = ["train", "--pretrained_model_name_or_path", "nowhere", "--instance_data_dir", "photos"]
    arguments += ["--instance_prompt", "zwx", f"--{spelling(name)}", *rest]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    # The settings were taken; the first thing that is wrong is the model.
    assert said.startswith("dbkit: there is no model folder nowhere; ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"instance_prompt": None},
            "no prompt is given: set instance_prompt, or use_txt_as_label with a .txt file beside each image",
        ),
        (
            {"use_txt_as_label": True},
            "instance_prompt and use_txt_as_label exclude each other, since each image has one prompt; "
            "keep one of them",
        ),
        (
            {"tag_dropout": 0.1},
            "tag_dropout has no effect without use_txt_as_label or combine_prompt_from_txt; turn that on or leave "
            "tag_dropout out",
        ),
        (
            {"use_filename_as_label": True, "use_txt_as_label": True},
            "instance_prompt and use_txt_as_label and use_filename_as_label exclude each other, since each image has "
            "one prompt; keep one of them",
        ),
        (
            {"class_prompt": "photo of a dog"},
            "class_prompt has no effect without with_prior_preservation; turn that on or leave class_prompt out",
        ),
        (
            {"class_data_dir": "class"},
            "class_data_dir has no effect without with_prior_preservation; turn that on or leave class_data_dir out",
        ),
        (
            {"with_prior_preservation": True},
            "with_prior_preservation needs class_prompt, for instance: photo of a dog",
        ),
        (
            {"with_prior_preservation": True, "class_prompt": "zwx"},
            "class_prompt and instance_prompt are the same; put an identifier, a rare word, in instance_prompt only",
        ),
        (
            {"lr_warmup_steps": 10},
            "lr_scheduler constant has no warm-up; choose constant_with_warmup, or lr_warmup_steps 0",
        ),
        (
            {"lr_scheduler": "cosine", "lr_num_cycles": 3},
            "lr_num_cycles has no effect without lr_scheduler cosine_with_restarts; set lr_scheduler to "
            "cosine_with_restarts or leave lr_num_cycles out",
        ),
        (
            {"lr_scheduler": "polynomial", "learning_rate": 1e-7},
            "lr_scheduler polynomial falls to 1e-07, and learning_rate 1e-07 is not above that; raise learning_rate or "
            "choose linear",
        ),
        (
            {"lr_scheduler": "cosine_with_hard_restarts"},
            "lr_scheduler is 'cosine_with_hard_restarts'; choose one of constant, constant_with_warmup, linear, "
            "cosine, cosine_with_restarts, polynomial; did you mean 'cosine_with_restarts'?",
        ),
        (
            {"use_8bit_adam": True, "optimizer": "lion"},
            "use_8bit_adam means adamw8bit, and optimizer is lion; leave one of them out",
        ),
        (
            {"optimizer": "adafactor", "adam_beta2": 0.9},
            "adam_beta2 has no effect with optimizer adafactor; leave it out",
        ),
        (
            {"optimizer": "lion", "adam_epsilon": 1e-6},
            "adam_epsilon has no effect with optimizer lion; leave it out",
        ),
        (
            {"optimizer": "prodigy"},
            "optimizer prodigy multiplies the rate that it finds by learning_rate, and 5e-06 would learn nothing; set "
            "learning_rate to 1",
        ),
        (
            {
                "optimizer": "prodigy",
                "learning_rate": 1,
                "train_text_encoder": True,
                "text_encoder_learning_rate": 0.5,
            },
            "optimizer prodigy finds one rate for all parts; leave text_encoder_learning_rate out",
        ),
        ({"output_dir": "photos"}, "output_dir photos holds instance_data_dir photos; choose another output_dir"),
        (
            {"output_dir": "class", "class_data_dir": "class", "with_prior_preservation": True, "class_prompt": "dog"},
            "output_dir class holds class_data_dir class; choose another output_dir",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, sentence):
    with pytest.raises(DbkitError) as caught:
        made(**changes)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "changes",
    [
        {"instance_prompt": None, "use_txt_as_label": True},
        {"instance_prompt": "", "use_filename_as_label": True},
        {"with_prior_preservation": True, "class_prompt": "dog", "class_data_dir": "class"},
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 10},
        {"output_dir": "run"},
    ],
)
def test_settings_that_go_together_are_accepted(changes):
    assert made(**changes)


@pytest.mark.parametrize(("cls", "field"), fields_where(lambda field, _: "needs" in field.metadata))
def test_what_a_setting_needs_stands_before_it_and_can_have_that_value(cls, field):
    names = [field.name for field in dataclasses.fields(cls)]
    for needed in field.metadata["needs"].split("|"):
        name, _, value = needed.partition("=")
        assert name in names[: names.index(field.name)]
        assert not value or value in typing.get_args(field_type(cls, name))


def test_the_settings_of_training_stand_in_groups_with_what_most_set_in_the_first_ones():
    found = groups(TrainConfig)
    assert [field for _, fields in found for field in fields] == list(dataclasses.fields(TrainConfig))
    assert [title for title, _ in found] == [
        "model and data",
        "method and prompts",
        "pictures",
        "what is trained",
        "steps, loss and rate",
        "memory and speed",
        "saving and previews",
        "parts, logs and upload",
    ]
    assert [title for title, fields in found if all(field.metadata.get("advanced") for field in fields)] == [
        found[-1][0]
    ]
    ((title, fields),) = groups(ConvertConfig)
    assert title == "" and fields == list(dataclasses.fields(ConvertConfig))


NEEDING = {
    field.name: field
    for field in dataclasses.fields(TrainConfig)
    if "needs" in field.metadata and not field.metadata.get("idle")
}


@pytest.mark.parametrize("name", NEEDING)
def test_a_setting_that_would_have_no_effect_is_refused_and_what_it_needs_is_there(name):
    field = NEEDING[name]
    kind = field_type(TrainConfig, name)
    kind = kind if typing.get_origin(kind) is typing.Literal else (typing.get_args(kind) or (kind,))[0]
    values = {float: 0.3, int: 64, str: "{PROMPT} {TXT_PROMPT}", Path: Path("elsewhere"), bool: not field.default}
    other = values[kind] if kind in values else typing.get_args(kind)[-1]
    first, *more = field.metadata["needs"].split("|")
    needed, _, value = first.partition("=")
    needed_field = next(field for field in dataclasses.fields(TrainConfig) if field.name == needed)
    with pytest.raises(DbkitError) as caught:
        made(**{name: other})
    words = f"{needed} {value}".strip() + "".join(f"{' or ' if n == more[-1] else ', '}{n}" for n in more)
    way = f"set {needed} to {value}" if value else "turn that on"
    assert f"{name} has no effect without {words}; {way} or leave {name} out" in str(caught.value)
    others = {"class_prompt": "photo of a dog"} if needed == "with_prior_preservation" else {}
    others |= (
        {"instance_prompt": None, "use_txt_as_label": True} if needed in ("shuffle_tags", "use_txt_as_label") else {}
    )
    choice = value or {bool: True, float: 0.1}.get(type(needed_field.default), "tensorboard")
    assert made(**{**others, needed: choice, name: other})


@pytest.mark.parametrize("stop", [2.5, 100.01])
def test_a_text_encoder_rests_after_a_whole_step_or_a_part_of_all(stop):
    with pytest.raises(DbkitError, match=f"stop_text_encoder_training is {stop}; write a whole step, or a part of all"):
        made(train_text_encoder=True, stop_text_encoder_training=stop)
    for fine in (0.5, 1, 200):
        assert made(train_text_encoder=True, stop_text_encoder_training=fine)


def test_all_contradictions_are_named_at_once():
    with pytest.raises(DbkitError) as caught:
        made(instance_prompt=None, class_prompt="dog", lr_warmup_steps=3, hub_private=False, output_dir="photos")
    said = str(caught.value).splitlines()
    assert said[0] == "5 settings need a change:"
    for part in ("hub_private", "no prompt", "class_prompt", "warm-up", "output_dir"):
        assert sum(part in line for line in said[1:]) == 1


def test_a_preview_needs_a_prompt():
    with pytest.raises(DbkitError, match=r"^prompt is missing: say what the pictures should show$"):
        PreviewConfig("model")
    assert PreviewConfig("model", prompts_file="prompts.txt").prompt == ()


def test_a_preview_needs_a_guidance_scale():
    with pytest.raises(DbkitError, match=r"^guidance_scale is empty; give at least one value$"):
        PreviewConfig("model", prompt="zwx", guidance_scale=())


def test_the_number_that_yaml_reads_as_text_becomes_the_learning_rate(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("learning_rate: 2e-6\ninstance_data_dir: photos\ninstance_prompt: zwx\n")
    assert TrainConfig.load(path, pretrained_model_name_or_path="owner/name").learning_rate == 2e-6


def test_saved_training_settings_load_as_the_same_settings(tmp_path):
    config = made(learning_rate=1e-7, output_dir=tmp_path / "run", test_prompt="犬: zwx", save_model_every_n_steps=None)
    assert TrainConfig.load(config.save(tmp_path / "train.yaml")) == config


def test_the_token_is_never_saved_nor_said():
    config = made(push_to_hub=True, hub_token="hf_hush", hub_model_id="owner/name")
    assert "hub_model_id" in plain(config)
    assert "hub_token" not in plain(config)
    assert "hub_token" not in to_yaml(config)
    assert "hf_hush" not in repr(config) and "hub_model_id='owner/name'" in repr(config)
    with pytest.raises(DbkitError) as caught:
        made(hub_token="hf_hush")
    assert "hf_hush" not in str(caught.value)


def test_every_sample_file_is_a_training_that_names_sample_pictures():
    paths = sorted((ROOT / "data_templates").rglob("*.yaml"))
    assert {path.stem for path in paths} == {f"train_{kind}" for kind in ("person", "object", "animal", "style")}
    for path in paths:
        config = TrainConfig.load(path, pretrained_model_name_or_path="owner/name")
        # No photographs of people come with dbkit.
        assert (ROOT / config.instance_data_dir).is_dir() or path.name == "train_person.yaml"


@pytest.fixture
def page():
    """docs/settings_page.py as a module."""
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "docs" / "settings_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_settings_is_up_to_date(page):
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page.settings_page(), "run: make docs"


def test_the_page_names_a_test_for_each_known_parameter_and_it_is_there(page):
    assert page.SCRIPTS.keys() == set(TABLE.split())
    for test in page.SCRIPTS.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_choices_may_stand_in_one_text():
    config = PrepareConfig("in", "out", leave_out="blurred, near-duplicate")
    assert config.leave_out == PrepareConfig("in", "out", leave_out=["blurred", "near-duplicate"]).leave_out
    with pytest.raises(DbkitError, match=r"leave_out is 'blured'; choose one of .*; did you mean 'blurred'"):
        PrepareConfig("in", "out", leave_out="blured,text")


@pytest.mark.parametrize("text", ["a\0b", "a\ud83d"])
def test_a_path_with_characters_that_no_file_has_is_refused(text):
    with pytest.raises(DbkitError, match="characters that no file's name has; type it again"):
        TrainConfig("model", text, instance_prompt="zwx")


def test_a_name_longer_than_a_file_may_have_is_one_of_the_hub():
    name = "x" * 5000
    config = TrainConfig(name, "photos", instance_prompt="zwx", pretrained_vae_name_or_path=name, revision="main")
    assert open_workspace().anchor(config).pretrained_model_name_or_path == name
