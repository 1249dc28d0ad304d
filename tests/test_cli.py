"""The command line: one sentence for a mistake, flags in both spellings, flags on top of a file."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

import dbkit
from dbkit.cli import main
from dbkit.config import COMMANDS


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused; returns the sentence."""

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("dbkit: ")
        assert "Traceback" not in said.err
        return said.err.removeprefix("dbkit: ").rstrip("\n")

    return run


def size_of(path):
    with Image.open(path) as image:
        return image.size


def captions(folder):
    return [image["caption"] for image in json.loads((folder / "report.json").read_text())["images"]]


def test_a_command_that_is_done_says_what_it_made_and_returns_0(photos, tmp_path, capsys):
    assert main(["prepare", str(photos), str(tmp_path / "out"), "--resolution", "32"]) == 0
    said = capsys.readouterr()
    assert "3 images, 3 captions, 0 refused, " in said.out and str(tmp_path / "out") in said.out
    assert said.err == ""
    assert size_of(tmp_path / "out" / "teal.png") == (32, 32)


def test_a_mistake_is_one_sentence_without_a_traceback_and_status_2(tmp_path):
    command = [sys.executable, "-m", "dbkit", "prepare", tmp_path / "gone", tmp_path / "data" / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"dbkit: there is no folder or .zip {tmp_path / 'gone'}; check the path\n"
    assert not (tmp_path / "data").exists()  # not even the lock


def test_being_stopped_is_status_130(photos, tmp_path, capsys, monkeypatch):
    class Stopped:
        def write(self, text):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", Stopped())
    assert main(["prepare", str(photos), str(tmp_path / "out"), "--resolution=32"]) == 130
    assert capsys.readouterr().err == "dbkit: stopped\n"


@pytest.mark.parametrize("arguments", [["--help"], ["prepare", "photos", "out", "--resolution", "32"]])
def test_a_pipe_whose_reader_has_gone_ends_the_command_without_a_word(photos, tmp_path, arguments):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "dbkit", *arguments]
    # Buffered, as it is by default: what is short is written at the end.
    env = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, cwd=photos.parent, env=env, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_programmers_mistake_keeps_its_traceback(photos, tmp_path, monkeypatch):
    class Broken:
        def write(self, text):
            raise ZeroDivisionError

    monkeypatch.setattr(sys, "stdout", Broken())
    with pytest.raises(ZeroDivisionError):
        main(["prepare", str(photos), str(tmp_path / "out"), "--resolution=32"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["train", "--learnin_rate", "1e-6"],
            "--learnin_rate is not known to dbkit train; did you mean 'learning_rate'?",
        ),
        (
            ["train", "--learnin-rate=1e-6"],
            "--learnin-rate is not known to dbkit train; did you mean 'learning_rate'?",
        ),
        (
            ["train", "--no-centre_crop"],
            "--no-centre_crop is not known to dbkit train; did you mean 'center_crop'?",
        ),
        (
            ["prepare", "--resolutio", "64", "photos", "out"],
            "--resolutio is not known to dbkit prepare; did you mean 'resolution'?",
        ),
        (
            ["train", "tiny-sd", "--seed", "1"],
            "tiny-sd is not known to dbkit train; if that is the model, write --pretrained_model_name_or_path tiny-sd",
        ),
        (
            ["train", "photos", "--pretrained_model_name_or_path", "tiny-sd"],
            "photos is not known to dbkit train; dbkit train --help lists what is",
        ),
        (["demo", "--zzzzz"], "--zzzzz is not known to dbkit demo; dbkit demo --help lists what is"),
        (["prepare", "a", "b", "c"], "c is not known to dbkit prepare; dbkit prepare --help lists what is"),
    ],
)
def test_an_unknown_argument_is_refused_with_the_nearest_name(refused, arguments, sentence):
    assert refused(*arguments) == sentence


def test_a_shortened_flag_is_not_guessed(refused):
    assert refused("train", "--learning", "1e-6") == (
        "--learning is not known to dbkit train; did you mean 'learning_rate'?"
    )


def test_an_unknown_command_is_refused_with_the_ones_there_are(refused):
    for wrong, hint in (("trian", "did you mean 'train'?"), ("zzz", "dbkit --help lists what there is")):
        assert refused(wrong) == f"{wrong!r} is none of dbkit's commands, {', '.join(COMMANDS)}; {hint}"


def test_a_secret_is_taken_out_of_the_arguments_that_others_may_write_down(monkeypatch, capsys):
    secret = ["--hub_token", "hf_hush", "--hub-token=hf_hush"]
    given = ["train", "--pretrained_model_name_or_path=nowhere", "--instance_data_dir=photos", "--instance_prompt=zwx"]
    monkeypatch.setattr(sys, "argv", ["dbkit", *given, "--push_to_hub", *secret])
    assert main() == 2
    assert sys.argv == ["dbkit", *given, "--push_to_hub", "--hub_token", "***", "--hub-token=***"]
    assert "hf_hush" not in capsys.readouterr().err


def test_no_command_is_refused(refused):
    assert refused() == "the following arguments are required: COMMAND; dbkit --help lists what there is"


def test_a_flag_without_its_value_is_refused(refused):
    assert refused("train", "--seed").endswith("expected one argument; dbkit train --help lists what there is")


@pytest.mark.parametrize(("command", "cls"), [(name, cls) for name, cls in COMMANDS.items() if name != "demo"])
def test_all_required_settings_that_are_missing_are_named(refused, command, cls):
    required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
    sentence = refused(command)
    assert [name for name in required if f"{name} is missing; give it a value" in sentence] == required


