"""A run goes on only from a state that is its own."""

import dataclasses
import json
import shutil

import pytest
from conftest import draw_photo
from test_train import assert_same_run, log_of, stop_in_pass

from dbkit import DbkitError, TrainConfig, train
from dbkit.checkpoint import manifest_text
from dbkit.resume import identity_of, newest_state
from dbkit.settings import replace


def test_a_new_run_has_no_state(tmp_path):
    assert newest_state(tmp_path / "run") is None


def test_a_finished_model_without_its_state_is_not_replaced(config):
    model = train(config)
    shutil.rmtree(config.output_dir / "resume")
    before = (model / "manifest.json").read_bytes()
    with pytest.raises(DbkitError, match="holds a finished model and no state to go on from"):
        train(config, max_train_steps=3)
    assert (model / "manifest.json").read_bytes() == before


def test_a_run_goes_on_beside_another_that_asked_for_more_of_the_same_class_images(settings, tmp_path):
    prior = {**settings, "with_prior_preservation": True, "class_prompt": "photo of a thing", "num_class_images": 1}
    train(**prior)
    train(**{**prior, "num_class_images": 2, "output_dir": tmp_path / "other"})
    assert train(**{**prior, "max_train_steps": 3}) == settings["output_dir"] / "model"


def test_a_setting_that_is_newer_than_the_state_is_as_if_it_had_its_default(config):
    train(config)
    (path,) = config.output_dir.glob("resume/*/manifest.json")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["facts"]["settings"]["use_ema"]
    path.write_text(manifest_text(manifest["step"], manifest["facts"], manifest["files"]), encoding="utf-8")
    with pytest.raises(DbkitError, match="do not continue: use_ema was False and is True"):
        train(config, max_train_steps=3, use_ema=True)
    train(config, max_train_steps=3)


def test_a_folder_of_pictures_is_not_taken_for_a_run(settings, photos, tmp_path):
    own = shutil.copytree(photos, tmp_path / "own")
    with pytest.raises(DbkitError, match="is a folder of pictures and no run; choose another output_dir"):
        train(**{**settings, "output_dir": own})


def test_both_names_of_8bit_adam_are_one_identity_and_its_libraries_are_two(config):
    old, new = replace(config, use_8bit_adam=True), replace(config, optimizer="adamw8bit")
    assert identity_of(old, "torchao", []) == identity_of(new, "torchao", [])
    assert identity_of(new, "torchao", []) != identity_of(new, "bitsandbytes", [])
    assert identity_of(new, "torchao", []) != identity_of(config, "torchao", [])


def test_starting_over_leaves_a_folder_that_is_no_run_where_it_is(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.doc").touch()
    train(**settings, start_over=True)
    assert (tmp_path / "run" / "thesis.doc").exists()


@pytest.fixture
def begun_over(config, smaller_model):
    """Settings of four steps with start_over on, for a folder that holds an older run."""
    config = replace(config, pretrained_model_name_or_path=str(smaller_model), log_interval=1)
    train(config)
    return replace(config, max_train_steps=4, learning_rate=1e-3, start_over=True)


def asides(config):
    """How many runs were moved aside."""
    return len(list(config.output_dir.parent.glob("run-*")))


def test_a_run_that_start_over_began_goes_on_with_the_same_settings_to_the_same_weights(begun_over, tmp_path, capsys):
    straight = train(begun_over, output_dir=tmp_path / "straight")
    stop_in_pass(begun_over, 2, step=2)
    capsys.readouterr()
    train(begun_over)
    said = capsys.readouterr().out
    assert "start_over was done already for this run, which goes on; to begin at step 0 again, choose another" in said
    assert "continuing after step 2" in said and asides(begun_over) == 1
    assert_same_run(straight.parent, begun_over.output_dir)
    # Finished, it is not begun again either, and it is trained further as any other run is.
    train(begun_over)
    assert "start_over was done already" in capsys.readouterr().out and asides(begun_over) == 1
    train(begun_over, max_train_steps=5, start_over=False)
    train(begun_over, max_train_steps=6)
    assert [line["step"] for line in log_of(begun_over.output_dir)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"learning_rate": 1e-4}, {"instance_data_dir": "other"}], ids=lambda changes: str(changes)
)
def test_start_over_with_other_settings_or_pictures_moves_a_run_aside_that_it_began(begun_over, tmp_path, changes):
    draw_photo(tmp_path / "other" / "one.png", colour="navy")
    stop_in_pass(begun_over, 2, step=2)
    changes = {name: tmp_path / value if value == "other" else value for name, value in changes.items()}
    train(begun_over, **changes)
    assert asides(begun_over) == 2 and [line["step"] for line in log_of(begun_over.output_dir)] == [1, 2, 3, 4]


def test_start_over_moves_a_run_aside_that_it_began_where_the_pictures_changed_or_no_state_is_whole(begun_over, photos):
    stop_in_pass(begun_over, 2, step=2)
    draw_photo(photos / "teal.png", colour="navy")
    stop_in_pass(begun_over, 2, step=2)
    assert asides(begun_over) == 2
    (state,) = (begun_over.output_dir / "resume").iterdir()
    (state / "unet.safetensors").write_bytes(b"torn")
    train(begun_over)
    assert asides(begun_over) == 3 and [line["step"] for line in log_of(begun_over.output_dir)] == [1, 2, 3, 4]


def test_a_run_that_was_given_other_settings_since_start_over_began_it_is_moved_aside(begun_over):
    stop_in_pass(begun_over, 2, step=2)
    stop_in_pass(begun_over, 1, step=3, start_over=False, learning_rate=1e-4)
    # Of the same settings it is not the run that start_over would give.
    train(begun_over, learning_rate=1e-4)
    assert asides(begun_over) == 2


def test_a_run_that_start_over_began_goes_on_on_another_machine(begun_over, tmp_path, capsys):
    straight = train(begun_over, output_dir=tmp_path / "straight")
    begun_over = replace(begun_over, local_dir=tmp_path / "one")
    stop_in_pass(begun_over, 2, step=2)
    capsys.readouterr()
    train(begun_over, local_dir=tmp_path / "two")
    assert "start_over was done already" in capsys.readouterr().out and asides(begun_over) == 1
    assert_same_run(straight.parent, begun_over.output_dir)
    # The first machine has an older state of the same run.
    train(begun_over)
    assert "4 steps done already" in capsys.readouterr().out and asides(begun_over) == 1


def test_what_auto_chose_for_a_run_that_start_over_began_is_kept(begun_over, capsys):
    given = dataclasses.asdict(begun_over)
    for name in ("learning_rate", "train_batch_size", "num_class_images", "memory", "use_8bit_adam"):
        del given[name]
    automatic = TrainConfig(**{**given, "auto": True})
    stop_in_pass(automatic, 2, step=2)
    capsys.readouterr()
    train(automatic)
    said = capsys.readouterr().out
    assert "goes on with" in said and "continuing after step 2" in said and asides(begun_over) == 1