def test_all_wrong_values_are_named_at_once(refused):
    sentence = refused("prepare", "a", "b", "--resolution", "4", "--seed", "x", "--head_crops")
    assert sentence.splitlines() == [
        "2 settings need a change:",
        "  - resolution is 4; it must be at least 8",
        "  - seed is 'x'; write a whole number",
    ]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [0, 2, 1]])
def test_flags_may_stand_before_between_and_after_the_paths(photos, tmp_path, order):
    parts = [[str(photos)], [str(tmp_path / "out")], ["--resolution", "32"]]
    assert main(["prepare", *(word for place in order for word in parts[place])]) == 0
    assert size_of(tmp_path / "out" / "teal.png") == (32, 32)


@pytest.mark.parametrize("flag", ["--no-use_txt_as_label", "--no-use-txt-as-label"])
def test_a_switch_is_turned_off_in_both_spellings(refused, photos, tmp_path, flag):
    (tmp_path / "train.yaml").write_text(f"use_txt_as_label: true\ninstance_data_dir: {photos}\n")
    common = ["train", "--config", str(tmp_path / "train.yaml"), "--pretrained_model_name_or_path", str(tmp_path)]
    # On, there are prompts, and the model is looked at; off, there are none.
    assert "is not a model folder" in refused(*common)
    assert refused(*common, flag).startswith("no prompt is given")


@pytest.mark.parametrize(
    "given", [["--use_txt_as_label", "off"], ["--use-txt-as-label=False"], ["--use_txt_as_label=0"]]
)
def test_a_switch_takes_the_words_of_a_settings_file(refused, photos, tmp_path, given):
    (tmp_path / "train.yaml").write_text(f"use_txt_as_label: true\ninstance_data_dir: {photos}\n")
    common = ["train", "--config", str(tmp_path / "train.yaml"), "--pretrained_model_name_or_path", str(tmp_path)]
    assert refused(*common, *given).startswith("no prompt is given")
    assert "is not a model folder" in refused(*common, *given, "--use_txt_as_label", "ON")


def test_what_follows_a_switch_and_is_no_value_of_it_is_left_alone(refused, photos, tmp_path):
    assert refused("train", "--use_ema", "offf").startswith("offf is not known to dbkit train")
    sentence = refused("train", "--use_ema=offf")
    assert "--use_ema" in sentence and "--no-use_ema" in sentence and "'offf'" in sentence
    # A path is not taken for the value.
    assert main(["prepare", "--no-look_for_text", str(photos), str(tmp_path / "out"), "--resolution", "32"]) == 0


@pytest.mark.parametrize("flag", ["--default_caption", "--default-caption"])
def test_a_flag_is_taken_in_both_spellings(photos, tmp_path, flag):
    for path in photos.glob("*.txt"):
        path.unlink()
    assert main(["prepare", str(photos), str(tmp_path / "out"), flag, "photo of 100 % zwx"]) == 0
    assert captions(tmp_path / "out") == ["photo of 100 % zwx"] * 3


def test_flags_win_over_the_settings_file(photos, tmp_path):
    for path in photos.glob("*.txt"):
        path.unlink()
    path = tmp_path / "prepare.yaml"
    path.write_text(f"source: {photos}\ndestination: {tmp_path / 'a'}\nresolution: 64\ndefault_caption: zwx\n")
    assert main(["prepare", "--config", str(path)]) == 0
    assert main(["prepare", "--config", str(path), "--resolution", "32", str(photos), str(tmp_path / "b")]) == 0
    assert (size_of(tmp_path / "a" / "teal.png"), size_of(tmp_path / "b" / "teal.png")) == ((64, 64), (32, 32))
    assert captions(tmp_path / "a") == captions(tmp_path / "b") == ["zwx"] * 3


def test_a_mistake_in_the_settings_file_is_a_sentence_with_the_files_name(refused, tmp_path):
    path = tmp_path / "prepare.yaml"
    path.write_text("source: photos\ndestination: out\nresolutoin: 64\n")
    sentence = f"there is no setting 'resolutoin' in {path}; did you mean 'resolution'?"
    assert refused("prepare", "--config", path) == sentence
    assert refused("prepare", "--config", tmp_path / "gone.yaml").startswith("there is no settings file")


def test_a_setting_of_several_values_takes_its_flag_several_times(refused):
    # The value that is out of bounds is found in either place.
    for first, second in (("0", "7"), ("7", "0")):
        flags = ["--guidance_scale", first, "--guidance-scale", second]
        assert refused("preview", "model", "--prompt", "a", *flags) == "guidance_scale is 0.0; it must be at least 1"


def shown(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("command", "cls"), COMMANDS.items())
def test_help_lists_every_setting_in_both_spellings(capsys, command, cls):
    text = shown(capsys, command, "--help")
    assert "SUPPRESS" not in text
    for field in dataclasses.fields(cls):
        if field.metadata.get("positional"):
            assert field.name.upper() in text
        else:
            assert f"--{field.name}" in text
            assert f"--{field.name.replace('_', '-')}" in text


def test_help_says_the_default(capsys):
    text = " ".join(shown(capsys, "train", "--help").split())
    assert "peak learning rate (default: 5e-06)" in text


def test_help_of_a_command_with_many_settings_has_them_in_groups(capsys):
    _, memory = shown(capsys, "train", "--help").split("\nmemory and speed:\n")
    assert "--use_8bit_adam" in memory.partition("\nsaving and previews:\n")[0]


def test_help_of_dbkit_lists_the_commands_and_version_says_the_version(capsys):
    text = shown(capsys, "--help")
    assert all(command in text for command in COMMANDS)
    assert shown(capsys, "--version") == f"dbkit {dbkit.__version__}\n"


def test_a_destination_that_cannot_be_written_is_a_sentence(photos, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    assert main(["prepare", str(photos), str(tmp_path / "file" / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dbkit: ") and "choose another name" in error and error.count("\n") == 1
